//! Greedy decoding, with measurements.

use candle_core::{DType, Device, Result, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;
use std::time::Instant;

/// A decoder with one sequence in its caches.
pub trait Generator {
    /// Appends tokens, and returns the logits of the token after the last: `[vocab_size]`.
    fn forward(&mut self, tokens: &[u32]) -> Result<Tensor>;

    /// Returns the number of tokens in the caches.
    fn tokens(&self) -> usize;

    /// Returns the memory in bytes that the caches hold, including unused memory.
    fn held_bytes(&self) -> usize;
}

/// The generated tokens, and measurements.
#[derive(Debug, Serialize)]
pub struct Generation {
    /// Number of prompt tokens.
    pub prompt_tokens: usize,
    /// Time from the prompt to the first token.
    pub prompt_seconds: f64,
    /// Time for the tokens after the first.
    pub decode_seconds: f64,
    /// Speed for the tokens after the first.
    pub tokens_per_second: f64,
    /// Samples during generation, including one at the end.
    pub samples: Vec<Sample>,
    /// The generated tokens.
    pub tokens: Vec<u32>,
}

/// Speed and memory at one point of the generation.
#[derive(Debug, Serialize)]
pub struct Sample {
    /// Tokens in the caches.
    pub cached_tokens: usize,
    /// Speed since the previous sample; 0 in the first.
    pub tokens_per_second: f64,
    /// Bytes that the cached tokens need.
    pub live_bytes: usize,
    /// Bytes of memory that the caches hold.
    pub held_bytes: usize,
}

impl Sample {
    fn take(decoder: &impl Generator, token_bytes: usize, tokens_per_second: f64) -> Self {
        Self {
            cached_tokens: decoder.tokens(),
            tokens_per_second,
            live_bytes: decoder.tokens() * token_bytes,
            held_bytes: decoder.held_bytes(),
        }
    }
}

/// Returns random tokens for a prompt.
pub fn prompt(vocab_size: usize, tokens: usize, seed: u64) -> Vec<u32> {
    let mut random = StdRng::seed_from_u64(seed);
    (0..tokens)
        .map(|_| random.random_range(0..vocab_size as u32))
        .collect()
}

/// Generates `count` tokens after the prompt by greedy decoding, and takes about `samples` samples.
pub fn generate(
    decoder: &mut impl Generator,
    token_bytes: usize,
    prompt: &[u32],
    count: usize,
    samples: usize,
) -> Result<Generation> {
    let start = Instant::now();
    // `most_likely` copies the token to the host, which waits for the device.
    let mut tokens = vec![most_likely(&decoder.forward(prompt)?)?];
    let decode_start = Instant::now();
    let mut taken = vec![Sample::take(decoder, token_bytes, 0.)];
    let interval = count.saturating_sub(1).div_ceil(samples.max(1)).max(1);
    let (mut since, mut since_tokens) = (decode_start, 0);
    let mut last = tokens[0];
    for step in 1..count {
        last = most_likely(&decoder.forward(&[last])?)?;
        tokens.push(last);
        if step % interval == 0 || step == count - 1 {
            let speed = (step - since_tokens) as f64 / since.elapsed().as_secs_f64();
            taken.push(Sample::take(decoder, token_bytes, speed));
            (since, since_tokens) = (Instant::now(), step);
        }
    }
    let decode_seconds = decode_start.elapsed().as_secs_f64();
    Ok(Generation {
        prompt_tokens: prompt.len(),
        prompt_seconds: (decode_start - start).as_secs_f64(),
        decode_seconds,
        tokens_per_second: match count {
            1 => 0.,
            _ => (count - 1) as f64 / decode_seconds,
        },
        samples: taken,
        tokens,
    })
}

/// Returns the token with the largest logit.
fn most_likely(logits: &Tensor) -> Result<u32> {
    // On the CPU Candle cannot compare some dtypes; a GPU uses the same code.
    let logits = logits.to_dtype(DType::F32)?;
    logits.argmax(0)?.to_device(&Device::Cpu)?.to_scalar()
}
