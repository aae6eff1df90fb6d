//! Which streams a range waits for, and which wait for it.

use super::handle::RangeHandle;
use super::queue::Until;
use super::users::End;
use crate::sync::Arc;
use crate::{CaptureGuard, Fence, Result, Stream};

impl RangeHandle {
    /// Names a stream whose work uses the range.
    pub(crate) fn use_stream(&self, stream: &Stream) -> Result<()> {
        let engine = self.engine().open()?;
        engine.device.expect_same(stream.device())?;
        self.add_stream(stream)?;
        // Streams that no caller can use any more go without a free.
        let users = self.slot.lock().users.clone();
        drop(self.slot.settle_users(users));
        Ok(())
    }

    /// Stops naming a stream for the range: frees wait for what is queued on it now, and not for
    /// later work.
    pub(crate) fn forget_stream(&self, stream: &Stream) -> Result<()> {
        let engine = self.engine().open()?;
        engine.device.expect_same(stream.device())?;
        let stream = stream.handle();
        if !self.slot.lock_open()?.users.is_named(stream) {
            return Ok(());
        }
        let end = End::of(stream);
        let dropped = self.slot.lock_open()?.users.forget(stream, end);
        // Its streams go without the lock.
        drop(dropped);
        Ok(())
    }

    /// Makes a stream wait for all work that was queued under leases of the range. Returns false if
    /// a capture makes that impossible.
    pub(crate) fn order_after_leases(&self, stream: &Stream) -> Result<bool> {
        let engine = self.engine().open()?;
        engine.device.expect_same(stream.device())?;
        if !self.slot.lock_open()?.users.are_all() {
            return Ok(true);
        }
        let Some(none) = CaptureGuard::try_none() else {
            return Ok(false);
        };
        if !stream.handle().is_per_thread() && stream.is_capturing()? {
            return Ok(false);
        }
        let Some(fences) = Until::of_contexts(&engine.device, true, &none)? else {
            return engine.device.finish_work(true).map(|()| true);
        };
        for fence in fences {
            if !fence.is_complete()? {
                stream.wait_for(&fence)?;
            }
        }
        Ok(true)
    }

    /// Makes frees of the range wait for the end of a stream that is not named.
    pub(crate) fn add_end(&self, end: &Arc<Fence>) -> Result<()> {
        let ends = self.slot.lock_open()?.users.add_end(end);
        if let Some(ends) = ends {
            drop(self.slot.take_past(&ends));
        }
        Ok(())
    }
}
