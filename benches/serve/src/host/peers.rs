//! The models beside a model, and what it asks of them: prefixes that nothing uses, before there is
//! a shortage.
//!
//! A model that grows takes what is free. When that runs low, another model is told to give some of
//! its prefixes back, while the first still has memory for its next sequences. So the calls of the
//! driver that move memory happen on the engine's thread, and no request waits for them.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::told::{Command, Peer};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a model takes to give prefixes back, and the engine's thread to unmap their pages.
/// Within it, nobody is asked again.
const PAUSE: Duration = Duration::from_millis(2);

/// All models, seen by one of them.
pub(super) struct Peers {
    all: Arc<[Peer]>,
    own: usize,
    asked_at: Option<Instant>,
}

impl Peers {
    /// `own` is the model's place among all.
    pub(super) fn new(all: Arc<[Peer]>, own: usize) -> Self {
        Self {
            all,
            own,
            asked_at: None,
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
}
