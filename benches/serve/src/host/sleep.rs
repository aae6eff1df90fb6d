//! When a model sleeps and wakes: its thread's part of it.
//!
//! A model that is idle sleeps after a time, when it is told to, or when another one needs its
//! memory. A request wakes it: it waits until others have given up enough, and has them told. No
//! sequence is preempted for a wake.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::peers::{LOOK, is_short};
use super::serving::Serving;
use crate::request::{Event, Refusal};
use std::time::{Duration, Instant};

/// When a client that was refused for want of memory may ask again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

impl Serving {
    /// How long to wait for a command: `None` for ever.
    pub(super) fn idle_wait(&self) -> Option<Duration> {
        if self.runner.is_asleep() {
            return (!self.waiting.is_empty()).then_some(LOOK);
        }
        let after = self.sleeping.and_then(|it| it.after)?;
        let idle = self.rest.idle_since?.elapsed();
        Some(after.saturating_sub(idle))
    }

    /// Whether no request is open.
    fn has_nothing_to_do(&self) -> bool {
        self.requests.is_empty() && self.waiting.is_empty() && self.runner.is_idle()
    }

    /// Sleeps if it is time to, and wakes if somebody wants it.
    pub(super) fn sleep_or_wake(&mut self) {
        self.told.closed(self.waiting.drop_gone());
        if self.sleeping.is_none() {
            return;
        }
        if self.runner.is_asleep() {
            self.try_wake();
        }
        self.note_idle();
        let after = self.sleeping.and_then(|it| it.after);
        let idle = self.rest.idle_since.map(|since| since.elapsed());
        if let (Some(after), Some(idle)) = (after, idle)
            && idle >= after
        {
            // If it is refused, the log says why, and it is tried again after the same time.
            _ = self.try_sleep();
        }
    }

    /// Notes whether the model has nothing to do, and since when.
    pub(super) fn note_idle(&mut self) {
        self.rest.is_asleep = self.runner.is_asleep();
        match self.has_nothing_to_do() && !self.rest.is_asleep {
            true => _ = self.rest.idle_since.get_or_insert_with(Instant::now),
            false => self.rest.idle_since = None,
        }
    }

    /// Sleeps instead of giving back prefixes, if it can and the host has room for all of it.
    pub(super) fn sleeps_instead(&mut self) -> bool {
        self.runner.fits_host() && self.try_sleep().is_ok()
    }

    /// Sleeps, unless there is something to do.
    pub(super) fn try_sleep(&mut self) -> core::result::Result<(), Refusal> {
        if self.sleeping.is_none() {
            return Err(Refusal::NeverSleeps);
        }
        if self.runner.is_asleep() && self.waiting.is_empty() {
            return Ok(());
        }
        if !self.has_nothing_to_do() {
            return Err(Refusal::Working);
        }
        let began = Instant::now();
        let slept = self.runner.sleep();
        self.rest.idle_since = None;
        self.note_idle();
        let elapsed = began.elapsed();
        match slept {
            Ok(kept) => {
                self.rest.sleeps += 1;
                self.rest.sleep_time += elapsed;
                tracing::info!(?kept, ?elapsed, "the model sleeps");
                self.rank();
                self.publish();
                Ok(())
            }
            Err(error) => {
                tracing::warn!(%error, "the model could not be put to sleep");
                self.publish();
                Err(Refusal::KeptAwake)
            }
        }
    }

    /// Wakes the model, if somebody wants it and there is room. If not, others are told to make it.
    fn try_wake(&mut self) {
        let patience = self.sleeping.map_or(Duration::ZERO, |it| it.patience);
        if self.waiting.is_empty() {
            self.waiting.since = None;
            return;
        }
        let since = *self.waiting.since.get_or_insert_with(Instant::now);
        let needed = self.runner.asleep_bytes();
        // Nobody owes for a wake that is not tried, so no sequence is preempted for it.
        if self.account.available_bytes() >= needed {
            match self.runner.wake() {
                Ok(()) => return self.woken(since),
                Err(error) if is_short(&error) => _ = self.account.withdraw(),
                Err(error) => {
                    tracing::error!(%error, "the model could not be woken");
                    let failed = error.to_string();
                    return self.refuse(&Event::Failed(failed), Refusal::KeptAsleep);
                }
            }
        }
        if since.elapsed() >= patience {
            let refusal = Refusal::NoRoom {
                needed_bytes: needed,
                retry_after: RETRY_AFTER,
            };
            tracing::warn!(needed, "there was no room to wake the model");
            return self.refuse(&Event::Refused(refusal), refusal);
        }
        self.peers.make_room(needed);
    }

    /// Begins what waited for the model.
    fn woken(&mut self, since: Instant) {
        self.rest.wakes += 1;
        self.rest.wake_time += since.elapsed();
        self.rest.idle_since = None;
        tracing::info!(elapsed = ?since.elapsed(), "the model is awake");
        let waited = std::mem::take(&mut self.waiting);
        if waited.clears {
            self.clear_prefixes();
        }
        for (id, ask, events) in waited.requests {
            self.begin(id, ask, events);
        }
        self.note_idle();
        self.publish();
        self.told.closed(waited.callers.len());
        for answer in waited.callers {
            // Who asked may have gone.
            _ = answer.send(Ok(()));
        }
    }

    /// Refuses what waits for the model.
    pub(super) fn refuse(&mut self, event: &Event, refusal: Refusal) {
        let waited = std::mem::take(&mut self.waiting);
        self.waiting.clears = waited.clears;
        let count = waited.requests.len() + waited.callers.len();
        self.told.closed(count);
        for (_, _, events) in waited.requests {
            _ = events.try_send(event.clone());
        }
        for answer in waited.callers {
            _ = answer.send(Err(refusal));
        }
    }
}
