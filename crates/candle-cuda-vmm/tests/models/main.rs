//! Models of candle-transformers generate the same tokens over every kind of cache.
//!
//! The README in this folder says where the models are from and what was changed. They run on the
//! CPU, with small random weights.
#![cfg(all(feature = "simulator", not(feature = "cuda")))]
// The models ask for a feature that this crate has not.
#![allow(unexpected_cfgs)]

// As candle-transformers names it.
extern crate candle_core as candle;

mod caches;
mod diffs;
#[rustfmt::skip]
#[allow(clippy::all, dead_code, unused_imports)]
mod ported;
#[rustfmt::skip]
#[allow(clippy::all, dead_code)]
mod stock;
mod support;
mod weights;

// Where the models look for them.
mod models {
    pub(crate) use crate::support as with_tracing;
}
use support as utils;

use caches::{Rotating, Windowed, Windows};
use candle::{D, DType, Device, Result, Tensor};
use candle_cuda_vmm::kv_cache::{ConcatCaches, KvCache, KvCacheFactory, PreallocatedCaches};
use candle_cuda_vmm::{TensorPool, TensorPoolOptions};
use candle_nn::Activation;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const LAYERS: usize = 3;
const VOCABULARY: usize = 120;
const POSITIONS: usize = 64;
const WINDOW: usize = 8;
/// A page of the simulated device.
const PAGE: usize = 2 << 20;
/// Tokens to generate, more than a window.
const TOKENS: usize = 12;

/// Prompts by length, and the lengths of their chunks.
const PROMPTS: [(usize, &[usize]); 6] = [
    (5, &[5]),
    (5, &[2, 3]),
    (WINDOW, &[3, 4, 1]),
    (WINDOW + 5, &[WINDOW + 5]),
    (WINDOW + 5, &[WINDOW - 2, 7]),
    (3 * WINDOW, &[5, 3, 2, 10, 4]),
];

/// Generates tokens by greedy decoding, `[TOKENS][batch]`, after a prompt `[batch, tokens]` that is
/// taken in chunks. `forward` gets tokens and the position of the first, and returns logits
/// `[batch, 1, VOCABULARY]`.
fn generate(
    prompt: &Tensor,
    chunks: &[usize],
    mut forward: impl FnMut(&Tensor, usize) -> Result<Tensor>,
) -> Result<Vec<Vec<u32>>> {
    let mut position = 0;
    let mut next = |tokens: &Tensor| {
        let logits = forward(tokens, position)?;
        position += tokens.dim(1)?;
        assert_eq!(logits.dims(), [prompt.dim(0)?, 1, VOCABULARY]);
        logits.argmax(D::Minus1)
    };
    let mut last = None;
    let mut first = 0;
    for &chunk in chunks {
        last = Some(next(&prompt.narrow(1, first, chunk)?)?);
        first += chunk;
    }
    assert_eq!(first, prompt.dim(1)?);
    let mut last = last.expect("a prompt");
    let mut tokens = Vec::new();
    loop {
        tokens.push(last.flatten_all()?.to_vec1()?);
        if tokens.len() == TOKENS {
            return Ok(tokens);
        }
        last = next(&last)?;
    }
}

fn prompt(batch: usize, length: usize) -> Tensor {
    let mut random = StdRng::seed_from_u64((batch * 100 + length) as u64);
    let tokens = (0..batch * length).map(|_| random.random_range(0..VOCABULARY as u32));
    Tensor::from_vec(tokens.collect::<Vec<_>>(), (batch, length), &Device::Cpu).unwrap()
}

/// A model over caches that it is given.
trait Ported {
    /// The heads of K and V, of 8 numbers each.
    const KV_HEADS: usize;

    /// Returns the logits of the next token.
    fn next(&mut self, tokens: &Tensor, caches: &mut [impl KvCache]) -> Result<Tensor>;

    fn generate<F: KvCacheFactory>(
        &mut self,
        factory: &F,
        prompt: &Tensor,
        chunks: &[usize],
    ) -> Vec<Vec<u32>> {
        let caches = (0..LAYERS).map(|layer| factory.layer(layer, 2, POSITIONS));
        let mut caches = caches.collect::<candle_cuda_vmm::Result<Vec<_>>>().unwrap();
        let forward = |tokens: &Tensor, position| {
            assert!(caches.iter().all(|cache| cache.position() == position));
            self.next(tokens, &mut caches)
        };
        generate(prompt, chunks, forward).unwrap()
    }

