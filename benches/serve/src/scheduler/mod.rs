//! Which sequences of one model take part in the next step.
//!
//! Scheduling is by iterations, as in Orca and vLLM: a sequence joins and leaves between any two
//! steps. A step has one token of every sequence that decodes. Beside them it has chunks of
//! prompts, as in Sarathi, in the order of arrival and up to a number of tokens, so that a long
//! prompt does not hold up the others for long.
//!
//! Sequences stand in one line, in the order of arrival: those that run, then those that wait. Who
//! waits is admitted from the front, so nobody overtakes. If a sequence that decodes gets no
//! memory, the youngest that runs is preempted, which may be itself: it gives its memory back, is
//! again the first that waits, and has all its tokens computed again. If others are about to give
//! memory back, it sits out the step instead, with what it has. In such plans nobody is admitted. So
//! after a step only the youngest that runs can be in the midst of its prompt. If that
//! one gets no memory, it keeps its place and what it has, and nobody is admitted either.
//!
//! The front of the line never loses its memory to the others. If the model can have all the memory
//! that it was promised, the front has a part in every step, except for those few that it sits out.
//! So every sequence gets there and ends.
//!
//! There is no clock, thread or device here: a plan depends on the calls alone.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

mod ask;
mod blocks;
mod sequence;
mod step;

pub use ask::{Ask, Id, Limits, Refusal};
pub use blocks::{Blocks, Growth};
pub use step::{Chunk, Step};

use sequence::Sequence;
use std::collections::VecDeque;

/// What there is, and what was done since the beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Sequences that have memory.
    pub running: usize,
    /// Sequences that have none, the preempted ones among them.
    pub waiting: usize,
    /// How often a sequence was preempted.
    pub preemptions: u64,
    /// Tokens that were computed.
    pub computed_tokens: u64,
    /// Tokens that the prefix cache spared.
    pub cached_tokens: u64,
    /// Tokens that were generated.
    pub generated_tokens: u64,
}

/// The sequences of one model.
///
/// ```
/// use cuda_vmm_serve::scheduler::{Ask, Blocks, Growth, Id, Limits, Scheduler};
///
/// struct Plenty;
///
/// impl Blocks for Plenty {
///     fn sequence_tokens_max(&self) -> usize { 4096 }
///     fn cached_prefix(&mut self, _: Id) -> usize { 0 }
///     fn grow(&mut self, _: Id, _: usize) -> Growth { Growth::Done }
///     fn release(&mut self, _: Id) {}
/// }
///
/// let limits = Limits { sequences_max: 8, step_tokens_max: 512, context_max: 4096, waiting_max: 100 };
/// let mut scheduler = Scheduler::new(limits);
/// let ask = Ask { id: Id(1), prompt_tokens: 700, generated_max: 20 };
/// scheduler.submit(ask, &Plenty).unwrap();
/// let mut tokens = 0;
/// while !scheduler.is_idle() {
///     let step = scheduler.plan(&mut Plenty);
///     // The model computes the step here.
///     scheduler.finish(&step, |_| { tokens += 1; false }, &mut Plenty);
/// }
/// assert_eq!(tokens, 20);
/// ```
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    /// The oldest first.
    running: Vec<Sequence>,
    /// The oldest first; all are younger than those that run.
    waiting: VecDeque<Sequence>,
    /// How many steps were planned.
    steps: u64,
    /// The numbers of sequences are filled in when somebody asks.
    counts: Counts,
}

impl Scheduler {
    /// No sequences yet.
    ///
    /// # Panics
    ///
    /// If no sequence may run, or no token of a prompt be in a step.
    pub fn new(limits: Limits) -> Self {
        assert!(limits.sequences_max > 0, "no sequence could run");
        assert!(limits.step_tokens_max > 0, "no prompt could be computed");
        Self {
            limits,
            running: Vec::new(),
            waiting: VecDeque::new(),
            steps: 0,
            counts: Counts::default(),
        }
    }

    /// What it was made with.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Has a sequence wait behind all others.
    ///
    /// # Errors
    ///
    /// The [`Refusal`] says why it does not; nothing has changed then.
    pub fn submit(&mut self, ask: Ask, blocks: &impl Blocks) -> Result<(), Refusal> {
        if ask.prompt_tokens == 0 || ask.generated_max == 0 {
            return Err(Refusal::Empty);
        }
        // The last token is never computed, so it needs no memory.
        let memory_max = blocks.sequence_tokens_max().saturating_add(1);
        let (tokens, tokens_max) = (ask.tokens(), self.limits.context_max.min(memory_max));
        if tokens > tokens_max {
            return Err(Refusal::TooLong { tokens, tokens_max });
        }
        let mut all = self.running.iter().chain(&self.waiting);
        if all.any(|sequence| sequence.id() == ask.id) {
            return Err(Refusal::Duplicate);
        }
        let waiting = self.waiting.len();
        if waiting >= self.limits.waiting_max {
            return Err(Refusal::Full { waiting });
        }
        self.waiting.push_back(Sequence::new(ask));
        Ok(())
    }

