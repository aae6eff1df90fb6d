//! Reserved bytes of a host store.
//!
//! # Safety
//! The bytes of a [`HostBytes`] are in pieces that stay mapped until it is dropped, and no other
//! `HostBytes` has them. Nobody is handed a reference to them. A device's copy from or to them is
//! queued by this crate alone, which borrows the `HostBytes` as long as the copy runs: shared for a
//! copy that reads them, exclusively for one that writes them.
#![allow(unsafe_code)]

use super::store::{Place, Store};
use crate::quarantine::Stuck;
use crate::sync::Arc;
use crate::{Result, VmmError};
use core::ops::Range;

/// Bytes of a [`HostStore`](crate::HostStore) that are reserved for one owner. Dropping it gives
/// them back to the store.
///
/// The bytes are in one extent, or in several if no free extent of the store is long enough. They
/// may hold anything until they are written, such as what an earlier owner left in them.
///
/// It keeps the store alive. After a `fork` the child has not the memory: there the calls return
/// [`VmmError::Forked`], and dropping does nothing.
#[derive(Debug)]
pub struct HostBytes {
    store: Arc<Store>,
    /// In the order of the bytes.
    places: Vec<Place>,
    bytes: usize,
}

impl HostBytes {
    pub(super) fn new(store: &Arc<Store>, places: Vec<Place>, bytes: usize) -> Self {
        Self {
            store: Arc::clone(store),
            places,
            bytes,
        }
    }

    /// The size in bytes, as it was asked for.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// What the store counts for it, in bytes: the size, rounded up to a multiple of 2 MiB.
    pub fn reserved_bytes(&self) -> usize {
        self.places.iter().map(|place| place.extent.bytes).sum()
    }

    /// The number of extents that the bytes are in.
    pub fn extents(&self) -> usize {
        self.places.len()
    }

    /// Copies `source` to the bytes from `offset` on. A slice without bytes copies nothing.
    ///
    /// # Errors
    /// [`VmmError::Overflow`], [`VmmError::OutOfRange`]; [`VmmError::Forked`]. Then nothing was
    /// copied.
    pub fn write(&mut self, offset: usize, source: &[u8]) -> Result<()> {
        let mut left = source;
        for (address, bytes) in self.parts(offset, source.len())? {
            let (part, rest) = left.split_at(bytes);
            let target = core::ptr::with_exposed_provenance_mut::<u8>(address);
            // SAFETY: `parts` returns bytes of this object alone, which are borrowed exclusively
            // and mapped in this process. No reference to them exists, so `part` is elsewhere.
            unsafe { target.copy_from_nonoverlapping(part.as_ptr(), bytes) };
            left = rest;
        }
        Ok(())
    }

    /// Copies the bytes from `offset` on to `target`. A slice without bytes copies nothing.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn read(&self, offset: usize, target: &mut [u8]) -> Result<()> {
        let mut left = target;
        for (address, bytes) in self.parts(offset, left.len())? {
            let (part, rest) = left.split_at_mut(bytes);
            let source = core::ptr::with_exposed_provenance::<u8>(address);
            // SAFETY: as in `write`. The bytes were zeroed when they were mapped, so they are
            // initialised, and nothing writes them while they are borrowed.
            unsafe { source.copy_to_nonoverlapping(part.as_mut_ptr(), bytes) };
            left = rest;
        }
        Ok(())
    }

    /// Returns the addresses and the lengths of bytes, in their order, after checking that they are
    /// this object's and that this process has them.
    pub(crate) fn parts(
        &self,
        offset: usize,
        bytes: usize,
    ) -> Result<impl Iterator<Item = (usize, usize)> + use<'_>> {
        self.store.check_process()?;
        let end = offset
            .checked_add(bytes)
            .ok_or(VmmError::Overflow { offset, bytes })?;
        if end > self.bytes {
            return Err(VmmError::OutOfRange {
                offset,
                bytes,
                capacity_bytes: self.bytes,
            });
        }
        let mut next = 0;
        let parts = self.places.iter().filter_map(move |place| {
            let own = next..next + place.extent.bytes;
            next = own.end;
            let Range { start, end } = own.start.max(offset)..own.end.min(end);
            (start < end).then(|| (place.address + (start - own.start), end - start))
        });
        Ok(parts)
    }
}

