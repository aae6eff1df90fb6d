//! The models beside a model, and what it asks of them: prefixes that nothing uses, before there is
//! a shortage, and to sleep, if they have nothing to do and there is one.
//!
//! A model that grows takes what is free. When that runs low, another model is told to give some of
//! its prefixes back, while the first still has memory for its next sequences. So the calls of the
//! driver that move memory happen on the engine's thread, and no request waits for them.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::told::{Command, Peer};
use crate::engine::is_store_full;
use candle_cuda_vmm::{Account, Result, VmmError};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// How long a model that has no memory waits before it looks again, if nothing tells it.
pub(super) const LOOK: Duration = Duration::from_millis(5);

/// How long a model takes to give prefixes back, and the engine's thread to unmap their pages.
/// Within it, nobody is asked again.
const PAUSE: Duration = Duration::from_millis(2);

/// How long a model may take to sleep before another one is asked.
const SLEEPS: Duration = Duration::from_secs(2);

/// All models, seen by one of them.
pub(super) struct Peers {
    all: Arc<[Peer]>,
    own: usize,
    asked_at: Option<Instant>,
    /// The model that was last told to sleep, since when it is idle, and when it was told.
    told: Option<(usize, Instant, Instant)>,
}

impl Peers {
    /// `own` is the model's place among all.
    pub(super) fn new(all: Arc<[Peer]>, own: usize) -> Self {
        Self {
            all,
            own,
            asked_at: None,
            told: None,
        }
    }

    /// Asks another model for so many bytes of its prefixes: one that has nothing to do, or else
    /// the one with the most.
    pub(super) fn ask(&mut self, bytes: usize) {
        if self.asked_at.is_some_and(|at| at.elapsed() < PAUSE) {
            return;
        }
        let others = self.all.iter().enumerate();
        let others = others.filter(|(place, _)| *place != self.own);
        let works = others.map(|(_, peer)| (peer, peer.told.work()));
        let works = works.filter(|(_, work)| work.held.prefix_bytes > 0);
        let found = works.max_by_key(|(_, work)| {
            let is_idle = work.counts.running + work.counts.waiting == 0;
            (is_idle, work.held.prefix_bytes)
        });
        let Some((peer, _)) = found else {
            return;
        };
        // An error says that its thread has ended.
        _ = peer.commands.send(Command::GiveBack(bytes));
        self.asked_at = Some(Instant::now());
    }

    /// Has another model sleep: the one that is idle for the longest time. One at a time; if none is
    /// idle, the others are asked for so many bytes of prefixes.
    pub(super) fn make_room(&mut self, bytes: usize) {
        let idle: Vec<_> = self.idle().collect();
        let is_on_its_way = |(place, since, at): (usize, Instant, Instant)| {
            at.elapsed() < SLEEPS && idle.contains(&(since, place))
        };
        if self.told.is_some_and(is_on_its_way) {
            return;
        }
        let Some((since, place)) = idle.iter().min().copied() else {
            return self.ask(bytes);
        };
        // An error says that its thread has ended.
        _ = self.all[place].commands.send(Command::MakeRoom);
        self.told = Some((place, since, Instant::now()));
    }

    /// The other models that are awake and have nothing to do, with the time since when.
    fn idle(&self) -> impl Iterator<Item = (Instant, usize)> {
        let others = self.all.iter().enumerate();
        let others = others.filter(|(place, _)| *place != self.own);
        others.filter_map(|(place, peer)| Some((peer.told.work().rest.idle_since?, place)))
    }

    /// Makes something that takes memory, and has others sleep for it.
    ///
    /// # Errors
    /// The last one, if nobody is left who could sleep, or the time is over.
    pub(super) fn with_room<T>(
        &mut self,
        account: &Account,
        patience: Duration,
        mut make: impl FnMut() -> Result<T>,
    ) -> Result<T> {
        let began = Instant::now();
        loop {
            // Before the call, so that what has slept before it counts.
            let may_come = self.idle().next().is_some() && began.elapsed() < patience;
            match make() {
                Err(error) if is_short(&error) && may_come => {
                    account.withdraw();
                    self.make_room(0);
                    thread::sleep(LOOK);
                }
                made => return made,
            }
        }
    }
}

/// Whether the same may succeed when others have given back memory.
pub(super) fn is_short(error: &VmmError) -> bool {
    is_store_full(error) || error.is_out_of_memory() || error.is_retryable()
}
