//! One elastic range.
//!
//! # Safety
//! Nothing unsafe is done here. [`VirtualMemoryPool::compact_shared`] is unsafe to call: its caller
//! promises what the `&mut` of [`VirtualMemoryPool::compact`] stands for.
#![allow(unsafe_code)]

use super::PoolStats;
use crate::engine::{
    Account, CompactReport, Engine, EngineOptions, GraphPin, LeaseToken, Patience, Place,
    PoolCounters, PoolOptions, RangeHandle, RangeStats,
};
use crate::sync::Arc;
use crate::{Device, Fence, Result, Stream};
use core::ops;

/// A range of device addresses with memory behind only those pages that are in use.
///
/// Bytes are *live* from `allocate` to `deallocate`. A page is backed while any byte in it is live.
/// So neighbours may share a page, and a cache can grow token by token. The contents of bytes are
/// undefined until written.
///
/// Freed pages are given back when the device has finished with them. That is after the work then
/// queued on the streams that [`use_stream`](Self::use_stream) named, or after all work of the
/// context if it named none. Only `allocate` waits for that, and only if it needs those very pages.
///
/// That is about pages. Bytes that are freed in a page which a neighbour keeps live can be
/// allocated again at once, while work on them may still run: a caller that hands such bytes from
/// one stream to another orders the two.
///
/// All methods take `&self`; a pool can be shared between threads. Dropping it waits for the device
/// and gives everything back.
#[derive(Debug)]
pub struct VirtualMemoryPool {
    pub(super) range: RangeHandle,
    base_address: u64,
    capacity_bytes: usize,
    page_bytes: usize,
}

impl VirtualMemoryPool {
    /// A pool of `capacity_bytes` of addresses, with an engine of its own whose budget is the
    /// device's memory.
    ///
    /// `page_bytes` is a power of two of at least the device's granularity. The capacity may be any
    /// number and may exceed the device's memory; the addresses reserved are rounded up to whole
    /// pages.
    ///
    /// # Errors
    /// [`VmmError::InvalidPageSize`](crate::VmmError::InvalidPageSize);
    /// [`VmmError::ZeroSize`](crate::VmmError::ZeroSize),
    /// [`VmmError::Overflow`](crate::VmmError::Overflow) for the capacity;
    /// [`VmmError::Driver`](crate::VmmError::Driver) if the addresses cannot be had.
    pub fn new(device: &Device, capacity_bytes: usize, page_bytes: usize) -> Result<Self> {
        let engine = Engine::new(device, EngineOptions::new())?;
        Self::on_engine(&engine, capacity_bytes, page_bytes)
    }