/// Kept by a device while a copy of its own may still run.
impl Stuck for HostBytes {
    fn host_bytes(&self) -> usize {
        self.reserved_bytes()
    }
}

impl Stuck for Arc<HostBytes> {
    fn host_bytes(&self) -> usize {
        self.reserved_bytes()
    }
}

impl Drop for HostBytes {
    fn drop(&mut self) {
        self.store.give_back(&self.places);
    }
}

#[cfg(all(test, feature = "simulator", not(model_check)))]
mod tests {
    use crate::driver::call;
    use crate::{
        Access, Driver, HostStore, HostStoreOptions, Mapping, PhysicalMemory, Reservation,
    };
    use crate::{Result, Stream};
    use cuda_vmm_sim::SimConfig;
    use std::sync::Arc;

    const UNIT: usize = 2 << 20;

    /// What a sleep will do: copies out while the host goes on, and in again.
    #[test]
    fn a_device_copies_to_the_parts_and_back_without_anyone_waiting() -> Result<()> {
        let driver = Driver::simulated(SimConfig::new())?;
        let (device, simulator) = (driver.device(0)?, driver.simulator().expect("simulated"));
        let options = HostStoreOptions::new().piece_bytes(UNIT).threads(1);
        let store = HostStore::with_options(&device, 3 * UNIT, options)?;
        let mut kept = store.reserve(3 * UNIT - 5)?;
        assert_eq!(kept.extents(), 3);
        let place = Arc::new(Reservation::new(&device, 3 * UNIT)?);
        let memory = Arc::new(PhysicalMemory::new(&device, 3 * UNIT)?);
        let access = [(device.clone(), Access::ReadWrite)];
        let mapping = Mapping::new(&place, 0, &memory, &access)?;
        let stream = Stream::new(&device)?;
        let pattern: Vec<u8> = (0..kept.bytes()).map(|at| (at % 251) as u8).collect();
        // SAFETY: the addresses are mapped.
        unsafe { stream.write(mapping.address(), &pattern) }?;

        let parts: Vec<_> = kept.parts(0, kept.bytes())?.collect();
        let last = UNIT - 5;
        assert_eq!([UNIT, UNIT, last], [parts[0].1, parts[1].1, parts[2].1]);
        let _current = device.make_current()?;
        simulator.hold_work();
        let mut from = mapping.address();
        for (address, bytes) in &parts {
            let to = core::ptr::with_exposed_provenance_mut(*address);
            // SAFETY: the addresses are mapped, and the bytes reserved until the stream is waited
            // for.
            unsafe { call!(&driver, cuMemcpyDtoHAsync(to, from, *bytes, stream.raw())) }?;
            from += *bytes as u64;
        }
        // Pageable memory would have been waited for, for ever.
        simulator.release_work();
        stream.synchronize()?;
        let mut found = vec![0; kept.bytes()];
        kept.read(0, &mut found)?;
        assert!(found == pattern, "what the device had");

        kept.write(UNIT - 1, &[7; 2])?;
        let mut to = mapping.address();
        for (address, bytes) in kept.parts(0, kept.bytes())? {
            let from = core::ptr::with_exposed_provenance(address);
            // SAFETY: as above.
            unsafe { call!(&driver, cuMemcpyHtoDAsync(to, from, bytes, stream.raw())) }?;
            to += bytes as u64;
        }
        // SAFETY: the addresses are mapped.
        unsafe { stream.read(mapping.address(), &mut found) }?;
        assert_eq!(
            found[UNIT - 2..UNIT + 2],
            [pattern[UNIT - 2], 7, 7, pattern[UNIT + 1]]
        );
        Ok(())
    }
}
