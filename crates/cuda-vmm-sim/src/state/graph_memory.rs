//! The memory of graphs: addresses of their allocations, and what a device reserves for them.
//!
//! The addresses of an allocation stay for the life of its graph. They have memory from a launch
//! until the device's reserve is trimmed. Whether an allocation is there is known twice: to calls,
//! by the launches and frees that were enqueued, and to work, by those that have run.

use super::DriverResult;
use super::address_space::{Access, AddressSpace, Kind, Range, out_of_memory};
use super::graph_range::GraphRange;
use super::streams::{Point, Streams};
use crate::host_memory::{HostFile, Protection};
use cuda_vmm_sys::*;
use std::collections::HashMap;

impl AddressSpace {
    /// Adds addresses for an allocation of a capture, without memory.
    pub(crate) fn add_graph(&mut self, bytes: usize, capture: u64) -> DriverResult<u64> {
        let (address, host) = self.new_addresses(bytes, self.granularity_bytes(), 0)?;
        let kind = Kind::Graph(GraphRange {
            capture,
            is_allocated: false,
            is_freed_inside: false,
            host,
        });
        self.insert(address, bytes, 0, Access::default(), kind);
        Ok(address)
    }

    /// Returns the allocation node of an address.
    pub(crate) fn graph(&mut self, address: u64) -> DriverResult<&mut GraphRange> {
        match self.ranges.get_mut(&address).map(|range| &mut range.kind) {
            Some(Kind::Graph(graph)) => Ok(graph),
            _ => Err(CUDA_ERROR_INVALID_VALUE),
        }
    }

    /// Returns the same if it is allocated.
    pub(crate) fn allocated_graph(&mut self, address: u64) -> DriverResult<&mut GraphRange> {
        let graph = self.graph(address)?;
        match graph.is_allocated {
            true => Ok(graph),
            false => Err(CUDA_ERROR_INVALID_VALUE),
        }
    }

    /// Returns the size of an allocation of a graph that is allocated, and otherwise 0.
    pub(crate) fn allocated_graph_bytes(&self, address: u64) -> usize {
        let range = self.ranges.get(&address);
        let allocated =
            |range: &&Range| matches!(&range.kind, Kind::Graph(graph) if graph.is_allocated);
        range.filter(allocated).map_or(0, |range| range.bytes)
    }

    /// Lets work that runs from now on use an allocation of a graph, or no more.
    pub(crate) fn open_graph(&mut self, address: u64, open: bool) {
        if let Some(range) = self.ranges.get_mut(&address)
            && matches!(range.kind, Kind::Graph(_))
        {
            range.access = if open { Access::ALL } else { Access::default() };
        }
    }

    /// Puts memory behind the addresses of an allocation.
    pub(crate) fn back_graph(
        &mut self,
        address: u64,
        handle: u64,
        storage: Option<(&HostFile, u64)>,
    ) -> DriverResult {
        let Some(range) = self.ranges.get_mut(&address) else {
            return Err(CUDA_ERROR_INVALID_VALUE);
        };
        if let Kind::Graph(graph) = &range.kind
            && let (Some(host), Some((file, offset))) = (&graph.host, storage)
        {
            host.map(0, range.bytes, file, offset)
                .and_then(|()| host.protect(0, range.bytes, Protection::ReadWrite))
                .map_err(out_of_memory)?;
        }
        range.handle = handle;
        Ok(())
    }

    /// Takes the memory away again and returns its handle.
    pub(crate) fn unback_graph(&mut self, address: u64) -> Option<u64> {
        let range = self.ranges.get_mut(&address)?;
        if let Kind::Graph(graph) = &range.kind
            && let Some(host) = &graph.host
        {
            // If this fails, the addresses keep the memory.
            host.clear(0, range.bytes).ok()?;
        }
        Some(std::mem::take(&mut range.handle)).filter(|&handle| handle != 0)
    }

    /// Removes the addresses of an allocation.
    pub(crate) fn remove_graph(&mut self, address: u64) {
        if self.graph(address).is_ok() {
            self.ranges.remove(&address);
        }
    }
}

/// The allocations of one capture, which its graph and executable graphs share.
#[derive(Debug)]
pub(crate) struct Allocations {
    pub(crate) device: usize,
    pub(crate) addresses: Vec<u64>,
    /// The most bytes that were allocated on the device during the latest launch. 0 if the reserve
    /// was trimmed since.
    pub(crate) most_bytes: usize,
    /// The latest launch, and frees that were enqueued outside of launches.
    points: Vec<Point>,
}

/// What a device reserves for the allocations of graphs.
#[derive(Debug, Default)]
pub(crate) struct Reserve {
    pub(crate) bytes: usize,
    /// What launches that failed for lack of memory had taken. No launch gets it, and trimming does
    /// not give it back.
    pub(crate) lost_bytes: usize,
    /// The most that both were together.
    pub(crate) bytes_max: usize,
    pub(crate) used_bytes_max: usize,
}

impl Reserve {
    pub(crate) fn all_bytes(&self) -> usize {
        self.bytes + self.lost_bytes
    }
}

/// The memory of all graphs.
#[derive(Debug)]
pub(crate) struct GraphMemory {
    pub(crate) reserves: Vec<Reserve>,
    /// By the number of the capture.
    pub(crate) by_capture: HashMap<u64, Allocations>,
}

impl GraphMemory {
    pub(crate) fn new(devices: usize) -> Self {
        Self {
            reserves: (0..devices).map(|_| Reserve::default()).collect(),
            by_capture: HashMap::new(),
        }
    }

    /// Notes a new allocation of a capture.
    pub(crate) fn add(&mut self, device: usize, capture: u64, address: u64) {
        let new = || Allocations {
            device,
            addresses: Vec::new(),
            most_bytes: 0,
            points: Vec::new(),
        };
        let allocations = self.by_capture.entry(capture).or_insert_with(new);
        allocations.addresses.push(address);
    }

    /// Returns all captures with allocations on a device.
    pub(crate) fn of_device(&self, device: usize) -> impl Iterator<Item = (u64, &Allocations)> {
        let all = self.by_capture.iter().map(|(&capture, all)| (capture, all));
        all.filter(move |(_, allocations)| allocations.device == device)
    }

    /// Returns the work that may use the allocations of a capture.
    pub(crate) fn points(&self, capture: u64) -> &[Point] {
        let allocations = self.by_capture.get(&capture);
        allocations.map_or(&[], |allocations| &allocations.points)
    }

    /// Notes the end of a launch, which runs behind all that was noted before.
    pub(crate) fn set_point(&mut self, capture: u64, point: Point) {
        if let Some(allocations) = self.by_capture.get_mut(&capture) {
            allocations.points = vec![point];
        }
    }

    /// Notes a free outside of launches.
    pub(crate) fn add_point(&mut self, capture: u64, point: Point) {
        if let Some(allocations) = self.by_capture.get_mut(&capture) {
            allocations.points.push(point);
        }
    }

    /// Returns whether no enqueued work uses the allocations of a capture.
    pub(crate) fn is_idle(&self, capture: u64, streams: &Streams) -> bool {
        streams.are_done(self.points(capture))
    }
}