    /// Fails unless every kind of cache gives these tokens.
    fn expect_everywhere(
        &mut self,
        windows: Windows,
        prompt: &Tensor,
        chunks: &[usize],
        expected: &[Vec<u32>],
    ) {
        let pool = TensorPool::new(&Device::Cpu).unwrap();
        let contiguous = TensorPoolOptions::new().contiguous_output(true);
        let contiguous = TensorPool::with_options(&Device::Cpu, contiguous).unwrap();
        macro_rules! expect {
            ($factory:expr) => {
                let tokens = self.generate(&Windowed($factory, windows), prompt, chunks);
                let what = stringify!($factory);
                assert_eq!(tokens, expected, "{what}, {chunks:?} of {prompt}");
            };
        }
        expect!(&PreallocatedCaches);
        expect!(&ConcatCaches);
        expect!(&pool);
        expect!(&contiguous);
        expect!(&pool.sequence());
        let token = (prompt.dims()[0], Self::KV_HEADS, 8);
        let sequence = pool.sequence();
        let one_range = sequence.rows_in_one_range(LAYERS, token, token, DType::F32);
        let one_range = one_range.unwrap();
        expect!(&one_range);
        assert_eq!(one_range.bytes(), PAGE, "no layer has left the range");
    }
}

impl Ported for ported::qwen3::ModelForCausalLM {
    const KV_HEADS: usize = 2;

    fn next(&mut self, tokens: &Tensor, caches: &mut [impl KvCache]) -> Result<Tensor> {
        self.forward(tokens, caches)
    }
}

impl Ported for ported::mistral::Model {
    const KV_HEADS: usize = 2;

    fn next(&mut self, tokens: &Tensor, caches: &mut [impl KvCache]) -> Result<Tensor> {
        self.forward(tokens, caches)
    }
}

impl Ported for ported::gemma3::Model {
    const KV_HEADS: usize = 1;

    fn next(&mut self, tokens: &Tensor, caches: &mut [impl KvCache]) -> Result<Tensor> {
        self.forward(tokens, caches)
    }
}

/// Fails unless the tokens are more than a few repetitions.
fn expect_variety(tokens: &[Vec<u32>]) {
    let mut seen = tokens.concat();
    seen.sort_unstable();
    seen.dedup();
    assert!(seen.len() > 2, "{tokens:?}");
}

macro_rules! qwen3_config {
    ($model:ident) => {
        $model::qwen3::Config {
            vocab_size: VOCABULARY,
            hidden_size: 32,
            intermediate_size: 48,
            num_hidden_layers: LAYERS,
            num_attention_heads: 4,
            head_dim: 8,
            attention_bias: false,
            num_key_value_heads: 2,
            max_position_embeddings: POSITIONS,
            sliding_window: None,
            max_window_layers: 0,
            tie_word_embeddings: false,
            rope_theta: 10_000.,
            rms_norm_eps: 1e-6,
            use_sliding_window: false,
            hidden_act: Activation::Silu,
        }
    };
}

#[test]
fn qwen_3_generates_the_same_tokens_with_every_cache() {
    let weights = weights::random(1);
    let mut stock =
        stock::qwen3::ModelForCausalLM::new(&qwen3_config!(stock), weights.clone()).unwrap();
    let mut ported = ported::qwen3::ModelForCausalLM::new(&qwen3_config!(ported), weights).unwrap();
    for batch in [1, 3] {
        for (length, chunks) in PROMPTS {
            let prompt = prompt(batch, length);
            let mut generate = |chunks: &[usize]| {
                stock.clear_kv_cache();
                generate(&prompt, chunks, |tokens, at| stock.forward(tokens, at)).unwrap()
            };
            let expected = generate(chunks);
            assert_eq!(expected, generate(&[length]), "chunks make no difference");
            expect_variety(&expected);
            ported.expect_everywhere(|_| None, &prompt, chunks, &expected);
        }
    }
}

macro_rules! mistral_config {
    ($model:ident) => {
        $model::mistral::Config {
            vocab_size: VOCABULARY,
            hidden_size: 32,
            intermediate_size: 48,
            num_hidden_layers: LAYERS,
            num_attention_heads: 4,
            head_dim: None,
            num_key_value_heads: 2,
            hidden_act: Activation::Silu,
            max_position_embeddings: POSITIONS,
            rms_norm_eps: 1e-6,
            rope_theta: 10_000.,
            sliding_window: Some(WINDOW),
            use_flash_attn: false,
        }
    };
}

