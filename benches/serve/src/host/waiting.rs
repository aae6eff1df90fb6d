//! What waits until a model is awake.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::told::Answer;
use crate::request::{Event, Generate};
use crate::scheduler::Id;
use std::time::Instant;
use tokio::sync::mpsc;

/// What waits until the model is awake.
#[derive(Default)]
pub(super) struct Waiting {
    pub(super) requests: Vec<(Id, Generate, mpsc::Sender<Event>)>,
    /// Callers that have asked for a wake.
    pub(super) callers: Vec<Answer>,
    /// Since when something waits.
    pub(super) since: Option<Instant>,
    /// Prefixes are to be cleared.
    pub(super) clears: bool,
}

impl Waiting {
    pub(super) fn is_empty(&self) -> bool {
        self.requests.is_empty() && self.callers.is_empty()
    }

    pub(super) fn hold(&mut self, id: Id, ask: Generate, events: mpsc::Sender<Event>) {
        self.requests.push((id, ask, events));
    }

    pub(super) fn call(&mut self, answer: Answer) {
        self.callers.push(answer);
    }

    /// Forgets those that have gone, and returns how many.
    pub(super) fn drop_gone(&mut self) -> usize {
        let before = self.requests.len() + self.callers.len();
        self.requests.retain(|(_, _, events)| !events.is_closed());
        self.callers.retain(|answer| !answer.is_closed());
        before - self.requests.len() - self.callers.len()
    }
}
