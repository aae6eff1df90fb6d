//! Pools that give up their memory and have it again at the same addresses.
//!
//! # Safety
//! [`sleep_shared`](VirtualMemoryPool::sleep_shared) unmaps live memory of a pool that others have
//! too; its caller promises that no work on it is launched meanwhile, or before the pool wakes.
#![allow(unsafe_code)]

use super::VirtualMemoryPool;
use crate::engine::{
    Account, Arrival, Keep, Patience, RangeHandle, Slept, Waking, sleep_all, wake_all,
};
use crate::size::Extent;
use crate::{Result, Stream, VmmError};
use core::ops::Range;
use core::time::Duration;

/// How a pool is woken; see [`VirtualMemoryPool::wake_with`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct WakeOptions {
    /// How long the call waits for memory that others hold. If none is given, it waits for retiring
    /// memory only, as [`VirtualMemoryPool::allocate`] does.
    pub timeout: Option<Duration>,
    /// Bytes whose contents come first, in this order. All others follow, in the order of their
    /// addresses. If several pools wake together, these are bytes of each.
    pub first: Vec<Range<usize>>,
    /// How many bytes of contents come in a second at most, so that copies of others have the rest
    /// of the link. If none is given, they come as fast as the link lets them.
    pub bytes_per_second: Option<u64>,
}

impl WakeOptions {
    /// The defaults: it waits for retiring memory only, and the contents come in the order of their
    /// addresses.
    pub const fn new() -> Self {
        Self {
            timeout: None,
            first: Vec::new(),
            bytes_per_second: None,
        }
    }

    /// Waits up to `timeout` for memory, as [`VirtualMemoryPool::allocate_timeout`] does.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// With the contents of these bytes first, in this order.
    pub fn first(mut self, bytes: impl IntoIterator<Item = Range<usize>>) -> Self {
        self.first = bytes.into_iter().collect();
        self
    }

    /// With at most this many bytes of contents in a second. Then they come in parts of 8 MiB, and
    /// between them the stream of the copies waits in a host function (`cuLaunchHostFunc`). The
    /// driver calls the host functions of all streams one after the other, so those of others may
    /// wait as long.
    pub const fn bytes_per_second(mut self, bytes: u64) -> Self {
        self.bytes_per_second = Some(bytes);
        self
    }

    pub(super) fn wake(&self, ranges: &[&RangeHandle], waits: bool) -> Result<Arrival> {
        let patience = match self.timeout {
            Some(timeout) => Patience::for_at_most(timeout),
            None => Patience::Retiring,
        };
        let how = Waking {
            patience,
            first: &self.first,
            bytes_per_second: self.bytes_per_second,
            waits,
        };
        wake_all(ranges, &how)
    }
}

impl VirtualMemoryPool {
    /// Gives up all memory of the pool, and keeps its addresses. What becomes of the contents says
    /// `keep`. [`wake`](Self::wake) brings the memory back to the same addresses.
    ///
    /// All bytes that are live stay allocated: they are live again when the pool wakes. Until then
    /// `allocate`, `deallocate`, `lease`, `pin_for_graph` and the like return
    /// [`VmmError::Asleep`], and no work may use the addresses. The memory
    /// goes to the driver before the call returns, so any account can have it. What the account is
    /// guaranteed stays its own.
    ///
    /// Contents are copied to the host on a private stream (`cuMemcpyDtoHAsync`), and the call
    /// waits for that. With [`Keep::Constant`] the copy of an earlier sleep is used again.
    ///
    /// Work on the memory must have ended: if streams are [named](Self::use_stream), the call looks
    /// whether they are idle, and is refused if not. If none is named, or the pool was leased, any
    /// stream may have work on it; then the call waits for all that is queued now. So it does if a
    /// default stream is named, which cannot be asked.
    ///
    /// # Errors
    /// [`VmmError::KeptAwake`] if a lease whose token is not released, a
    /// pin, a capture, queued work, memory that is [shared](crate::Account::share_many) or another
    /// thread's call keeps it awake; [`VmmError::Asleep`] if it is asleep;
    /// [`VmmError::HostStoreFull`] and the other errors of
    /// [`HostStore::reserve`](crate::HostStore::reserve);
    /// [`VmmError::Quarantined`] if the driver refused to unmap some
    /// of it before; [`VmmError::Driver`],
    /// [`VmmError::Closed`],
    /// [`VmmError::Forked`]. After an error the pool is awake, with its
    /// memory and contents. Only if the driver also refuses to map a chunk again, its bytes are in
    /// quarantine, as after a [`compact`](Self::compact).
    ///
    /// ```
    /// # #[cfg(feature = "simulator")] {
    /// use cuda_vmm::{Driver, HostStore, Keep, VirtualMemoryPool};
    ///
    /// let device = Driver::detect()?.device(0)?;
    /// let store = HostStore::new(&device, 64 << 20)?;
    /// let mut pool = VirtualMemoryPool::new(&device, 1 << 30, 2 << 20)?;
    /// let address = pool.allocate(0, 4 << 20)?;
    /// pool.sleep(Keep::Host(&store))?;
    /// assert_eq!(pool.stats().committed_bytes, 0);
    /// assert_eq!(pool.stats().asleep_bytes, 4 << 20);
    /// pool.wake()?;
    /// assert!(pool.is_mapped(0, 4 << 20)); // at `address`, with what was in it
    /// # }
    /// # Ok::<(), cuda_vmm::VmmError>(())
    /// ```
    pub fn sleep(&mut self, keep: Keep<'_>) -> Result<Slept> {
        sleep_all(&[(&self.range, keep)])
    }

