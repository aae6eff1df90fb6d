//! A Llama-shaped decoder with a KV cache of your choice, and greedy decoding.
//!
//! `cargo run --release --example generate -- --help` lists the options. Without options it runs a
//! small model with random weights. `--config` takes the `config.json` of a Hugging Face model, and
//! `--weights` its safetensors files.

// The server of this repository also puts models to sleep.
#[allow(dead_code)]
mod batch;
#[cfg(all(test, feature = "simulator"))]
mod batch_tests;
mod caches;
mod config;
mod demand;
mod generation;
#[allow(dead_code)]
mod model;
mod paged;
#[cfg(test)]
mod tests;
#[allow(dead_code)]
mod weights;

use caches::{Cached, Kind, Measured};
use candle_core::{DType, Device};
use candle_cuda_vmm::device::cuda_with_own_stream;
use candle_cuda_vmm::kv_cache::{ConcatCaches, PreallocatedCaches};
use candle_cuda_vmm::{TensorPool, TensorPoolOptions};
use clap::{Parser, ValueEnum};
use config::Config;
use demand::Demand;
use generation::{Generation, Generator};
use model::{Attention, Decoder};
use paged::Paged;
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
    /// Launch the kernels of a decode step one by one. By default a GPU replays a captured step, with
    /// the cache `paged`
    #[arg(long)]
    no_capture: bool,
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
        Some(DeviceKind::Cuda) => cuda_with_own_stream(0)?,
        None if cfg!(feature = "cuda") => cuda_with_own_stream(0)?,
        _ => Device::Cpu,
    };
    let work = Work::new(&arguments, &device)?;
    match arguments.cache {
        Kind::Kv => work.run(&PreallocatedCaches),
        Kind::Concat => work.run(&ConcatCaches),
        Kind::Elastic => {
            // Two pages are mapped ahead, so that no token waits for the driver.
            let is_stock = arguments.attention == Attention::Stock;
            let options = TensorPoolOptions::new()
                .ahead_bytes_max(4 << 20)
                .contiguous_output(is_stock);
            work.run(&TensorPool::with_options(&device, options)?)
        }
        Kind::Paged => work.run_paged(),
    }
}

/// What is asked for, checked before anything is allocated.
struct Work<'a> {
    arguments: &'a Arguments,
    device: &'a Device,
    config: Config,
    dtype: DType,
    max_seq_len: usize,
}

impl<'a> Work<'a> {
    fn new(arguments: &'a Arguments, device: &'a Device) -> Result<Self, Box<dyn Error>> {
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
        Demand {
            prompt_tokens: arguments.prompt_tokens,
            tokens: arguments.tokens,
            max_seq_len,
            // On the CPU blocks take all their memory at once.
            is_reserved: matches!(arguments.cache, Kind::Kv | Kind::Paged),
            dtype,
        }
        .check(&config, device)?;
        Ok(Self {
            arguments,
            device,
            config,
            dtype,
            max_seq_len,
        })
    }

    fn weights(&self) -> Result<Weights, Box<dyn Error>> {
        let source = match self.arguments.weights.as_slice() {
            [] => Source::Random(self.arguments.seed),
            paths => Source::Files(weights::read(paths)?),
        };
        Ok(Weights::new(source, self.dtype, self.device))
    }

    /// Makes the model with caches of this factory, and generates tokens.
    fn run<F: Measured>(&self, factory: &F) -> Result<(), Box<dyn Error>> {
        let (weights, attention) = (self.weights()?, self.arguments.attention);
        let decoder = Decoder::new(&self.config, weights, factory, self.max_seq_len, attention)?;
        self.generate(&mut Cached { decoder, factory }, Some(name(attention)))
    }

    /// Makes the model with a paged cache, and generates tokens.
    fn run_paged(&self) -> Result<(), Box<dyn Error>> {
        let tokens = self.arguments.prompt_tokens + self.arguments.tokens;
        // Other caches grow beyond `max_seq_len`.
        let tokens_max = tokens.max(self.max_seq_len);
        let pool = TensorPool::new(self.device)?;
        let weights = self.weights()?;
        let is_captured = self.device.is_cuda() && !self.arguments.no_capture;
        let (config, dtype) = (&self.config, self.dtype);
        let mut paged = Paged::new(&pool, config, weights, dtype, tokens_max, is_captured)?;
        self.generate(&mut paged, None)
    }

    /// Generates tokens, and prints the results.
    fn generate(
        &self,
        decoder: &mut impl Generator,
        attention: Option<String>,
    ) -> Result<(), Box<dyn Error>> {
        let arguments = self.arguments;
        let prompt = generation::prompt(
            self.config.vocab_size,
            arguments.prompt_tokens,
            arguments.seed,
        );
        let bytes = token_bytes(&self.config, self.dtype);
        let generation = generation::generate(decoder, bytes, &prompt, arguments.tokens, 8)?;
        print!("{}", describe(&generation));
        if let Some(path) = &arguments.json {
            let report = json!({
                "cache": name(arguments.cache),
                "attention": attention,
                "dtype": name(arguments.dtype),
                "device": format!("{:?}", self.device.location()),
                "seed": arguments.seed,
                "max_seq_len": self.max_seq_len,
                "generation": generation,
            });
            std::fs::write(path, format!("{report:#}\n"))?;
        }
        Ok(())
    }
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
