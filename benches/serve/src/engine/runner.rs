//! One model that serves: its scheduler, its memory, and its steps.

use super::choice::Choice;
use super::inputs::{Inputs, Rows};
use super::kv::{BLOCK_TOKENS, Kv};
use super::prompts::PromptInputs;
use super::sleeper::Sleeper;
use crate::batch::BatchDecoder;
use crate::scheduler::{Ask, Blocks, Chunk, Counts, Id, Limits, Refusal, Scheduler, Step};
use candle_core::{Device, Tensor};
use candle_cuda_vmm::Result;
use candle_cuda_vmm::graph::{DecodeGraph, DecodeGraphOptions};
use candle_cuda_vmm::sampling::sample;
use std::collections::HashMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// A new token of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Made {
    /// The sequence.
    pub id: Id,
    /// The token.
    pub token: u32,
}

/// Bytes of the blocks that are handed out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeldBytes {
    /// Blocks that sequences use, each counted once.
    pub sequence_bytes: usize,
    /// Blocks that only the prefix cache holds.
    pub prefix_bytes: usize,
}

/// A step that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stepped {
    /// Sequences that decoded a token.
    pub decodes: usize,
    /// Tokens of prompts.
    pub prompt_tokens: usize,
    /// From the decode step's launch until its tokens were on the host.
    pub decode_time: Duration,
}

/// A model that serves. It stays on its thread, as its captured steps do.
pub struct Runner {
    pub(super) decoder: Rc<BatchDecoder>,
    pub(super) kv: Kv,
    scheduler: Scheduler,
    pub(super) rows: Rows,
    pub(super) graph: DecodeGraph<'static>,
    choices: HashMap<Id, Choice>,
    pub(super) device: Device,
    /// A block in all tensors.
    block_bytes: usize,
    /// The weights, if they sleep. Dropped after the tensors over them.
    pub(super) sleeper: Option<Sleeper>,
}

impl Runner {
    /// Makes a runner over these blocks. No step is captured yet.
    pub fn new(decoder: BatchDecoder, kv: Kv, device: &Device, limits: Limits) -> Result<Self> {
        let batch_max = limits.sequences_max;
        let blocks_max = limits.context_max.div_ceil(BLOCK_TOKENS);
        let block_bytes = kv.blocks().stats().block_bytes;
        let rows = Rows::new(&kv, device, batch_max, blocks_max)?;
        let decoder = Rc::new(decoder);
        let step = Self::decode_step(&decoder, rows.inputs());
        let options = DecodeGraphOptions::up_to(batch_max);
        Ok(Self {
            graph: DecodeGraph::new(device, options, step)?,
            decoder,
            kv,
            scheduler: Scheduler::new(limits),
            rows,
            choices: HashMap::new(),
            device: device.clone(),
            block_bytes,
            sleeper: None,
        })
    }