    /// Gives up all memory like [`sleep`](Self::sleep), for a pool that other threads have too. If
    /// they allocate or free meanwhile, they get
    /// [`VmmError::Asleep`].
    ///
    /// # Errors
    /// As [`sleep`](Self::sleep).
    ///
    /// # Safety
    /// No work that uses the pool's memory may be launched, by any thread, from the beginning of
    /// the call until the pool is awake again.
    pub unsafe fn sleep_shared(&self, keep: Keep<'_>) -> Result<Slept> {
        sleep_all(&[(&self.range, keep)])
    }

    /// Wakes the pool: all bytes that were live when it fell asleep are live again, at their
    /// addresses, with their contents if these were kept.
    ///
    /// The memory is allocated as by [`allocate`](Self::allocate), all of it or none: the account's
    /// priority, guarantee and ceiling count, others are asked to give back, and it waits for
    /// retiring memory. Then the contents are copied in, on a private stream, and the call waits
    /// for that.
    ///
    /// # Errors
    /// [`VmmError::Awake`] if it is awake;
    /// [`VmmError::Asleep`] if another thread wakes it or puts it to sleep;
    /// [`VmmError::OutOfPhysicalMemory`], with what is
    /// missing; [`VmmError::Driver`],
    /// [`VmmError::Quarantined`],
    /// [`VmmError::Closed`],
    /// [`VmmError::Forked`]. After an error the pool is asleep as it was,
    /// and can be woken later.
    pub fn wake(&self) -> Result<()> {
        self.wake_with(&WakeOptions::new())
    }

    /// Wakes the pool like [`wake`](Self::wake), with options.
    ///
    /// # Errors
    /// As [`wake`](Self::wake).
    pub fn wake_with(&self, options: &WakeOptions) -> Result<()> {
        options.wake(&[&self.range], true).map(drop)
    }

    /// Wakes the pool like [`wake_with`](Self::wake_with), and does not wait for the contents. The
    /// pool is awake when all copies are queued, and its bytes can be used in the order in which
    /// they come: have the stream that uses them wait
    /// ([`Arriving::order_stream`]). What is freed meanwhile is given back behind the copies.
    ///
    /// # Errors
    /// As [`wake`](Self::wake). A copy that fails after it was queued puts the context beyond use.
    ///
    /// ```
    /// # #[cfg(feature = "simulator")] {
    /// use cuda_vmm::{Driver, HostStore, Keep, Stream, VirtualMemoryPool, WakeOptions};
    ///
    /// let device = Driver::detect()?.device(0)?;
    /// let store = HostStore::new(&device, 64 << 20)?;
    /// let mut pool = VirtualMemoryPool::new(&device, 1 << 30, 2 << 20)?;
    /// pool.allocate(0, 32 << 20)?;
    /// pool.sleep(Keep::Host(&store))?;
    /// let layer = |number: usize| number * (8 << 20)..(number + 1) * (8 << 20);
    /// let layers = WakeOptions::new().first((0..4).map(layer));
    /// let arriving = pool.wake_streaming(&layers)?;
    /// let stream = Stream::new(&device)?;
    /// for number in 0..4 {
    ///     let bytes = layer(number);
    ///     arriving.order_stream(&stream, &pool, bytes.start, bytes.len())?;
    ///     // The work of this layer is launched on the stream here.
    /// }
    /// arriving.finish()?;
    /// # }
    /// # Ok::<(), cuda_vmm::VmmError>(())
    /// ```
    pub fn wake_streaming(&self, options: &WakeOptions) -> Result<Arriving> {
        options.wake(&[&self.range], false).map(Arriving)
    }

    /// Whether the pool is asleep, or a thread is putting it to sleep or waking it; false if it was
    /// closed.
    pub fn is_asleep(&self) -> bool {
        self.range.is_asleep()
    }

