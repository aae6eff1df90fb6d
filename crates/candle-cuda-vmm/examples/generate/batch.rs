//! The decoder of a batch of sequences.

use crate::config::Config;
use crate::model::{Model, rotations};
use crate::weights::Weights;
use candle_core::{Device, Result, Tensor};
use candle_cuda_vmm::attention::{
    DecodePlan, KvBatch, PromptSpan, Rotary, Slots, decode, prompt, write,
};

/// The decoder of a batch. Keys and values are where the caller has them: a [`KvBatch`] for each
/// layer, with the lengths after the new tokens.
pub struct BatchDecoder {
    model: Model,
    rotary: Rotary,
    plan: DecodePlan,
}

impl BatchDecoder {
    /// Makes the model, for decode steps of at most `batch_max` sequences.
    pub fn new(
        config: &Config,
        weights: Weights,
        batch_max: usize,
        device: &Device,
    ) -> Result<Self> {
        // First, since a GPU needs the feature `attention`.
        let plan = DecodePlan::new(device, batch_max, config.num_attention_heads)?;
        let (cos, sin) = rotations(config, device)?;
        let (rotary, model) = (Rotary::new(&cos, &sin)?, Model::new(config, weights)?);
        Ok(Self {
            model,
            rotary,
            plan,
        })
    }

    /// Appends a token to each sequence, and returns the logits of the tokens after them:
    /// `[batch, vocab_size]`. `tokens` and `positions` are U32 `[batch]`.
    ///
    /// On a GPU tokens, positions, lengths and tables are read when the work runs.
    pub fn decode(
        &self,
        tokens: &Tensor,
        positions: &Tensor,
        layers: &[KvBatch],
    ) -> Result<Tensor> {
        let hidden = self.model.hidden(tokens, |layer, new| {
            let kv = &layers[layer];
            let rotary = Some((&self.rotary, positions));
            let q = write(&new.q, &new.k, &new.v, rotary, kv, Slots::Last)?;
            decode(&q, kv, &self.model.options, &self.plan)
        })?;
        self.model.logits(&hidden)
    }

    /// Appends chunks of prompts, and returns the logits of the token after each: `[spans,
    /// vocab_size]`. `tokens` is U32 `[total_queries]`, one span after the other.
    pub fn prompt(
        &self,
        tokens: &Tensor,
        spans: &[PromptSpan],
        layers: &[KvBatch],
    ) -> Result<Tensor> {
        let device = self.model.device();
        let (mut sequences, mut rows, mut ends) = (Vec::new(), Vec::new(), Vec::new());
        for span in spans {
            sequences.extend(std::iter::repeat_n(span.sequence as u32, span.queries));
            rows.extend((span.keys - span.queries..span.keys).map(|row| row as u32));
            ends.push(rows.len() as u32 - 1);
        }
        let (sequences, rows) = (Tensor::new(sequences, device)?, Tensor::new(rows, device)?);
        let slots = Slots::At {
            sequences: &sequences,
            rows: &rows,
        };
        let hidden = self.model.hidden(tokens, |layer, new| {
            let kv = &layers[layer];
            // A token's position is its row.
            let rotary = Some((&self.rotary, &rows));
            let q = write(&new.q, &new.k, &new.v, rotary, kv, slots)?;
            prompt(&q, kv, spans, &self.model.options)
        })?;
        let ends = Tensor::new(ends, device)?;
        self.model
            .logits(&hidden.select(|all| all.index_select(&ends, 0))?)
    }
}
