//! Two services and a batch job share one GPU's memory under one limit.
//!
//! ```text
//! cargo run --release -p cuda-vmm --features simulator --example demo -- --help
//! ```

mod arguments;
mod figures;
mod generator;
mod live;
mod memory;
mod model;
mod plot;
mod replay;
mod slots;
mod static_split;
mod table;
mod tally;
mod trace;
mod workload;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::arguments::Arguments;
use crate::figures::{Figures, Input, Moment};
use crate::live::Live;
use crate::memory::{ElasticPool, Gpu};
use crate::replay::{Sample, replay};
use crate::static_split::StaticSplit;
use crate::table::{count, gib};
use crate::tally::Tally;
use crate::workload::Workload;

const SECOND_NS: f64 = 1e9;

fn main() -> ExitCode {
    let arguments = Arguments::from_command_line();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::FAILURE,
        Err(error) => {
            // If standard error is closed, there is no place left to report to.
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let gpu = Gpu::detect()?;
    let about = gpu.figures();
    say(&format!(
        "{} driver, CUDA {}: {}, {}, pages of {} KiB",
        about.driver,
        about.driver_version,
        about.device,
        gib(about.device_bytes),
        about.page_bytes >> 10
    ))?;

    let svg = arguments.svg.clone().unwrap_or_else(default_svg);
    for path in arguments.json.iter().chain([&svg]) {
        check_folder(path)?;
    }
    let workload = if arguments.traces.is_empty() {
        Workload::generated(arguments.seed)
    } else {
        Workload::from_traces(&arguments.traces, arguments.seed)?
    };
    let limit_bytes = limit(arguments, &gpu, about.page_bytes)?;
    describe(&workload, arguments, limit_bytes)?;

    let weights = match &arguments.shares[..] {
        [] => vec![1.0; workload.services.len()],
        shares => shares.to_vec(),
    };
    let mut split = StaticSplit::new(&workload, limit_bytes, about.page_bytes, &weights);
    let shares_bytes = split.shares_bytes();
    let mut static_refused = Vec::new();
    let static_tallies = replay(&workload, &mut split, |sample| {
        static_refused.push((sample.at_ns, figures::refused(sample.tallies)));
        Ok(())
    })?;

    let start = Instant::now();
    let mut pool = ElasticPool::new(&gpu, &workload, limit_bytes)?;
    let (tallies, over_time) = replay_live(&workload, &mut pool, &static_refused)?;
    let elapsed_seconds = start.elapsed().as_secs_f64();
    let peaks = pool.peaks_committed_bytes();
    pool.close()?;

    let figures = Figures {
        elastic_refused: figures::refused(&tallies),
        static_refused: figures::refused(&static_tallies),
        gpu: about,
        input: Input {
            traces: arguments
                .traces
                .iter()
                .map(|path| path.display().to_string())
                .collect(),
            seed: arguments.seed,
        },
        limit_bytes,
        requests: workload.request_count() as u64,
        simulated_seconds: over_time.last().map_or(0.0, |moment| moment.seconds),
        elapsed_seconds,
        models: figures::models(&workload, &tallies, &peaks, &static_tallies, &shares_bytes),
        over_time,
    };
    report(&figures, &svg, arguments.json.as_deref())
}

/// Replays against the pool with a live line; `static_refused` are the static split's refusals over
/// time.
fn replay_live(
    workload: &Workload,
    pool: &mut ElasticPool,
    static_refused: &[(u64, u64)],
) -> Result<(Vec<Tally>, Vec<Moment>)> {
    let mut live = Live::new(workload.end_ns());
    let mut over_time = Vec::new();
    let mut split = static_refused.iter().peekable();
    let mut static_refused = 0;
    let tallies = replay(workload, pool, |sample: &Sample<'_, ElasticPool>| {
        while let Some(&(_, refused)) = split.next_if(|(at_ns, _)| *at_ns <= sample.at_ns) {
            static_refused = refused;
        }
        let moment = Moment {
            seconds: sample.at_ns as f64 / SECOND_NS,
            committed_bytes: sample.memory.committed_bytes(),
            live_bytes: sample
                .tallies
                .iter()
                .map(|tally| tally.live_bytes)
                .collect(),
            elastic_refused: figures::refused(sample.tallies),
            static_refused,
        };
        live.show(sample.at_ns, || {
            format!(
                "{:.0} s, {} committed, refused {}, static {}",
                moment.seconds,
                gib(moment.committed_bytes),
                count(moment.elastic_refused),
                count(moment.static_refused)
            )
        });
        over_time.push(moment);
        Ok(())
    })?;
    live.finish();
    Ok((tallies, over_time))
}

