//! Measures the server `cuda-vmm-serve` over HTTP, with its memory under several policies.

// Traces are read as the core's demo reads them.
#[path = "../../../../../crates/cuda-vmm/examples/demo/trace.rs"]
mod trace;

mod arrivals;
mod client;
mod metrics;
mod play;
mod plots;
mod policy;
mod record;
mod report;
mod server;
mod settings;
mod simulated;
mod stream;
mod summary;
mod tables;
mod workload;

use anyhow::{Context, Result, bail, ensure};
use arrivals::Run;
use clap::{Parser, ValueEnum};
use client::Client;
use cuda_vmm_benches::program;
use cuda_vmm_benches::report::print_command;
use cuda_vmm_benches::serving::Request;
use policy::Policy;
use record::Ran;
use report::{Report, Started};
use server::Running;
use settings::Settings;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use workload::Workload;

const ABSENT: &str = "(b) traces: not run: no trace was given (--trace FILE)";

/// Measures the server of this workspace over HTTP: the same requests under each policy of memory.
///
/// Exit code: 0, all requests were served or refused; 1, some failed, or something else did; 64,
/// wrong usage.
#[derive(Debug, Parser)]
#[command(name = "bench-serve")]
struct Arguments {
    /// The workloads' file
    #[arg(long, value_name = "FILE")]
    workloads: PathBuf,
    /// Run only these workloads
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["a", "b", "c", "d", "e"])]
    only: Vec<Workload>,
    /// Run only these policies
    #[arg(long, value_enum, value_delimiter = ',',
        default_values = ["static", "page-at-a-time", "elastic", "ideal"])]
    policies: Vec<Policy>,
    /// Seeds of each workload, instead of as many as the file says
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    seeds: Option<u64>,
    /// Where models run, as the server's argument of this name
    #[arg(long, value_enum)]
    device: Option<Device>,
    /// An Azure LLM inference trace for workload (b), one model each; can be given again
    #[arg(long, value_name = "FILE")]
    trace: Vec<PathBuf>,
    /// Write all that is recorded to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the plots to this folder
    #[arg(long, value_name = "FOLDER")]
    plots: Option<PathBuf>,
    /// The server's program [default: the one beside this program]
    #[arg(long, value_name = "FILE")]
    server: Option<PathBuf>,
    /// Shorter workloads, which show that everything runs
    #[arg(long)]
    quick: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Device {
    Cpu,
    Cuda,
}

fn main() -> ExitCode {
    program::start("bench-serve", |arguments: &Arguments| {
        let runtime = tokio::runtime::Runtime::new().context("no runtime")?;
        runtime.block_on(async {
            // Signals are heard before a server starts. What is dropped when one comes ends its
            // server.
            tokio::select! {
                biased;
                signal = interrupted() => bail!("ended by {}", signal?),
                ended = run(arguments) => ended,
            }
        })
    })
}

/// Waits for a signal that ends the program.
async fn interrupted() -> Result<&'static str> {
    let listen = |kind| signal(kind).context("signals cannot be heard");
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    tokio::select! {
        _ = interrupt.recv() => Ok("SIGINT"),
        _ = terminate.recv() => Ok("SIGTERM"),
    }
}

/// A server that runs, for one policy.
struct Server {
    policy: Policy,
    flags: Vec<String>,
    running: Running,
    client: Client,
}

/// What is measured on, and what came of it.
struct Measuring<'a> {
    arguments: &'a Arguments,
    settings: Settings,
    traces: Vec<Vec<Request>>,
    program: PathBuf,
    servers: Vec<Started>,
    ran: Vec<Ran>,
}

async fn run(arguments: &Arguments) -> Result<ExitCode> {
    print_command();
    let file = std::fs::read_to_string(&arguments.workloads);
    let name = arguments.workloads.display();
    let file = file.with_context(|| format!("the workloads' file {name} cannot be read"))?;
    let mut settings = Settings::parse(&file).with_context(|| format!("the file {name}"))?;
    if arguments.quick {
        settings = settings.quick();
    }
    if let Some(seeds) = arguments.seeds {
        settings = settings.with_seeds(seeds);
    }
    let traces = arguments.trace.iter().map(|path| trace::read(path));
    let mut measuring = Measuring {
        arguments,
        settings,
        traces: traces.collect::<Result<_>>()?,
        program: program(arguments.server.as_deref())?,
        servers: Vec::new(),
        ran: Vec::new(),
    };
    let measured = measuring.measure_all().await;
    // What was measured before a failure is not lost.
    let code = measuring.end(&file)?;
    measured.map(|()| code)
}

/// The server's program: what is told, or the one beside this one.
fn program(told: Option<&Path>) -> Result<PathBuf> {
    let path = match told {
        Some(path) => path.to_owned(),
        None => {
            let own = std::env::current_exe().context("this program's own file")?;
            own.with_file_name("cuda-vmm-serve")
        }
    };
    let is_there = path.is_file();
    ensure!(
        is_there,
        "there is no server {} (--server FILE)",
        path.display()
    );
    Ok(path)
}

