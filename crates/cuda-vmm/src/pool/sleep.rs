//! Pools that give up their memory and have it again at the same addresses.
//!
//! # Safety
//! [`sleep_shared`](VirtualMemoryPool::sleep_shared) unmaps live memory of a pool that others have
//! too; its caller promises that no work on it is launched meanwhile, or before the pool wakes.
#![allow(unsafe_code)]

use super::VirtualMemoryPool;
use crate::Result;
use crate::engine::{Keep, Patience, Slept, Waking, sleep_all, wake_all};
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
    /// addresses.
    pub first: Vec<Range<usize>>,
}

impl WakeOptions {
    /// The defaults: it waits for retiring memory only, and the contents come in the order of their
    /// addresses.
    pub const fn new() -> Self {
        Self {
            timeout: None,
            first: Vec::new(),
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
}

impl VirtualMemoryPool {
    /// Gives up all memory of the pool, and keeps its addresses. What becomes of the contents says
    /// `keep`. [`wake`](Self::wake) brings the memory back to the same addresses.
    ///
    /// All bytes that are live stay allocated: they are live again when the pool wakes. Until then
    /// `allocate`, `deallocate`, `lease`, `pin_for_graph` and the like return
    /// [`VmmError::Asleep`](crate::VmmError::Asleep), and no work may use the addresses. The memory
    /// goes to the driver before the call returns, so any account can have it. What the account is
    /// guaranteed stays its own.
    ///
    /// Contents are copied to the host on a private stream (`cuMemcpyDtoHAsync`), and the call
    /// waits for that. With [`Keep::Constant`] the copy of an earlier sleep is used again.
    ///
    /// Work on the memory must have ended: if streams are [named](Self::use_stream), the call looks
    /// whether they are idle, and is refused if not. If none is named, or the pool was leased, any
    /// stream may have work on it; then the call waits for all that is queued now.
    ///
    /// # Errors
    /// [`VmmError::KeptAwake`](crate::VmmError::KeptAwake) if a lease whose token is not released, a
    /// pin, a capture, queued work, memory that is [shared](crate::Account::share_many) or another
    /// thread's call keeps it awake; [`VmmError::Asleep`](crate::VmmError::Asleep) if it is asleep;
    /// [`VmmError::HostStoreFull`](crate::VmmError::HostStoreFull) and the other errors of
    /// [`HostStore::reserve`](crate::HostStore::reserve);
    /// [`VmmError::Quarantined`](crate::VmmError::Quarantined) if the driver refused to unmap some
    /// of it before; [`VmmError::Driver`](crate::VmmError::Driver),
    /// [`VmmError::Closed`](crate::VmmError::Closed),
    /// [`VmmError::Forked`](crate::VmmError::Forked). After an error the pool is awake, with its
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
    /// [`VmmError::Asleep`](crate::VmmError::Asleep).
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
    /// [`VmmError::Awake`](crate::VmmError::Awake) if it is awake;
    /// [`VmmError::Asleep`](crate::VmmError::Asleep) if another thread wakes it or puts it to sleep;
    /// [`VmmError::OutOfPhysicalMemory`](crate::VmmError::OutOfPhysicalMemory), with what is
    /// missing; [`VmmError::Driver`](crate::VmmError::Driver),
    /// [`VmmError::Quarantined`](crate::VmmError::Quarantined),
    /// [`VmmError::Closed`](crate::VmmError::Closed),
    /// [`VmmError::Forked`](crate::VmmError::Forked). After an error the pool is asleep as it was,
    /// and can be woken later.
    pub fn wake(&self) -> Result<()> {
        self.wake_with(&WakeOptions::new())
    }

    /// Wakes the pool like [`wake`](Self::wake), with options.
    ///
    /// # Errors
    /// As [`wake`](Self::wake).
    pub fn wake_with(&self, options: &WakeOptions) -> Result<()> {
        let patience = match options.timeout {
            Some(timeout) => Patience::for_at_most(timeout),
            None => Patience::Retiring,
        };
        let waking = Waking {
            handle: &self.range,
            first: &options.first,
        };
        wake_all(&[waking], &patience)
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
    /// [`VmmError::Closed`](crate::VmmError::Closed),
    /// [`VmmError::Forked`](crate::VmmError::Forked).
    pub fn generation(&self) -> Result<u64> {
        self.range.generation()
    }

    /// Gives back the copy on the host that a sleep with [`Keep::Constant`] has left; returns the
    /// bytes of the store.
    ///
    /// # Errors
    /// [`VmmError::Asleep`](crate::VmmError::Asleep) if the copy is all there is;
    /// [`VmmError::Closed`](crate::VmmError::Closed),
    /// [`VmmError::Forked`](crate::VmmError::Forked).
    pub fn forget_copy(&self) -> Result<usize> {
        self.range.forget_copy()
    }
}
