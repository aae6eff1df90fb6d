//! The limit of models whose memory costs nothing: a number that they count up and down together.
//!
//! Nobody is asked to give bytes back. But models with prompts that are half computed could wait
//! for each other forever. So a model that waits and can compute nothing gives a sequence's memory
//! back at each look, unless it is the first of those that wait.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

/// Bytes that the sequences of several models may have in use together. Clones count the same.
#[derive(Clone, Debug)]
pub struct Budget {
    limit_bytes: usize,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    used_bytes: usize,
    /// The most that was ever in use.
    most_bytes: usize,
    /// Models that wait for bytes.
    waiting: BTreeSet<usize>,
    wakers: Vec<Waker>,
}

impl Budget {
    /// Nothing is in use.
    pub fn new(limit_bytes: usize) -> Self {
        Self {
            limit_bytes,
            state: Arc::default(),
        }
    }

    /// Counts this many bytes more as in use. Returns `false`, and counts nothing, if they are more
    /// than are left.
    #[must_use]
    pub fn take(&self, bytes: usize) -> bool {
        let mut state = self.state();
        let fits = bytes <= self.limit_bytes - state.used_bytes;
        if fits {
            state.used_bytes += bytes;
            state.most_bytes = state.most_bytes.max(state.used_bytes);
        }
        fits
    }

    /// Counts this many bytes less.
    ///
    /// # Panics
    ///
    /// If fewer are in use.
    fn give(&self, bytes: usize) {
        let mut state = self.state();
        let used = state.used_bytes.checked_sub(bytes);
        state.used_bytes = used.expect("what is given was taken");
    }

    fn wake_all(&self) {
        let wakers = self.state().wakers.clone();
        wakers.iter().for_each(Waker::wake_by_ref);
    }

    /// Wakes a model whenever bytes are given.
    pub fn wake(&self, waker: Waker) {
        self.state().wakers.push(waker);
    }

    /// Bytes in use.
    pub fn used_bytes(&self) -> usize {
        self.state().used_bytes
    }

    /// The most bytes that were in use at any time.
    pub fn most_bytes(&self) -> usize {
        self.state().most_bytes
    }

    /// A model's part, of blocks of this size.
    pub(super) fn counted(self, model: usize, block_bytes: usize) -> Counted {
        Counted {
            budget: self,
            model,
            block_bytes,
            blocks: 0,
            before_plan: None,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What of a budget is counted for one model.
pub(super) struct Counted {
    budget: Budget,
    model: usize,
    block_bytes: usize,
    blocks: usize,
    /// What was counted before the plan that is being made.
    before_plan: Option<usize>,
}

impl Counted {
    /// A plan begins. What it takes and gives again wakes nobody: models that wait would wake each
    /// other for ever.
    pub(super) fn begin_plan(&mut self) {
        self.before_plan = Some(self.blocks);
    }

    /// A plan is made, and lacks bytes or not. Wakes the models if it has given some.
    pub(super) fn end_plan(&mut self, is_short: bool) {
        let before = self.before_plan.take();
        if before.is_some_and(|before| self.blocks < before) {
            self.budget.wake_all();
        }
        self.wait(is_short);
    }

    /// Counts this many blocks more as in use. Returns `false` if there is no room for them.
    #[must_use]
    pub(super) fn take(&mut self, blocks: usize) -> bool {
        let fits = self.budget.take(blocks * self.block_bytes);
        self.blocks += if fits { blocks } else { 0 };
        fits
    }

    /// Notes whether the model waits for bytes.
    pub(super) fn wait(&self, is_waiting: bool) {
        let mut state = self.budget.state();
        if !is_waiting {
            state.waiting.remove(&self.model);
        } else if state.waiting.insert(self.model) {
            drop(state);
            self.budget.wake_all();
        }
    }

    /// Whether the model, if it can compute nothing, must give its bytes to one that waits.
    pub(super) fn must_yield(&self) -> bool {
        let first = self.budget.state().waiting.first().copied();
        first.is_some_and(|first| first < self.model)
    }

    /// Gives back what was counted beyond the blocks that are in use. Wakes the models, as one may
    /// wait for it.
    pub(super) fn settle(&mut self, used: usize) {
        let unused = self.blocks.checked_sub(used);
        let unused = unused.expect("what is in use was counted");
        self.blocks = used;
        self.budget.give(unused * self.block_bytes);
        if unused > 0 && self.before_plan.is_none() {
            self.budget.wake_all();
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.before_plan = None;
        self.settle(0);
        self.wait(false);
    }
}

#[cfg(test)]
mod unit {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn models_count_the_same_bytes_and_what_is_given_wakes_them() {
        let (budget, woken) = (Budget::new(100), Arc::new(Woken::default()));
        budget.wake(Waker::from(woken.clone()));
        let counted = |model, bytes| budget.clone().counted(model, bytes);
        let (mut one, mut two) = (counted(0, 10), counted(1, 7));
        assert!(one.take(6) && two.take(5), "95 of 100");
        assert!(!two.take(1) && !one.take(1), "nothing is counted");
        assert_eq!(budget.used_bytes(), 95);
        one.settle(6);
        assert_eq!(woken.0.load(Ordering::Relaxed), 0, "nothing was given");
        one.settle(4);
        assert_eq!(woken.0.load(Ordering::Relaxed), 1);
        // A plan that gives what it took wakes nobody; one that gives more does.
        for (used, wakes) in [(4, 1), (3, 2)] {
            one.begin_plan();
            assert!(one.take(1));
            one.settle(used);
            one.end_plan(false);
            assert_eq!(woken.0.load(Ordering::Relaxed), wakes);
        }
        assert!(one.take(1));
        assert!(two.take(3));
        one.wait(true);
        assert!(two.must_yield() && !one.must_yield());
        two.wait(true);
        assert!(!one.must_yield(), "it is the first");
        drop(one);
        assert!(!two.must_yield());
        assert_eq!(budget.used_bytes(), 56);
        assert_eq!(budget.most_bytes(), 96);
    }
}
