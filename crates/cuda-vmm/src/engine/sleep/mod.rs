//! Ranges that give up all their memory, keep their addresses, and have both again later.
//!
//! ```text
//! sleep
//!  mark            from now on no call takes, frees, leases, pins or moves bytes of the range
//!  check           leases, pins, captures, queued work, other threads' work
//!  reserve         host bytes for the contents, or there is a copy that is still true
//!  give up         what is parked and made ahead goes first
//!  depart, copy    the chunks leave the books; their contents go to the host
//!  unmap           each chunk when it is copied; the memory stays and has the contents until all
//!                  of it is unmapped
//!  end             the books are empty, the range is asleep, the memory goes to the driver
//!
//!  a step fails    what was unmapped is mapped again; the range is awake, as it was
//!  that fails too  the chunk is stranded, as one of a move is: kept, counted, tried again
//!
//! wake
//!  mark            one thread wakes a range
//!  allocate        the bytes that were live, as any allocation does: all or none; if there is room
//!                  for all of them now, those first whose contents come first
//!  copy            from the host, on a stream of its own, in the order that was asked for
//!  end             the range is awake: when all contents have come, or, if the wake streams, when
//!                  all copies are queued and each part has a fence
//!
//!  a step fails    the memory goes again; the range is asleep, and has its host bytes
//! ```
//!
//! Several ranges sleep together or not at all, and wake so.

mod arrival;
mod change;
mod copies;
mod idle;
mod order;
mod sleeper;
mod wake;

pub(crate) use arrival::Arrival;
pub use sleeper::Slept;
pub(crate) use sleeper::sleep_all;
pub(crate) use wake::{Waking, wake_all};

use super::handle::RangeHandle;
use super::range::rest::Rest;
use crate::{HostStore, Result};

/// What becomes of the contents of a range that sleeps.
#[derive(Debug, Clone, Copy)]
pub enum Keep<'a> {
    /// They are lost. The range wakes with the same bytes live, which hold anything.
    Nothing,
    /// They are copied to the host store, and back when the range wakes. Its host bytes are given
    /// back then.
    Host(&'a HostStore),
    /// Like [`Host`](Self::Host), for contents that do not change while the range is awake. The
    /// copy stays when the range wakes, and the next sleep with this uses it again instead of
    /// copying, unless bytes of the range were allocated or freed meanwhile.
    ///
    /// It is a promise that nothing was written since the range was woken last. The engine cannot
    /// check it. If something was, the range wakes with the older contents.
    Constant(&'a HostStore),
}

impl RangeHandle {
    /// Whether the range is asleep, or on its way there or back; false if it was closed.
    pub(crate) fn is_asleep(&self) -> bool {
        let range = self.slot.lock_open();
        range.is_ok_and(|range| !range.rest.is_awake())
    }

    /// How often memory was taken from behind the range's addresses, or replaced.
    pub(crate) fn generation(&self) -> Result<u64> {
        Ok(self.slot.lock_open()?.pages.generation())
    }

    /// Gives back the copy that an earlier sleep left on the host; returns its bytes.
    pub(crate) fn forget_copy(&self) -> Result<usize> {
        let mut range = self.slot.lock_open()?;
        range.check_awake()?;
        let host_bytes = range.rest.stats().host_bytes;
        let copy = core::mem::replace(&mut range.rest, Rest::Awake(None));
        drop(range);
        // Without the lock: it may unpin memory, which calls the driver.
        drop(copy);
        Ok(host_bytes)
    }
}
