//! Reserved addresses, and the memory that is mapped to them.

use super::DriverResult;
use super::graph_range::GraphRange;
use crate::host_memory::{HostFile, HostRange, Protection};
use cuda_vmm_sys::*;
use std::collections::BTreeMap;
use std::io;

/// The access of each device to a range: two bits per device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Access(u64);

impl Access {
    /// Read and write access for every device.
    pub(crate) const ALL: Self = Self(u64::MAX);

    pub(crate) fn of(self, device: usize) -> CUmemAccess_flags {
        (self.0 >> (2 * device)) as CUmemAccess_flags & 3
    }

    /// Returns whether a device may read, or write.
    pub(crate) fn allows(self, device: usize, write: bool) -> bool {
        self.of(device) & if write { 2 } else { 1 } != 0
    }

    pub(crate) fn set(&mut self, device: usize, flags: CUmemAccess_flags) {
        self.0 = self.0 & !(3 << (2 * device)) | (u64::from(flags) & 3) << (2 * device);
    }

    /// Returns the host protection that permits the access of every device.
    fn protection(self) -> Protection {
        const WRITE_BITS: u64 = 0xAAAA_AAAA_AAAA_AAAA;
        if self.0 & WRITE_BITS != 0 {
            Protection::ReadWrite
        } else if self.0 != 0 {
            Protection::Read
        } else {
            Protection::None
        }
    }
}

/// What backs a range of addresses.
#[derive(Debug)]
pub(crate) enum Kind {
    /// A handle that is mapped into a reservation.
    Mapping,
    /// An allocation by `cuMemAlloc` or `cuMemAllocAsync`. It owns its addresses and frees them
    /// when dropped.
    Plain {
        device: usize,
        freeing: bool,
        _host: Option<HostRange>,
    },
    /// An allocation of a graph.
    Graph(GraphRange),
}

/// A range of addresses with memory.
#[derive(Debug)]
pub(crate) struct Range {
    /// Unique. Queued work keeps it to detect that its addresses were mapped anew.
    pub(crate) id: u64,
    pub(crate) bytes: usize,
    /// The memory; 0 if an allocation of a graph has none now.
    pub(crate) handle: u64,
    /// The access of work that runs now.
    pub(crate) access: Access,
    pub(crate) kind: Kind,
}

impl Range {
    /// Returns whether a call may enqueue work of a device that reads, or writes, this.
    fn is_open(&self, device: usize, write: bool) -> bool {
        match &self.kind {
            // Its access changes when the launches run, and this when they are enqueued.
            Kind::Graph(graph) => graph.is_allocated,
            _ => self.access.allows(device, write),
        }
    }
}

#[derive(Debug)]
struct Reservation {
    bytes: usize,
    host: Option<HostRange>,
}

/// All addresses of one simulator.
#[derive(Debug)]
pub(crate) struct AddressSpace {
    backed: bool,
    granularity_bytes: usize,
    reservations: BTreeMap<u64, Reservation>,
    reserved_bytes: usize,
    pub(super) ranges: BTreeMap<u64, Range>,
    next_id: u64,
    /// The next unused address, if the simulator has no host memory.
    next_address: u64,
}

pub(super) fn out_of_memory(_: io::Error) -> CUresult {
    CUDA_ERROR_OUT_OF_MEMORY
}

impl AddressSpace {
    /// Reservations of this size and more fail, as on a device with 47 address bits.
    const LIMIT_BYTES: usize = 1 << 47;

    pub(crate) fn new(granularity_bytes: usize, backed: bool) -> Self {
        Self {
            backed,
            granularity_bytes,
            reservations: BTreeMap::new(),
            reserved_bytes: 0,
            ranges: BTreeMap::new(),
            next_id: 1,
            next_address: 1 << 40,
        }
    }

    pub(crate) fn granularity_bytes(&self) -> usize {
        self.granularity_bytes
    }

    /// Returns the number of reservations and their total size in bytes.
    pub(crate) fn reserved(&self) -> (usize, usize) {
        (self.reservations.len(), self.reserved_bytes)
    }

