//! The resources that were created through an interposer and not freed. Pure bookkeeping.

use crate::Books;
use std::collections::{BTreeMap, HashMap, HashSet};

/// Objects of one kind that are created and destroyed, by handle.
pub(super) type Handles = HashSet<usize>;

#[derive(Clone, Copy, Debug, Default)]
struct Memory {
    bytes: usize,
    /// Creates, imports and retains that were not released.
    references: usize,
    mappings: usize,
}

/// Addresses with memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mapped {
    handle: u64,
    bytes: usize,
}

/// All resources that are held.
#[derive(Debug, Default)]
pub(super) struct Holdings {
    memory: HashMap<u64, Memory>,
    reservations: HashMap<u64, usize>,
    mappings: BTreeMap<u64, Mapped>,
    plain: HashMap<u64, usize>,
    registered: HashMap<usize, usize>,
    pub(super) streams: Handles,
    pub(super) events: Handles,
    pub(super) graphs: Handles,
    pub(super) context_retains: usize,
}

impl Holdings {
    /// Adds a reference to the memory of a handle. `bytes` is 0 if unknown: the size of imported
    /// memory is known once it is mapped.
    pub(super) fn add_reference(&mut self, handle: u64, bytes: usize) {
        self.entry(handle, bytes).references += 1;
    }

    fn entry(&mut self, handle: u64, bytes: usize) -> &mut Memory {
        let memory = self.memory.entry(handle).or_default();
        memory.bytes = memory.bytes.max(bytes);
        memory
    }

    /// Removes a reference, and returns the size of the memory in bytes if there was one.
    pub(super) fn release(&mut self, handle: u64) -> Option<usize> {
        let memory = self.memory.get_mut(&handle)?;
        let bytes = memory.bytes;
        memory.references = memory.references.checked_sub(1)?;
        self.remove_unused(handle);
        Some(bytes)
    }

    fn remove_unused(&mut self, handle: u64) {
        let unused = |memory: &Memory| memory.references + memory.mappings == 0;
        if self.memory.get(&handle).is_some_and(unused) {
            self.memory.remove(&handle);
        }
    }

    pub(super) fn map(&mut self, address: u64, bytes: usize, handle: u64) {
        self.entry(handle, bytes).mappings += 1;
        self.mappings.insert(address, Mapped { handle, bytes });
    }

    /// Removes the mappings that begin in a range.
    pub(super) fn unmap(&mut self, address: u64, bytes: usize) -> Vec<(u64, Mapped)> {
        let end = address.saturating_add(bytes as u64);
        let inside = self.mappings.range(address..end);
        let inside: Vec<_> = inside.map(|(at, mapped)| (*at, *mapped)).collect();
        for (at, mapped) in &inside {
            self.mappings.remove(at);
            if let Some(memory) = self.memory.get_mut(&mapped.handle) {
                memory.mappings = memory.mappings.saturating_sub(1);
            }
            self.remove_unused(mapped.handle);
        }
        inside
    }

    /// Undoes an [`unmap`](Self::unmap) that the driver refused.
    pub(super) fn map_again(&mut self, mappings: Vec<(u64, Mapped)>) {
        for (address, mapped) in mappings {
            self.map(address, mapped.bytes, mapped.handle);
        }
    }

    pub(super) fn reserve(&mut self, address: u64, bytes: usize) {
        self.reservations.insert(address, bytes);
    }

    pub(super) fn free(&mut self, address: u64) -> Option<usize> {
        self.reservations.remove(&address)
    }

    pub(super) fn plain_alloc(&mut self, address: u64, bytes: usize) {
        self.plain.insert(address, bytes);
    }

    pub(super) fn plain_free(&mut self, address: u64) -> Option<usize> {
        self.plain.remove(&address)
    }

    pub(super) fn register(&mut self, address: usize, bytes: usize) {
        self.registered.insert(address, bytes);
    }

    pub(super) fn unregister(&mut self, address: usize) -> Option<usize> {
        self.registered.remove(&address)
    }

    pub(super) fn books(&self) -> Books {
        let plain_bytes = self.plain.values().sum::<usize>();
        Books {
            physical_bytes: self
                .memory
                .values()
                .map(|memory| memory.bytes)
                .sum::<usize>()
                + plain_bytes,
            handles: self.memory.values().map(|memory| memory.references).sum(),
            reservations: self.reservations.len(),
            reserved_bytes: self.reservations.values().sum(),
            mappings: self.mappings.len(),
            mapped_bytes: self.mappings.values().map(|mapped| mapped.bytes).sum(),
            plain_allocations: self.plain.len(),
            plain_bytes,
            host_registrations: self.registered.len(),
            host_registered_bytes: self.registered.values().sum(),
            streams: self.streams.len(),
            events: self.events.len(),
            graphs: self.graphs.len(),
            context_retains: self.context_retains,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_held_while_it_is_referred_to_or_mapped() {
        let mut holdings = Holdings::default();
        holdings.add_reference(7, 4096);
        holdings.map(0x1000, 4096, 7);
        holdings.map(0x9000, 4096, 7);
        assert_eq!(holdings.release(7), Some(4096));
        assert_eq!(holdings.release(7), None, "no reference is left");
        let books = holdings.books();
        assert_eq!((books.physical_bytes, books.handles), (4096, 0));
        assert_eq!((books.mappings, books.mapped_bytes), (2, 8192));
        let one = holdings.unmap(0x1000, 4096);
        assert_eq!((one.len(), holdings.books().physical_bytes), (1, 4096));
        let other = holdings.unmap(0, usize::MAX);
        assert_eq!(holdings.books(), Books::default());
        // The driver refused both, so both are added again.
        holdings.map_again(one);
        holdings.map_again(other);
        assert_eq!(holdings.books().mapped_bytes, 8192);
    }

    #[test]
    fn what_has_an_address_is_known_by_it() {
        let mut holdings = Holdings::default();
        holdings.reserve(0x1000, 64);
        holdings.plain_alloc(0x2000, 32);
        let books = holdings.books();
        assert_eq!((books.reservations, books.reserved_bytes), (1, 64));
        assert_eq!((books.plain_allocations, books.physical_bytes), (1, 32));
        holdings.register(0x3000, 16);
        let books = holdings.books();
        let registered = (books.host_registrations, books.host_registered_bytes);
        assert_eq!(registered, (1, 16));
        assert_eq!(holdings.unregister(0x1000), None);
        assert_eq!(holdings.unregister(0x3000), Some(16));
        assert_eq!(holdings.free(0x2000), None);
        assert_eq!(holdings.free(0x1000), Some(64));
        assert_eq!(holdings.plain_free(0x2000), Some(32));
        assert_eq!(holdings.books(), Books::default());
    }
}
