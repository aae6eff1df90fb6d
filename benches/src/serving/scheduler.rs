//! One model's engine: which sequences take part in its next step.
//!
//! Iteration-level scheduling as in Orca and vLLM: sequences come and go between any two steps. A
//! step has all sequences that run, and the prompts whose blocks fit, whole, in the order in which
//! they came. If a sequence finds no block for its next token, the one admitted last is preempted:
//! its blocks are freed, and it waits at the front to have all its tokens computed again.

use super::memory::blocks_of;
use super::request::Request;
use super::served::Run;
use anyhow::Result;
use std::collections::VecDeque;

/// What an engine allows itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The most sequences in a step.
    pub sequences_max: usize,
    /// The most prompt tokens in a step, except for a single longer prompt.
    pub prompt_tokens_max: u32,
    /// The share of blocks that stays free when a prompt is admitted, as a divisor; none if nothing
    /// runs.
    pub watermark_divisor: usize,
}

impl Limits {
    /// vLLM's defaults: 256 sequences, a hundredth of the blocks left free.
    pub const DEFAULT: Self = Self {
        sequences_max: 256,
        prompt_tokens_max: 8192,
        watermark_divisor: 100,
    };
}

/// A request on its way.
pub(super) struct Sequence {
    pub request: Request,
    pub generated: u32,
    /// When its first token was there.
    pub first_ns: Option<u64>,
    was_refused: bool,
    blocks: Vec<u32>,
}

impl Sequence {
    /// Tokens whose KV the next step writes or reads.
    fn tokens(&self) -> u32 {
        self.request.prompt_tokens + self.generated
    }
}

/// What a step does: all sequences that run, the last of them prompts.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Step {
    pub decodes: usize,
    pub prompts: usize,
    pub prompt_tokens: u32,
}

/// The engine of one model.
pub(super) struct Scheduler {
    model: usize,
    limits: Limits,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
}

impl Scheduler {
    /// Of a model, with nothing to do.
    pub fn new(model: usize, limits: Limits) -> Self {
        Self {
            model,
            limits,
            waiting: VecDeque::new(),
            running: Vec::new(),
        }
    }

    /// Takes a request, or refuses one that could never have its blocks.
    pub fn arrive(&mut self, request: Request, run: &mut Run) {
        if blocks_of(request.tokens_max()) > run.memory.most_blocks(self.model) {
            run.served.refused += 1;
            return;
        }
        self.waiting.push_back(Sequence {
            request,
            generated: 0,
            first_ns: None,
            was_refused: false,
            blocks: Vec::new(),
        });
    }

    /// Whether anything is to be done.
    pub fn is_busy(&self) -> bool {
        !(self.waiting.is_empty() && self.running.is_empty())
    }

    /// Chooses the next step and takes its blocks; an empty step if no block can be had.
    pub fn plan(&mut self, run: &mut Run) -> Result<Step> {
        let preempted = self.grow(run)?;
        let mut step = Step {
            decodes: self.running.len(),
            ..Step::default()
        };
        if !preempted {
            self.admit(run, &mut step)?;
        }
        Ok(step)
    }

    /// Admits prompts in the order in which they wait, as long as their blocks fit.
    fn admit(&mut self, run: &mut Run, step: &mut Step) -> Result<()> {
        let (limits, model) = (&self.limits, self.model);
        let reserve = run.memory.most_blocks(model) / limits.watermark_divisor;
        while let Some(next) = self.waiting.front_mut() {
            let (tokens, need) = (next.tokens(), blocks_of(next.tokens()));
            let over = step.prompt_tokens + tokens > limits.prompt_tokens_max && step.prompts > 0;
            if over || self.running.len() >= limits.sequences_max {
                break;
            }
            let reserve = if self.running.is_empty() { 0 } else { reserve };
            let blocks = match need + reserve > run.memory.free_blocks(model) {
                true => None,
                false => run.memory.take(&mut run.now_ns, model, need)?,
            };
            let Some(blocks) = blocks else {
                run.served.refused_prompts += usize::from(!next.was_refused);
                next.was_refused = true;
                break;
            };
            next.blocks = blocks;
            step.prompts += 1;
            step.prompt_tokens += tokens;
            self.running.extend(self.waiting.pop_front());
        }
        Ok(())
    }

    /// Takes the block of its next token for every running sequence, the oldest first; returns
    /// whether one was preempted.
    fn grow(&mut self, run: &mut Run) -> Result<bool> {
        let (mut at, mut preempted) = (0, false);
        while at < self.running.len() {
            let sequence = &mut self.running[at];
            let missing = blocks_of(sequence.tokens()) - sequence.blocks.len();
            let taken = match missing {
                0 => Some(Vec::new()),
                _ => run.memory.take(&mut run.now_ns, self.model, missing)?,
            };
            if let Some(blocks) = taken {
                sequence.blocks.extend(blocks);
                at += 1;
            } else if let Some(mut victim) = self.running.pop() {
                let blocks = std::mem::take(&mut victim.blocks);
                run.memory.give(&mut run.now_ns, self.model, blocks)?;
                self.waiting.push_front(victim);
                run.served.preemptions += 1;
                preempted = true;
            }
        }
        Ok(preempted)
    }

    /// Ends a step: each sequence in it has a token more. Returns those that have all.
    pub fn finish(&mut self, run: &mut Run) -> Result<Vec<Sequence>> {
        let ready_ns = run.now_ns;
        for sequence in &mut self.running {
            sequence.generated += 1;
            if sequence.first_ns.is_none() {
                sequence.first_ns = Some(ready_ns);
                let waited_ns = ready_ns - sequence.request.arrival_ns;
                run.served.first_token.push(waited_ns as f64);
            }
        }
        let is_over = |one: &mut Sequence| one.generated >= one.request.generated_tokens;
        let ended: Vec<_> = self.running.extract_if(.., is_over).collect();
        let blocks = ended.iter().flat_map(|one| one.blocks.iter().copied());
        let blocks: Vec<_> = blocks.collect();
        if !blocks.is_empty() {
            run.memory.give(&mut run.now_ns, self.model, blocks)?;
        }
        Ok(ended)
    }
}
