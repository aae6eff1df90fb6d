//! Allocations that wait for memory that others hold.

use super::VirtualMemoryPool;
use crate::engine::{Ask, Later, Patience, Place};
use crate::{Result, VmmError};
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll};
use core::time::Duration;

impl VirtualMemoryPool {
    /// Allocates like [`allocate`](Self::allocate), but waits up to `timeout` for memory. It waits
    /// also for memory that other accounts hold and are asked to give back
    /// ([`Account::owed_bytes`](crate::Account::owed_bytes)).
    ///
    /// Calls that wait stand in a line. They are served by the priority of their accounts
    /// ([`Quota::priority`](crate::Quota::priority)), and among equals in the order in which they
    /// came. A call that stands behind does not get memory that comes free before it is served. Nor
    /// does a call that comes later with the same priority or less, waiting or not. Memory within
    /// an account's guarantee never waits behind others.
    ///
    /// The budget may have room while the device has no memory, because another process or a
    /// framework holds it. Then the call asks the driver again: when memory of the device comes
    /// free in this process, and otherwise with growing delays of up to 64 ms. Each time it tries
    /// all that makes room, [`Device::set_make_room`](crate::Device::set_make_room) included. It
    /// holds nothing in between. At its own ceiling an account waits for what it frees itself. With
    /// a `timeout` of zero the call tries all that takes no waiting. The wait may be longer if only
    /// callers take steps ([`WorkerMode::Manual`](crate::WorkerMode::Manual)) and only a context
    /// synchronise tells what the device has finished with. Then the call makes that synchronise.
    ///
    /// # Errors
    /// As [`allocate`](Self::allocate). After the timeout: [`VmmError::OutOfPhysicalMemory`] with
    /// the bytes that are asked for, free, retiring and reclaimable at that moment;
    /// [`VmmError::Driver`] with `CUDA_ERROR_OUT_OF_MEMORY` if the device has no memory.
    /// [`VmmError::Closed`] also if the pool or its account is closed meanwhile. A request that can
    /// never be served fails at once. After an error everything is as before.
    pub fn allocate_timeout(&self, offset: usize, bytes: usize, timeout: Duration) -> Result<u64> {
        self.take(Place::At(offset), bytes, &Patience::for_at_most(timeout))
    }

    /// Allocates like [`allocate_timeout`](Self::allocate_timeout), at the lowest unused address
    /// that is a multiple of `alignment` bytes from the base.
    ///
    /// # Errors
    /// As [`allocate_timeout`](Self::allocate_timeout) and
    /// [`allocate_anywhere`](Self::allocate_anywhere). The call does not wait for addresses.
    pub fn allocate_anywhere_timeout(
        &self,
        bytes: usize,
        alignment: usize,
        timeout: Duration,
    ) -> Result<u64> {
        if alignment == 0 {
            return Err(VmmError::ZeroSize { what: "alignment" });
        }
        let place = Place::FirstFit { alignment };
        self.take(place, bytes, &Patience::for_at_most(timeout))
    }

    /// Returns a future that allocates like [`allocate_timeout`](Self::allocate_timeout) and waits
    /// as long as it is polled. It needs no runtime: its task is woken when something has changed.
    ///
    /// It stands in the same line as threads do, from its first poll on. Dropping it leaves the
    /// line, so a cancelled task waits for no memory. A poll may call the driver, as
    /// [`allocate`](Self::allocate) does. If only callers take steps
    /// ([`WorkerMode::Manual`](crate::WorkerMode::Manual)), freed memory comes back with them.
    ///
    /// # Errors
    /// As [`allocate_timeout`](Self::allocate_timeout). If the device has no memory though the
    /// budget has room, the future ends with that error: nothing would wake it.
    ///
    /// ```
    /// # #[cfg(feature = "simulator")] {
    /// use core::future::Future;
    /// use core::pin::pin;
    /// use core::task::{Context, Poll, Waker};
    /// use cuda_vmm::{Driver, Engine, EngineOptions, VirtualMemoryPool};
    ///
    /// let device = Driver::detect()?.device(0)?;
    /// let engine = Engine::new(&device, EngineOptions::new().limit_bytes(4 << 30))?;
    /// let page_bytes = device.granularity_bytes();
    /// let [chat, code] = [(); 2]
    ///     .map(|()| VirtualMemoryPool::on_engine(&engine, 8 << 30, page_bytes));
    /// let (chat, code) = (chat?, code?);
    /// chat.allocate(0, 3 << 30)?;
    ///
    /// let mut allocation = pin!(code.allocate_async(0, 2 << 30)); // or `.await` in a runtime
    /// let mut context = Context::from_waker(Waker::noop());
    /// assert!(allocation.as_mut().poll(&mut context).is_pending());
    /// assert_eq!(chat.account().owed_bytes(), 1 << 30);
    /// chat.deallocate(0, 1 << 30)?;
    /// while allocation.as_mut().poll(&mut context).is_pending() {}
    /// assert!(code.is_mapped(0, 2 << 30));
    /// # }
    /// # Ok::<(), cuda_vmm::VmmError>(())
    /// ```
    pub fn allocate_async(&self, offset: usize, bytes: usize) -> Allocation<'_> {
        Allocation {
            pool: self,
            offset,
            bytes,
            later: Later::new(self.engine()),
        }
    }
}

/// An allocation that waits for memory; see [`VirtualMemoryPool::allocate_async`].
#[derive(Debug)]
#[must_use = "futures do nothing unless they are polled"]
pub struct Allocation<'a> {
    pool: &'a VirtualMemoryPool,
    offset: usize,
    bytes: usize,
    later: Later,
}

impl Future for Allocation<'_> {
    /// The address.
    type Output = Result<u64>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let pool = self.pool;
        let places = [(Place::At(self.offset), self.bytes)];
        let ask = Ask {
            handle: &pool.range,
            places: &places,
            wakes: false,
        };
        let offset = self.later.poll(&[ask], context);
        offset.map_ok(|offset| pool.base_address() + offset as u64)
    }
}