    /// How often memory was taken from behind the pool's addresses, or replaced: by a sleep, a
    /// [`compact`](Self::compact), or because freed memory was given back. What was registered with
    /// other code by its addresses, such as a network card, is true as long as this is the same.
    ///
    /// # Errors
    /// [`VmmError::Closed`],
    /// [`VmmError::Forked`].
    pub fn generation(&self) -> Result<u64> {
        self.range.generation()
    }

    /// Gives back the copy on the host that a sleep with [`Keep::Constant`] has left; returns the
    /// bytes of the store.
    ///
    /// # Errors
    /// [`VmmError::Asleep`] if the copy is all there is;
    /// [`VmmError::Closed`],
    /// [`VmmError::Forked`].
    pub fn forget_copy(&self) -> Result<usize> {
        self.range.forget_copy()
    }
}

impl Account {
    /// Puts several pools of the account to sleep, all or none, as [`VirtualMemoryPool::sleep`]
    /// does. What becomes of the contents is said of each.
    ///
    /// # Errors
    /// As [`VirtualMemoryPool::sleep`], for the first pool that fails; then all are awake.
    /// [`VmmError::ForeignAccount`] for a pool of another account.
    pub fn sleep_many(&self, pools: &mut [(&mut VirtualMemoryPool, Keep<'_>)]) -> Result<Slept> {
        let ranges = pools.iter().map(|(pool, keep)| (&pool.range, *keep));
        let ranges: Vec<_> = ranges.collect();
        ranges
            .iter()
            .try_for_each(|(range, _)| self.expect(range))?;
        sleep_all(&ranges)
    }

    /// Wakes several pools of the account, all or none, as [`VirtualMemoryPool::wake_with`] does.
    /// The contents come pool by pool.
    ///
    /// # Errors
    /// As [`VirtualMemoryPool::wake`]; what is missing is missing for all of them together. Then
    /// all are asleep. [`VmmError::ForeignAccount`] for a pool of another account.
    pub fn wake_many(&self, pools: &[&VirtualMemoryPool], options: &WakeOptions) -> Result<()> {
        self.wake_ranges(pools, options, true).map(drop)
    }

    /// Wakes several pools like [`wake_many`](Self::wake_many), and does not wait for the contents,
    /// as [`VirtualMemoryPool::wake_streaming`] does.
    ///
    /// # Errors
    /// As [`wake_many`](Self::wake_many).
    pub fn wake_many_streaming(
        &self,
        pools: &[&VirtualMemoryPool],
        options: &WakeOptions,
    ) -> Result<Arriving> {
        self.wake_ranges(pools, options, false).map(Arriving)
    }

    fn wake_ranges(
        &self,
        pools: &[&VirtualMemoryPool],
        options: &WakeOptions,
        waits: bool,
    ) -> Result<Arrival> {
        let ranges: Vec<_> = pools.iter().map(|pool| &pool.range).collect();
        ranges.iter().try_for_each(|range| self.expect(range))?;
        options.wake(&ranges, waits)
    }

    fn expect(&self, range: &RangeHandle) -> Result<()> {
        match range.account() == self {
            true => Ok(()),
            false => Err(VmmError::ForeignAccount {
                expected: self.name().into(),
                found: range.account().name().into(),
            }),
        }
    }
}

/// Contents of pools that were woken and are on their way; see
/// [`VirtualMemoryPool::wake_streaming`]. Dropping it waits until all have come.
#[derive(Debug)]
#[must_use = "dropping it waits for all contents"]
pub struct Arriving(Arrival);

impl Arriving {
    /// Makes `stream` wait until the contents of `bytes` bytes at `offset` of the pool have come
    /// (`cuStreamWaitEvent`). What of them is not on its way is not waited for.
    ///
    /// # Errors
    /// [`VmmError::ZeroSize`], [`VmmError::Overflow`], [`VmmError::OutOfRange`];
    /// [`VmmError::WrongDriver`], [`VmmError::Driver`].
    pub fn order_stream(
        &self,
        stream: &Stream,
        pool: &VirtualMemoryPool,
        offset: usize,
        bytes: usize,
    ) -> Result<()> {
        let extent = Extent::new(offset, bytes, pool.capacity_bytes())?;
        (self.0).order_stream(stream, pool.range.id(), &extent.range())
    }

    /// Whether the contents of `bytes` bytes at `offset` of the pool have come.
    ///
    /// # Errors
    /// As [`order_stream`](Self::order_stream).
    pub fn has_come(&self, pool: &VirtualMemoryPool, offset: usize, bytes: usize) -> Result<bool> {
        let extent = Extent::new(offset, bytes, pool.capacity_bytes())?;
        let end = self.0.end_of(pool.range.id(), &extent.range());
        end.map_or(Ok(true), |end| end.is_complete())
    }

    /// Waits until all contents have come.
    ///
    /// # Errors
    /// [`VmmError::Driver`].
    pub fn finish(self) -> Result<()> {
        self.0.finish()
    }
}
