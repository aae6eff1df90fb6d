//! Serves several models under one limit of memory, over HTTP as OpenAI's.

use anyhow::{Context, Result, bail};
use candle_core::DType;
use candle_cuda_vmm::Quota;
use clap::{Parser, ValueEnum};
use cuda_vmm_serve::api;
use cuda_vmm_serve::engine::Policy;
use cuda_vmm_serve::host::{Host, ModelSpec, Place, Shape, Sharing, Sleeping};
use std::collections::HashMap;
use std::fmt::Display;
use std::net::{SocketAddr, TcpListener};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use tracing_subscriber::EnvFilter;

const MIB: usize = 1 << 20;

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
    /// Memory for keys and values of all models, in MiB; for weights too, if models sleep
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
    /// Memory that a model always gets, in MiB; for several models, given again
    #[arg(long, value_name = "NAME=MIB", value_parser = of_model::<usize>)]
    guarantee: Vec<(String, usize)>,
    /// The most memory that a model gets, in MiB
    #[arg(long, value_name = "NAME=MIB", value_parser = of_model::<usize>)]
    ceiling: Vec<(String, usize)>,
    /// A model's priority: the higher one gets memory first, and gives it back last
    #[arg(long, value_name = "NAME=NUMBER", value_parser = of_model::<i32>)]
    priority: Vec<(String, i32)>,
    /// Models sleep: one that has no requests gives all its memory to another one that needs it, or
    /// on POST /v1/models/NAME/sleep, and wakes by a request, or on POST /v1/models/NAME/wake
    #[arg(long)]
    sleeping: bool,
    /// Models sleep, and do so after this time without requests
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    sleep_after: Option<Duration>,
    /// Pinned memory of the host for weights and prefixes of models that sleep, in MiB. Weights that
    /// have no room there are read again, and prefixes are forgotten
    #[arg(long, value_name = "MIB", default_value_t = 4096)]
    host_memory: usize,
    /// How long a request to a model that sleeps waits for memory
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    wake_timeout: Duration,
    /// How long requests may go on after ctrl-C, in seconds; a second ctrl-C ends them at once
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    drain: u64,
}

/// Reads `NAME=VALUE`.
fn of_model<T: FromStr<Err: Display>>(text: &str) -> Result<(String, T), String> {
    let (name, value) = text.split_once('=').ok_or("NAME=VALUE is expected")?;
    let value = value.parse().map_err(|error| format!("{value}: {error}"))?;
    Ok((name.to_owned(), value))
}

/// Reads a time in seconds.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|error| format!("{error}"))?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
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
    // Before models are made, which can take minutes.
    let listener = TcpListener::bind(arguments.listen);
    let listener = listener.with_context(|| format!("cannot listen on {}", arguments.listen))?;
    let host = Arc::new(host(&arguments)?);
    let runtime = tokio::runtime::Runtime::new().context("no runtime")?;
    let served = runtime.block_on(serve(&arguments, listener, &host));
    // Ends what still runs: the models learn that nobody wants it.
    runtime.shutdown_timeout(Duration::from_secs(10));
    host.close();
    served
}

/// Serves until ctrl-C, and then until the running responses have ended or their time is over.
async fn serve(arguments: &Arguments, listener: TcpListener, host: &Arc<Host>) -> Result<()> {
    listener.set_nonblocking(true).context("no socket")?;
    let listener = tokio::net::TcpListener::from_std(listener).context("no socket")?;
    // The same for both waits, so that no ctrl-C between them is lost.
    let mut signals = Signals::new().context("ctrl-C cannot be heard")?;
    let address = listener.local_addr().context("no address")?;
    println!("listening on http://{address}");
    let (tell, told) = oneshot::channel();
    let shutdown = async move {
        signals.recv().await;
        tracing::info!("no more requests are taken");
        // Nobody waits for it if the server has failed.
        _ = tell.send(signals);
    };
    let late = async {
        let Ok(mut signals) = told.await else {
            return std::future::pending().await;
        };
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(arguments.drain)) => {}
            () = signals.recv() => {}
        }
    };
    tokio::select! {
        served = api::serve(listener, host.clone(), shutdown) => served?,
        () = late => tracing::warn!("the requests that still run are cut off"),
    }
    Ok(())
}

/// What ends the server: ctrl-C, and what service managers send.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn recv(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
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
        limit_bytes: arguments.memory.saturating_mul(MIB),
        policy: match arguments.policy {
            PolicyKind::Elastic => Policy::Elastic,
            PolicyKind::Static => Policy::Static,
            PolicyKind::PageAtATime => Policy::PageAtATime,
            PolicyKind::Ideal => Policy::Ideal,
        },
        sequences_max: arguments.sequences.into(),
        waiting_max: arguments.waiting.into(),
        step_tokens_max: arguments.step_tokens.into(),
        sleeping: (arguments.sleeping || arguments.sleep_after.is_some()).then(|| Sleeping {
            after: arguments.sleep_after,
            host_bytes: arguments.host_memory.saturating_mul(MIB),
            patience: arguments.wake_timeout,
        }),
    };
    let can_sleep = matches!(sharing.policy, Policy::Elastic | Policy::PageAtATime);
    if sharing.sleeping.is_some() && !can_sleep {
        bail!("models sleep under the policies elastic and page-at-a-time alone");
    }
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
    set_quotas(arguments, &mut specs)?;
    Host::new(place, &sharing, specs).context("the models cannot be made")
}

/// Gives the models the quotas that are asked for.
fn set_quotas(arguments: &Arguments, specs: &mut [ModelSpec]) -> Result<()> {
    let mut quota = |name: &str, change: &dyn Fn(Quota) -> Quota| {
        let spec = specs.iter_mut().find(|spec| spec.name == name);
        let spec = spec.with_context(|| format!("there is no model {name} to give a quota"))?;
        spec.quota = change(spec.quota);
        anyhow::Ok(())
    };
    for (name, mib) in &arguments.guarantee {
        quota(name, &|it| it.guarantee_bytes(mib.saturating_mul(MIB)))?;
    }
    for (name, mib) in &arguments.ceiling {
        quota(name, &|it| it.ceiling_bytes(mib.saturating_mul(MIB)))?;
    }
    for (name, priority) in &arguments.priority {
        quota(name, &|it| it.priority(*priority))?;
    }
    Ok(())
}
