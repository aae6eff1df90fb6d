//! A plain model of the scheduler: what holds of every plan.

use super::memory::Memory;
use crate::scheduler::*;

/// What is known of a sequence.
#[derive(Debug, Clone)]
struct Plain {
    ask: Ask,
    /// After so many tokens the caller says that it has ended.
    ends_after: usize,
    generated: usize,
    /// Tokens that are computed, if it runs.
    computed: Option<usize>,
    /// Tokens of the step on its way.
    planned: usize,
}

impl Plain {
    fn tokens(&self) -> usize {
        self.ask.prompt_tokens + self.generated
    }

    fn decodes(&self) -> bool {
        self.generated > 0 && self.computed == Some(self.tokens() - 1)
    }
}

pub(super) struct World {
    limits: Limits,
    scheduler: Scheduler,
    pub(super) memory: Memory,
    /// In the order of arrival: those that run, then those that wait.
    line: Vec<Plain>,
    step: Option<Step>,
    counts: Counts,
    arrivals: u64,
    pub(super) ended: usize,
    pub(super) cancelled: usize,
}

impl World {
    pub(super) fn new(limits: Limits, memory: Memory) -> Self {
        Self {
            limits,
            scheduler: Scheduler::new(limits),
            memory,
            line: Vec::new(),
            step: None,
            counts: Counts::default(),
            arrivals: 0,
            ended: 0,
            cancelled: 0,
        }
    }

    fn running(&self) -> usize {
        let running = self.line.iter();
        running.filter(|it| it.computed.is_some()).count()
    }

    /// Submits a sequence; returns whether it was accepted.
    pub(super) fn submit(
        &mut self,
        prompt_tokens: usize,
        generated_max: usize,
        ends_after: usize,
        (family, prefix_tokens): (usize, usize),
    ) -> bool {
        let id = Id(self.arrivals);
        self.arrivals += 1;
        let ask = Ask {
            id,
            prompt_tokens,
            generated_max,
        };
        let (tokens, waiting) = (
            prompt_tokens + generated_max,
            self.line.len() - self.running(),
        );
        let fits = tokens <= self.limits.context_max;
        let fits = fits && tokens - 1 <= self.memory.sequence_tokens_max();
        let outcome = self.scheduler.submit(ask, &self.memory);
        match outcome {
            Err(Refusal::TooLong { .. }) => assert!(!fits),
            Err(Refusal::Full { waiting: of }) => {
                assert!(fits && of == waiting && waiting >= self.limits.waiting_max)
            }
            Err(other) => panic!("{other}"),
            Ok(()) => {
                assert!(fits && waiting < self.limits.waiting_max);
                self.memory
                    .set_prefix(id, family, prefix_tokens, prompt_tokens);
                self.line.push(Plain {
                    ask,
                    ends_after: ends_after.min(generated_max),
                    generated: 0,
                    computed: None,
                    planned: 0,
                });
            }
        }
        self.check();
        outcome.is_ok()
    }

    pub(super) fn cancel(&mut self, which: usize) {
        if self.line.is_empty() {
            let id = Id(self.arrivals);
            assert!(!self.scheduler.cancel(id, &mut self.memory));
            return;
        }
        let plain = self.line.remove(which % self.line.len());
        assert!(self.scheduler.cancel(plain.ask.id, &mut self.memory));
        assert!(!self.scheduler.cancel(plain.ask.id, &mut self.memory));
        self.cancelled += 1;
        self.check();
    }

    /// The youngest that runs waits again.
    fn preempt(&mut self, id: Id) {
        let youngest = self.running().checked_sub(1).expect("one runs");
        let plain = &mut self.line[youngest];
        assert_eq!(plain.ask.id, id, "the youngest is preempted");
        (plain.computed, plain.planned) = (None, 0);
        self.counts.preemptions += 1;
    }

    pub(super) fn give_back(&mut self, tokens: usize) {
        let running: Vec<_> = self.line[..self.running()]
            .iter()
            .map(|it| it.ask.id)
            .collect();
        let held = |memory: &Memory| {
            running
                .iter()
                .map(|id| memory.blocks_of(*id, 0).0)
                .sum::<usize>()
        };
        let before = held(&self.memory);
        let preempted = self.scheduler.give_back(tokens, &mut self.memory);
        preempted.iter().for_each(|id| self.preempt(*id));
        let blocks = self.memory.blocks_of(Id(0), tokens).1;
        // Blocks may be partly filled: so many or more.
        let given = before - held(&self.memory);
        assert!(given >= blocks.min(before), "{given} of {blocks}");
        assert_eq!(preempted.is_empty(), tokens == 0 || running.is_empty());
        self.check();
    }

    pub(super) fn plan(&mut self) {
        self.line.iter_mut().for_each(|it| it.planned = 0);
        self.memory.released.clear();
        self.memory.waiting.clear();
        let step = self.scheduler.plan(&mut self.memory);
        let released = core::mem::take(&mut self.memory.released);
        assert!(
            released.iter().all(|(_, is_short)| *is_short),
            "only if memory is short"
        );
        step.preempted.iter().for_each(|id| self.preempt(*id));
        self.check_decodes(&step);
        self.check_chunks(&step);
        let holders = self.line.iter().filter(|it| it.planned > 0);
        for plain in holders {
            let tokens = plain.computed.unwrap_or(0) + plain.planned;
            let (held, needed) = self.memory.blocks_of(plain.ask.id, tokens);
            assert_eq!(held, needed, "{plain:?}");
        }
        if let Some(front) = self.line.first() {
            let may_wait = !self.memory.has_most() || self.memory.waiting.contains(&front.ask.id);
            assert!(front.planned > 0 || may_wait, "{step:?} {front:?}");
        }
        assert_eq!(
            step.tokens(),
            self.line.iter().map(|it| it.planned).sum::<usize>()
        );
        assert_eq!(step.is_empty(), step.tokens() == 0);
        self.step = Some(step);
        self.check();
    }

