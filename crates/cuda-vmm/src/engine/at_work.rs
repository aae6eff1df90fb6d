//! Whether this thread has work of an engine in hand: pages or memory that the books give to no
//! other thread until it is done.
//!
//! Code of others runs in the middle of such work: a subscriber sees each driver call, and what
//! makes room is called while pages are being filled. If it calls the pools, and the call waited
//! for another thread's work, it could wait for the very work that it is in. So a call that comes
//! from within work waits for the device at most, never for a thread; what it leaves undone is done
//! when the work is.

use crate::sync::thread_local;
use core::cell::Cell;
use core::marker::PhantomData;

thread_local! {
    static PIECES: Cell<usize> = const { Cell::new(0) };
}

/// One piece of work in hand, begun before the lock is let go and ended with the work's end in the
/// books.
#[derive(Debug)]
pub(crate) struct AtWork(PhantomData<*const ()>);

impl AtWork {
    pub(crate) fn begin() -> Self {
        // Fails only while the thread itself ends.
        _ = PIECES.try_with(|pieces| pieces.set(pieces.get() + 1));
        Self(PhantomData)
    }

    /// Whether this thread has any in hand.
    pub(crate) fn any() -> bool {
        PIECES.try_with(|pieces| pieces.get() > 0).unwrap_or(false)
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        _ = PIECES.try_with(|pieces| pieces.set(pieces.get().saturating_sub(1)));
    }
}
