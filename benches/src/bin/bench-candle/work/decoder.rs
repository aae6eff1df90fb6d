//! The whole decoder.

use super::{Outcome, Work};
use crate::caches::Measured;
use crate::config::Config;
use crate::demand::{Demand, Reach};
use crate::generation::{generate, prompt};
use crate::machine::Machine;
use crate::model::{Attention, Decoder};
use crate::sides::Sides;
use crate::weights::{Source, Weights};
use anyhow::Result;
use candle_core::DType;
use candle_cuda_vmm::TensorPool;
use candle_cuda_vmm::kv_cache::PreallocatedCaches;
use std::cell::RefCell;
use std::time::Duration;

const STOCK: Demand = Demand::time(
    "decoder of a 1B shape, bf16, 8k context, stock attention over contiguous answers: the same with KvCache",
    "tokens/s",
    Reach::AtLeastTimes(1.0),
);
const VIEWS: Demand = Demand::time(
    "decoder of a 1B shape, bf16, 8k context, stock attention over views: the same with KvCache",
    "tokens/s",
    Reach::Open,
);
const GQA: Demand = Demand::time(
    "decoder of a 1B shape, bf16, 8k context, gqa: the same with KvCache",
    "tokens/s",
    Reach::Open,
);
const ADDED: Demand = Demand::time(
    "decoder of a 1B shape, bf16, 8k context, gqa: stock attention over contiguous answers",
    "tokens/s",
    Reach::Open,
);

/// Against Candle's preallocated cache.
pub const WORK: Work = Work {
    name: "whole decoder",
    demands: &[STOCK, VIEWS, GQA, ADDED],
    measure,
};

/// Llama 3.2 1B's shape.
const LARGE: &str = r#"{ "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": true,
    "rope_theta": 500000.0, "max_position_embeddings": 16384 }"#;
/// For a CPU.
const SMALL: &str = r#"{ "vocab_size": 160, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128 }"#;

/// Tokens of the prompt that are taken at once.
const PART: usize = 512;
const SEED: u64 = 0;

/// Of the caches whose answers are contiguous.
const CONTIGUOUS: (&str, Attention) = (
    "ElasticKvCache, contiguous answers, stock attention",
    Attention::Stock,
);
const SIDES: [(&str, Attention); 2] = [
    ("ElasticKvCache, stock attention", Attention::Stock),
    ("ElasticKvCache, gqa", Attention::Gqa),
];
const PEERS: [(&str, Attention); 2] = [
    ("KvCache, stock attention", Attention::Stock),
    ("KvCache, gqa", Attention::Gqa),
];

/// A decoder that has taken its prompt, and who made its caches.
struct Subject<'a, F: Measured> {
    factory: &'a F,
    decoder: Decoder<F::Cache>,
    /// The token that comes next.
    last: u32,
}

impl<'a, F: Measured> Subject<'a, F> {
    fn new(machine: &Machine, config: &Config, factory: &'a F) -> Result<Self> {
        let sizes = &machine.sizes;
        let weights = Weights::new(Source::Random(SEED), DType::BF16, &machine.candle);
        // Both attentions generate in every round, the one that warms up among them, and each is given one token more.
        let most = sizes.context + 2 * (sizes.decoder_rounds + 1) * (sizes.generated + 1);
        // The prompt is not what is measured, and with stock attention its scores would take gigabytes.
        let mut decoder = Decoder::new(config, weights, factory, most, Attention::Gqa)?;
        let prompt = prompt(config.vocab_size, sizes.context, SEED);
        for part in prompt.chunks(PART) {
            decoder.forward(part)?;
        }
        machine.synchronize()?;
        Ok(Self {
            factory,
            decoder,
            last: prompt[prompt.len() - 1],
        })
    }

    /// The time of a token, of some that are generated.
    fn timed(&mut self, machine: &Machine, attention: Attention) -> Result<Duration> {
        self.decoder.attention = attention;
        let count = machine.sizes.generated;
        // The first token is waited for, and is not timed.
        let prompt = [self.last];
        let generation = generate(&mut self.decoder, self.factory, 0, &prompt, count + 1, 1)?;
        self.last = generation.tokens[count];
        let seconds = generation.decode_seconds / count as f64;
        Ok(Duration::from_secs_f64(seconds))
    }
}

fn measure(machine: &Machine) -> Result<Outcome> {
    let config = Config::parse(if machine.is_real() { LARGE } else { SMALL })?;
    let pool = machine.pool()?;
    let options = machine.pool_options().contiguous_output(true);
    let copying_pool = TensorPool::with_options(&machine.candle, options)?;
    let elastic = RefCell::new(Subject::new(machine, &config, &pool)?);
    let mut copying = Subject::new(machine, &config, &copying_pool)?;
    let preallocated = RefCell::new(Subject::new(machine, &config, &PreallocatedCaches)?);
    let mut sides = Sides::new();
    sides.add(CONTIGUOUS.0, || copying.timed(machine, CONTIGUOUS.1));
    for (name, attention) in SIDES {
        let elastic = &elastic;
        sides.add(name, move || elastic.borrow_mut().timed(machine, attention));
    }
    for (name, attention) in PEERS {
        let preallocated = &preallocated;
        sides.add(name, move || {
            preallocated.borrow_mut().timed(machine, attention)
        });
    }
    let rounds = machine.sizes.decoder_rounds;
    let mut outcome = Outcome::new(sides.measure(&machine.settings.whole(), rounds)?);
    let speed = |side: (&str, Attention)| anyhow::Ok(1e6 / outcome.measured.median_us(side.0)?);
    let [stock, views, gqa] = [speed(CONTIGUOUS)?, speed(SIDES[0])?, speed(SIDES[1])?];
    let [peer_stock, peer_gqa] = [speed(PEERS[0])?, speed(PEERS[1])?];
    let (from, to) = (machine.sizes.context, elastic.borrow().decoder.tokens());
    let note = format!(
        "{from} to {to} tokens in the caches; the mean of {} tokens is a sample",
        machine.sizes.generated
    );
    outcome.add_noted(&STOCK, stock, Some(peer_stock), note);
    outcome.add(&VIEWS, views, Some(peer_stock));
    outcome.add(&GQA, gqa, Some(peer_gqa));
    outcome.add(&ADDED, gqa, Some(stock));
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sizes::Sizes;

    #[test]
    fn the_large_shape_has_a_billion_weights_and_room_for_every_round() {
        let config = Config::parse(LARGE).unwrap();
        let (hidden, between) = (config.hidden_size, config.intermediate_size);
        let attention = 2 * hidden * hidden + 2 * hidden * config.kv_heads() * config.head_dim();
        let layer = attention + 3 * hidden * between;
        let weights = config.vocab_size * hidden + config.num_hidden_layers * layer;
        assert!((1.2e9..1.3e9).contains(&(weights as f64)), "{weights}");
        for (text, sizes) in [(LARGE, Sizes::FULL), (SMALL, Sizes::SMALL)] {
            let most = sizes.context + 2 * (sizes.decoder_rounds + 1) * (sizes.generated + 1);
            assert!(most <= Config::parse(text).unwrap().max_position_embeddings);
        }
    }
}
