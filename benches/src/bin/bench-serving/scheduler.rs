//! One model's engine: which sequences take part in its next step.
//!
//! Iteration-level scheduling as in Orca and vLLM: sequences come and go between any two steps. A step has all sequences that
//! run, and the prompts whose blocks fit, whole, in the order in which they came. Where a sequence finds no block for its next
//! token, the one admitted last is preempted; its blocks are given up, and it waits at the front to have all its tokens computed
//! again. The fit also tries prompts first, in steps of their own.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use crate::pools::{Memory, blocks_of};
use crate::workload::Request;
use anyhow::Result;
use std::collections::VecDeque;

/// Whether prompts have steps of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Prompts first, in steps of their own.
    PromptsFirst,
    /// Prompts join the step of the sequences that decode.
    Mixed,
}

/// What an engine allows itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Whether prompts have steps of their own.
    pub order: Order,
    /// The most sequences in a step.
    pub sequences_max: usize,
    /// The most prompt tokens in a step, but for a single longer prompt.
    pub prompt_tokens_max: u32,
    /// Blocks that stay free when a prompt is admitted, as one of so many; none where nothing runs.
    pub watermark_divisor: usize,
}

impl Limits {
    /// vLLM's defaults: 256 sequences, a hundredth of the blocks left free.
    pub const DEFAULT: Self = Self {
        order: Order::Mixed,
        sequences_max: 256,
        prompt_tokens_max: 8192,
        watermark_divisor: 100,
    };
}

/// A request on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// What was asked.
    pub request: Request,
    /// Tokens generated so far.
    pub generated: u32,
    /// When the first of them was there.
    pub first_ns: Option<u64>,
    blocks: Vec<u32>,
}

impl Sequence {
    fn new(request: Request) -> Self {
        Self {
            request,
            generated: 0,
            first_ns: None,
            blocks: Vec::new(),
        }
    }

    /// Tokens whose KV the next step writes or reads.
    fn tokens(&self) -> u32 {
        self.request.prompt_tokens + self.generated
    }
}

/// What a step does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Prompts, the last ones that run.
    pub prompts: usize,
    /// Their tokens.
    pub prompt_tokens: u32,
    /// Sequences that decode, the first ones that run.
    pub decodes: usize,
}

impl Step {
    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.prompts + self.decodes == 0
    }
}

/// The engine of one model.
pub struct Scheduler {
    model: usize,
    limits: Limits,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    /// Sequences that lost their blocks so far.
    pub preemptions: u64,
}

impl Scheduler {
    /// Of a model, with nothing to do.
    pub fn new(model: usize, limits: Limits) -> Self {
        Self {
            model,
            limits,
            waiting: VecDeque::new(),
            running: Vec::new(),
            preemptions: 0,
        }
    }

    /// Takes a request, or refuses one that could never have its blocks.
    pub fn arrive(&mut self, request: Request, memory: &dyn Memory) -> bool {
        let fits = blocks_of(request.tokens_max()) <= memory.most_blocks(self.model);
        if fits {
            self.waiting.push_back(Sequence::new(request));
        }
        fits
    }

    /// Whether anything is to be done.
    pub fn is_busy(&self) -> bool {
        !(self.waiting.is_empty() && self.running.is_empty())
    }

    /// Chooses the next step and takes its blocks; an empty step if no block can be had.
    ///
    /// # Errors
    /// If the memory fails.
    pub fn plan(&mut self, memory: &mut dyn Memory, now_ns: &mut u64) -> Result<Step> {
        let mut step = Step::default();
        if self.limits.order == Order::PromptsFirst {
            self.admit(memory, now_ns, &mut step)?;
            if step.is_empty() {
                self.grow(memory, now_ns)?;
                step.decodes = self.running.len();
            }
        } else {
            let preempted = self.grow(memory, now_ns)?;
            step.decodes = self.running.len();
            if !preempted {
                self.admit(memory, now_ns, &mut step)?;
            }
        }
        Ok(step)
    }

    /// Admits prompts in the order in which they wait, as long as their blocks fit.
    fn admit(&mut self, memory: &mut dyn Memory, now_ns: &mut u64, step: &mut Step) -> Result<()> {
        let reserve = memory.most_blocks(self.model) / self.limits.watermark_divisor;
        while let Some(next) = self.waiting.front_mut() {
            let (tokens, need) = (next.tokens(), blocks_of(next.tokens()));
            let over =
                step.prompt_tokens + tokens > self.limits.prompt_tokens_max && step.prompts > 0;
            if over || self.running.len() >= self.limits.sequences_max {
                break;
            }
            let reserve = if self.running.is_empty() { 0 } else { reserve };
            if need + reserve > memory.free_blocks(self.model)
                || !memory.take(now_ns, self.model, need, &mut next.blocks)?
            {
                break;
            }
            step.prompts += 1;
            step.prompt_tokens += tokens;
            self.running.extend(self.waiting.pop_front());
        }
        Ok(())
    }

    /// Gives every running sequence the block of its next token, the oldest first; says whether one was preempted.
    fn grow(&mut self, memory: &mut dyn Memory, now_ns: &mut u64) -> Result<bool> {
        let mut preempted = false;
        let mut at = 0;
        while at < self.running.len() {
            let sequence = &mut self.running[at];
            let missing = blocks_of(sequence.tokens()) - sequence.blocks.len();
            if missing == 0 || memory.take(now_ns, self.model, missing, &mut sequence.blocks)? {
                at += 1;
                continue;
            }
            if let Some(mut victim) = self.running.pop() {
                memory.give(now_ns, self.model, &mut victim.blocks)?;
                self.waiting.push_front(victim);
                self.preemptions += 1;
                preempted = true;
            }
        }
        Ok(preempted)
    }

    /// Ends a step: each sequence in it has a token more. Answers those that have all.
    ///
    /// # Errors
    /// If the memory fails.
    pub fn finish(
        &mut self,
        step: Step,
        memory: &mut dyn Memory,
        now_ns: &mut u64,
    ) -> Result<Vec<Sequence>> {
        let ready_ns = *now_ns;
        let first_prompt = self.running.len() - step.prompts;
        let stepped = self.running.iter_mut().enumerate();
        for (_, sequence) in stepped.filter(|(at, _)| *at < step.decodes || *at >= first_prompt) {
            sequence.generated += 1;
            sequence.first_ns.get_or_insert(ready_ns);
        }
        let is_over =
            |sequence: &mut Sequence| sequence.generated >= sequence.request.generated_tokens;
        let mut ended: Vec<_> = self.running.extract_if(.., is_over).collect();
        let mut blocks: Vec<u32> = ended
            .iter_mut()
            .flat_map(|sequence| sequence.blocks.drain(..))
            .collect();
        if !blocks.is_empty() {
            memory.give(now_ns, self.model, &mut blocks)?;
        }
        Ok(ended)
    }
}
