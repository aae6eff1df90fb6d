//! Host memory that is registered: page-locked, and known to all contexts.

use super::DriverResult;
use cuda_vmm_sys::*;
use std::collections::BTreeMap;

/// One registered range.
#[derive(Debug)]
struct Registered {
    bytes: usize,
    /// The device whose context registered it.
    device: usize,
}

/// All registered ranges, by their first address. They do not share a byte.
#[derive(Debug, Default)]
pub(crate) struct Registrations(BTreeMap<usize, Registered>);

impl Registrations {
    /// Adds a range that is not empty. Fails if a byte of it is registered.
    pub(crate) fn add(&mut self, device: usize, address: usize, bytes: usize) -> DriverResult {
        let end = address.checked_add(bytes).ok_or(CUDA_ERROR_INVALID_VALUE)?;
        // Ranges are disjoint, so the last one that begins before the end reaches furthest.
        let last = self.0.range(..end).next_back();
        if last.is_some_and(|(start, range)| start + range.bytes > address) {
            return Err(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
        }
        self.0.insert(address, Registered { bytes, device });
        Ok(())
    }

    /// Removes the range that begins at an address.
    pub(crate) fn remove(&mut self, address: usize) -> DriverResult {
        let removed = self.0.remove(&address);
        removed
            .map(drop)
            .ok_or(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED)
    }

    /// Returns whether all of these bytes are in one registered range.
    pub(crate) fn contains(&self, address: usize, bytes: usize) -> bool {
        let before = self.0.range(..=address).next_back();
        before.is_some_and(|(start, range)| address - start + bytes <= range.bytes)
    }

    /// Returns the number and the total size in bytes of the ranges that a device's context
    /// registered.
    pub(crate) fn of_device(&self, device: usize) -> (usize, usize) {
        let own = self.0.values().filter(|range| range.device == device);
        own.fold((0, 0), |(count, bytes), range| {
            (count + 1, bytes + range.bytes)
        })
    }

    /// Removes the ranges that a device's context registered.
    pub(crate) fn remove_all(&mut self, device: usize) {
        self.0.retain(|_, range| range.device != device);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_share_a_byte_are_refused_and_neighbours_are_not() {
        let mut ranges = Registrations::default();
        ranges.add(0, 0x2000, 0x2000).expect("nothing is there");
        for (address, bytes) in [
            (0x2000, 0x2000),
            (0x1000, 0x1001),
            (0x3fff, 1),
            (0x1000, 0x8000),
        ] {
            let again = ranges.add(0, address, bytes);
            assert_eq!(again, Err(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED));
        }
        ranges.add(1, 0x1000, 0x1000).expect("before");
        ranges.add(0, 0x4000, 1).expect("behind");
        assert_eq!(ranges.add(0, usize::MAX, 2), Err(CUDA_ERROR_INVALID_VALUE));
        assert_eq!(ranges.of_device(0), (2, 0x2001));
        assert!(ranges.contains(0x2000, 0x2000) && ranges.contains(0x3fff, 1));
        // Two ranges that touch are two.
        assert!(!ranges.contains(0x1000, 0x1001) && !ranges.contains(0x4000, 2));
        for inside in [0x2001, 0x5000] {
            let removed = ranges.remove(inside);
            assert_eq!(removed, Err(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED));
        }
        ranges.remove(0x2000).expect("registered");
        ranges.remove_all(0);
        assert_eq!(
            (ranges.of_device(0), ranges.of_device(1)),
            ((0, 0), (1, 0x1000))
        );
    }
}
