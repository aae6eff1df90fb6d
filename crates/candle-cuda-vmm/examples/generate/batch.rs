//! The decoder of a batch of sequences.

use crate::config::Config;
use crate::model::{Model, rotations};
use crate::weights::Weights;
use candle_core::{Device, Error, Result, Tensor};
use candle_cuda_vmm::attention::{
    DecodePlan, KvBatch, PromptSpan, Rotary, Slots, decode, prompt, write,
};

/// The decoder of a batch. Keys and values are where the caller has them: a [`KvBatch`] for each
/// layer, with the lengths after the new tokens.
pub struct BatchDecoder {
    /// `None` while its weights sleep.
    model: Option<Model>,
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
            model: Some(model),
            rotary,
            plan,
        })
    }

    /// Drops the model with the tensors of its weights, so that these can sleep. All else that a step
    /// reads stays where it is.
    pub fn drop_model(&mut self) {
        self.model = None;
    }

    /// Makes the model again.
    pub fn make_model(&mut self, config: &Config, weights: Weights) -> Result<()> {
        self.model = Some(Model::new(config, weights)?);
        Ok(())
    }

    /// Whether it has its model.
    pub fn has_model(&self) -> bool {
        self.model.is_some()
    }

    fn model(&self) -> Result<&Model> {
        let model = self.model.as_ref();
        model.ok_or_else(|| Error::msg("the weights of the model are asleep"))
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
        let model = self.model()?;
        let hidden = model.hidden(tokens, |layer, new| {
            let kv = &layers[layer];
            let rotary = Some((&self.rotary, positions));
            let q = write(&new.q, &new.k, &new.v, rotary, kv, Slots::Last)?;
            decode(&q, kv, &model.options, &self.plan)
        })?;
        model.logits(&hidden)
    }

    /// Appends chunks of prompts, and returns the logits of the token after each: `[spans,
    /// vocab_size]`. `tokens` is U32 `[total_queries]`, one span after the other.
    pub fn prompt(
        &self,
        tokens: &Tensor,
        spans: &[PromptSpan],
        layers: &[KvBatch],
    ) -> Result<Tensor> {
        let model = self.model()?;
        let device = model.device();
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
        let hidden = model.hidden(tokens, |layer, new| {
            let kv = &layers[layer];
            // A token's position is its row.
            let rotary = Some((&self.rotary, &rows));
            let q = write(&new.q, &new.k, &new.v, rotary, kv, slots)?;
            prompt(&q, kv, spans, &model.options)
        })?;
        let ends = Tensor::new(ends, device)?;
        model.logits(&hidden.select(|all| all.index_select(&ends, 0))?)
    }
}
