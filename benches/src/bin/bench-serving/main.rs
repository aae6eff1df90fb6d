//! Simulates serving several models on one GPU, with the memory in one of four pools.

// Traces are read as the core's demo reads them.
#[path = "../../../../crates/cuda-vmm/examples/demo/trace.rs"]
mod trace;

mod card;
mod contest;
mod fit;
#[cfg(test)]
mod invariants;
mod plots;
mod pools;
mod ramps;
mod tables;
mod time_model;
mod workloads;

use anyhow::Result;
use clap::{Parser, Subcommand};
use cuda_vmm_benches::figure::{Figure, Finding};
use cuda_vmm_benches::serving as workload;
use cuda_vmm_benches::{Outcome, program, report};
use std::path::PathBuf;
use std::process::ExitCode;

const FIGURES: &str = include_str!("../../../figures/bench-serving.csv");
/// The workload that there is only if traces are given, and that is named for them then.
const TRACES: &str = "(b) traces";
const ABSENT: &str = "not run: no trace was given (--trace FILE)";

/// Simulates serving several models on one GPU, in four pools, on the same arrivals. Needs no GPU.
///
/// Exit code: 0, everything that is demanded is reached; 1, something is not; 64, wrong usage.
#[derive(Debug, Parser)]
#[command(name = "bench-serving")]
struct Arguments {
    /// Write a list of `name`, `ours`, `peer`, `ratio`, `reach`, `pass`, `unit`, `note` to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the plots to this folder
    #[arg(long, value_name = "FOLDER")]
    plots: Option<PathBuf>,
    /// An Azure LLM inference trace for workload (b), one model each; can be given again
    #[arg(long, value_name = "FILE")]
    trace: Vec<PathBuf>,
    /// Shorter workloads, which show that everything runs and are not judged
    #[arg(long)]
    quick: bool,
    /// Something else than the benchmark
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Subcommand)]
enum Command {
    /// Find the constants of the time model again, by the published static curve as a whole
    Fit,
}

fn main() -> ExitCode {
    program::start("bench-serving", run)
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    report::print_command();
    println!("All times are simulated: steps by the fitted time model, calls by costs of an H100.");
    if arguments.command == Some(Command::Fit) {
        fit::run()?;
        return Ok(ExitCode::SUCCESS);
    }
    let quick = arguments.quick;
    // First, as a trace may be one that cannot be read.
    let traces = workloads::traces(quick, &arguments.trace)?;
    let ramps = ramps::hold(quick)?;
    let (idle, single) = (workloads::idle(quick)?, workloads::single(quick)?);
    let mut contests = Vec::new();
    contests.extend(traces.iter().map(|one| ("traces".to_owned(), one)));
    contests.extend([("idle".to_owned(), &idle), ("single".to_owned(), &single)]);
    let peaks = ramps.iter();
    contests.extend(peaks.map(|(point, one)| (format!("ramps-{}", point.peak), one)));
    let mut outcome = Outcome::default();
    for (_, contest) in &contests {
        tables::print_contest(contest);
        contest.tell(&mut outcome);
    }
    tables::print_curves(&ramps);
    let is_best_judged = ramps::tell(&ramps, &mut outcome)?;
    workloads::tell_hand_back(&mut outcome)?;
    let name = traces.as_ref().map_or(TRACES, |traces| &traces.name);
    let mut findings = Vec::new();
    for figure in Figure::list(&FIGURES.replace(TRACES, name))? {
        let is_judged = figure.work != ramps::BEST || is_best_judged;
        findings.push(match figure.work == TRACES {
            true => Finding::new(TRACES, "ms", "").noted(ABSENT),
            false => outcome.judge(&figure, is_judged),
        });
    }
    // One row says that traces are absent.
    findings.dedup();
    let judged = findings.iter_mut().filter(|finding| finding.pass.is_some());
    for finding in judged.filter(|_| quick) {
        let unjudged = finding.clone().unjudged();
        *finding = unjudged.noted("a quick run is not judged");
    }
    if let Some(folder) = &arguments.plots {
        plots::draw(folder, &ramps, &contests)?;
        println!("Plots: {}", folder.display());
    }
    report::end(&findings, arguments.json.as_deref())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traces_can_be_given_again() {
        let arguments =
            Arguments::parse_from(["bench-serving", "--trace", "a", "--trace", "b", "--quick"]);
        assert_eq!(arguments.trace.len(), 2);
        assert!(arguments.quick && arguments.command.is_none());
        let arguments = Arguments::parse_from(["bench-serving", "fit"]);
        assert_eq!(arguments.command, Some(Command::Fit));
    }
}
