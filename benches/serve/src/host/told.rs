//! What is told to a model's thread, and what it tells.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::figures::Work;
use crate::engine::{StepTimes, Stepped};
use crate::request::{Event, Generate, Refusal};
use crate::scheduler::Id;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// Tells a caller how what it asked for has ended.
pub(super) type Answer = oneshot::Sender<Result<(), Refusal>>;

/// What a model's thread is told.
pub(super) enum Command {
    Begin(Id, Generate, mpsc::Sender<Event>),
    /// Memory is owed, or may be had.
    Look,
    /// Gives back so many bytes of prefixes that nothing uses, or what there is.
    GiveBack(usize),
    ClearPrefixes(Sender<()>),
    /// Sleeps if there is nothing to do: another model needs the memory.
    MakeRoom,
    Sleep(Answer),
    Wake(Answer),
    /// Ends when nothing is left.
    Close,
}

/// What a model's thread tells.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// Requests that were taken and have not ended.
    pub(super) open: AtomicUsize,
    pub(super) next: AtomicU64,
    pub(super) is_closing: AtomicBool,
    pub(super) has_failed: AtomicBool,
    pub(super) work: Mutex<Work>,
    pub(super) times: Mutex<Times>,
}

/// How long steps took.
#[derive(Clone, Debug, Default)]
pub(super) struct Times {
    /// Those without prompts, by their number of sequences, up to a power of two.
    pub(super) decode: BTreeMap<usize, StepTimes>,
    /// Those with prompts, by the tokens of these, up to a power of two.
    pub(super) prompt: BTreeMap<usize, StepTimes>,
}

impl Told {
    /// What the thread has published last.
    pub(super) fn work(&self) -> Work {
        *self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts requests that have ended.
    pub(super) fn closed(&self, count: usize) {
        self.open.fetch_sub(count, Ordering::Relaxed);
    }

    pub(super) fn count_time(&self, step: Stepped, total: Duration) {
        let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        let (of_kind, size) = match step.prompt_tokens {
            0 => (&mut times.decode, step.decodes),
            tokens => (&mut times.prompt, tokens),
        };
        let sizes = (step.decodes, step.prompt_tokens);
        let own = total.saturating_sub(step.decode_time);
        let times = of_kind.entry(size.next_power_of_two()).or_default();
        times.add(sizes, total, own);
    }
}

/// A model, as the others know it.
pub(super) struct Peer {
    pub(super) commands: Sender<Command>,
    pub(super) told: Arc<Told>,
}

impl Peer {
    /// A model that is not there yet, and what will be sent to it.
    pub(super) fn new() -> (Self, Receiver<Command>) {
        let (commands, received) = channel();
        let told = Arc::default();
        (Self { commands, told }, received)
    }
}
