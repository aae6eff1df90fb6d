//! What keeps a range awake.

use crate::capture::NoCapture;
use crate::engine::at_work::AtWork;
use crate::engine::books::pages::ChunkState;
use crate::engine::handle::RangeHandle;
use crate::engine::inner::Inner;
use crate::engine::moving::{finish_work, may_move};
use crate::engine::range::Range;
use crate::engine::range::leases::Asker;
use crate::engine::scope::Scope;
use crate::engine::users::Users;
use crate::sync::Arc;
use crate::{Result, VmmError};
use core::ops;

impl RangeHandle {
    /// The error if something keeps the range awake.
    fn kept_awake(&self, by: &'static str) -> VmmError {
        let range = self.slot.lock();
        let mut live = range.pages.live().iter();
        let first = live.next().unwrap_or_default();
        let end = live.last().map_or(first.end, |last| last.end);
        kept(first.start..end, by)
    }

    /// Checks that nothing uses the memory, and waits for other threads' work on it.
    pub(super) fn check_idle(
        &self,
        engine: &Arc<Inner>,
        no_capture: Option<&NoCapture>,
    ) -> Result<()> {
        let slot = &self.slot;
        self.await_others(engine)?;
        slot.ask_tokens(Asker::Waiting, None);
        // What was freed under leases that are over retires.
        engine.poll();
        let range = slot.lock();
        let held = range.leases.bytes().into_iter();
        let held = held.chain(range.leases.freed().iter()).next();
        if let Some(bytes) = held {
            return Err(kept(bytes, "a lease"));
        }
        if let Some(pages) = range.pins.values().next() {
            let bytes = pages.start * range.page_bytes..pages.end * range.page_bytes;
            return Err(kept(bytes, "a pin"));
        }
        let users = range.users.clone();
        drop(range);
        let users = slot.settle_users(users);
        if !may_move(no_capture, &users)? {
            return Err(self.kept_awake("a capture"));
        }
        match is_busy(&users)? {
            Some(true) => return Err(self.kept_awake("queued work")),
            Some(false) => {}
            // It may be of others, so it is waited for.
            None => finish_work(engine, &users)?,
        }
        engine.poll();
        self.await_retiring(engine)
    }

    /// Waits until the device has finished with what was freed, and with zeros that the engine
    /// writes over it. The streams that are known are idle, so that is not long.
    fn await_retiring(&self, engine: &Arc<Inner>) -> Result<()> {
        loop {
            let state = engine.state.lock();
            let range = state.ranges.get(self.id()).ok_or(VmmError::Closed)?;
            let retires = range.pages.any_in_state(ChunkState::Retiring);
            drop(range);
            let scope = Scope::Range(self.id());
            if !retires || engine.await_progress(state, scope)?.is_none() {
                return Ok(());
            }
        }
    }

    /// Waits until no other thread makes, moves or unmaps pages of the range.
    fn await_others(&self, engine: &Inner) -> Result<()> {
        let mut state = engine.state.lock();
        loop {
            let range = state.ranges.get(self.id()).ok_or(VmmError::Closed)?;
            let pages = &range.pages;
            let drains = pages.any_in_state(ChunkState::Draining);
            if !(pages.is_worked_on() || pages.is_any_pending() || drains) {
                return Ok(());
            }
            if range.making_room > 0 || AtWork::any() {
                // That could wait for this thread.
                drop(range);
                drop(state);
                return Err(self.kept_awake("another call"));
            }
            drop(range);
            state = engine.state.wait(state);
        }
    }
}

/// Whether work is queued on the streams that are known; `None` if others may have some, or if a
/// default stream is known, which cannot be asked. Not by a fence of now, which takes the device a
/// moment though the stream is idle.
fn is_busy(users: &Users) -> Result<Option<bool>> {
    let named = users.streams().into_iter().flatten();
    let handles: Vec<_> = named.map(|(_, named)| named.handle()).collect();
    if users.streams().is_none() || handles.iter().any(|stream| stream.is_default()) {
        return Ok(None);
    }
    for stream in handles {
        if !stream.is_idle()? {
            return Ok(Some(true));
        }
    }
    for end in users.ends() {
        if !end.is_complete()? {
            return Ok(Some(true));
        }
    }
    Ok(Some(false))
}

impl Range {
    /// Checks that every chunk can be taken out.
    pub(super) fn check_ready(&self) -> Result<()> {
        let Some((pages, state, is_shared)) = self.pages.first_unready() else {
            return Ok(());
        };
        let bytes = pages.start * self.page_bytes..pages.end * self.page_bytes;
        Err(match state {
            _ if is_shared => kept(bytes, "shared memory"),
            ChunkState::Quarantined | ChunkState::Stranded => VmmError::Quarantined {
                offset: bytes.start,
                bytes: bytes.len(),
            },
            ChunkState::Retiring | ChunkState::Parked => kept(bytes, "queued work"),
            _ => kept(bytes, "another call"),
        })
    }
}

pub(super) fn kept(bytes: ops::Range<usize>, by: &'static str) -> VmmError {
    VmmError::KeptAwake {
        offset: bytes.start,
        bytes: bytes.len(),
        by,
    }
}
