//! Making room if the device has run out of memory: for other allocators, and with their help.

use super::books::range_id::RangeId;
use super::drain::GivenUp;
use super::inner::{Engine, Inner};
use super::retry::Which;
use super::scope::Scope;
use crate::device::MemoryHolder;
use crate::foreign;
use crate::sync::{Arc, thread_local};
use core::cell::Cell;

impl Engine {
    /// Gives at least `bytes` bytes back to the driver, if that much can be spared: memory that was
    /// made ahead, cached or parked. For when another allocator of the process, a framework's for
    /// instance, was refused memory by the driver. Returns the bytes that went.
    ///
    /// Waits for nothing: what is still retiring is not among it. What the driver refuses to take
    /// back is in quarantine, and not counted. In a forked process it does nothing.
    pub fn relieve(&self, bytes: usize) -> usize {
        match self.inner().check_process() {
            Ok(()) => self.inner().relieve(bytes),
            Err(_) => 0,
        }
    }
}

impl Inner {
    /// Gives this many bytes back to the driver, or what can be spared; returns the bytes that
    /// went.
    pub(crate) fn relieve(self: &Arc<Self>, bytes: usize) -> usize {
        self.poll();
        let mut given_bytes = self.retry(&Which::All);
        while given_bytes < bytes {
            match self.give_up_one(self.state.lock(), Scope::All) {
                GivenUp::Piece(outcome) => given_bytes += outcome.unwrap_or_default(),
                GivenUp::Nothing(_) => break,
            }
        }
        self.finish_closing();
        given_bytes
    }
}

impl MemoryHolder for Inner {
    fn poll(self: Arc<Self>) {
        Self::poll(&self);
    }

    fn retry(self: Arc<Self>) {
        Self::retry(&self, &Which::All);
    }

    /// If the driver refuses, more is not tried.
    fn give_a_piece(self: Arc<Self>) -> bool {
        let given = self.give_up_one(self.state.lock(), Scope::All);
        let is_given = matches!(given, GivenUp::Piece(Ok(_)));
        drop(given);
        self.finish_closing();
        is_given
    }
}

thread_local! {
    static MAKING_ROOM: Cell<bool> = const { Cell::new(false) };
}

/// This thread is in the function that makes room. If an allocation from there finds no memory, it
/// is refused, and the function is not called again. A thread that closes the range does not wait
/// for its pages: the function may be waiting for that thread.
struct MakingRoom<'a> {
    engine: &'a Inner,
    ranges: &'a [RangeId],
}

impl<'a> MakingRoom<'a> {
    fn begin(engine: &'a Inner, ranges: &'a [RangeId]) -> Self {
        MAKING_ROOM.with(|here| here.set(true));
        let this = Self { engine, ranges };
        this.count(|making_room| *making_room += 1);
        this
    }

    fn is_here() -> bool {
        MAKING_ROOM.with(Cell::get)
    }

    fn count(&self, change: impl Fn(&mut usize)) {
        let state = self.engine.state.lock();
        for id in self.ranges {
            if let Some(mut range) = state.ranges.get(*id) {
                change(&mut range.making_room);
            }
        }
    }
}

impl Drop for MakingRoom<'_> {
    fn drop(&mut self) {
        self.count(|making_room| *making_room -= 1);
        MAKING_ROOM.with(|here| here.set(false));
    }
}

/// What was done already for an allocation that the device has no memory for.
///
/// Only one piece is given up at a time, and then the driver is asked again: so an allocation takes
/// from others what is missing, and at most a piece more, and two that are short at once do not
/// take everything.
#[derive(Debug, Default)]
pub(crate) struct Relief {
    polled: bool,
    retried: bool,
    others: bool,
    is_told: bool,
}

impl Relief {
    /// Whether no message has said yet that the device is short of memory. The caller writes it
    /// now.
    pub(crate) fn is_first(&mut self) -> bool {
        !core::mem::replace(&mut self.is_told, true)
    }

    /// The same allocation asks again, some time later: everything may help anew.
    pub(crate) fn begin_again(&mut self) {
        *self = Self {
            is_told: self.is_told,
            ..Self::default()
        };
    }

    /// Takes the next step for pages of a range; `false` if all were taken. The caller holds no
    /// lock.
    ///
    /// First the engine's own spare memory goes, then what the driver refused before, then what
    /// other engines of the device can spare, and last what others in the process do.
    pub(crate) fn next(&mut self, engine: &Inner, ranges: &[RangeId], bytes: usize) -> bool {
        let device = &engine.device;
        let holders = device.holders();
        let is_own =
            |other: &&Arc<dyn MemoryHolder>| core::ptr::addr_eq(Arc::as_ptr(other), engine);
        if !core::mem::replace(&mut self.polled, true) {
            holders.iter().cloned().for_each(MemoryHolder::poll);
        }
        let mut own = holders.iter().filter(is_own).cloned();
        if own.any(MemoryHolder::give_a_piece) {
            return true;
        }
        if !core::mem::replace(&mut self.retried, true) {
            holders.iter().cloned().for_each(MemoryHolder::retry);
            device.retry_refused();
            // The driver is asked once more in any case: another process may have given some back.
            return true;
        }
        let mut others = holders.iter().filter(|holder| !is_own(holder)).cloned();
        if others.any(MemoryHolder::give_a_piece) {
            return true;
        }
        if !MakingRoom::is_here()
            && !core::mem::replace(&mut self.others, true)
            && let Some(make_room) = device.make_room()
        {
            let _making = MakingRoom::begin(engine, ranges);
            if foreign::call(|| make_room(bytes)).is_none() {
                crate::events::warn!("what makes room for the pools panicked");
            }
            return true;
        }
        false
    }
}
