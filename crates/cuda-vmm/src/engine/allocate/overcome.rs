//! How each obstacle in the way of an allocation is overcome.
//!
//! Each way returns the engine's lock if the allocation may try again, or the error if nothing
//! helps any more.

use super::attempt::Attempt;
use super::obstacle::Obstacle;
use crate::engine::changes::Locked;
use crate::engine::range::leases::Asker;
use crate::engine::retry::Which;
use crate::engine::scope::Scope;
use crate::size::Extent;
use crate::{Result, VmmError};

impl<'a> Attempt<'a> {
    /// Does the next thing that may take the obstacle away.
    pub(super) fn overcome(
        &mut self,
        obstacle: Obstacle,
        mut state: Locked<'a>,
    ) -> Result<Locked<'a>> {
        match obstacle {
            Obstacle::Final(error) => Err(error),
            Obstacle::TooLarge { whole_bytes, room } => {
                Err(state.quietly().out_of_memory(whole_bytes, &room))
            }
            Obstacle::Leased(extent) => self.ask_tokens(extent, state),
            Obstacle::Quarantined(extent, page_bytes) => self.retry(extent, page_bytes, state),
            Obstacle::Backlog => {
                // Others get the lock in between.
                drop(state);
                Ok(self.engine().state.lock())
            }
            Obstacle::Busy(extent) => self.await_others(extent, state),
            Obstacle::Leaving(extent) => self.await_leaving(extent, state),
            Obstacle::Retiring(extent, chunks) => self.await_retiring(extent, &chunks, state),
            Obstacle::Short(lack) => self.make_room(&lack, state),
        }
    }

    /// Leased: asks the tokens of the leases.
    fn ask_tokens(&mut self, extent: Extent, state: Locked<'a>) -> Result<Locked<'a>> {
        let Extent { offset, bytes } = extent;
        if self.shortage.has_polled() {
            return Err(VmmError::Leased { offset, bytes });
        }
        drop(state);
        let slot = &self.handle().slot;
        slot.ask_tokens(Asker::Waiting, Some(&[(offset, bytes)]));
        match self.poll_once(self.engine().state.lock()) {
            Ok(state) | Err(state) => Ok(state),
        }
    }

    /// Quarantined: asks the driver again to take the pages back.
    fn retry(
        &mut self,
        extent: Extent,
        page_bytes: usize,
        state: Locked<'a>,
    ) -> Result<Locked<'a>> {
        let Extent { offset, bytes } = extent;
        drop(state);
        if !self.retried.insert((self.handle().id(), offset)) {
            return Err(VmmError::Quarantined { offset, bytes });
        }
        let pages = extent.pages(page_bytes);
        self.engine().retry(&Which::At(self.handle().id(), pages));
        Ok(self.engine().state.lock())
    }

    /// Busy: waits for the other thread, which says when it is done.
    fn await_others(&mut self, extent: Extent, state: Locked<'a>) -> Result<Locked<'a>> {
        let engine = self.engine();
        let state = match self.poll_once(state) {
            Ok(state) => return Ok(state),
            Err(state) => state,
        };
        if let Some(state) = self.patience.await_change(engine, state) {
            return Ok(state);
        }
        self.keeps_its_place();
        Err(self.in_the_way(&mut engine.state.lock(), extent))
    }

    /// Retiring: makes the streams that will use the pages wait for the device's work, or else
    /// waits for it.
    fn await_retiring(
        &mut self,
        extent: Extent,
        chunks: &[usize],
        state: Locked<'a>,
    ) -> Result<Locked<'a>> {
        let mut state = match self.poll_once(state) {
            Ok(state) => return Ok(state),
            Err(state) => state,
        };
        if self.followed.insert((self.handle().id(), extent.offset)) {
            return Ok(self.handle().make_follow(state, chunks));
        }
        let error = self.in_the_way(&mut state, extent);
        let only = Scope::Range(self.handle().id());
        if let Some(state) = (self.patience).await_memory(self.engine(), state, only)? {
            return Ok(state);
        }
        self.keeps_its_place();
        Err(error)
    }

    /// Leaving: unmaps what the device has finished with, or else waits for the device.
    fn await_leaving(&mut self, extent: Extent, state: Locked<'a>) -> Result<Locked<'a>> {
        let (engine, only) = (self.engine(), Scope::Range(self.handle().id()));
        let state = match self.poll_once(state) {
            Ok(state) => return Ok(state),
            Err(state) => state,
        };
        drop(state);
        if engine.unmap_leaving(only) {
            return Ok(engine.state.lock());
        }
        let mut state = engine.state.lock();
        let error = self.in_the_way(&mut state, extent);
        if let Some(state) = (self.patience).await_memory(engine, state, only)? {
            return Ok(state);
        }
        self.keeps_its_place();
        Err(error)
    }

    /// Looks what the device has finished with, and locks the engine again; or hands the lock back,
    /// if that was done.
    fn poll_once(&mut self, state: Locked<'a>) -> Result<Locked<'a>, Locked<'a>> {
        let engine = self.engine();
        match self.shortage.poll(engine, state) {
            None => Ok(engine.state.lock()),
            Some(state) => Err(state),
        }
    }

    /// The error if some of the pages retire, or another thread works on them.
    fn in_the_way(&self, state: &mut Locked<'_>, extent: Extent) -> VmmError {
        let stats = state.quietly().parts();
        let range = state.ranges.get(self.handle().id());
        let (asked_bytes, limit_bytes) = range.map_or((extent.bytes, 0), |range| {
            let pages = extent.pages(range.page_bytes).len();
            let limit_bytes = state.ledger.account_limit_bytes(range.account);
            (pages * range.page_bytes, limit_bytes)
        });
        VmmError::OutOfPhysicalMemory {
            asked_bytes,
            free_bytes: 0,
            retiring_bytes: stats.retiring_bytes,
            reclaimable_bytes: stats.reclaimable_bytes(),
            limit_bytes,
        }
    }
}
