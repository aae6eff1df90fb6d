//! What can make room on a device, and the threads that wait for it.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::Device;
use crate::Result;
use crate::foreign::Foreign;
use crate::process::{Here, Process};
use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use crate::sync::{self, Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak, thread};
use core::time::Duration;

/// Makes room on a device, for [`Device::set_make_room`]. Its argument is the bytes that an
/// allocation needs.
pub type MakeRoom = dyn Fn(usize) + Send + Sync;

/// An engine, as its device and the device's other engines see it: it holds memory and can spare
/// some of it.
///
/// The caller holds no lock. No method waits for the device.
pub(crate) trait MemoryHolder: Send + Sync {
    /// Parks the memory that the device has finished with.
    fn poll(self: Arc<Self>);

    /// Asks the driver again to take back what it refused.
    fn retry(self: Arc<Self>);

    /// Gives one piece of spare memory back to the driver. Returns whether it did.
    fn give_a_piece(self: Arc<Self>) -> bool;
}

/// A device's engines, and its threads that are short of memory.
pub(super) struct Room {
    holders: Here<Mutex<Vec<Weak<dyn MemoryHolder>>>>,
    /// What the program does to make room.
    make_room: Mutex<Option<Foreign<std::sync::Arc<MakeRoom>>>>,
    /// Threads whose driver calls are urgent: a caller waits for the memory.
    urgent_calls: AtomicUsize,
    /// How often memory has come free.
    memory_events: AtomicU64,
    /// Threads that wait for memory of the device.
    short: AtomicUsize,
    shortage: Mutex<()>,
    memory: Condvar,
}

impl Room {
    pub(super) fn new(process: Process) -> Self {
        Self {
            holders: Here::new(process, Mutex::default()),
            make_room: Mutex::default(),
            urgent_calls: AtomicUsize::new(0),
            memory_events: AtomicU64::new(0),
            short: AtomicUsize::new(0),
            shortage: Mutex::default(),
            memory: Condvar::new(),
        }
    }
}

impl Device {
    /// Notes that memory of the device has come free, or can be given up now. Threads that wait for
    /// memory ask again.
    pub(crate) fn note_memory(&self) {
        self.0.room.memory_events.fetch_add(1, Ordering::SeqCst);
        if self.0.room.short.load(Ordering::SeqCst) > 0 {
            // With the lock, so that a thread that is about to wait has seen the event or is woken.
            drop(self.lock_shortage());
            self.0.room.memory.notify_all();
        }
    }

    /// Returns how often memory has come free.
    pub(crate) fn memory_events(&self) -> u64 {
        self.0.room.memory_events.load(Ordering::SeqCst)
    }

    /// Waits until [`memory_events`](Self::memory_events) is no longer `seen`, or for `at_most`.
    /// The caller holds no lock.
    pub(crate) fn await_memory(&self, seen: u64, at_most: Duration) {
        self.0.room.short.fetch_add(1, Ordering::SeqCst);
        let guard = self.lock_shortage();
        let is_unchanged = |_: &mut ()| self.memory_events() == seen;
        let waited = sync::wait_timeout_while(
            &self.0.room.memory,
            &self.0.room.shortage,
            guard,
            at_most,
            is_unchanged,
        );
        drop(waited);
        self.0.room.short.fetch_sub(1, Ordering::SeqCst);
    }

    fn lock_shortage(&self) -> MutexGuard<'_, ()> {
        let guard = self.0.room.shortage.lock();
        guard.unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers an engine, so that it gives up spare memory when the device runs out.
    pub(crate) fn register(&self, holder: Weak<dyn MemoryHolder>) -> Result<()> {
        let mut holders = self.0.room.holders.lock()?;
        holders.retain(|holder| holder.strong_count() > 0);
        holders.push(holder);
        Ok(())
    }

    /// Sets the function that makes room on this device, such as trimming a framework's pool.
    /// `None` removes it. A device has one, for all of its engines.
    ///
    /// An allocation calls it if the driver has no memory although the budget has room. All engines
    /// of the device give up their spare memory first. Then the driver is asked again. While
    /// [`allocate_timeout`](crate::VirtualMemoryPool::allocate_timeout) waits for the device, it
    /// calls the function again now and then. The function's argument is the bytes that are needed.
    /// It runs on the thread that allocates, with no lock held. A panic in it, or in its drop, is
    /// caught.
    ///
    /// The function may call the pools. It may also unregister the model for which it makes room:
    /// that allocation then fails with [`VmmError::Closed`](crate::VmmError::Closed), and the rest
    /// of the model is given back when the allocation ends. An allocation of the function waits for
    /// no other thread, and does not call the function again.
    ///
    /// The device keeps the function until another replaces it. Let it capture a `Weak`, for
    /// instance of an `Arc<SharedMemoryPool>`: a pool keeps its device, so neither would ever end
    /// otherwise. In a forked process this does nothing.
    pub fn set_make_room(&self, make_room: Option<std::sync::Arc<MakeRoom>>) {
        if self.driver().check_process().is_err() {
            return;
        }
        let mut held = self.held_make_room();
        let before = core::mem::replace(&mut *held, make_room.map(Foreign::new));
        drop(held);
        // Without the lock: its drop is the program's code.
        drop(before);
    }

    pub(crate) fn make_room(&self) -> Option<Foreign<std::sync::Arc<MakeRoom>>> {
        let held = self.held_make_room();
        held.as_ref().map(|held| Foreign::new((**held).clone()))
    }

    fn held_make_room(&self) -> MutexGuard<'_, Option<Foreign<std::sync::Arc<MakeRoom>>>> {
        let held = self.0.room.make_room.lock();
        held.unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the driver calls of this thread as urgent until the guard is dropped: a caller waits
    /// for them.
    pub(crate) fn begin_urgent_call(&self) -> UrgentCall<'_> {
        self.0.room.urgent_calls.fetch_add(1, Ordering::Relaxed);
        UrgentCall(self)
    }

    /// Yields to urgent calls for a while, as the driver does one call at a time.
    pub(crate) fn give_way(&self) {
        for _ in 0..TURNS_GIVEN {
            if self.0.room.urgent_calls.load(Ordering::Relaxed) == 0 {
                return;
            }
            thread::yield_now();
        }
    }

    /// Returns the engines of this device in this process.
    pub(crate) fn holders(&self) -> Vec<Arc<dyn MemoryHolder>> {
        let holders = self.0.room.holders.lock();
        holders.map_or(Vec::new(), |holders| {
            holders.iter().filter_map(Weak::upgrade).collect()
        })
    }
}

/// How often a thread yields if no caller waits for it.
const TURNS_GIVEN: usize = if cfg!(model_check) { 3 } else { 1_000 };

/// Counts an urgent call while it lives.
pub(crate) struct UrgentCall<'a>(&'a Device);

impl Drop for UrgentCall<'_> {
    fn drop(&mut self) {
        self.0.0.room.urgent_calls.fetch_sub(1, Ordering::Relaxed);
    }
}
