//! Serves several models under one limit of memory, over HTTP as OpenAI's.

use anyhow::{Context, Result};
use candle_core::DType;
use candle_cuda_vmm::Quota;
use clap::{Parser, ValueEnum};
use cuda_vmm_serve::api;
use cuda_vmm_serve::engine::Policy;
use cuda_vmm_serve::host::{Host, ModelSpec, Place, Shape, Sharing};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::TcpListener;
use tracing_subscriber::EnvFilter;

/// Serve language models that share a GPU's memory, over HTTP as OpenAI's
///
/// It proves the library, and is no product: no one is asked who they are.
#[derive(Parser)]
struct Arguments {
    /// Models: tiny, wide, 1b, 3b (random weights, bytes as tokens), or folders of Hugging Face. A name of
    /// your own goes before it: NAME=MODEL
    #[arg(long, value_delimiter = ',', default_value = "tiny,tiny")]
    models: Vec<String>,
    /// Where to listen
    #[arg(long, default_value = "127.0.0.1:8000")]
    listen: SocketAddr,
    /// Where models run [default: the GPU if built with the feature `attention`]
    #[arg(long, value_enum)]
    device: Option<DeviceKind>,
    /// Memory for keys and values of all models, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    memory: usize,
    /// How blocks get their memory
    #[arg(long, value_enum, default_value_t = PolicyKind::Elastic)]
    policy: PolicyKind,
    /// Sequences of a model that run at once
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..))]
    sequences: u16,
    /// Requests of a model that wait
    #[arg(long, value_name = "N", default_value_t = 1024)]
    waiting: u16,
    /// Tokens of prompts in a step
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = clap::value_parser!(u16).range(1..))]
    step_tokens: u16,
    /// Type of weights, keys and values
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    dtype: Precision,
    /// Seed of random weights
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Clone, Copy, ValueEnum)]
enum DeviceKind {
    Cpu,
    Cuda,
}

#[derive(Clone, Copy, ValueEnum)]
enum PolicyKind {
    Elastic,
    Static,
    PageAtATime,
    Ideal,
}

#[derive(Clone, Copy, ValueEnum)]
enum Precision {
    F32,
    F16,
    Bf16,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let host = Arc::new(host(&arguments)?);
    let runtime = tokio::runtime::Runtime::new().context("no runtime")?;
    runtime.block_on(serve(&arguments, &host))?;
    tracing::info!("what runs is finished");
    host.close();
    Ok(())
}

async fn serve(arguments: &Arguments, host: &Arc<Host>) -> Result<()> {
    let listener = TcpListener::bind(arguments.listen).await;
    let listener = listener.with_context(|| format!("cannot listen on {}", arguments.listen))?;
    let address = listener.local_addr().context("no address")?;
    println!("listening on http://{address}");
    let shutdown = async {
        if let Err(error) = tokio::signal::ctrl_c().await {
            tracing::error!(%error, "ctrl-C cannot be heard");
            std::future::pending::<()>().await;
        }
        tracing::info!("no more requests are taken");
    };
    Ok(api::serve(listener, host.clone(), shutdown).await?)
}

/// Makes the models.
fn host(arguments: &Arguments) -> Result<Host> {
    let dtype = match arguments.dtype {
        Precision::F32 => DType::F32,
        Precision::F16 => DType::F16,
        Precision::Bf16 => DType::BF16,
    };
    let place = match arguments.device {
        Some(DeviceKind::Cpu) => Place::Cpu,
        Some(DeviceKind::Cuda) => Place::Gpu(0),
        None if cfg!(feature = "attention") => Place::Gpu(0),
        None => Place::Cpu,
    };
    let sharing = Sharing {
        limit_bytes: arguments.memory << 20,
        policy: match arguments.policy {
            PolicyKind::Elastic => Policy::Elastic,
            PolicyKind::Static => Policy::Static,
            PolicyKind::PageAtATime => Policy::PageAtATime,
            PolicyKind::Ideal => Policy::Ideal,
        },
        sequences_max: arguments.sequences.into(),
        waiting_max: arguments.waiting.into(),
        step_tokens_max: arguments.step_tokens.into(),
    };
    let mut names = HashMap::new();
    let mut specs = Vec::new();
    for (at, text) in arguments.models.iter().enumerate() {
        let (name, model) = match text.split_once('=') {
            Some((name, model)) => (Some(name.to_owned()), model),
            None => (None, text.as_str()),
        };
        // A second model of one kind gets a number: tiny, tiny-2.
        let known: &mut usize = names.entry(model.to_owned()).or_default();
        *known += 1;
        let name = name.unwrap_or_else(|| match *known {
            1 => model.to_owned(),
            number => format!("{model}-{number}"),
        });
        let shape = Shape::read(model, arguments.seed + at as u64, dtype)?;
        let quota = Quota::new();
        specs.push(ModelSpec { name, shape, quota });
    }
    Host::new(place, &sharing, specs).context("the models cannot be made")
}