/// The limit that was asked for, or what fits the device.
fn limit(arguments: &Arguments, gpu: &Gpu, page_bytes: u64) -> Result<u64> {
    let asked_bytes = arguments.limit_bytes();
    let room_bytes = gpu.room_bytes()?;
    let limit_bytes = asked_bytes.min(room_bytes);
    ensure!(
        limit_bytes >= page_bytes,
        "a limit of {limit_bytes} bytes is less than one page of {page_bytes} bytes"
    );
    if limit_bytes < asked_bytes {
        say(&format!(
            "The limit of {} does not fit the free memory of the device: {} are used instead",
            gib(asked_bytes),
            gib(limit_bytes)
        ))?;
    }
    Ok(limit_bytes)
}

fn describe(workload: &Workload, arguments: &Arguments, limit_bytes: u64) -> Result<()> {
    let source = match arguments.traces.len() {
        0 => format!("generated with seed {}", arguments.seed),
        1 => "of 1 trace".to_owned(),
        number => format!("of {number} traces"),
    };
    say(&format!(
        "{} requests {source}, batch job included, under a limit of {}",
        count(workload.request_count() as u64),
        gib(limit_bytes)
    ))?;
    for service in &workload.services {
        let model = &service.model;
        say(&format!(
            "  {:<6} {:<18} {} bytes of KV cache a token",
            model.name,
            model.network,
            count(model.bytes_per_token)
        ))?;
    }
    Ok(())
}

fn report(figures: &Figures, svg: &Path, json: Option<&Path>) -> Result<()> {
    say(&format!("\n{}", table::render(figures)))?;
    say(
        "Refused: all (at arrival + midway). Static split: the same requests against fixed shares of the same memory, by bookkeeping.",
    )?;
    say(&format!(
        "{:.0} s of simulated time in {:.1} s; every model unregistered, 0 bytes committed",
        figures.simulated_seconds, figures.elapsed_seconds
    ))?;
    plot::draw(figures, svg)?;
    say(&format!("Memory over time: {}", svg.display()))?;
    if let Some(path) = json {
        let text = serde_json::to_string_pretty(figures).context("cannot write the figures")?;
        std::fs::write(path, text + "\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
        say(&format!("Figures: {}", path.display()))?;
    }
    Ok(())
}

/// `demo.svg` in the target folder that the program was built in, or in the current folder.
fn default_svg() -> PathBuf {
    let executable = std::env::current_exe().ok();
    let examples = executable
        .as_deref()
        .and_then(Path::parent)
        .filter(|folder| folder.ends_with("examples"));
    let target = examples.and_then(Path::parent).and_then(Path::parent);
    target.unwrap_or(Path::new("")).join("demo.svg")
}

fn check_folder(path: &Path) -> Result<()> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    ensure!(
        folder.is_dir(),
        "cannot write {}: {} is not a folder",
        path.display(),
        folder.display()
    );
    ensure!(
        !path.is_dir(),
        "cannot write {}: it is a folder",
        path.display()
    );
    Ok(())
}

fn say(line: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{line}").context("cannot write to standard output")
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io_error = error.downcast_ref::<std::io::Error>();
    io_error.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
