//! A Llama-shaped decoder with a KV cache of your choice, and greedy decoding.
//!
//! `cargo run --release --example generate -- --help` lists the options. Without options it runs a
//! small model with random weights. `--config` takes the `config.json` of a Hugging Face model, and
//! `--weights` its safetensors files.

mod caches;
mod config;
mod demand;
mod generation;
mod model;
#[cfg(test)]
mod tests;
mod weights;

use caches::{Kind, Measured};
use candle_core::{DType, Device};
use candle_cuda_vmm::kv_cache::{ConcatCaches, PreallocatedCaches};
use candle_cuda_vmm::{TensorPool, TensorPoolOptions};
use clap::{Parser, ValueEnum};
use config::Config;
use demand::Demand;
use generation::Generation;
use model::{Attention, Decoder};
use serde_json::json;
use std::error::Error;
use std::fmt::Write;
use std::path::PathBuf;
use weights::{Source, Weights};

/// Generate tokens with a Llama-shaped model, and show speed and memory
#[derive(Parser)]
struct Arguments {
    /// The model's config.json [default: a small model]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Safetensors files, or a folder of them [default: random weights]
    #[arg(long, value_name = "PATH", num_args = 1..)]
    weights: Vec<PathBuf>,
    /// The KV cache
    #[arg(long, value_enum, default_value_t = Kind::Kv)]
    cache: Kind,
    /// How attention reads keys and values
    #[arg(long, value_enum, default_value_t = Attention::Stock)]
    attention: Attention,
    /// Length of the prompt, in random tokens
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = at_least_one)]
    prompt_tokens: usize,
    /// Number of tokens to generate
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = at_least_one)]
    tokens: usize,
    /// Sequence length that the caches are made for [default: the model's maximum]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    max_seq_len: Option<usize>,
    /// Seed of the prompt and of random weights
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Type of weights, keys and values
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    dtype: Precision,
    /// Device to run on [default: the GPU if built with the feature `cuda`]
    #[arg(long, value_enum)]
    device: Option<DeviceKind>,
    /// Write all results to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Precision {
    F32,
    F16,
    Bf16,
}

#[derive(Clone, Copy, ValueEnum)]
enum DeviceKind {
    Cpu,
    Cuda,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("it must be at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("{error}")),
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let device = match arguments.device {
        Some(DeviceKind::Cpu) => Device::Cpu,
        Some(DeviceKind::Cuda) => Device::new_cuda(0)?,
        None if cfg!(feature = "cuda") => Device::new_cuda(0)?,
        None => Device::Cpu,
    };
    match arguments.cache {
        Kind::Kv => run(&arguments, &PreallocatedCaches, device),
        Kind::Concat => run(&arguments, &ConcatCaches, device),
        Kind::Elastic => {
            // Two pages are mapped ahead, so that no token waits for the driver.
            let is_stock = arguments.attention == Attention::Stock;
            let options = TensorPoolOptions::new()
                .ahead_bytes_max(4 << 20)
                .contiguous_output(is_stock);
            run(
                &arguments,
                &TensorPool::with_options(&device, options)?,
                device,
            )
        }
    }
}

/// Makes the model with caches of this factory, generates tokens, and prints the results.
fn run<F: Measured>(
    arguments: &Arguments,
    factory: &F,
    device: Device,
) -> Result<(), Box<dyn Error>> {
    let config = match &arguments.config {
        Some(path) => Config::read(path)?,
        None => Config::small()?,
    };
    let dtype = match arguments.dtype {
        Precision::F32 => DType::F32,
        Precision::F16 => DType::F16,
        Precision::Bf16 => DType::BF16,
    };
    let positions = config.max_position_embeddings;
    let max_seq_len = arguments.max_seq_len.unwrap_or(positions);
    let (prompt_tokens, tokens) = (arguments.prompt_tokens, arguments.tokens);
    Demand {
        prompt_tokens,
        tokens,
        max_seq_len,
        is_reserved: arguments.cache == Kind::Kv,
        dtype,
    }
    .check(&config, &device)?;
    let source = match arguments.weights.as_slice() {
        [] => Source::Random(arguments.seed),
        paths => Source::Files(weights::read(paths)?),
    };
    let weights = Weights::new(source, dtype, &device);
    let mut decoder = Decoder::new(&config, weights, factory, max_seq_len, arguments.attention)?;
    let prompt = generation::prompt(config.vocab_size, arguments.prompt_tokens, arguments.seed);
    let generation = generation::generate(
        &mut decoder,
        factory,
        token_bytes(&config, dtype),
        &prompt,
        arguments.tokens,
        8,
    )?;
    print!("{}", describe(&generation));
    if let Some(path) = &arguments.json {
        let report = json!({
            "cache": name(arguments.cache),
            "attention": name(arguments.attention),
            "dtype": name(arguments.dtype),
            "device": format!("{:?}", device.location()),
            "seed": arguments.seed,
            "max_seq_len": max_seq_len,
            "generation": generation,
        });
        std::fs::write(path, format!("{report:#}\n"))?;
    }
    Ok(())
}

/// Returns the size in bytes of one token's keys and values in all layers.
fn token_bytes(config: &Config, dtype: DType) -> usize {
    let elements = 2 * config.num_hidden_layers * config.kv_heads() * config.head_dim();
    elements * dtype.size_in_bytes()
}

/// Returns a value's name on the command line.
fn name(value: impl ValueEnum) -> String {
    let value = value.to_possible_value();
    value.map_or_else(String::new, |value| value.get_name().to_owned())
}

/// Formats the results as text.
fn describe(generation: &Generation) -> String {
    const MIB: f64 = (1 << 20) as f64;
    let mut text = format!(
        "prompt: {} tokens in {:.3} s\n{:>13}  {:>8}  {:>12}  {:>12}\n",
        generation.prompt_tokens,
        generation.prompt_seconds,
        "cached tokens",
        "tokens/s",
        "live MiB",
        "held MiB"
    );
    for sample in &generation.samples {
        let speed = match sample.tokens_per_second {
            0. => "-".to_owned(),
            speed => format!("{speed:.1}"),
        };
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{:>13}  {speed:>8}  {:>12.3}  {:>12.3}",
            sample.cached_tokens,
            sample.live_bytes as f64 / MIB,
            sample.held_bytes as f64 / MIB
        );
    }
    let _ = writeln!(
        text,
        "generated: {} tokens, {:.1} tokens/s\ntokens: {:?}",
        generation.tokens.len(),
        generation.tokens_per_second,
        generation.tokens
    );
    text
}
