//! Filling memory of a pool with what host code reads or makes, through pinned memory.
//!
//! # Safety
//! The pool's bytes are pinned, so they stay mapped until no copy to them runs. A buffer is written
//! by the one thread that has taken it, after the copy from it has ended. The host bytes go back to
//! their store when no copy from them runs, or stay with the device.
#![allow(unsafe_code)]

use super::VirtualMemoryPool;
use crate::engine::GraphPin;
use crate::host_store::{UNIT_BYTES, share_out};
use crate::size::Extent;
use crate::sync::{Mutex, PoisonError};
use crate::{Fence, HostBytes, HostStore, Result, Stream, VmmError};
use core::result;
use std::collections::VecDeque;

/// How many buffers each thread has: one to fill, and others from which copies run.
const BUFFERS: usize = 4;

impl VirtualMemoryPool {
    /// Fills `bytes` live bytes at `offset` with what `read` writes to pinned memory. `read` gets the
    /// offset in the pool of the first byte of a slice, and fills all of the slice.
    ///
    /// It is called once for each part of at most 2 MiB, in any order, by as many threads as
    /// [`HostStoreOptions::threads`](crate::HostStoreOptions::threads) of the store says, while the
    /// device copies other parts (`cuMemcpyHtoDAsync`, on a private stream). The store gives four
    /// parts for each thread, and has them back when the call returns. All bytes are there then.
    ///
    /// Work that uses the same bytes is to be queued before or after the call. What it would read
    /// meanwhile is undefined.
    ///
    /// # Errors
    /// The first error of `read`, after which no other part is begun. [`VmmError::ZeroSize`],
    /// [`VmmError::Overflow`], [`VmmError::OutOfRange`]; [`VmmError::NotMapped`] if some of the bytes
    /// are not live; the errors of [`HostStore::reserve`]; [`VmmError::WrongDriver`] if the store is
    /// of another driver; [`VmmError::Driver`], [`VmmError::Asleep`], [`VmmError::Closed`],
    /// [`VmmError::Forked`]. After an error the bytes may hold anything.
    ///
    /// # Panics
    /// If `read` does, after all copies have ended.
    ///
    /// ```
    /// # #[cfg(feature = "simulator")] {
    /// use cuda_vmm::{Driver, HostStore, VirtualMemoryPool, VmmError};
    ///
    /// let device = Driver::detect()?.device(0)?;
    /// let store = HostStore::new(&device, 64 << 20)?;
    /// let pool = VirtualMemoryPool::new(&device, 1 << 30, 2 << 20)?;
    /// pool.allocate(0, 10 << 20)?;
    /// pool.fill(0, 10 << 20, &store, |offset, bytes| {
    ///     bytes.fill((offset >> 20) as u8); // from a file, for instance
    ///     Ok::<_, VmmError>(())
    /// })?;
    /// # }
    /// # Ok::<(), cuda_vmm::VmmError>(())
    /// ```
    pub fn fill<E: From<VmmError> + Send>(
        &self,
        offset: usize,
        bytes: usize,
        store: &HostStore,
        read: impl Fn(usize, &mut [u8]) -> result::Result<(), E> + Sync,
    ) -> result::Result<(), E> {
        let extent = Extent::new(offset, bytes, self.capacity_bytes())?.range();
        let (parts, threads) = (bytes.div_ceil(UNIT_BYTES), store.options().threads.max(1));
        let filling = Filling::begin(self, (offset, bytes), store, parts.min(BUFFERS * threads))?;
        let failed = Mutex::new(None);
        let first_failure = || failed.lock().unwrap_or_else(PoisonError::into_inner);
        share_out(parts, threads, |part| {
            if first_failure().is_some() {
                return;
            }
            let first = offset + part * UNIT_BYTES;
            let last = extent.end.min(first + UNIT_BYTES);
            let filled = filling.fill(self.base_address(), first..last, &read);
            if let Err(error) = filled {
                first_failure().get_or_insert(error);
            }
        });
        let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
        failed.map_or(Ok(()), Err)?;
        Ok(filling.finish()?)
    }
}

/// Pinned memory of at most [`UNIT_BYTES`] bytes, and the end of the copy from it.
#[derive(Debug)]
struct Buffer {
    address: usize,
    copied: Option<Fence>,
}

/// A call that fills memory. Dropping it waits for the copies.
#[derive(Debug)]
struct Filling {
    stream: Stream,
    free: Mutex<VecDeque<Buffer>>,
    /// The buffers' memory and the pin of the target, which go last.
    held: Option<(HostBytes, GraphPin)>,
}

impl Filling {
    fn begin(
        pool: &VirtualMemoryPool,
        (offset, bytes): (usize, usize),
        store: &HostStore,
        buffers: usize,
    ) -> Result<Self> {
        let device = pool.engine().device();
        if !device.driver().is_same(store.device().driver()) {
            return Err(VmmError::WrongDriver);
        }
        let pin = pool.pin_for_graph(offset, bytes)?;
        let host = store.reserve(buffers * UNIT_BYTES)?;
        // Extents are of whole units.
        let units = host.parts(0, host.bytes())?;
        let units =
            units.flat_map(|(address, bytes)| (address..address + bytes).step_by(UNIT_BYTES));
        let free = units.map(|address| Buffer {
            address,
            copied: None,
        });
        Ok(Self {
            stream: Stream::new(device)?,
            free: Mutex::new(free.collect()),
            held: Some((host, pin)),
        })
    }

    /// Fills a part of the pool's bytes by way of a buffer.
    fn fill<E: From<VmmError>>(
        &self,
        base: u64,
        bytes: core::ops::Range<usize>,
        read: impl Fn(usize, &mut [u8]) -> result::Result<(), E>,
    ) -> result::Result<(), E> {
        let free = || self.free.lock().unwrap_or_else(PoisonError::into_inner);
        // The one whose copy was queued first. Only after a failure there is none.
        let Some(mut buffer) = free().pop_front() else {
            return Ok(());
        };
        if let Some(copied) = buffer.copied.take() {
            copied.wait()?;
        }
        let target = core::ptr::with_exposed_provenance_mut::<u8>(buffer.address);
        // SAFETY: the unit is mapped and initialised memory of this call's host bytes. This thread
        // alone has the buffer, and no copy from it runs.
        let target = unsafe { core::slice::from_raw_parts_mut(target, bytes.len()) };
        read(bytes.start, target)?;
        // SAFETY: the pin keeps the pool's bytes mapped, and nothing writes to the buffer before
        // its fence is past.
        unsafe { (self.stream).copy_in(base + bytes.start as u64, buffer.address, bytes.len()) }?;
        buffer.copied = Some(self.stream.record()?);
        free().push_back(buffer);
        Ok(())
    }

    /// Waits for all copies.
    fn finish(self) -> Result<()> {
        self.stream.synchronize()
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        let finished = self.stream.synchronize();
        let is_past = finished.map_or_else(|error| error.is_poisoned(), |()| true);
        if let (false, Some((host, pin))) = (is_past, self.held.take()) {
            // The device may still copy: the host bytes stay with it, and the target stays pinned.
            self.stream.device().keep_unfinished(vec![host]);
            core::mem::forget(pin);
        }
    }
}
