//! The calls for the memory of graphs: allocations and frees that are captured, their launches, and
//! the reserve.

use crate::memory::whole_pages;
use crate::state::graphs::{Graph, Node};
use crate::state::streams::Key;
use crate::state::work::Work;
use crate::state::{DriverResult, Inner, State};
use cuda_vmm_sys::*;
use std::collections::HashMap;
use std::sync::Arc;

impl Inner {
    /// Captures an allocation and returns its address, which has no memory before a launch. That of
    /// no bytes is null, and nothing is captured.
    pub(crate) fn capture_allocation(&mut self, key: Key, bytes: usize) -> DriverResult<u64> {
        if bytes == 0 {
            return Ok(0);
        }
        let bytes = whole_pages(bytes)?;
        let stream = self.streams.get_mut(key)?;
        let device = stream.device;
        let capture = stream.capture.as_mut().ok_or(CUDA_ERROR_ILLEGAL_STATE)?;
        if capture.invalidated {
            return Err(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        }
        let address = self.space.add_graph(bytes, capture.id)?;
        self.graph_memory.add(device, capture.id, address);
        capture.add(Node::Allocate { address, bytes })?;
        Ok(address)
    }

    /// Captures a free. It is refused, and the capture goes on, for what no graph allocates, what
    /// its own graph already frees, and what this capture already frees.
    pub(crate) fn capture_free(&mut self, key: Key, address: u64) -> DriverResult {
        let memory = self.space.graph(address)?;
        let stream = self.streams.get_mut(key)?;
        let capture = stream.capture.as_mut().ok_or(CUDA_ERROR_ILLEGAL_STATE)?;
        let is_freed =
            |node: &Node| matches!(node, Node::Free { address: freed } if *freed == address);
        if memory.is_freed_inside || capture.nodes.iter().any(is_freed) {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        capture.add(Node::Free { address })?;
        memory.is_freed_inside = memory.capture == capture.id;
        Ok(())
    }

    /// Begins a launch: reserves and backs what it allocates, and returns what it must free first.
    ///
    /// It fails, and nothing is allocated or freed, if an earlier launch left something allocated
    /// that this one does not free first, if a node frees what is not allocated then, or if the
    /// device has too little memory.
    pub(crate) fn begin_graph_memory(&mut self, graph: &Graph) -> DriverResult<Vec<u64>> {
        let allocated = graph.nodes.iter().filter_map(|node| match *node {
            Node::Allocate { address, .. } => Some(address),
            _ => None,
        });
        let own: Vec<u64> = allocated.collect();
        let mut left = own.clone();
        left.retain(|&address| self.space.allocated_graph(address).is_ok());
        if !left.is_empty() && !graph.auto_free {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        // What is allocated when the nodes so far have run, as far as it changes.
        let mut bytes_of: HashMap<u64, usize> = left.iter().map(|&left| (left, 0)).collect();
        let mut bytes = self.allocated_bytes(graph.device);
        for &address in &left {
            bytes -= self.space.allocated_graph_bytes(address);
        }
        let mut most_bytes = bytes;
        for node in graph.nodes.iter() {
            match *node {
                Node::Allocate {
                    address,
                    bytes: new,
                } => {
                    bytes_of.insert(address, new);
                    bytes += new;
                    most_bytes = most_bytes.max(bytes);
                }
                Node::Free { address } => {
                    let now = || self.space.allocated_graph_bytes(address);
                    let freed = bytes_of.get(&address).copied().unwrap_or_else(now);
                    if freed == 0 {
                        return Err(CUDA_ERROR_INVALID_VALUE);
                    }
                    bytes_of.insert(address, 0);
                    bytes = bytes.saturating_sub(freed);
                }
                _ => {}
            }
        }
        self.reserve_for_graphs(graph.device, most_bytes)?;
        for address in own {
            self.back_graph_memory(graph.device, address)?;
        }
        for (address, bytes) in bytes_of {
            self.space.graph(address)?.is_allocated = bytes > 0;
        }
        if let Some(allocations) = self.graph_memory.by_capture.get_mut(&graph.capture) {
            allocations.most_bytes = most_bytes;
        }
        let used_bytes = self.used_for_graphs(graph.device);
        let reserve = &mut self.graph_memory.reserves[graph.device];
        reserve.used_bytes_max = reserve.used_bytes_max.max(used_bytes);
        Ok(left)
    }

    fn reserve_for_graphs(&mut self, device: usize, bytes: usize) -> DriverResult {
        let bytes = bytes.next_multiple_of(self.space.granularity_bytes());
        let reserve = &mut self.graph_memory.reserves[device];
        let missing_bytes = bytes.saturating_sub(reserve.bytes);
        let charged = self.physical.charge(device, missing_bytes);
        if charged.is_err() {
            // The driver takes what there is before it fails, and keeps it.
            let lost_bytes = self.physical.free_bytes(device);
            self.physical.charge(device, lost_bytes)?;
            reserve.lost_bytes += lost_bytes;
        } else {
            reserve.bytes += missing_bytes;
        }
        reserve.bytes_max = reserve.bytes_max.max(reserve.all_bytes());
        charged
    }

    fn back_graph_memory(&mut self, device: usize, address: u64) -> DriverResult {
        let (_, range) = self.space.at(address).ok_or(CUDA_ERROR_INVALID_VALUE)?;
        if range.handle != 0 {
            return Ok(());
        }
        let handle = self.physical.create_for_graph(device, range.bytes)?;
        let storage = self.physical.storage(handle);
        let backed = self.space.back_graph(address, handle, storage);
        if backed.is_err() {
            self.physical.release(handle)?;
        }
        backed
    }

    fn unback_graph_memory(&mut self, address: u64) {
        if let Some(handle) = self.space.unback_graph(address) {
            // The handle belongs to the allocation and has exactly this reference.
            let _ = self.physical.release(handle);
        }
    }

    /// Returns how much memory of a device is allocated by graphs.
    fn allocated_bytes(&self, device: usize) -> usize {
        let all = self.graph_memory.of_device(device);
        let addresses = all.flat_map(|(_, allocations)| &allocations.addresses);
        addresses
            .map(|&address| self.space.allocated_graph_bytes(address))
            .sum()
    }

    /// Returns how much memory of a device is behind the addresses of graphs. Graphs that are not
    /// allocated at once share it.
    fn used_for_graphs(&self, device: usize) -> usize {
        let all = self.graph_memory.of_device(device);
        let most = all.map(|(_, allocations)| allocations.most_bytes).max();
        let bytes = self.allocated_bytes(device).max(most.unwrap_or(0));
        bytes.next_multiple_of(self.space.granularity_bytes())
    }

    /// Forgets the allocations of graphs that are gone, except those that are allocated or that
    /// work may use.
    pub(crate) fn forget_graph_memory(&mut self) {
        let captures: Vec<u64> = self.graph_memory.by_capture.keys().copied().collect();
        for capture in captures {
            let is_alive = self.streams.is_captured(capture)
                || self.graphs.of_capture(capture).next().is_some();
            if is_alive || !self.graph_memory.is_idle(capture, &self.streams) {
                continue;
            }
            let Some(allocations) = self.graph_memory.by_capture.get_mut(&capture) else {
                continue;
            };
            allocations.most_bytes = 0;
            let addresses = std::mem::take(&mut allocations.addresses);
            let (kept, gone) = addresses
                .into_iter()
                .partition::<Vec<_>, _>(|&address| self.space.allocated_graph_bytes(address) > 0);
            match kept.is_empty() {
                true => drop(self.graph_memory.by_capture.remove(&capture)),
                false => allocations.addresses = kept,
            }
            for address in gone {
                self.unback_graph_memory(address);
                self.space.remove_graph(address);
            }
        }
    }

    /// Frees the memory of all graphs of a device.
    pub(crate) fn free_all_graph_memory(&mut self, device: usize) {
        let all = self.graph_memory.of_device(device);
        let addresses: Vec<u64> = all
            .flat_map(|(_, allocations)| allocations.addresses.iter().copied())
            .collect();
        for address in addresses {
            self.unback_graph_memory(address);
            self.space.remove_graph(address);
        }
        let by_capture = &mut self.graph_memory.by_capture;
        by_capture.retain(|_, allocations| allocations.device != device);
        let lost_bytes = &mut self.graph_memory.reserves[device].lost_bytes;
        self.physical.discharge(device, std::mem::take(lost_bytes));
        self.shrink_reserve(device);
    }

    /// Gives back what is reserved on a device and not in use.
    fn shrink_reserve(&mut self, device: usize) {
        let used_bytes = self.used_for_graphs(device);
        let reserve = &mut self.graph_memory.reserves[device];
        let unused_bytes = reserve.bytes.saturating_sub(used_bytes);
        reserve.bytes -= unused_bytes;
        self.physical.discharge(device, unused_bytes);
    }
}

impl State {
    /// Frees what a launch left allocated, in the order of a stream.
    pub(crate) fn free_graph_memory(
        self: &Arc<Self>,
        inner: &mut Inner,
        address: u64,
        key: Key,
    ) -> DriverResult {
        inner.check_implicit(key)?;
        let work = Work::Open {
            address,
            open: false,
        };
        let sequence = self.enqueue(inner, key, work)?;
        let memory = inner.space.graph(address)?;
        memory.is_allocated = false;
        inner
            .graph_memory
            .add_point(memory.capture, (key, sequence));
        Ok(())
    }

    pub(crate) fn graph_memory_attribute(
        &self,
        device: usize,
        attribute: CUgraphMem_attribute,
    ) -> DriverResult<usize> {
        let mut inner = self.lock();
        inner.forget_graph_memory();
        let reserve = &inner.graph_memory.reserves[device];
        Ok(match attribute {
            CU_GRAPH_MEM_ATTR_USED_MEM_CURRENT => inner.used_for_graphs(device),
            CU_GRAPH_MEM_ATTR_USED_MEM_HIGH => reserve.used_bytes_max,
            CU_GRAPH_MEM_ATTR_RESERVED_MEM_CURRENT => reserve.all_bytes(),
            CU_GRAPH_MEM_ATTR_RESERVED_MEM_HIGH => reserve.bytes_max,
            _ => return Err(CUDA_ERROR_INVALID_VALUE),
        })
    }

    /// Gives back the reserve of a device, except what is allocated or used by launches that have
    /// not completed.
    pub(crate) fn graph_memory_trim(&self, device: usize) -> DriverResult {
        let mut inner = self.lock();
        inner.forget_graph_memory();
        let all = inner.graph_memory.of_device(device);
        let idle = all.filter(|(capture, _)| inner.graph_memory.is_idle(*capture, &inner.streams));
        let idle: Vec<u64> = idle.map(|(capture, _)| capture).collect();
        for capture in idle {
            let Some(allocations) = inner.graph_memory.by_capture.get_mut(&capture) else {
                continue;
            };
            allocations.most_bytes = 0;
            for address in allocations.addresses.clone() {
                if inner.space.allocated_graph_bytes(address) == 0 {
                    inner.unback_graph_memory(address);
                }
            }
        }
        inner.shrink_reserve(device);
        Ok(())
    }
}
