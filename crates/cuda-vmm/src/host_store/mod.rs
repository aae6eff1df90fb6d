//! Pinned host memory for copies of what devices hold: one budget, in big pieces that are kept.
//!
//! [`HostStore`] is what callers hold, and [`HostBytes`] what they reserve. `store` has the pieces
//! and says which thread may make or give back some; `books` has what is free; `piece` is memory
//! that is registered with the driver, and `host_memory` what the system maps.

mod books;
mod bytes;
mod host_memory;
mod options;
mod piece;
mod share_out;
mod stats;
mod store;

pub use bytes::HostBytes;
pub use options::HostStoreOptions;
pub(crate) use share_out::share_out;
pub use stats::HostStoreStats;

use crate::sync::Arc;
use crate::{Device, Result, VmmError};
use store::Store;

/// The unit of all sizes in a store: a huge page.
pub(crate) const UNIT_BYTES: usize = 2 << 20;

/// A budget of pinned host memory; a cheap clone.
///
/// Device memory that is to be kept while it is given back is copied here. The device copies from
/// and to pinned memory at the full speed of its link, beside other work. Pinning is dear. So the
/// store pins memory in big pieces when it is first reserved, and keeps it when it is given back. A
/// program makes one store for each driver. [`trim`](Self::trim) gives back what is not in use, and
/// the rest goes with the last clone and the last [`HostBytes`].
///
/// A piece is mapped (`mmap`), of huge pages if the system has them, touched by several threads and
/// registered for all contexts (`cuMemHostRegister`). It needs no memory of the device.
///
/// ```
/// # #[cfg(feature = "simulator")] {
/// use cuda_vmm::{Driver, HostStore, HostStoreOptions, VmmError};
///
/// let device = Driver::detect()?.device(0)?;
/// let options = HostStoreOptions::new().piece_bytes(8 << 20);
/// let store = HostStore::with_options(&device, 16 << 20, options)?;
/// let mut kept = store.reserve(10 << 20)?;
/// kept.write(0, b"a page that leaves the device")?;
/// let mut word = [0; 6];
/// kept.read(2, &mut word)?;
/// assert_eq!(&word, b"page t");
///
/// // More than the limit allows is refused before anything is done.
/// let refused = store.reserve(8 << 20).unwrap_err();
/// assert_eq!(
///     refused,
///     VmmError::HostStoreFull { needed_bytes: 8 << 20, in_use_bytes: 10 << 20, limit_bytes: 16 << 20 }
/// );
/// // What is given back stays pinned, for the next reservation.
/// drop(kept);
/// assert_eq!(store.stats().registered_bytes, 16 << 20);
/// assert_eq!(store.trim()?, 16 << 20);
/// # }
/// # Ok::<(), cuda_vmm::VmmError>(())
/// ```
///
/// Calls may be made from any thread. One thread at a time pins or unpins memory. Others wait for
/// it only if they need memory that is not pinned yet, or call [`trim`](Self::trim) or
/// [`set_limit_bytes`](Self::set_limit_bytes).
///
/// The system backs the memory when it is pinned. A limit of more than it can back may end the
/// process, as with any memory. Pinned memory is never swapped.
///
/// After a `fork` the child has none of the memory: there the calls return [`VmmError::Forked`], and
/// dropping does nothing.
#[derive(Debug, Clone)]
pub struct HostStore(Arc<Store>);

impl HostStore {
    /// Makes a store that pins at most `limit_bytes` bytes, rounded down to a multiple of 2 MiB. It
    /// pins nothing yet.
    ///
    /// `device` is one whose context the driver is called with. Copies of all devices of its driver
    /// may use the memory. The store keeps the device.
    ///
    /// # Errors
    /// [`VmmError::Forked`].
    pub fn new(device: &Device, limit_bytes: usize) -> Result<Self> {
        Self::with_options(device, limit_bytes, HostStoreOptions::new())
    }

    /// As [`new`](Self::new), with options.
    ///
    /// # Errors
    /// [`VmmError::ZeroSize`] or [`VmmError::Misaligned`] if the size of a piece is not a multiple
    /// of 2 MiB; [`VmmError::Forked`].
    pub fn with_options(
        device: &Device,
        limit_bytes: usize,
        options: HostStoreOptions,
    ) -> Result<Self> {
        device.driver().check_process()?;
        let options = options.check()?;
        Ok(Self(Arc::new(Store::new(device, limit_bytes, options))))
    }

    /// Reserves `bytes` bytes, of which the store counts the next multiple of 2 MiB.
    ///
    /// It takes what is free: one extent if there is one that is long enough, or else several. It
    /// pins memory for the rest.
    ///
    /// # Errors
    /// [`VmmError::ZeroSize`]; [`VmmError::HostStoreFull`] if the limit has no room, which is found
    /// before anything changes; [`VmmError::HostMemory`] if the system refuses memory;
    /// [`VmmError::Driver`] if the driver refuses to register it; [`VmmError::Forked`]. Whatever
    /// fails, nothing is reserved, and memory that was pinned by the call is unpinned. If the driver
    /// refuses that too, the memory stays in the store and is free.
    pub fn reserve(&self, bytes: usize) -> Result<HostBytes> {
        if bytes == 0 {
            return Err(VmmError::ZeroSize { what: "host bytes" });
        }
        // What cannot be rounded is more than any limit.
        let whole_bytes = bytes.checked_next_multiple_of(UNIT_BYTES);
        let places = self.0.reserve(whole_bytes.unwrap_or(usize::MAX))?;
        Ok(HostBytes::new(&self.0, places, bytes))
    }

    /// Unpins all pieces of which nothing is in use, and gives their memory back to the system
    /// (`cuMemHostUnregister`, `munmap`). Returns their bytes.
    ///
    /// # Errors
    /// The first [`VmmError::Driver`] if the driver refuses; such pieces stay in the store and can
    /// be used, and all others have gone. [`VmmError::Forked`].
    pub fn trim(&self) -> Result<usize> {
        self.0.trim()
    }

    /// Sets the limit in bytes, rounded down to a multiple of 2 MiB.
    ///
    /// What is in use stays, even above the limit. Then nothing can be reserved until enough was
    /// given back. While more is pinned than the limit allows, pieces of which nothing is in use are
    /// unpinned: by this call, and when bytes are given back. What the driver refuses to unpin stays
    /// in the store, and is tried again with the next bytes that are given back.
    ///
    /// # Errors
    /// [`VmmError::Forked`].
    pub fn set_limit_bytes(&self, bytes: usize) -> Result<()> {
        self.0.set_limit(bytes)
    }

    /// What the store holds now. Nothing in a forked process.
    pub fn stats(&self) -> HostStoreStats {
        self.0.stats()
    }

    /// The device that the store was made with.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// The options that the store was made with.
    pub fn options(&self) -> HostStoreOptions {
        self.0.options
    }
}