/// The stock model keeps all tokens: its window is in the mask of a prompt alone. So no cache
/// releases any.
#[test]
fn mistral_generates_the_same_tokens_with_every_cache() {
    let weights = weights::random(2);
    let mut stock = stock::mistral::Model::new(&mistral_config!(stock), weights.clone()).unwrap();
    let mut ported = ported::mistral::Model::new(&mistral_config!(ported), weights).unwrap();
    let mut has_window = false;
    for batch in [1, 3] {
        for (length, chunks) in PROMPTS {
            let prompt = prompt(batch, length);
            let mut generate = |chunks: &[usize]| {
                stock.clear_kv_cache();
                generate(&prompt, chunks, |tokens, at| stock.forward(tokens, at)).unwrap()
            };
            let expected = generate(chunks);
            if length <= WINDOW {
                assert_eq!(expected, generate(&[length]), "chunks make no difference");
            } else {
                has_window |= expected != generate(&vec![1; length]);
            }
            expect_variety(&expected);
            ported.expect_everywhere(|_| None, &prompt, chunks, &expected);
        }
    }
    assert!(has_window, "without a mask the tokens differ");
}

macro_rules! gemma3_config {
    ($model:ident) => {
        $model::gemma3::Config {
            attention_bias: false,
            head_dim: 8,
            hidden_activation: Activation::GeluPytorchTanh,
            hidden_size: 32,
            intermediate_size: 48,
            num_attention_heads: 4,
            num_hidden_layers: LAYERS,
            // The stock model's cache refuses prompts with more, as Candle's `KvCache` wants
            // contiguous tokens.
            num_key_value_heads: 1,
            rms_norm_eps: 1e-6,
            rope_theta: 1_000_000.,
            rope_local_base_freq: 10_000.,
            vocab_size: VOCABULARY,
            final_logit_softcapping: Some(30.),
            attn_logit_softcapping: Some(50.),
            query_pre_attn_scalar: 8,
            sliding_window: WINDOW,
            sliding_window_pattern: LAYERS,
            max_position_embeddings: POSITIONS,
        }
    };
}

/// All layers but the last have a window.
fn gemma3_windows(layer: usize) -> Option<usize> {
    (layer + 1 < LAYERS).then_some(WINDOW)
}

/// Returns whether the stock model can take these chunks: its mask of several tokens is right only
/// while all before them are in the window.
fn is_stock(chunks: &[usize]) -> bool {
    let mut position = 0;
    chunks.iter().enumerate().all(|(index, chunk)| {
        position += chunk;
        index == 0 || *chunk == 1 || position <= WINDOW
    })
}

#[test]
fn gemma_3_generates_the_same_tokens_with_every_cache() {
    let weights = weights::random(3);
    let config = gemma3_config!(stock);
    let mut stock = stock::gemma3::Model::new(false, &config, weights.clone()).unwrap();
    let config = gemma3_config!(ported);
    let mut ported = ported::gemma3::Model::new(false, &config, weights).unwrap();
    let pool = TensorPool::new(&Device::Cpu).unwrap();
    let rotating = Rotating(&pool, gemma3_windows);
    let mut has_window = false;
    for batch in [1, 3] {
        for (length, chunks) in PROMPTS {
            let prompt = prompt(batch, length);
            let mut generate = |chunks: &[usize]| {
                stock.clear_kv_cache();
                generate(&prompt, chunks, |tokens, at| stock.forward(tokens, at))
            };
            let whole = generate(&[length]).unwrap();
            expect_variety(&whole);
            if is_stock(chunks) {
                assert_eq!(
                    generate(chunks).unwrap(),
                    whole,
                    "chunks make no difference"
                );
                assert_eq!(ported.generate(&rotating, &prompt, chunks), whole);
            } else {
                assert!(
                    generate(chunks).is_err(),
                    "the stock model has learnt {chunks:?}"
                );
            }
            // Caches that keep what the chunk's first query sees need no such care.
            ported.expect_everywhere(gemma3_windows, &prompt, chunks, &whole);
            has_window |= ported.generate(&pool, &prompt, chunks) != whole;
        }
    }
    assert!(has_window, "without a window the tokens differ");
}
