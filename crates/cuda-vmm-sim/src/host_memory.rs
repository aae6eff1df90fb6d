//! The host memory behind simulated addresses. Only this module calls `mmap` and `memfd_create`.
//!
//! # Safety
//! A [`HostRange`] owns the addresses that it reserved until it is dropped, and changes only those.
//! Rust's own memory is never there. Callers with raw addresses read and write the simulated
//! memory.

#[cfg(not(target_os = "linux"))]
pub(crate) use elsewhere::*;
#[cfg(target_os = "linux")]
pub(crate) use linux::*;

/// The host's access to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protection {
    /// No access: an access is a fault.
    None,
    /// Read access.
    Read,
    /// Read and write access.
    ReadWrite,
}

/// Identifies the file of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FileIdentity {
    device: u64,
    inode: u64,
}

#[cfg(target_os = "linux")]
mod linux {
    use super::{FileIdentity, Protection};
    use std::ffi::CString;
    use std::fs::File;
    use std::io::{Error, Result};
    use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, RawFd};
    use std::os::unix::fs::MetadataExt;

    /// Whether this system supports simulated devices.
    pub(crate) const SUPPORTED: bool = true;

    /// Returns the host's page size, in bytes.
    pub(crate) fn page_bytes() -> usize {
        // SAFETY: sysconf has no preconditions.
        let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        usize::try_from(bytes).unwrap_or(4096)
    }

    /// A sparse file in memory. Unwritten parts read as zero.
    #[derive(Debug)]
    pub(crate) struct HostFile(File);

    impl HostFile {
        /// Makes a file. A sealed file can never change its size, so a mapping of all of it stays
        /// valid even if other processes hold it.
        pub(crate) fn create(name: &str, bytes: u64, sealed: bool) -> Result<Self> {
            let name = CString::new(name)?;
            // SAFETY: the name is a C string that outlives the call.
            let descriptor = unsafe {
                libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)
            };
            if descriptor < 0 {
                return Err(Error::last_os_error());
            }
            // SAFETY: the descriptor was just opened and nothing else owns it.
            let file = unsafe { File::from_raw_fd(descriptor) };
            file.set_len(bytes)?;
            if sealed {
                let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
                // SAFETY: the descriptor is open, and F_ADD_SEALS takes an integer.
                if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
                    return Err(Error::last_os_error());
                }
            }
            Ok(Self(file))
        }

        /// Opens the file of `descriptor` again, and returns it with its name. Fails unless the
        /// file is sealed against shrinking.
        pub(crate) fn import(descriptor: RawFd) -> Result<(Self, String)> {
            // SAFETY: F_GET_SEALS has no preconditions; a bad descriptor is an error.
            let seals = unsafe { libc::fcntl(descriptor, libc::F_GET_SEALS) };
            if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 {
                return Err(Error::from(std::io::ErrorKind::InvalidInput));
            }
            // SAFETY: the call above succeeded, so the descriptor is open. The borrow ends with
            // this statement.
            let file =
                File::from(unsafe { BorrowedFd::borrow_raw(descriptor) }.try_clone_to_owned()?);
            let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
            Ok((Self(file), link.to_string_lossy().into_owned()))
        }

        /// Duplicates the descriptor for another owner.
        pub(crate) fn duplicate(&self) -> Result<RawFd> {
            Ok(self.0.try_clone()?.into_raw_fd())
        }

        /// Returns the file's identity.
        pub(crate) fn identity(&self) -> Result<FileIdentity> {
            let metadata = self.0.metadata()?;
            Ok(FileIdentity {
                device: metadata.dev(),
                inode: metadata.ino(),
            })
        }

        /// Returns the file's size in bytes.
        pub(crate) fn bytes(&self) -> Result<u64> {
            Ok(self.0.metadata()?.len())
        }

        /// Frees the memory of a part of the file, which then reads as zero.
        pub(crate) fn punch(&self, offset: u64, bytes: usize) -> Result<()> {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            // SAFETY: fallocate touches the file only.
            let code = unsafe {
                libc::fallocate(
                    self.0.as_raw_fd(),
                    mode,
                    offset as libc::off_t,
                    bytes as libc::off_t,
                )
            };
            if code < 0 {
                Err(Error::last_os_error())
            } else {
                Ok(())
            }
        }
    }

    /// Reserved host addresses. Dropping it frees them.
    #[derive(Debug)]
    pub(crate) struct HostRange {
        address: usize,
        bytes: usize,
    }

    const RESERVED: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

    impl HostRange {
        /// Reserves addresses without access, aligned to a power of two, at `hint` if that is free.
        pub(crate) fn reserve(bytes: usize, alignment: usize, hint: usize) -> Result<Self> {
            let alignment = alignment.max(page_bytes());
            let no_memory = || Error::from_raw_os_error(libc::ENOMEM);
            let slack = alignment - page_bytes();
            let asked = bytes.checked_add(slack).ok_or_else(no_memory)?;
            // SAFETY: without MAP_FIXED the kernel places the new mapping where nothing else is.
            let start = unsafe {
                libc::mmap(
                    hint as *mut libc::c_void,
                    asked,
                    libc::PROT_NONE,
                    RESERVED,
                    -1,
                    0,
                )
            };
            if start == libc::MAP_FAILED {
                return Err(Error::last_os_error());
            }
            let start = start as usize;
            let address = start.next_multiple_of(alignment);
            for (from, to) in [(start, address), (address + bytes, start + asked)] {
                if from < to {
                    // SAFETY: these are the unused edges of the mapping made above. If it fails,
                    // some addresses stay reserved until the process ends, which is harmless.
                    unsafe { libc::munmap(from as *mut libc::c_void, to - from) };
                }
            }
            Ok(Self { address, bytes })
        }

        /// Returns the first address.
        pub(crate) fn address(&self) -> u64 {
            self.address as u64
        }

        /// Returns the host pointer at `offset`. Fails unless `bytes` bytes from there lie within
        /// the range.
        fn part(&self, offset: usize, bytes: usize) -> Result<*mut libc::c_void> {
            if offset.checked_add(bytes).is_none_or(|end| end > self.bytes) {
                return Err(Error::from(std::io::ErrorKind::InvalidInput));
            }
            Ok((self.address + offset) as *mut libc::c_void)
        }

        /// Maps a part of a file at `offset`, without access until `protect` is called.
        pub(crate) fn map(
            &self,
            offset: usize,
            bytes: usize,
            file: &HostFile,
            file_offset: u64,
        ) -> Result<()> {
            let pointer = self.part(offset, bytes)?;
            // SAFETY: the addresses lie within this range, which owns them. The file keeps its size
            // as long as it is mapped.
            let mapped = unsafe {
                libc::mmap(
                    pointer,
                    bytes,
                    libc::PROT_NONE,
                    libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
                    file.0.as_raw_fd(),
                    file_offset as libc::off_t,
                )
            };
            if mapped == libc::MAP_FAILED {
                Err(Error::last_os_error())
            } else {
                Ok(())
            }
        }

        /// Unmaps a part of the range and removes access to it.
        pub(crate) fn clear(&self, offset: usize, bytes: usize) -> Result<()> {
            let pointer = self.part(offset, bytes)?;
            // SAFETY: the addresses lie within this range, which owns them.
            let mapped = unsafe {
                libc::mmap(
                    pointer,
                    bytes,
                    libc::PROT_NONE,
                    RESERVED | libc::MAP_FIXED,
                    -1,
                    0,
                )
            };
            if mapped == libc::MAP_FAILED {
                Err(Error::last_os_error())
            } else {
                Ok(())
            }
        }

        /// Sets the host's access to a part of the range.
        pub(crate) fn protect(
            &self,
            offset: usize,
            bytes: usize,
            protection: Protection,
        ) -> Result<()> {
            let pointer = self.part(offset, bytes)?;
            let flags = match protection {
                Protection::None => libc::PROT_NONE,
                Protection::Read => libc::PROT_READ,
                Protection::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
            };
            // SAFETY: the addresses lie within this range, which owns them, and no Rust reference
            // points there.
            if unsafe { libc::mprotect(pointer, bytes, flags) } < 0 {
                return Err(Error::last_os_error());
            }
            Ok(())
        }
    }

    impl Drop for HostRange {
        fn drop(&mut self) {
            // SAFETY: this object owns the range, which is never used again. A failure cannot be
            // reported.
            unsafe { libc::munmap(self.address as *mut libc::c_void, self.bytes) };
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod elsewhere {
    //! The same interface for systems without such memory. Its types have no values.

    use super::{FileIdentity, Protection};
    use std::convert::Infallible;
    use std::io::{Error, ErrorKind, Result};

    pub(crate) const SUPPORTED: bool = false;

    pub(crate) fn page_bytes() -> usize {
        4096
    }

    fn unsupported<T>() -> Result<T> {
        Err(Error::from(ErrorKind::Unsupported))
    }

    #[derive(Debug)]
    pub(crate) struct HostFile(Infallible);

    impl HostFile {
        pub(crate) fn create(_name: &str, _bytes: u64, _sealed: bool) -> Result<Self> {
            unsupported()
        }

        pub(crate) fn import(_descriptor: i32) -> Result<(Self, String)> {
            unsupported()
        }

        pub(crate) fn duplicate(&self) -> Result<i32> {
            match self.0 {}
        }

        pub(crate) fn identity(&self) -> Result<FileIdentity> {
            match self.0 {}
        }

        pub(crate) fn bytes(&self) -> Result<u64> {
            match self.0 {}
        }

        pub(crate) fn punch(&self, _offset: u64, _bytes: usize) -> Result<()> {
            match self.0 {}
        }
    }

    #[derive(Debug)]
    pub(crate) struct HostRange(Infallible);

    impl HostRange {
        pub(crate) fn reserve(_bytes: usize, _alignment: usize, _hint: usize) -> Result<Self> {
            unsupported()
        }

        pub(crate) fn address(&self) -> u64 {
            match self.0 {}
        }

        pub(crate) fn map(
            &self,
            _offset: usize,
            _bytes: usize,
            _file: &HostFile,
            _file_offset: u64,
        ) -> Result<()> {
            match self.0 {}
        }

        pub(crate) fn clear(&self, _offset: usize, _bytes: usize) -> Result<()> {
            match self.0 {}
        }

        pub(crate) fn protect(
            &self,
            _offset: usize,
            _bytes: usize,
            _protection: Protection,
        ) -> Result<()> {
            match self.0 {}
        }
    }
}
