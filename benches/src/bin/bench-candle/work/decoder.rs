//! The whole decoder.

use crate::config::Config;
use crate::machine::Machine;
use crate::model::{Attention, Decoder};
use crate::weights::{Source, Weights};
use anyhow::Result;
use candle_core::{DType, Device};
use candle_cuda_vmm::kv_cache::{KvCache, KvCacheFactory, PreallocatedCaches};
use cuda_vmm_benches::{Outcome, Sides, time};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::cell::RefCell;
use std::time::Duration;

/// Llama 3.2 1B's shape.
pub const LARGE: &str = include_str!("large.json");
pub const SMALL: &str = include_str!("small.json");

/// Tokens in the decoder's caches before anything is timed.
const CONTEXT: [usize; 2] = [8192, 24];
const GENERATED: [usize; 2] = [16, 3];
const ROUNDS: [usize; 2] = [25, 2];
/// Tokens of the prompt that are taken at once.
const PART: usize = 512;
const SEED: u64 = 0;

/// The most tokens of a decoder: both attentions generate in each round, and one token more.
const fn tokens_max(size: usize) -> usize {
    CONTEXT[size] + 2 * (ROUNDS[size] + 1) * (GENERATED[size] + 1)
}

/// A decoder that has taken its prompt.
struct Subject<C> {
    decoder: Decoder<C>,
    last: u32,
}

impl<C: KvCache> Subject<C> {
    fn new<F>(machine: &Machine, config: &Config, factory: &F) -> Result<Self>
    where
        F: KvCacheFactory<Cache = C>,
    {
        let weights = Weights::new(Source::Random(SEED), DType::BF16, &machine.candle);
        let most = machine.sized([tokens_max(0), tokens_max(1)]);
        // Stock attention's scores of the prompt, which is not measured, would take gigabytes.
        let mut decoder = Decoder::new(config, weights, factory, most, Attention::Gqa)?;
        let mut random = StdRng::seed_from_u64(SEED);
        let token = |_| random.random_range(0..config.vocab_size as u32);
        let prompt: Vec<_> = (0..machine.sized(CONTEXT)).map(token).collect();
        let mut parts = prompt.chunks(PART);
        parts.try_for_each(|part| decoder.forward(part).map(drop))?;
        machine.candle.synchronize()?;
        let last = prompt[prompt.len() - 1];
        Ok(Self { decoder, last })
    }

    /// Generates a token, and waits for it.
    fn generate(&mut self) -> candle_core::Result<()> {
        let logits = self.decoder.forward(&[self.last])?.to_dtype(DType::F32)?;
        self.last = logits.argmax(0)?.to_device(&Device::Cpu)?.to_scalar()?;
        Ok(())
    }

    /// The time of a token, of some that are generated after one that does not count.
    fn timed(&mut self, machine: &Machine, attention: Attention) -> Result<Duration> {
        self.decoder.attention = attention;
        self.generate()?;
        let count = machine.sized(GENERATED) as u32;
        let ((), elapsed) = time(|| (0..count).try_for_each(|_| self.generate()))?;
        Ok(elapsed / count)
    }
}

/// Against Candle's preallocated cache.
pub fn measure(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    use Attention::{Gqa, Stock};
    const CONTIGUOUS: &str = "ElasticKvCache, contiguous answers, stock attention";
    let config = Config::parse(if machine.is_real() { LARGE } else { SMALL })?;
    let new = |is_contiguous| Subject::new(machine, &config, &machine.pool(is_contiguous)?);
    let (elastic, mut copying) = (&RefCell::new(new(false)?), new(true)?);
    let preallocated = &RefCell::new(Subject::new(machine, &config, &PreallocatedCaches)?);
    let mut sides = Sides::default();
    sides.add(CONTIGUOUS, || copying.timed(machine, Stock));
    for (name, attention) in [("stock attention", Stock), ("gqa", Gqa)] {
        let [ours, peer] = ["ElasticKvCache", "KvCache"].map(|cache| format!("{cache}, {name}"));
        let elastic = move || elastic.borrow_mut().timed(machine, attention);
        let preallocated = move || preallocated.borrow_mut().timed(machine, attention);
        sides.add(&ours, elastic);
        sides.add(&peer, preallocated);
    }
    let settings = machine.settings.patient(u32::MAX);
    outcome.measure(sides, &settings, machine.sized(ROUNDS))?;
    let (from, to) = (machine.sized(CONTEXT), elastic.borrow().decoder.tokens());
    let count = machine.sized(GENERATED);
    let note = format!("{from} to {to} tokens in the caches; a sample is the mean of {count}");
    outcome.note(CONTIGUOUS, note);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_large_shape_has_a_billion_weights_and_room_for_every_round() {
        let config = Config::parse(LARGE).unwrap();
        let (hidden, between) = (config.hidden_size, config.intermediate_size);
        let attention = 2 * hidden * (hidden + config.kv_heads() * config.head_dim());
        let layer = attention + 3 * hidden * between;
        let weights = config.vocab_size * hidden + config.num_hidden_layers * layer;
        assert!((1.2e9..1.3e9).contains(&(weights as f64)), "{weights}");
        for (size, text) in [LARGE, SMALL].into_iter().enumerate() {
            assert!(tokens_max(size) <= Config::parse(text).unwrap().max_position_embeddings);
        }
    }
}