    /// A pool that shares an engine's budget with the other ranges on it.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn on_engine(engine: &Engine, capacity_bytes: usize, page_bytes: usize) -> Result<Self> {
        Self::with_options(engine, capacity_bytes, page_bytes, PoolOptions::new())
    }

    /// A pool on an engine, with options.
    ///
    /// # Errors
    /// As [`new`](Self::new); [`VmmError::QuotaUnsatisfiable`](crate::VmmError::QuotaUnsatisfiable)
    /// if `ahead_bytes_min` is above `ahead_bytes_max`.
    pub fn with_options(
        engine: &Engine,
        capacity_bytes: usize,
        page_bytes: usize,
        options: PoolOptions,
    ) -> Result<Self> {
        let account = engine.own_account()?;
        Self::on_account(&account, capacity_bytes, page_bytes, options)
    }

    /// A pool on an account, which is charged for the pool's memory.
    ///
    /// # Errors
    /// As [`with_options`](Self::with_options); [`VmmError::Closed`](crate::VmmError::Closed) if
    /// the account is closed.
    pub fn on_account(
        account: &Account,
        capacity_bytes: usize,
        page_bytes: usize,
        options: PoolOptions,
    ) -> Result<Self> {
        let (range, base_address) =
            RangeHandle::open(account, capacity_bytes, page_bytes, options)?;
        Ok(Self {
            range,
            base_address,
            capacity_bytes,
            page_bytes,
        })
    }

    /// Makes `bytes` bytes at `offset` live and returns their address. Edges need not be aligned to
    /// pages: exactly the bytes named are live, and every page that they touch is backed.
    ///
    /// It waits for retiring memory only, and only if that is enough. If
    /// [`use_stream`](Self::use_stream) has named streams, it takes pages back at once that retire
    /// at these very addresses. The streams are made to wait for what the device still does with
    /// the pages (`cuStreamWaitEvent`; no call if one stream is named). So new work on any named
    /// stream comes after it. While a [`CaptureGuard`](crate::CaptureGuard) lives, the caller
    /// waits.
    ///
    /// # Errors
    /// [`VmmError::ZeroSize`](crate::VmmError::ZeroSize),
    /// [`VmmError::Overflow`](crate::VmmError::Overflow),
    /// [`VmmError::OutOfRange`](crate::VmmError::OutOfRange);
    /// [`VmmError::AlreadyMapped`](crate::VmmError::AlreadyMapped) if some of the bytes are live,
    /// [`VmmError::Leased`](crate::VmmError::Leased) if some were freed while they were leased and
    /// still are; [`VmmError::OutOfPhysicalMemory`](crate::VmmError::OutOfPhysicalMemory) if the
    /// budget has no room, [`VmmError::Driver`](crate::VmmError::Driver) if the device has none or
    /// a call failed; [`VmmError::Quarantined`](crate::VmmError::Quarantined),
    /// [`VmmError::Closed`](crate::VmmError::Closed). After an error everything is as before.
    pub fn allocate(&self, offset: usize, bytes: usize) -> Result<u64> {
        self.take(Place::At(offset), bytes, &Patience::Retiring)
    }

    /// Allocates like [`allocate`](Self::allocate), but never waits for the device. If memory is
    /// retiring, it returns an error for which [`is_retryable`](crate::VmmError::is_retryable)
    /// holds, and which says how much is retiring.
    ///
    /// # Errors
    /// As [`allocate`](Self::allocate).
    pub fn try_allocate(&self, offset: usize, bytes: usize) -> Result<u64> {
        self.take(Place::At(offset), bytes, &Patience::None)
    }

    /// Allocates like [`allocate`](Self::allocate), at the lowest unused address that is a multiple
    /// of `alignment` bytes from the base.
    ///
    /// # Errors
    /// As [`allocate`](Self::allocate);
    /// [`VmmError::OutOfVirtualMemory`](crate::VmmError::OutOfVirtualMemory) if no run of unused
    /// addresses is long enough; [`VmmError::ZeroSize`](crate::VmmError::ZeroSize) for an alignment
    /// of 0.
    pub fn allocate_anywhere(&self, bytes: usize, alignment: usize) -> Result<u64> {
        if alignment == 0 {
            return Err(crate::VmmError::ZeroSize { what: "alignment" });
        }
        self.take(Place::FirstFit { alignment }, bytes, &Patience::Retiring)
    }

    pub(super) fn take(&self, place: Place, bytes: usize, patience: &Patience) -> Result<u64> {
        let offset = self.range.allocate(place, bytes, patience)?;
        Ok(self.base_address + offset as u64)
    }

    /// Frees `bytes` bytes at `offset`. All of them must be live, but they need not come from one
    /// `allocate`. It never waits for the device.
    ///
    /// # Errors
    /// [`VmmError::ZeroSize`](crate::VmmError::ZeroSize),
    /// [`VmmError::Overflow`](crate::VmmError::Overflow),
    /// [`VmmError::OutOfRange`](crate::VmmError::OutOfRange);
    /// [`VmmError::NotMapped`](crate::VmmError::NotMapped) if some of the bytes are not live, and
    /// then none is freed.
    pub fn deallocate(&self, offset: usize, bytes: usize) -> Result<()> {
        self.range.deallocate(&[(offset, bytes)])
    }

    /// Frees several parts at once, each given by its offset and its bytes, in any order. It never
    /// waits for the device.
    ///
    /// Their memory retires behind the same fences: one event on each stream that was named,
    /// however many parts there are. So a caller that frees all sequences that end in a step
    /// records once. An empty list does nothing.
    ///
    /// # Errors
    /// As [`deallocate`](Self::deallocate), for the first part that fails;
    /// [`VmmError::NotMapped`](crate::VmmError::NotMapped) also for a part that has bytes in common
    /// with one before it in the order of addresses. After an error none is freed.
    pub fn deallocate_many(&self, parts: &[(usize, usize)]) -> Result<()> {
        match parts.is_empty() {
            true => Ok(()),
            false => self.range.deallocate(parts),
        }
    }

    /// Names a stream whose work uses this pool's memory. Freed memory then waits for the named
    /// streams only. Name each stream before it uses the memory: freed memory does not wait for
    /// work on others.
    ///
    /// Memory of a pool that was [leased](Self::lease) waits for others as well.
    ///
    /// Each free asks each named stream, as any may have got work since. If one stream is named, it
    /// records an event there. If several are named, it records events only on those that are not
    /// idle. When the last clone of a stream made by [`Stream::new`] is dropped, the pool lets it
    /// go: it waits once for what is still queued there. [`forget_stream`](Self::forget_stream)
    /// does so for any other.
    ///
    /// # Errors
    /// [`VmmError::WrongDevice`](crate::VmmError::WrongDevice),
    /// [`VmmError::WrongDriver`](crate::VmmError::WrongDriver).
    pub fn use_stream(&self, stream: &Stream) -> Result<()> {
        self.range.use_stream(stream)
    }

    /// Stops naming a stream. Memory that is freed later waits for what is queued on the stream
    /// now, and for none of its later work: from now on its work must not touch this pool's memory.
    /// If the stream is not named, the call does nothing. If no stream is left, freed memory waits
    /// for all work of the context again.
    ///
    /// The pool holds the stream no longer. A stream that is being captured gives no fence, and
    /// neither does the per-thread default stream. If it is one of these, memory freed from now on
    /// waits for all work of the context, and of the contexts of other devices in use.
    ///
    /// # Errors
    /// As [`use_stream`](Self::use_stream); [`VmmError::Closed`](crate::VmmError::Closed).
    pub fn forget_stream(&self, stream: &Stream) -> Result<()> {
        self.range.forget_stream(stream)
    }

    /// Makes a stream that is not named wait for what is still done with memory that was taken
    /// back.
    pub(super) fn order_stream(&self, stream: &Stream) -> Result<()> {
        self.range.order_stream(stream)
    }

    /// Makes frees wait for the end of work on a stream that is not named.
    pub(super) fn add_end(&self, end: &Arc<Fence>) -> Result<()> {
        self.range.add_end(end)
    }

    /// Keeps the memory behind `bytes` bytes at `offset` mapped until the pin is dropped. All of
    /// them must be live. Hold the pin for the life of a graph that names their addresses: as
    /// arguments of its kernels, that is, and not in tables that they read. What a table names has
    /// to be there when the graph runs, and is another each time. See
    /// [`BlockPin`](crate::pool::blocks::BlockPin).
    ///
    /// A replayed graph uses the memory that is mapped at its addresses when it runs. If nothing is
    /// mapped there, the context is beyond use. Pinned memory that is freed is parked and not given
    /// back, whatever [`EngineOptions::park_bytes_max`] says; it can be allocated again at the same
    /// addresses, and then the graph works on that. Dropping the pool leaves it to the engine until
    /// the last pin is gone.
    ///
    /// # Errors
    /// [`VmmError::ZeroSize`](crate::VmmError::ZeroSize),
    /// [`VmmError::Overflow`](crate::VmmError::Overflow),
    /// [`VmmError::OutOfRange`](crate::VmmError::OutOfRange);
    /// [`VmmError::NotMapped`](crate::VmmError::NotMapped) if some of the bytes are not live.
    pub fn pin_for_graph(&self, offset: usize, bytes: usize) -> Result<GraphPin> {
        self.range.pin(offset, bytes)
    }

    /// Keeps the memory behind `bytes` bytes at `offset` as it is until `token` is released. All of
    /// them must be live. The memory stays mapped, at its addresses, and is given to no other
    /// allocation.
    ///
    /// Use it for memory that other code holds by a shared value, such as a tensor of a framework:
    /// the lease ends when the value is shared no longer. The bytes can be freed at any time, and
    /// the pool dropped. What is leased then is counted as
    /// [`leased_bytes`](crate::MemoryParts::leased_bytes), its allocation returns
    /// [`VmmError::Leased`](crate::VmmError::Leased), and it retires when the engine finds the
    /// token released: behind fences recorded then, since a token says nothing of work that is
    /// queued. For work on a stream that you know, no lease is needed: name the stream
    /// ([`use_stream`](Self::use_stream)).
    ///
    /// That work may be on any stream of any device, and a pool cannot know them all. So from the
    /// first lease on, all that is freed of this pool waits for more than the named streams, leased
    /// or not. It waits for all work of the context, and of the contexts of other devices in use in
    /// this process. That takes one event of each (`cuCtxRecordEvent`), and no other calls. While a
    /// capture is declared, and with drivers before CUDA 12.5, it waits for a context synchronise.
    /// Several leases may cover the same bytes. The engine's steps, and calls that need memory, ask
    /// the token. It is dropped soon after it is released, on any thread.
    ///
    /// Chunks with leased bytes are not moved by [`compact`](Self::compact).
    ///
    /// The engine keeps the token until then. One that owns the pool keeps it too; let it hold a
    /// `Weak`.
    ///
    /// # Errors
    /// [`VmmError::ZeroSize`](crate::VmmError::ZeroSize),
    /// [`VmmError::Overflow`](crate::VmmError::Overflow),
    /// [`VmmError::OutOfRange`](crate::VmmError::OutOfRange);
    /// [`VmmError::NotMapped`](crate::VmmError::NotMapped) if some of the bytes are not live. The
    /// token is then dropped.
    pub fn lease(&self, offset: usize, bytes: usize, token: impl LeaseToken) -> Result<()> {
        self.range.lease(offset, bytes, Box::new(token))
    }

    /// Whether a lease whose token is not released covers any of `bytes` bytes at `offset`; false
    /// if the pool was closed.
    pub fn is_leased(&self, offset: usize, bytes: usize) -> bool {
        self.range.is_leased(offset, bytes)
    }

    /// Makes `stream` wait for all work that was queued under leases, so that it may write to bytes
    /// whose lease is over. The device need not have finished with bytes when their token is
    /// released. The call waits for nothing if the driver records events of contexts (CUDA 12.5 or
    /// newer), and otherwise for the device.
    ///
    /// That takes an event of each context in use and a wait for those that are not past
    /// (`cuCtxRecordEvent`, `cuStreamWaitEvent`). For a pool that was never leased it takes
    /// nothing. Returns false, and does nothing, if a capture is declared or `stream` is being
    /// captured.
    ///
    /// # Errors
    /// [`VmmError::WrongDevice`](crate::VmmError::WrongDevice),
    /// [`VmmError::WrongDriver`](crate::VmmError::WrongDriver),
    /// [`VmmError::Driver`](crate::VmmError::Driver),
    /// [`VmmError::Closed`](crate::VmmError::Closed).
    pub fn order_after_leases(&self, stream: &Stream) -> Result<bool> {
        self.range.order_after_leases(stream)
    }

    /// The bytes under each lease whose token is not released, freed or not.
    pub(super) fn leased(&self) -> Vec<ops::Range<usize>> {
        self.range.leased()
    }

    /// The capacity in bytes, as it was given.
    pub fn capacity_bytes(&self) -> usize {
        self.capacity_bytes
    }

    /// The page size in bytes.
    pub fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// The first address, which stays while the pool lives.
    pub fn base_address(&self) -> u64 {
        self.base_address
    }

    /// Pages with live bytes, in bytes.
    pub fn physical_memory_usage(&self) -> usize {
        self.range.live_pages() * self.page_bytes
    }

    /// Returns whether all of the bytes are live; false for no bytes and for bytes outside the
    /// pool.
    pub fn is_mapped(&self, offset: usize, bytes: usize) -> bool {
        self.range.is_live(offset, bytes)
    }

    /// The pool's numbers at one moment; all zero except capacity and page if the pool was closed.
    pub fn stats(&self) -> PoolStats {
        match self.range_stats() {
            Ok(range) => PoolStats::new(self.capacity_bytes, self.page_bytes, range),
            Err(_) => PoolStats {
                capacity_bytes: self.capacity_bytes,
                page_bytes: self.page_bytes,
                ..PoolStats::default()
            },
        }
    }

    /// Counts of the pool's events so far; all zero if the pool was closed.
    pub fn counters(&self) -> PoolCounters {
        let stats = self.range_stats();
        stats.map_or(PoolCounters::default(), |stats| stats.counters)
    }

    /// Its range, with the bytes of its addresses and of a page.
    fn range_stats(&self) -> Result<RangeStats> {
        self.range.stats()
    }

    /// Gives memory of the engine back that is not live and that the device has finished with.
    /// Returns the bytes.
    ///
    /// # Errors
    /// As [`Engine::trim`].
    pub fn trim(&self) -> Result<usize> {
        self.engine().trim()
    }

    /// Gives slack back by moving live pages to chunks that fit. Slack is pages without live bytes
    /// in chunks that have others. Addresses and contents of live bytes stay.
    ///
    /// If [`EngineOptions::chunk_bytes_max`](crate::EngineOptions::chunk_bytes_max) makes each page
    /// a chunk, there is no slack. Otherwise the call moves each chunk that is live in part. It
    /// makes new memory (`cuMemCreate`) and maps it at addresses aside. It copies the live pages
    /// (`cuMemcpyDtoDAsync` on a stream of its own) and waits for that. It unmaps the old memory
    /// and maps the new in its place (`cuMemUnmap`, `cuMemMap`, `cuMemSetAccess`). Only then it
    /// releases the old memory (`cuMemRelease`).
    ///
    /// No work may be launched on the pool's memory meanwhile, so this takes `&mut self`. It first
    /// waits for all that is queued on the named streams, or on any stream if none is named. Other
    /// pools go on, and so do other threads that free bytes of this one.
    ///
    /// The budget must have room for the live pages of one chunk, which are held twice for a
    /// moment; parked memory is given up for that. A chunk for which there is no room stays as it
    /// is. While a [`CaptureGuard`](crate::CaptureGuard) lives, or a stream that was named is
    /// captured, nothing is moved.
    ///
    /// # Errors
    /// [`VmmError::Driver`](crate::VmmError::Driver),
    /// [`VmmError::Closed`](crate::VmmError::Closed),
    /// [`VmmError::Forked`](crate::VmmError::Forked). After an error live bytes are where they
    /// were, with their contents. Only if the driver also refuses to undo what it did, they are
    /// kept in quarantine: `allocate` and `deallocate` of them return
    /// [`VmmError::Quarantined`](crate::VmmError::Quarantined), and they must not be used, until a
    /// later `compact`, [`trim`](Self::trim) or step has mapped them again.
    pub fn compact(&mut self) -> Result<CompactReport> {
        self.range.compact()
    }

    /// Gives slack back like [`compact`](Self::compact), for a pool that other threads have too.
    /// They may allocate and free meanwhile.
    ///
    /// # Errors
    /// As [`compact`](Self::compact).
    ///
    /// # Safety
    /// No work that uses the pool's memory may be launched, by any thread, from the beginning of
    /// the call to its end: pages are unmapped for a moment, and what is written to the old memory
    /// after it was copied is lost. Work that was queued before, on the streams that were named for
    /// the pool or on any if none was, is waited for.
    pub unsafe fn compact_shared(&self) -> Result<CompactReport> {
        self.range.compact()
    }

    /// What [`compact`](Self::compact) would move and give back now; all zero if the pool was
    /// closed. Makes no driver calls.
    pub fn compact_report(&self) -> CompactReport {
        self.range.compact_report().unwrap_or_default()
    }

    /// The account that it is charged to: the one that it was made on, or one of its own.
    pub fn account(&self) -> &Account {
        self.range.account()
    }

    /// The engine that the pool is on.
    pub fn engine(&self) -> &Engine {
        self.range.engine()
    }

    /// Waits for the device, gives everything back, and returns the error that dropping would hide.
    ///
    /// # Errors
    /// The driver's, if it refused; the engine keeps and retries what is left.
    pub fn close(self) -> Result<()> {
        self.range.close()
    }
}

impl Drop for VirtualMemoryPool {
    fn drop(&mut self) {
        // What is refused stays with the engine, which retries it.
        let _ = self.range.close();
    }
}