    /// What the graph captures: the next token of each row.
    pub(super) fn decode_step(
        decoder: &Rc<BatchDecoder>,
        inputs: &Inputs,
    ) -> impl FnMut(usize) -> candle_core::Result<Tensor> + 'static {
        let (model, inputs) = (decoder.clone(), inputs.clone());
        move |bucket| {
            inputs.write_entries(bucket)?;
            let [tokens, positions] = inputs.tokens(bucket)?;
            let logits = model.decode(&tokens, &positions, &inputs.kv(bucket)?)?;
            sample(&logits, &inputs.parameters(bucket)?)
        }
    }

    /// Captures the steps of all sizes of batches.
    pub fn capture(&mut self) -> Result<()> {
        self.graph.capture_all(self.kv.named(), |_| {})
    }

    /// Computes prompts of many lengths and forgets them, so that no request waits until its kernels
    /// are loaded. It ends early if there is no memory for more.
    pub fn warm_up(&mut self) -> Result<()> {
        let limits = self.scheduler.limits();
        let tokens_max = limits.context_max.min(self.kv.sequence_tokens_max());
        let prompt_max = tokens_max.saturating_sub(1).max(1);
        let mut is_short = false;
        for count in prompt_lengths(limits.step_tokens_max) {
            let prompts = (0..count).step_by(prompt_max);
            let lengths = prompts.map(|first| prompt_max.min(count - first));
            let ids: Vec<_> = lengths
                .clone()
                .enumerate()
                .map(|(at, _)| Id(at as u64))
                .collect();
            for (id, length) in ids.iter().zip(lengths) {
                // What is refused is not computed.
                is_short |= self
                    .submit(*id, vec![0; length], 1, Choice::GREEDY)
                    .is_err();
            }
            while !self.is_idle() && !is_short {
                is_short = self.step(|_| true)?.is_none();
            }
            for id in ids {
                self.cancel(id);
            }
            self.kv.clear_prefixes()?;
            if is_short {
                break;
            }
        }
        self.scheduler = Scheduler::new(limits);
        Ok(())
    }

    /// Has a sequence wait for its turn.
    ///
    /// # Errors
    ///
    /// Why it does not.
    pub fn submit(
        &mut self,
        id: Id,
        prompt: Vec<u32>,
        generated_max: usize,
        choice: Choice,
    ) -> core::result::Result<(), Refusal> {
        let ask = Ask {
            id,
            prompt_tokens: prompt.len(),
            generated_max,
        };
        self.scheduler.submit(ask, &self.kv)?;
        self.kv.begin(id, prompt);
        self.choices.insert(id, choice);
        Ok(())
    }

    /// Ends a sequence and frees its memory. Returns whether there was one.
    pub fn cancel(&mut self, id: Id) -> bool {
        let was_there = self.scheduler.cancel(id, &mut self.kv);
        self.forget(id);
        was_there
    }

    fn forget(&mut self, id: Id) {
        self.kv.forget(id);
        self.choices.remove(&id);
    }

    fn choice(&self, id: Id) -> Choice {
        self.choices.get(&id).copied().unwrap_or(Choice::GREEDY)
    }

    /// Takes a step, if there is something to do and memory for it. Calls `made` with each token
    /// that it gives, which returns whether the sequence ends there. Returns the step if it took one.
    pub fn step(&mut self, mut made: impl FnMut(Made) -> bool) -> Result<Option<Stepped>> {
        self.kv.begin_plan();
        let step = self.scheduler.plan(&mut self.kv);
        self.kv.end_plan();
        if let Some(failure) = self.kv.failure() {
            return Err(failure);
        }
        if step.is_empty() {
            if self.kv.must_yield() {
                self.scheduler.give_back(1, &mut self.kv);
            }
            return Ok(None);
        }
        let (tokens, decode_time) = self.compute(&step)?;
        for chunk in &step.chunks {
            self.kv.computed(chunk.id, chunk.first + chunk.count);
        }
        for id in &step.decodes {
            self.kv.computed(*id, self.kv.tokens(*id).len());
        }
        let mut ends = Vec::new();
        let ended = |id: Id| {
            let Some(token) = tokens.get(&id).copied() else {
                return false;
            };
            let is_last = made(Made { id, token });
            ends.push((id, token));
            is_last
        };
        let gone = self.scheduler.finish(&step, ended, &mut self.kv);
        for (id, token) in ends {
            self.kv.push(id, token);
        }
        gone.into_iter().for_each(|id| self.forget(id));
        match self.kv.failure() {
            Some(failure) => Err(failure),
            None => Ok(Some(Stepped {
                decodes: step.decodes.len(),
                prompt_tokens: step.chunks.iter().map(|chunk| chunk.count).sum(),
                decode_time,
            })),
        }
    }

    /// Computes a step, and returns the next token of each sequence that has one, and how long the
    /// decode step took.
    fn compute(&mut self, step: &Step) -> Result<(HashMap<Id, u32>, Duration)> {
        let prompts = match step.chunks.as_slice() {
            [] => None,
            chunks => Some(self.prompts(chunks)?),
        };
        let mut begun = Instant::now();
        let decodes = match step.decodes.as_slice() {
            [] => None,
            ids => {
                let choices = &self.choices;
                let choice = |id| choices.get(&id).copied().unwrap_or(Choice::GREEDY);
                let rows = self.rows.set(&self.kv, ids, choice)?;
                begun = Instant::now();
                Some((rows, self.graph.replay(ids.len(), self.kv.named())?))
            }
        };
        // First, as a copy to pageable memory that waits for the step seems to keep other models from
        // launching.
        self.device.synchronize()?;
        let mut tokens = HashMap::new();
        let mut decode_time = Duration::ZERO;
        if let Some(next) = prompts {
            let last = step.chunks.iter().zip(next.to_vec1()?);
            let last = last.filter(|(chunk, _)| chunk.is_last);
            tokens.extend(last.map(|(chunk, token)| (chunk.id, token)));
        }
        if let Some((rows, next)) = decodes {
            let next = next.to_vec1()?;
            decode_time = begun.elapsed();
            tokens.extend(rows.iter().copied().zip(next));
        }
        Ok((tokens, decode_time))
    }

    /// Computes chunks of prompts, and returns the token after each.
    fn prompts(&self, chunks: &[Chunk]) -> Result<Tensor> {
        let choice = |id| self.choice(id);
        let inputs = PromptInputs::new(&self.kv, chunks, choice, &self.device)?;
        let (tokens, spans) = (&inputs.tokens, &inputs.spans);
        let logits = self.decoder.prompt(tokens, spans, &inputs.kv)?;
        Ok(sample(&logits, &inputs.parameters)?)
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle()
    }

    /// What there is, and what was done.
    pub fn counts(&self) -> Counts {
        self.scheduler.counts()
    }

    /// What holds the blocks. It looks at no block, so it can be called after every step.
    pub fn held(&self) -> HeldBytes {
        let prefixes = self.kv.unused_prefixes();
        let sequences = self.kv.allocated().saturating_sub(prefixes);
        HeldBytes {
            sequence_bytes: sequences * self.block_bytes,
            prefix_bytes: prefixes * self.block_bytes,
        }
    }

    /// Gives memory back for others: unused blocks and prefixes first, then the youngest sequences.
    pub fn give_back(&mut self, bytes: usize) -> Result<()> {
        let freed = self.kv.give_back(bytes)?;
        if freed < bytes && !self.scheduler.is_idle() {
            let (sequences, blocks) = self.kv.in_use();
            let per_sequence = blocks.checked_div(sequences).unwrap_or_default() * BLOCK_TOKENS;
            self.scheduler.give_back(per_sequence.max(1), &mut self.kv);
            self.kv.give_back(bytes - freed)?;
        }
        Ok(())
    }

    /// The memory.
    pub fn kv(&mut self) -> &mut Kv {
        &mut self.kv
    }
}

/// Lengths of which each is at most half as long again as the one before, up to this one.
fn prompt_lengths(most: usize) -> Vec<usize> {
    let powers = (0..usize::BITS).map(|bits| 1usize << bits);
    let powers = powers.take_while(|power| *power <= most);
    let mut lengths: Vec<_> = powers
        .flat_map(|power| [power, power + power / 2])
        .collect();
    lengths.retain(|length| *length <= most);
    lengths.push(most);
    lengths.dedup();
    lengths
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn prompts_of_all_lengths_are_near_one_that_is_computed_first() {
        assert_eq!(prompt_lengths(1), [1]);
        assert_eq!(prompt_lengths(14), [1, 2, 3, 4, 6, 8, 12, 14]);
        let lengths = prompt_lengths(8192);
        assert_eq!((lengths.len(), lengths.last()), (26, Some(&8192)));
    }
}
