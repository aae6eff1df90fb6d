//! The host memory behind simulated addresses: the one place that calls `mmap` and `memfd_create`.
//!
//! # Safety
//! A [`HostRange`] owns the addresses that it reserved until it is dropped, and changes only what lies
//! within them; nothing in Rust's own memory is ever there. Reading and writing simulated memory is left
//! to the callers, who hold raw addresses.

#[cfg(not(target_os = "linux"))]
pub(crate) use elsewhere::*;
#[cfg(target_os = "linux")]
pub(crate) use linux::*;

/// What the host may do at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protection {
    /// Nothing: touching it is a fault.
    None,
    /// Read.
    Read,
    /// Read and write.
    ReadWrite,
}

/// Which file a descriptor leads to.
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

    /// Whether simulated devices can exist here.
    pub(crate) const SUPPORTED: bool = true;

    /// The host's page size, in bytes.
    pub(crate) fn page_bytes() -> usize {
        // SAFETY: sysconf has no preconditions.
        let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        usize::try_from(bytes).unwrap_or(4096)
    }

    /// A sparse file in memory, which reads zero where nothing was written.
    #[derive(Debug)]
    pub(crate) struct HostFile(File);

    impl HostFile {
        /// A new file. A sealed one can never change its size, so mapping all of it stays safe
        /// whoever else holds it.
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

        /// A second descriptor of the file that `descriptor` leads to, with the name that it was made
        /// with. Files that are not sealed against shrinking are refused.
        pub(crate) fn import(descriptor: RawFd) -> Result<(Self, String)> {
            // SAFETY: F_GET_SEALS has no preconditions; a bad descriptor is an error.
            let seals = unsafe { libc::fcntl(descriptor, libc::F_GET_SEALS) };
            if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 {
                return Err(Error::from(std::io::ErrorKind::InvalidInput));
            }
            // SAFETY: the call above has shown that the descriptor is open, and the borrow ends with
            // this statement.
            let file =
                File::from(unsafe { BorrowedFd::borrow_raw(descriptor) }.try_clone_to_owned()?);
            let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
            Ok((Self(file), link.to_string_lossy().into_owned()))
        }

        /// A descriptor of the same file for another owner.
        pub(crate) fn duplicate(&self) -> Result<RawFd> {
            Ok(self.0.try_clone()?.into_raw_fd())
        }

        /// Which file this is.
        pub(crate) fn identity(&self) -> Result<FileIdentity> {
            let metadata = self.0.metadata()?;
            Ok(FileIdentity {
                device: metadata.dev(),
                inode: metadata.ino(),
            })
        }

        /// The file's size.
        pub(crate) fn bytes(&self) -> Result<u64> {
            Ok(self.0.metadata()?.len())
        }

        /// Gives the memory of a part back; it reads zero from then on.
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

    /// Reserved host addresses, which are given back when this is dropped.
    #[derive(Debug)]
    pub(crate) struct HostRange {
        address: usize,
        bytes: usize,
    }

    const RESERVED: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

    impl HostRange {
        /// Reserves inaccessible addresses, aligned to a power of two, at `hint` if it is free.
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
                    // SAFETY: these are the unused edges of the mapping made above. A failure leaves
                    // some addresses reserved until the process ends, which harms nothing.
                    unsafe { libc::munmap(from as *mut libc::c_void, to - from) };
                }
            }
            Ok(Self { address, bytes })
        }

        /// The first address.
        pub(crate) fn address(&self) -> u64 {
            self.address as u64
        }

        /// The host pointer at `offset`, if that many bytes from there lie within the range.
        fn part(&self, offset: usize, bytes: usize) -> Result<*mut libc::c_void> {
            if offset.checked_add(bytes).is_none_or(|end| end > self.bytes) {
                return Err(Error::from(std::io::ErrorKind::InvalidInput));
            }
            Ok((self.address + offset) as *mut libc::c_void)
        }

        /// Puts part of a file at `offset`, inaccessible until it is given a protection.
        pub(crate) fn map(
            &self,
            offset: usize,
            bytes: usize,
            file: &HostFile,
            file_offset: u64,
        ) -> Result<()> {
            let place = self.part(offset, bytes)?;
            // SAFETY: the place lies within this range, which we own; the file keeps its size for as
            // long as it is mapped.
            let mapped = unsafe {
                libc::mmap(
                    place,
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

        /// Makes part of the range inaccessible and empty again.
        pub(crate) fn clear(&self, offset: usize, bytes: usize) -> Result<()> {
            let place = self.part(offset, bytes)?;
            // SAFETY: the place lies within this range, which we own.
            let mapped = unsafe {
                libc::mmap(
                    place,
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

        /// Sets what the host may do in part of the range.
        pub(crate) fn protect(
            &self,
            offset: usize,
            bytes: usize,
            protection: Protection,
        ) -> Result<()> {
            let place = self.part(offset, bytes)?;
            let flags = match protection {
                Protection::None => libc::PROT_NONE,
                Protection::Read => libc::PROT_READ,
                Protection::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
            };
            // SAFETY: the place lies within this range, which we own, and no Rust reference is there.
            if unsafe { libc::mprotect(place, bytes, flags) } < 0 {
                return Err(Error::last_os_error());
            }
            Ok(())
        }
    }

    impl Drop for HostRange {
        fn drop(&mut self) {
            // SAFETY: the range is ours and is never used again. There is nobody to tell of a failure.
            unsafe { libc::munmap(self.address as *mut libc::c_void, self.bytes) };
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod elsewhere {
    //! The same interface where there is no such memory. No value of these types can exist.

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