    /// Returns all ranges with memory.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = (u64, &Range)> {
        self.ranges.iter().map(|(&address, range)| (address, range))
    }

    pub(super) fn new_addresses(
        &mut self,
        bytes: usize,
        alignment: usize,
        hint: u64,
    ) -> DriverResult<(u64, Option<HostRange>)> {
        if bytes >= Self::LIMIT_BYTES {
            return Err(CUDA_ERROR_OUT_OF_MEMORY);
        }
        if self.backed {
            let host =
                HostRange::reserve(bytes, alignment, hint as usize).map_err(out_of_memory)?;
            return Ok((host.address(), Some(host)));
        }
        let address = self
            .next_address
            .checked_next_multiple_of(alignment as u64)
            .filter(|address| {
                address
                    .checked_add(bytes as u64)
                    .is_some_and(|end| end < 1 << 62)
            })
            .ok_or(CUDA_ERROR_OUT_OF_MEMORY)?;
        // A gap after every reservation, so that work beyond its end finds nothing mapped.
        self.next_address = address + bytes as u64 + self.granularity_bytes as u64;
        Ok((address, None))
    }

    /// Reserves addresses.
    pub(crate) fn reserve(
        &mut self,
        bytes: usize,
        alignment: usize,
        hint: u64,
    ) -> DriverResult<u64> {
        let aligned = alignment == 0 || alignment.is_power_of_two();
        if bytes == 0 || !bytes.is_multiple_of(self.granularity_bytes) || !aligned {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        let alignment = alignment.max(self.granularity_bytes);
        let (address, host) = self.new_addresses(bytes, alignment, hint)?;
        self.reservations
            .insert(address, Reservation { bytes, host });
        self.reserved_bytes += bytes;
        Ok(address)
    }

    /// Frees a whole reservation in which nothing is mapped.
    pub(crate) fn free(&mut self, address: u64, bytes: usize) -> DriverResult {
        let reservation = self
            .reservations
            .get(&address)
            .ok_or(CUDA_ERROR_INVALID_VALUE)?;
        if reservation.bytes != bytes || self.overlapping(address, bytes).next().is_some() {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        self.reservations.remove(&address);
        self.reserved_bytes -= bytes;
        Ok(())
    }

    /// Returns the ranges that overlap the given one.
    pub(crate) fn overlapping(
        &self,
        address: u64,
        bytes: usize,
    ) -> impl Iterator<Item = (u64, &Range)> {
        let end = address.saturating_add(bytes as u64);
        let before = self.ranges.range(..address).next_back();
        let before = before.filter(|(start, range)| **start + range.bytes as u64 > address);
        before
            .into_iter()
            .chain(self.ranges.range(address..end.max(address)))
            .map(|(&start, range)| (start, range))
    }

    /// Returns the range that contains an address.
    pub(crate) fn at(&self, address: u64) -> Option<(u64, &Range)> {
        let (&start, range) = self.ranges.range(..=address).next_back()?;
        (address - start < range.bytes as u64).then_some((start, range))
    }

    /// Returns whether an address is reserved or has memory.
    pub(crate) fn is_known(&self, address: u64) -> bool {
        self.reservation_of(address, 1).is_ok() || self.at(address).is_some()
    }

    /// Returns whether a device may read, or write, all of a range.
    pub(crate) fn is_open(&self, address: u64, bytes: usize, device: usize, write: bool) -> bool {
        let Some(end) = address.checked_add(bytes as u64) else {
            return false;
        };
        let mut reached = address;
        for (start, range) in self.overlapping(address, bytes) {
            if start > reached || !range.is_open(device, write) {
                return false;
            }
            reached = start + range.bytes as u64;
        }
        reached >= end
    }

    /// Returns the reservation that contains all of a range.
    fn reservation_of(&self, address: u64, bytes: usize) -> DriverResult<(u64, &Reservation)> {
        let (&start, reservation) = self
            .reservations
            .range(..=address)
            .next_back()
            .ok_or(CUDA_ERROR_INVALID_VALUE)?;
        let end = (address - start).checked_add(bytes as u64);
        match end {
            Some(end) if end <= reservation.bytes as u64 => Ok((start, reservation)),
            _ => Err(CUDA_ERROR_INVALID_VALUE),
        }
    }

    fn check_aligned(&self, address: u64, bytes: usize) -> DriverResult {
        let granularity = self.granularity_bytes;
        if bytes == 0
            || !bytes.is_multiple_of(granularity)
            || !address.is_multiple_of(granularity as u64)
        {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        Ok(())
    }

    pub(super) fn insert(
        &mut self,
        address: u64,
        bytes: usize,
        handle: u64,
        access: Access,
        kind: Kind,
    ) {
        let id = self.next_id;
        self.next_id += 1;
        let range = Range {
            id,
            bytes,
            handle,
            access,
            kind,
        };
        self.ranges.insert(address, range);
    }

    /// Maps a handle, without access.
    pub(crate) fn map(
        &mut self,
        address: u64,
        bytes: usize,
        handle: u64,
        storage: Option<(&HostFile, u64)>,
    ) -> DriverResult {
        self.check_aligned(address, bytes)?;
        let (start, reservation) = self.reservation_of(address, bytes)?;
        if self.overlapping(address, bytes).next().is_some() {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        if let (Some(host), Some((file, offset))) = (&reservation.host, storage) {
            host.map((address - start) as usize, bytes, file, offset)
                .map_err(out_of_memory)?;
        }
        self.insert(address, bytes, handle, Access::default(), Kind::Mapping);
        Ok(())
    }

    /// Returns the addresses of the mappings in a range. Fails if one lies in it in part only.
    fn whole_mappings(&self, address: u64, bytes: usize) -> DriverResult<Vec<u64>> {
        let end = address + bytes as u64;
        self.overlapping(address, bytes)
            .map(|(start, range)| {
                let whole = start >= address && start + range.bytes as u64 <= end;
                if whole {
                    Ok(start)
                } else {
                    Err(CUDA_ERROR_INVALID_VALUE)
                }
            })
            .collect()
    }

    /// Unmaps the mappings in a range, which may have gaps, and returns them. A range without
    /// mappings need not be aligned.
    pub(crate) fn unmap(&mut self, address: u64, bytes: usize) -> DriverResult<Vec<Range>> {
        if bytes == 0 {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        let (start, reservation) = self.reservation_of(address, bytes)?;
        let mapped = self.whole_mappings(address, bytes)?;
        if mapped.is_empty() {
            return Ok(Vec::new());
        }
        self.check_aligned(address, bytes)?;
        if let Some(host) = &reservation.host {
            host.clear((address - start) as usize, bytes)
                .map_err(out_of_memory)?;
        }
        Ok(mapped
            .iter()
            .filter_map(|start| self.ranges.remove(start))
            .collect())
    }

    /// Sets the access of devices to a range that whole mappings fill, and returns each mapping's
    /// size.
    pub(crate) fn set_access(
        &mut self,
        address: u64,
        bytes: usize,
        change: impl Fn(&mut Access),
    ) -> DriverResult<Vec<(u64, usize)>> {
        self.check_aligned(address, bytes)?;
        let (base, reservation) = self.reservation_of(address, bytes)?;
        let mapped = self.whole_mappings(address, bytes)?;
        let sizes: Vec<_> = mapped
            .iter()
            .map(|start| (*start, self.ranges[start].bytes))
            .collect();
        if sizes.iter().map(|(_, bytes)| bytes).sum::<usize>() != bytes {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        let access_of = |start: &u64| {
            let old = self.ranges[start].access;
            let mut new = old;
            change(&mut new);
            (old, new)
        };
        if let Some(host) = &reservation.host {
            let protect = |start: u64, bytes: usize, access: Access| {
                host.protect((start - base) as usize, bytes, access.protection())
            };
            for (done, (start, bytes)) in sizes.iter().enumerate() {
                if let Err(error) = protect(*start, *bytes, access_of(start).1) {
                    for (start, bytes) in &sizes[..done] {
                        // Cannot fail: the host already had these protections.
                        let _ = protect(*start, *bytes, access_of(start).0);
                    }
                    return Err(out_of_memory(error));
                }
            }
        }
        for start in &mapped {
            if let Some(range) = self.ranges.get_mut(start) {
                change(&mut range.access);
            }
        }
        Ok(sizes)
    }

    /// Adds a plain allocation at new addresses, with access for all devices.
    pub(crate) fn add_plain(
        &mut self,
        device: usize,
        bytes: usize,
        handle: u64,
        storage: Option<(&HostFile, u64)>,
    ) -> DriverResult<u64> {
        let (address, host) = self.new_addresses(bytes, self.granularity_bytes, 0)?;
        if let (Some(host), Some((file, offset))) = (&host, storage) {
            host.map(0, bytes, file, offset).map_err(out_of_memory)?;
            host.protect(0, bytes, Protection::ReadWrite)
                .map_err(out_of_memory)?;
        }
        let kind = Kind::Plain {
            device,
            freeing: false,
            _host: host,
        };
        self.insert(address, bytes, handle, Access::ALL, kind);
        Ok(address)
    }

    /// Returns the plain allocation at an address, unless it is being freed.
    pub(crate) fn plain(&mut self, address: u64) -> DriverResult<&mut Range> {
        self.ranges
            .get_mut(&address)
            .filter(|range| matches!(range.kind, Kind::Plain { freeing: false, .. }))
            .ok_or(CUDA_ERROR_INVALID_VALUE)
    }

    /// Removes a plain allocation.
    pub(crate) fn remove_plain(&mut self, address: u64) -> Option<Range> {
        let range = self.ranges.get(&address)?;
        if !matches!(range.kind, Kind::Plain { .. }) {
            return None;
        }
        self.ranges.remove(&address)
    }
}
