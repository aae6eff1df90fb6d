//! Simulates serving several models on one GPU, with the memory in one of four pools.

// What judges and lists figures is the same as for the other measuring programs, which use more of it.
#[allow(dead_code)]
#[path = "../bench/demand.rs"]
mod demand;
#[path = "../bench/listing.rs"]
mod listing;
#[path = "../bench/start.rs"]
mod start;

// Traces are read as the core's demo reads them.
#[path = "../../../../crates/cuda-vmm/examples/demo/trace.rs"]
mod trace;

mod arguments;
mod arrivals;
mod card;
mod contest;
mod fit;
#[cfg(test)]
mod invariants;
mod outcome;
mod plots;
mod pools;
mod published;
mod scheduler;
mod simulation;
mod tables;
mod time_model;
mod work;
mod workload;

use anyhow::Result;
use arguments::{Arguments, Command};
use std::process::ExitCode;
use work::{Course, hand_back, idle, ramps, single, traces};

fn main() -> ExitCode {
    start::start("bench-serving", run)
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    tables::print_head();
    if arguments.command == Some(Command::Fit) {
        fit::run()?;
        return Ok(ExitCode::SUCCESS);
    }
    let course = Course {
        quick: arguments.quick,
    };
    // First, as a trace may be one that cannot be read.
    let traces = traces::hold(&course, &arguments.trace)?;
    let ramps = ramps::hold(&course)?;
    ramps
        .iter()
        .for_each(|(_, contest)| tables::print_contest(contest));
    tables::print_curves(&ramps);
    let idle = idle::hold(&course)?;
    let single = single::hold(&course)?;
    let others = traces.iter().chain([&idle, &single]);
    others.for_each(tables::print_contest);

    let mut findings = ramps::judge(&course, &ramps)?;
    findings.extend(traces::judge(&course, traces.as_ref()));
    findings.extend(idle::judge(&course, &idle));
    findings.extend(single::judge(&course, &single));
    findings.extend(hand_back::judge(&course)?);
    listing::print_findings(&findings);
    if let Some(folder) = &arguments.plots {
        let mut drawn = vec![("idle", &idle), ("single", &single)];
        drawn.extend(traces.iter().map(|contest| ("traces", contest)));
        let names: Vec<_> = ramps
            .iter()
            .map(|(point, _)| format!("ramps-{}", point.peak))
            .collect();
        drawn.extend(
            names
                .iter()
                .map(String::as_str)
                .zip(ramps.iter().map(|(_, contest)| contest)),
        );
        plots::draw(folder, &ramps, &drawn)?;
        println!("Plots: {}", folder.display());
    }
    if let Some(path) = &arguments.json {
        listing::write(path, &findings)?;
    }
    let has_failed = findings.iter().any(|finding| finding.pass == Some(false));
    Ok(match has_failed {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    })
}
