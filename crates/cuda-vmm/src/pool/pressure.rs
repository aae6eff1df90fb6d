//! Memory that is short: waiting for it, being asked for it, giving it back.

use super::{ModelQuota, SharedMemoryPool, VirtualMemoryPool};
use crate::engine::{Patience, Place};
use crate::{Result, VmmError};
use core::task::Waker;
use core::time::Duration;

impl VirtualMemoryPool {
    /// As [`allocate`](Self::allocate), but waits up to `timeout` for memory, also for what others hold and are asked to
    /// give back ([`owed_bytes`](Self::owed_bytes)).
    ///
    /// Those who wait are served by priority ([`ModelOptions::priority`](super::ModelOptions::priority)), and among
    /// equals in the order in which they came. What comes free is not given to anyone who stands behind, or who comes later with
    /// the same priority or less, waiting or not. Memory within a model's guarantee never waits behind others.
    ///
    /// If the budget has room and the device has no memory, since another process or a framework holds it, the driver is asked
    /// again: when memory of the device comes free in this process, and otherwise with growing delays of up to 64 ms. Each
    /// time all is tried that makes room, [`Device::set_make_room`](crate::Device::set_make_room) included, and nothing is
    /// held in between. At its own ceiling a model waits for
    /// what it frees itself. With a `timeout` of zero everything is tried that takes no waiting. Where nobody but callers take
    /// steps ([`WorkerMode::Manual`](crate::WorkerMode::Manual)) and only a context synchronise tells what the device has
    /// finished with, that is made, and the wait may be longer.
    ///
    /// # Errors
    /// As [`allocate`](Self::allocate): after the time, [`VmmError::OutOfPhysicalMemory`] with what was asked, free, retiring
    /// and reclaimable at that moment, or [`VmmError::Driver`] with `CUDA_ERROR_OUT_OF_MEMORY` if it was the device that had
    /// no memory, and everything is as before; [`VmmError::Closed`] also if the pool is closed
    /// meanwhile. What can never be had is refused at once.
    pub fn allocate_timeout(&self, offset: usize, bytes: usize, timeout: Duration) -> Result<u64> {
        self.take(Place::At(offset), bytes, &Patience::for_at_most(timeout))
    }

    /// As [`allocate_timeout`](Self::allocate_timeout), at the lowest unused address that is a multiple of `alignment` bytes
    /// from the base.
    ///
    /// # Errors
    /// As [`allocate_timeout`](Self::allocate_timeout) and [`allocate_anywhere`](Self::allocate_anywhere). Addresses are not
    /// waited for.
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

    /// How many bytes this pool is asked to give back; one atomic read. What it frees counts at once, though the device may
    /// still use it.
    ///
    /// Asked for is what is missing for another's allocation that waits, or was refused and has not been repeated with
    /// success, after all that comes back by itself: of those that hold more than their guarantee and have no higher priority
    /// than who asks, the lowest priority first, and among equals the furthest above its guarantee; never below a
    /// guarantee. Asked for is also what it holds above a ceiling that was lowered. Nothing is taken by force: who does not
    /// give back keeps what it has, and gets no more meanwhile.
    ///
    /// Meant to be read where giving back is easy, between two steps of a model for instance. 0 in a forked process.
    pub fn owed_bytes(&self) -> usize {
        self.owed.get().map_or(0, |owed| owed.bytes())
    }

    /// Has `waker` woken each time [`owed_bytes`](Self::owed_bytes) has risen, in place of an earlier one; `None` for nobody.
    ///
    /// It is woken on whichever thread brought the rise about, with no lock held, and a panic in it is caught. That thread
    /// may be one that allocates, so the waker should do no more than wake. Read `owed_bytes` after this call: a rise
    /// before it woke nobody.
    ///
    /// The pool keeps the waker. One that owns the pool would keep it for ever; let it hold a `Weak`.
    /// In a forked process this does nothing.
    pub fn set_owed_waker(&self, waker: Option<Waker>) {
        if let Ok(owed) = self.owed.get() {
            owed.set_waker(waker);
        }
    }

    /// Gives back to the driver what this pool holds and does not use, parked or made ahead; returns the bytes. What is
    /// owed is worked out anew.
    ///
    /// It frees nothing that is live: that is the caller's to choose, by [`deallocate`](Self::deallocate), before. Waits for
    /// nothing: what still retires goes to those who wait for it when the device has finished with it.
    ///
    /// # Errors
    /// The driver's, if it refused; what it refused is in quarantine. [`VmmError::Closed`], [`VmmError::Forked`].
    pub fn give_back(&self) -> Result<usize> {
        self.range.give_back()
    }
}

impl SharedMemoryPool {
    /// Changes what a model may hold, and its priority, while it runs: all three, up or down.
    ///
    /// The ceiling may be below what the model holds. Then it gets no more, owes what is above
    /// ([`VirtualMemoryPool::owed_bytes`]), and what of that is parked or made ahead goes with the next step.
    ///
    /// # Errors
    /// [`VmmError::ModelNotFound`]; [`VmmError::QuotaUnsatisfiable`] if the guarantee is above the ceiling, or is more than
    /// what the model holds and what others neither hold nor are guaranteed. Then nothing has changed.
    pub fn set_quota(&self, model: &str, quota: ModelQuota) -> Result<()> {
        self.find(model)?.range.set_quota(quota.into())
    }

    /// What a model may hold, as it is now.
    pub fn quota(&self, model: &str) -> Option<ModelQuota> {
        let pool = self.find(model).ok()?;
        pool.range.quota().ok().map(ModelQuota::from)
    }

    /// As [`allocate_for_model`](Self::allocate_for_model), but waits up to `timeout` for memory; see
    /// [`VirtualMemoryPool::allocate_timeout`].
    ///
    /// # Errors
    /// [`VmmError::ModelNotFound`]; otherwise as [`VirtualMemoryPool::allocate_anywhere_timeout`].
    pub fn allocate_for_model_timeout(
        &self,
        model: &str,
        bytes: usize,
        timeout: Duration,
    ) -> Result<u64> {
        let pool = self.find(model)?;
        pool.allocate_anywhere_timeout(bytes, super::shared::ALIGNMENT, timeout)
    }

    /// How many bytes a model is asked to give back; see [`VirtualMemoryPool::owed_bytes`], which takes no lock.
    pub fn model_owed_bytes(&self, model: &str) -> Option<usize> {
        self.find(model).ok().map(|pool| pool.owed_bytes())
    }

    /// Gives at least `bytes` bytes back to the driver, if so much can be spared; returns the bytes that went. See
    /// [`Engine::relieve`](crate::Engine::relieve).
    pub fn relieve(&self, bytes: usize) -> usize {
        self.engine().relieve(bytes)
    }
}
