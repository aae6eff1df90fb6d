//! A thread that puts a range to sleep or wakes it.

use crate::engine::handle::RangeHandle;
use crate::engine::range::Range;
use crate::engine::range::rest::{Asleep, HostCopy, Rest};
use crate::{Result, VmmError};

/// Marks a range as one that a thread puts to sleep or wakes, which has what the range had.
/// Dropping it leaves the range as it was.
pub(super) struct Change<'a> {
    pub(super) handle: &'a RangeHandle,
    /// `None` once the change has ended.
    before: Option<Rest>,
}

impl<'a> Change<'a> {
    /// Begins to put a range to sleep that is awake.
    pub(super) fn to_sleep(handle: &'a RangeHandle) -> Result<Self> {
        Self::begin(handle, |range| range.check_awake())
    }

    /// Begins to wake a range that is asleep.
    pub(super) fn to_wake(handle: &'a RangeHandle) -> Result<Self> {
        Self::begin(handle, |range| match &range.rest {
            Rest::Asleep(_) => Ok(()),
            Rest::Awake(_) => Err(VmmError::Awake {
                live_bytes: range.owned_bytes(),
            }),
            Rest::Changing(_) => range.check_awake(),
        })
    }

    fn begin(handle: &'a RangeHandle, check: impl FnOnce(&Range) -> Result<()>) -> Result<Self> {
        // With the engine's lock: a call that has it looks once whether the range is awake, and then
        // takes pages in the books. A thread that waits for memory of the range learns as the lock
        // is let go that it gets none.
        let state = handle.engine().open()?.state.lock();
        let mut range = state.ranges.get(handle.id()).ok_or(VmmError::Closed)?;
        if range.takes_no_more() {
            return Err(VmmError::Closed);
        }
        check(&range)?;
        let changing = Rest::Changing(range.rest.stats());
        let before = core::mem::replace(&mut range.rest, changing);
        Ok(Self {
            handle,
            before: Some(before),
        })
    }

    /// The copy that an earlier sleep has left.
    pub(super) fn copy(&self) -> Option<&HostCopy> {
        match &self.before {
            Some(Rest::Awake(copy)) => copy.as_ref(),
            _ => None,
        }
    }

    /// Takes that copy.
    pub(super) fn take_copy(&mut self) -> Option<HostCopy> {
        match &mut self.before {
            Some(Rest::Awake(copy)) => copy.take(),
            _ => None,
        }
    }

    /// What is asleep.
    pub(super) fn asleep(&self) -> Option<&Asleep> {
        match &self.before {
            Some(Rest::Asleep(asleep)) => Some(asleep),
            _ => None,
        }
    }

    /// Takes what is asleep, to [`end`](Self::end) the change.
    pub(super) fn take_asleep(&mut self) -> Option<Asleep> {
        match self.before.take() {
            Some(Rest::Asleep(asleep)) => Some(asleep),
            before => {
                self.before = before;
                None
            }
        }
    }

    /// Ends the change. The caller has set what the range is now; returns what it was, to be
    /// dropped without a lock.
    pub(super) fn end(mut self) -> Option<Rest> {
        self.before.take()
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        let Some(before) = self.before.take() else {
            return;
        };
        if self.handle.slot.check_process().is_ok() {
            self.handle.slot.lock().rest = before;
            self.handle.inner().state.tell();
        }
    }
}