impl Measuring<'_> {
    async fn measure_all(&mut self) -> Result<()> {
        let arguments = self.arguments;
        for workload in Workload::ALL {
            if !arguments.only.contains(&workload) {
                continue;
            }
            if workload == Workload::Traces && self.traces.is_empty() {
                println!("{ABSENT}");
                continue;
            }
            let of = || workload.name().to_owned();
            self.measure(workload).await.with_context(of)?;
        }
        Ok(())
    }

    /// Runs a workload on servers of its own, one for each policy. Each run is played on all of them
    /// before the next, so that what is compared is a few seconds apart.
    async fn measure(&mut self, workload: Workload) -> Result<()> {
        let models = workload.models(&self.settings, &self.traces);
        let mut servers = self.start(workload, models).await?;
        let runs = workload.runs(&self.settings, &self.traces);
        for (turn, run) in runs.into_iter().enumerate() {
            let first = turn % servers.len();
            servers.rotate_left(first);
            for server in &servers {
                self.play(workload, server, &run).await?;
            }
            servers.rotate_right(first);
        }
        for server in servers {
            let Server {
                policy,
                flags,
                running,
                client,
            } = server;
            let metrics = client.metrics().await?;
            self.servers.push(Started {
                workload,
                policy,
                flags,
                steps: metrics.steps,
                prompt_steps: metrics.prompt_steps,
            });
            running.stop().await?;
        }
        Ok(())
    }

    /// Starts a server for each policy, all at once, and warms up its models.
    async fn start(&self, workload: Workload, models: usize) -> Result<Vec<Server>> {
        let mut of_server = self.settings.server.clone();
        if workload == Workload::Closed {
            of_server.sequences = self.settings.closed.sequences;
            of_server.memory_mib = self.settings.closed.memory_mib;
        }
        let device = self.arguments.device.map(|device| match device {
            Device::Cpu => "cpu",
            Device::Cuda => "cuda",
        });
        let asked = &self.arguments.policies;
        let policies = Policy::ALL.into_iter().filter(|it| asked.contains(it));
        let prompt_tokens = self.settings.ramps.tokens.prompt;
        let mut starting = JoinSet::new();
        for policy in policies {
            let flags = server::flags(&of_server, models, policy, device);
            let program = self.program.clone();
            starting.spawn(async move {
                let running = Running::start(&program, &flags).await;
                let running = running.with_context(|| policy.name())?;
                let client = Client::new(&running.url, server::names(models))?;
                play::warm_up(&client, models, prompt_tokens).await?;
                anyhow::Ok(Server {
                    policy,
                    flags,
                    running,
                    client,
                })
            });
        }
        let mut servers = Vec::new();
        while let Some(started) = starting.join_next().await {
            servers.push(started.context("a server's task failed")??);
        }
        servers.sort_by_key(|server| server.policy as usize);
        Ok(servers)
    }

    async fn play(&mut self, workload: Workload, server: &Server, run: &Run) -> Result<()> {
        let peak = run.peak.map(|peak| format!(", peak {peak}"));
        let of = format!(
            "{}{}, seed {}, {}",
            workload.name(),
            peak.unwrap_or_default(),
            run.seed,
            server.policy.name()
        );
        let played = play::play(&server.client, run)
            .await
            .with_context(|| of.clone())?;
        let took = played.memory.last().map_or(0, |looked| looked.at_us);
        eprintln!(
            "{of}: {} requests in {:.1} s",
            run.requests(),
            took as f64 / 1e6
        );
        self.ran.push(Ran {
            workload,
            policy: server.policy,
            peak: run.peak,
            seed: run.seed,
            requests: played.requests,
            memory: played.memory,
            preemptions: played.preemptions,
        });
        Ok(())
    }

    /// Prints and writes what came of it.
    fn end(&self, file: &str) -> Result<ExitCode> {
        tables::print(&self.ran, &self.servers);
        if let Some(path) = &self.arguments.json {
            let traces = self.arguments.trace.iter();
            let report = Report {
                command: std::env::args().collect(),
                file,
                settings: &self.settings,
                traces: traces.map(|path| path.display().to_string()).collect(),
                servers: &self.servers,
                runs: &self.ran,
            };
            report.write(path)?;
        }
        if let Some(folder) = &self.arguments.plots {
            plots::draw(folder, &self.ran)?;
            println!("Plots: {}", folder.display());
        }
        simulated::print(&self.ran, &self.servers, &self.settings)?;
        let requests = self.ran.iter().flat_map(|run| &run.requests);
        let failures = requests.filter_map(|request| request.failure.as_deref());
        let failures: Vec<_> = failures.collect();
        if let Some(first) = failures.first() {
            eprintln!("{} requests failed, the first: {first}", failures.len());
            return Ok(ExitCode::FAILURE);
        }
        Ok(ExitCode::SUCCESS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workloads_and_policies_are_lists() {
        let parse = |arguments: &[&str]| {
            let all = [&["bench-serve", "--workloads", "x"], arguments].concat();
            Arguments::try_parse_from(all)
        };
        let all = parse(&[]).unwrap();
        assert_eq!(all.only, Workload::ALL);
        assert_eq!(all.policies, Policy::ALL);
        let some = parse(&["--only", "a,c", "--policies", "elastic,ideal"]).unwrap();
        assert_eq!(some.only, [Workload::Ramps, Workload::Idle]);
        assert_eq!(some.policies, [Policy::Elastic, Policy::Ideal]);
        assert!(parse(&["--seeds", "0"]).is_err());
        assert!(parse(&["--only", "f"]).is_err());
    }
}
