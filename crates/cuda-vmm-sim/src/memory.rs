//! The calls on memory, which combine physical memory and addresses.

use crate::location::{Descriptor, Properties};
use crate::state::address_space::Kind;
use crate::state::work::Work;
use crate::state::{DriverResult, Inner, State};
use cuda_vmm_sys::*;
use std::sync::Arc;

impl State {
    pub(crate) fn create(&self, bytes: usize, properties: Properties) -> DriverResult<u64> {
        if bytes == 0 || !bytes.is_multiple_of(self.config.granularity_bytes) {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        let mut inner = self.lock();
        let handle = inner
            .physical
            .create(properties.device, bytes, properties.shareable)?;
        inner.charge(|cost| cost.create.at(bytes));
        Ok(handle)
    }

    pub(crate) fn release(&self, handle: u64) -> DriverResult {
        let mut inner = self.lock();
        let bytes = inner.physical.get(handle)?.bytes;
        inner.physical.release(handle)?;
        inner.charge(|cost| cost.release.at(bytes));
        Ok(())
    }

    pub(crate) fn properties(&self, handle: u64) -> DriverResult<Properties> {
        let inner = self.lock();
        let physical = inner.physical.get(handle)?;
        Ok(Properties {
            device: physical.device,
            shareable: physical.shareable,
        })
    }

    pub(crate) fn retain_at(&self, address: u64) -> DriverResult<u64> {
        let mut inner = self.lock();
        match inner.space.at(address) {
            Some((_, range)) if matches!(range.kind, Kind::Mapping) => {
                let handle = range.handle;
                inner.physical.retain(handle)?;
                Ok(handle)
            }
            _ => Err(CUDA_ERROR_INVALID_VALUE),
        }
    }

    pub(crate) fn export(&self, handle: u64) -> DriverResult<i32> {
        let mut inner = self.lock();
        let bytes = inner.physical.get(handle)?.bytes;
        let descriptor = inner.physical.export(handle)?;
        inner.charge(|cost| cost.export.at(bytes));
        Ok(descriptor)
    }

    pub(crate) fn import(&self, descriptor: i32) -> DriverResult<u64> {
        let mut inner = self.lock();
        let handle = inner.physical.import(descriptor)?;
        let granularity = self.config.granularity_bytes;
        let bytes = inner.physical.get(handle)?.bytes;
        if !bytes.is_multiple_of(granularity) {
            inner.physical.release(handle)?;
            return Err(CUDA_ERROR_NOT_SUPPORTED);
        }
        inner.charge(|cost| cost.import.at(bytes));
        Ok(handle)
    }

    pub(crate) fn reserve(&self, bytes: usize, alignment: usize, hint: u64) -> DriverResult<u64> {
        let mut inner = self.lock();
        let address = inner.space.reserve(bytes, alignment, hint)?;
        inner.charge(|cost| cost.reserve.at(bytes));
        Ok(address)
    }

    pub(crate) fn address_free(&self, address: u64, bytes: usize) -> DriverResult {
        let mut inner = self.lock();
        inner.space.free(address, bytes)?;
        inner.charge(|cost| cost.address_free.at(bytes));
        Ok(())
    }

    pub(crate) fn map(
        &self,
        address: u64,
        bytes: usize,
        offset: usize,
        handle: u64,
    ) -> DriverResult {
        let mut guard = self.lock();
        let inner = &mut *guard;
        let whole = inner.physical.get(handle)?.bytes;
        let part = offset.checked_add(bytes).ok_or(CUDA_ERROR_INVALID_VALUE)?;
        if part > whole {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        // So the offset is 0 from here on.
        if bytes != whole {
            return Err(CUDA_ERROR_NOT_SUPPORTED);
        }
        inner
            .space
            .map(address, bytes, handle, inner.physical.storage(handle))?;
        inner.physical.add_mapping(handle);
        inner.charge(|cost| cost.map.at(bytes));
        Ok(())
    }

    pub(crate) fn unmap(&self, address: u64, bytes: usize) -> DriverResult {
        let mut inner = self.lock();
        let unmapped = inner.space.unmap(address, bytes)?;
        for range in &unmapped {
            let peers = inner.has_peers(range.handle, |device| range.access.of(device));
            inner.physical.remove_mapping(range.handle);
            inner.charge(|cost| match peers {
                true => cost.unmap_peer.at(range.bytes),
                false => cost.unmap.at(range.bytes),
            });
        }
        Ok(())
    }

    pub(crate) fn set_access(
        &self,
        address: u64,
        bytes: usize,
        descriptors: &[Descriptor],
    ) -> DriverResult {
        let mut inner = self.lock();
        let mapped = inner.space.set_access(address, bytes, |access| {
            for descriptor in descriptors {
                access.set(descriptor.device, descriptor.flags);
            }
        })?;
        for (start, bytes) in mapped {
            let handle = inner.space.at(start).map(|(_, range)| range.handle);
            let peers = handle.is_some_and(|handle| {
                inner.has_peers(handle, |device| {
                    let named = descriptors
                        .iter()
                        .filter(|descriptor| descriptor.device == device);
                    named.map(|descriptor| descriptor.flags).max().unwrap_or(0)
                })
            });
            inner.charge(|cost| match peers {
                true => cost.set_access_peer.at(bytes),
                false => cost.set_access.at(bytes),
            });
        }
        Ok(())
    }

    pub(crate) fn access(&self, device: usize, address: u64) -> DriverResult<CUmemAccess_flags> {
        match self.lock().space.at(address) {
            Some((_, range)) => Ok(range.access.of(device)),
            None => Err(CUDA_ERROR_INVALID_VALUE),
        }
    }

    /// Returns the free and total bytes of the current context's device.
    pub(crate) fn memory_info(&self) -> DriverResult<(usize, usize)> {
        let inner = self.lock();
        let device = inner.enter()?;
        let total = self.config.memory_bytes;
        Ok((total - inner.physical.used_bytes(device), total))
    }

    pub(crate) fn plain_alloc(&self, bytes: usize) -> DriverResult<u64> {
        let mut inner = self.lock();
        let device = inner.enter()?;
        inner.unsafe_call()?;
        let address = inner.add_plain(device, bytes)?;
        inner.charge(|cost| cost.plain_alloc.at(bytes));
        Ok(address)
    }

    /// Frees a plain allocation after the device has completed all its work, as the driver does.
    pub(crate) fn plain_free(&self, address: u64) -> DriverResult {
        let mut inner = self.lock();
        let device = inner.enter()?;
        inner.unsafe_call()?;
        if address == 0 {
            return Ok(());
        }
        if inner.space.allocated_graph(address).is_ok() {
            let mut inner = self.wait_for_device(inner, device)?;
            inner.space.allocated_graph(address)?.is_allocated = false;
            inner.space.open_graph(address, false);
            return Ok(());
        }
        inner.space.plain(address)?;
        let mut inner = self.wait_for_device(inner, device)?;
        let bytes = inner.space.plain(address)?.bytes;
        inner.remove_plain(address);
        inner.charge(|cost| cost.plain_free.at(bytes));
        Ok(())
    }

    pub(crate) fn plain_alloc_async(&self, bytes: usize, stream: CUstream) -> DriverResult<u64> {
        let mut inner = self.lock();
        let key = inner.enter_stream(stream)?;
        if inner.streams.get(key)?.capture.is_some() {
            return inner.capture_allocation(key, bytes);
        }
        let device = inner.streams.get(key)?.device;
        let address = inner.add_plain(device, bytes)?;
        inner.charge(|cost| cost.async_alloc.at(bytes));
        Ok(address)
    }

    pub(crate) fn plain_free_async(
        self: &Arc<Self>,
        address: u64,
        stream: CUstream,
    ) -> DriverResult {
        let mut inner = self.lock();
        let key = inner.enter_stream(stream)?;
        if address == 0 {
            return Ok(());
        }
        if inner.streams.get(key)?.capture.is_some() {
            return inner.capture_free(key, address);
        }
        if inner.space.allocated_graph(address).is_ok() {
            return self.free_graph_memory(&mut inner, address, key);
        }
        let Ok(range) = inner.space.plain(address) else {
            // The driver then uses the call that waits.
            inner.unsafe_call()?;
            return Err(CUDA_ERROR_INVALID_VALUE);
        };
        let bytes = range.bytes;
        inner.check_implicit(key)?;
        self.enqueue(&mut inner, key, Work::Free { address })?;
        if let Kind::Plain { freeing, .. } = &mut inner.space.plain(address)?.kind {
            *freeing = true;
        }
        inner.charge(|cost| cost.async_free.at(bytes));
        Ok(())
    }
}

impl Inner {
    /// Returns whether a device other than the memory's own has access.
    fn has_peers(&self, handle: u64, access: impl Fn(usize) -> CUmemAccess_flags) -> bool {
        let owner = self.physical.device_of(handle);
        (0..crate::SimConfig::MAX_DEVICES)
            .any(|device| Some(device) != owner && access(device) != 0)
    }

    fn add_plain(&mut self, device: usize, bytes: usize) -> DriverResult<u64> {
        let bytes = whole_pages(bytes)?;
        let handle = self.physical.create(device, bytes, false)?;
        let placed = self
            .space
            .add_plain(device, bytes, handle, self.physical.storage(handle));
        if placed.is_err() {
            self.physical.release(handle)?;
        }
        placed
    }

    /// Frees a plain allocation at once.
    pub(crate) fn remove_plain(&mut self, address: u64) {
        if let Some(range) = self.space.remove_plain(address) {
            let handle = range.handle;
            drop(range);
            // The handle belongs to the allocation and has exactly this reference.
            let _ = self.physical.release(handle);
        }
    }

    /// Frees all plain allocations of a device.
    pub(crate) fn free_all_plain(&mut self, device: usize) {
        let mine =
            |kind: &Kind| matches!(kind, Kind::Plain { device: owner, .. } if *owner == device);
        let addresses: Vec<u64> = self
            .space
            .ranges()
            .filter(|(_, range)| mine(&range.kind))
            .map(|(address, _)| address)
            .collect();
        for address in addresses {
            self.remove_plain(address);
        }
    }
}

/// Rounds the size of an allocation up to whole pages of the host.
pub(crate) fn whole_pages(bytes: usize) -> DriverResult<usize> {
    if bytes == 0 {
        return Err(CUDA_ERROR_INVALID_VALUE);
    }
    bytes
        .checked_next_multiple_of(crate::host_memory::page_bytes())
        .ok_or(CUDA_ERROR_OUT_OF_MEMORY)
}