    /// Plans the next step, and takes the memory for it.
    ///
    /// A step that was planned before and not finished counts for nothing: its tokens are planned
    /// again.
    #[must_use]
    pub fn plan(&mut self, blocks: &mut impl Blocks) -> Step {
        self.steps += 1;
        let mut step = Step {
            number: self.steps,
            ..Step::default()
        };
        self.running.iter_mut().for_each(Sequence::unplan);
        let mut has_memory = self.plan_decodes(&mut step, blocks);
        let mut budget = self.limits.step_tokens_max;
        has_memory &= self.plan_prompts(&mut step, &mut budget, blocks);
        if has_memory {
            self.admit(&mut step, &mut budget, blocks);
        }
        step
    }

    /// Goes on with sequences that decode; returns whether there was memory for all.
    fn plan_decodes(&mut self, step: &mut Step, blocks: &mut impl Blocks) -> bool {
        let (mut at, mut has_memory) = (0, true);
        // Only such are preempted as come later, or the one itself: what is planned stays.
        while let Some(sequence) = self.running.get_mut(at) {
            if !sequence.decodes() {
                at += 1;
                continue;
            }
            let planned = sequence.plan(1, blocks);
            has_memory &= planned.is_ok();
            match planned {
                Ok(chunk) => step.decodes.push(chunk.id),
                Err(Growth::Coming) => {}
                Err(_) => {
                    step.preempted.extend(self.preempt(blocks));
                    continue;
                }
            }
            at += 1;
        }
        has_memory
    }

    /// Goes on with prompts that were begun; returns whether there was memory for it.
    fn plan_prompts(
        &mut self,
        step: &mut Step,
        budget: &mut usize,
        blocks: &mut impl Blocks,
    ) -> bool {
        // There are several only if a step was not finished. All but the youngest have the memory
        // for what is left of theirs.
        let begun = self.running.iter_mut();
        for sequence in begun.filter(|sequence| !sequence.decodes()) {
            let Ok(chunk) = sequence.plan(*budget, blocks) else {
                return false;
            };
            *budget -= chunk.count;
            step.chunks.push(chunk);
        }
        true
    }

    fn admit(&mut self, step: &mut Step, budget: &mut usize, blocks: &mut impl Blocks) {
        while *budget > 0 && self.running.len() < self.limits.sequences_max {
            let Some(mut sequence) = self.waiting.pop_front() else {
                break;
            };
            let cached = sequence.take_prefix(blocks);
            let Ok(chunk) = sequence.plan(*budget, blocks) else {
                sequence.release(blocks);
                self.waiting.push_front(sequence);
                break;
            };
            self.counts.cached_tokens += cached as u64;
            *budget -= chunk.count;
            step.chunks.push(chunk);
            self.running.push(sequence);
        }
    }

    /// Takes the memory of the youngest that runs, and has it wait at the front.
    fn preempt(&mut self, blocks: &mut impl Blocks) -> Option<Id> {
        let mut sequence = self.running.pop()?;
        sequence.release(blocks);
        let id = sequence.id();
        self.waiting.push_front(sequence);
        self.counts.preemptions += 1;
        Some(id)
    }

    /// Counts the tokens of the step that was planned last, and ends sequences; returns which, in
    /// the order of arrival.
    ///
    /// `ended` is called once for each sequence that has a new token, in the order of arrival; it
    /// says whether that token was the last. So is the one with which a sequence has all that it
    /// asked for. What was cancelled or preempted since the plan has no new token: it is not asked
    /// for, and the token that the model made for it is not to be used.
    pub fn finish(
        &mut self,
        step: &Step,
        mut ended: impl FnMut(Id) -> bool,
        blocks: &mut impl Blocks,
    ) -> Vec<Id> {
        if step.number != self.steps {
            return Vec::new();
        }
        let counts = &mut self.counts;
        let gone = self.running.extract_if(.., |sequence| {
            let (computed, is_new) = sequence.advance();
            counts.computed_tokens += computed as u64;
            counts.generated_tokens += u64::from(is_new);
            is_new && (ended(sequence.id()) || sequence.has_all())
        });
        let gone = gone.map(|mut sequence| {
            sequence.release(blocks);
            sequence.id()
        });
        gone.collect()
    }

    /// Drops a sequence and gives its memory back at once, even if a step with it is on its way;
    /// returns whether there was one of this name.
    pub fn cancel(&mut self, id: Id, blocks: &mut impl Blocks) -> bool {
        let is_it = |sequence: &Sequence| sequence.id() == id;
        if let Some(at) = self.running.iter().position(is_it) {
            self.running.remove(at).release(blocks);
            return true;
        }
        let at = self.waiting.iter().position(is_it);
        at.and_then(|at| self.waiting.remove(at)).is_some()
    }

    /// Preempts the youngest, one after the other, until they have given back the memory of so many
    /// tokens, or none is left; returns which, the youngest first.
    ///
    /// For memory that other models need. A prefix that others share is counted though it stays,
    /// so the caller looks at what is free, and may ask again.
    pub fn give_back(&mut self, tokens: usize, blocks: &mut impl Blocks) -> Vec<Id> {
        let (mut given, mut preempted) = (0, Vec::new());
        while given < tokens {
            given += self.running.last().map_or(0, Sequence::held);
            let Some(id) = self.preempt(blocks) else {
                break;
            };
            preempted.push(id);
        }
        preempted
    }

    /// Whether no sequence runs or waits.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// What there is, and what was done since the beginning.
    pub fn counts(&self) -> Counts {
        Counts {
            running: self.running.len(),
            waiting: self.waiting.len(),
            ..self.counts
        }
    }
}

#[cfg(test)]
mod tests;