    fn check_decodes(&mut self, step: &Step) {
        let mut decodes = step.decodes.iter();
        let waiting = &self.memory.waiting;
        let decodes_now = |it: &&mut Plain| it.decodes() && !waiting.contains(&it.ask.id);
        for plain in self.line.iter_mut().filter(decodes_now) {
            assert_eq!(decodes.next(), Some(&plain.ask.id), "all, in their order");
            plain.planned = 1;
        }
        assert_eq!(decodes.next(), None);
    }

    fn check_chunks(&mut self, step: &Step) {
        let mut left = self.limits.step_tokens_max;
        let mut chunks = step.chunks.iter().peekable();
        let waits = |it: &Plain| it.decodes() && self.memory.waiting.contains(&it.ask.id);
        let mut is_held_up = !step.preempted.is_empty() || self.line.iter().any(waits);
        for at in 0..self.line.len() {
            let (is_short, running) = (self.is_short_for(at, left), self.running());
            let plain = &mut self.line[at];
            let is_new = plain.computed.is_none();
            if plain.decodes() {
                continue;
            }
            let Some(chunk) = chunks.next_if(|chunk| chunk.id == plain.ask.id) else {
                // Nobody behind it has a chunk either.
                let is_full = left == 0 || running == self.limits.sequences_max;
                assert!(is_short || is_new && (is_held_up || is_full), "{plain:?}");
                break;
            };
            assert!(
                !(is_new && is_held_up),
                "nobody is admitted beside a preemption or one who waits"
            );
            let cached = self.memory.cached.get(&chunk.id).copied().unwrap_or(0);
            let first = plain.computed.unwrap_or(cached);
            assert_eq!(chunk.first, first, "no hole");
            assert!(first < plain.tokens());
            assert_eq!(chunk.count, left.min(plain.tokens() - first));
            assert_eq!(chunk.is_last, first + chunk.count == plain.tokens());
            left -= chunk.count;
            (plain.computed, plain.planned) = (Some(first), chunk.count);
            self.counts.cached_tokens += if is_new { first as u64 } else { 0 };
            is_held_up |= !chunk.is_last;
        }
        assert_eq!(chunks.next(), None, "in the order of arrival");
        assert!(self.running() <= self.limits.sequences_max);
    }

    /// Whether there is no memory for the next chunk of a sequence, after the plan.
    fn is_short_for(&self, at: usize, tokens_max: usize) -> bool {
        let (plain, mut memory) = (&self.line[at], self.memory.clone());
        let id = plain.ask.id;
        // It was admitted in this plan.
        if memory.holders().contains(&id) && plain.computed.is_none() {
            return false;
        }
        let first = plain.computed.unwrap_or_else(|| memory.cached_prefix(id));
        let count = tokens_max.min(plain.tokens() - first);
        memory.grow(id, first + count) != Growth::Done
    }

    /// Finishes the step that is on its way, if one is.
    pub(super) fn finish(&mut self) {
        let Some(step) = self.step.take() else {
            return;
        };
        let mut asked = Vec::new();
        let line = &self.line;
        let ended = |id| {
            asked.push(id);
            let plain = line.iter().find(|it| it.ask.id == id).expect("it runs");
            plain.generated + 1 == plain.ends_after
        };
        let gone = self.scheduler.finish(&step, ended, &mut self.memory);
        let (mut new, mut all) = (Vec::new(), Vec::new());
        for plain in self.line.iter_mut().filter(|it| it.planned > 0) {
            let computed = plain
                .computed
                .insert(plain.computed.unwrap_or(0) + plain.planned);
            self.counts.computed_tokens += plain.planned as u64;
            plain.planned = 0;
            if *computed == plain.ask.prompt_tokens + plain.generated {
                plain.generated += 1;
                self.counts.generated_tokens += 1;
                new.push(plain.ask.id);
                if plain.generated == plain.ends_after {
                    all.push(plain.ask.id);
                }
            }
        }
        assert_eq!(asked, new, "who has a new token");
        assert_eq!(gone, all, "who has all its tokens");
        self.ended += gone.len();
        self.line.retain(|it| !gone.contains(&it.ask.id));
        assert_eq!(self.scheduler.finish(&step, |_| true, &mut self.memory), []);
        self.check();
    }

    fn check(&self) {
        let running = self.running();
        let ids = self.line[..running].iter().map(|it| it.ask.id);
        assert_eq!(
            self.memory.holders(),
            ids.collect::<Vec<_>>(),
            "they have the memory"
        );
        assert!(self.line[running..].iter().all(|it| it.computed.is_none()));
        let counts = Counts {
            running,
            waiting: self.line.len() - running,
            ..self.counts
        };
        assert_eq!(self.scheduler.counts(), counts);
        assert_eq!(self.scheduler.is_idle(), self.line.is_empty());
    }

    /// Lets all end that are there, with all memory; each step has a token of the front.
    pub(super) fn drain(&mut self) {
        self.memory.set_now(usize::MAX);
        self.memory.comes = 0;
        let mut steps = self
            .line
            .iter()
            .map(|it| it.ask.prompt_tokens + it.ends_after)
            .sum::<usize>();
        while !self.line.is_empty() {
            steps = steps
                .checked_sub(1)
                .expect("it takes no more steps than tokens");
            self.plan();
            self.finish();
        }
        assert_eq!(self.memory.own(), 0, "no memory is left behind");
        assert_eq!(self.memory.holders(), []);
    }
}
