//! Host memory in big pieces: anonymous, of huge pages if the system has them, and not inherited by
//! a forked process.
//!
//! # Safety
//! A [`HostMemory`] owns the addresses of one mapping that it made, until it is dropped. It hands
//! out the address as a number. Nothing of Rust's own is ever there.
#![allow(unsafe_code)]

use super::UNIT_BYTES;
use super::share_out::share_out;
use crate::{Result, VmmError};

/// Mapped host memory. Dropping it unmaps it (`munmap`).
#[derive(Debug)]
pub(super) struct HostMemory {
    /// A multiple of [`UNIT_BYTES`].
    address: usize,
    bytes: usize,
}

/// The smallest page of any system. A write at each multiple of it touches every page.
const SMALLEST_PAGE_BYTES: usize = 4096;

impl HostMemory {
    pub(super) fn address(&self) -> usize {
        self.address
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Writes to every page, so that the system backs it, by several threads.
    fn touch(&self, threads: usize) {
        share_out(self.bytes / UNIT_BYTES, threads, |part| {
            let first = self.address + part * UNIT_BYTES;
            for address in (first..first + UNIT_BYTES).step_by(SMALLEST_PAGE_BYTES) {
                let byte = core::ptr::with_exposed_provenance_mut::<u8>(address);
                // SAFETY: the byte is in this mapping, and no other code has its address yet. Each
                // part is touched by one thread.
                unsafe { byte.write_volatile(0) };
            }
        });
    }

    /// Does not unmap the memory. For a forked process, in which other memory may be there.
    pub(super) fn leave(self) {
        core::mem::forget(self);
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use super::*;
    use core::ffi::c_int;
    use core::ptr::null_mut;

    const KIND: c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

    fn failed(call: &'static str, bytes: usize) -> VmmError {
        VmmError::HostMemory {
            call,
            bytes,
            reason: std::io::Error::last_os_error().to_string().into(),
        }
    }

    impl HostMemory {
        /// Maps `bytes` bytes, a multiple of [`UNIT_BYTES`], and has the system back them.
        pub(in crate::host_store) fn new(bytes: usize, threads: usize) -> Result<Self> {
            let memory = Self::map(bytes)?;
            let address = core::ptr::with_exposed_provenance_mut(memory.address);
            // SAFETY: advice on a whole mapping that is this object's. A system without huge pages
            // refuses it, and then the pages are small ones.
            unsafe { libc::madvise(address, bytes, libc::MADV_HUGEPAGE) };
            // SAFETY: as above. A child has nothing at these addresses, and this crate touches
            // nothing in a child.
            if unsafe { libc::madvise(address, bytes, libc::MADV_DONTFORK) } != 0 {
                return Err(failed("madvise", bytes));
            }
            memory.touch(threads);
            Ok(memory)
        }

        /// Maps memory at a multiple of [`UNIT_BYTES`].
        fn map(bytes: usize) -> Result<Self> {
            // With one unit more there is a multiple of the unit in it.
            let mapped_bytes = bytes.saturating_add(UNIT_BYTES);
            let access = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: without MAP_FIXED the system chooses addresses at which nothing is.
            let start = unsafe { libc::mmap(null_mut(), mapped_bytes, access, KIND, -1, 0) };
            if start == libc::MAP_FAILED {
                return Err(failed("mmap", bytes));
            }
            let start = start.expose_provenance();
            let address = start.next_multiple_of(UNIT_BYTES);
            let edges = [(start, address), (address + bytes, start + mapped_bytes)];
            for (from, to) in edges.into_iter().filter(|(from, to)| from < to) {
                // SAFETY: the edges are of the mapping made above, and not part of the result. If
                // it fails, addresses without memory stay mapped.
                unsafe { libc::munmap(core::ptr::with_exposed_provenance_mut(from), to - from) };
            }
            Ok(Self { address, bytes })
        }

        /// Gives the memory back and keeps the addresses, for good. For memory that the driver may
        /// know for ever: no other memory must come to these addresses.
        pub(in crate::host_store) fn abandon(self) {
            let address = core::ptr::with_exposed_provenance_mut(self.address);
            let kind = KIND | libc::MAP_FIXED | libc::MAP_NORESERVE;
            // SAFETY: the addresses are this object's, whole, and nothing uses them. If it fails,
            // the memory stays as it is.
            unsafe { libc::mmap(address, self.bytes, libc::PROT_NONE, kind, -1, 0) };
            self.leave();
        }
    }

    impl Drop for HostMemory {
        fn drop(&mut self) {
            let address = core::ptr::with_exposed_provenance_mut(self.address);
            // SAFETY: the mapping is this object's, whole, and nothing uses it any more. A failure
            // cannot be reported, and the memory then stays.
            unsafe { libc::munmap(address, self.bytes) };
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod elsewhere {
    use super::*;

    impl HostMemory {
        /// Fails.
        pub(in crate::host_store) fn new(bytes: usize, threads: usize) -> Result<Self> {
            // Keeps the code above in use.
            Self {
                address: 0,
                bytes: 0,
            }
            .touch(threads);
            Err(VmmError::HostMemory {
                call: "mmap",
                bytes,
                reason: "supported on Linux only".into(),
            })
        }

        pub(in crate::host_store) fn abandon(self) {
            self.leave();
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// The line of a field in the system's account of the mapping at an address.
    fn of_mapping(address: usize, field: &str) -> Option<String> {
        let maps = std::fs::read_to_string("/proc/self/smaps").expect("the maps");
        let mut lines = maps.lines();
        let within = |line: &str| {
            let (from, to) = line.split(' ').next()?.split_once('-')?;
            let [from, to] = [from, to].map(|text| usize::from_str_radix(text, 16));
            Some((from.ok()?..to.ok()?).contains(&address))
        };
        lines.find(|line| within(line) == Some(true))?;
        let line = lines.find(|line| line.starts_with(field))?;
        Some(line[field.len()..].trim().to_owned())
    }

    #[test]
    fn memory_is_aligned_backed_and_not_inherited() {
        for threads in [0, 1, 3] {
            let memory = HostMemory::new(3 * UNIT_BYTES, threads).expect("memory");
            assert_eq!(memory.address() % UNIT_BYTES, 0);
            assert_eq!(memory.bytes(), 3 * UNIT_BYTES);
            let flags = of_mapping(memory.address(), "VmFlags:").expect("the mapping");
            assert!(flags.split(' ').any(|flag| flag == "dc"), "{flags}");
            let resident = of_mapping(memory.address(), "Rss:").expect("the mapping");
            // The system may join it with a neighbour, of another test.
            let kib = resident.trim_end_matches(" kB").parse::<usize>();
            let kib = kib.expect("a number");
            assert!(kib >= 3 * UNIT_BYTES / 1024, "{resident}");
        }
    }

    #[test]
    fn what_is_abandoned_has_no_memory_and_no_access() {
        let memory = HostMemory::new(UNIT_BYTES, 1).expect("memory");
        let address = memory.address();
        memory.abandon();
        let flags = of_mapping(address, "VmFlags:").expect("the addresses are kept");
        assert!(!flags.split(' ').any(|flag| flag == "rd"), "{flags}");
        assert_eq!(of_mapping(address, "Rss:").as_deref(), Some("0 kB"));
    }

    #[test]
    fn more_than_there_are_addresses_is_refused_with_the_call_and_the_bytes() {
        let bytes = 1 << 60;
        let error = HostMemory::new(bytes, 1).expect_err("no such room");
        let VmmError::HostMemory {
            call,
            bytes: named,
            reason,
        } = error
        else {
            panic!("{error:?}");
        };
        assert_eq!((call, named), ("mmap", bytes));
        assert!(!reason.is_empty());
    }
}
