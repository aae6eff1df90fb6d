//! Measures the pools on a GPU, beside the driver's own calls and other allocators, in one run.

mod arguments;
mod bare;
mod demand;
mod kernel;
mod machine;
mod recorder;
mod report;
mod samples;
mod sides;
mod work;

use anyhow::{Result, ensure};
use arguments::{Arguments, Choice};
use clap::Parser;
use cuda_vmm_benches::CountingAllocator;
use demand::Finding;
use machine::Machine;
use std::process::ExitCode;
use work::Work;

/// The exit code where no GPU answers.
const NO_GPU: u8 = 2;
/// The exit code of a usage error.
const USAGE: u8 = 64;

/// Counts only while the bookkeeping's memory is measured.
#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator::new();

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Telling why can only fail if there is nobody left to tell.
            let _ = error.print();
            return match error.exit_code() {
                0 => ExitCode::SUCCESS,
                _ => ExitCode::from(USAGE),
            };
        }
    };
    match run(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bench: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let word = arguments.only.as_deref().unwrap_or_default();
    let wanted: Vec<&Work> = work::ALL
        .iter()
        .filter(|work| work.is_meant_by(word))
        .collect();
    ensure!(
        !wanted.is_empty(),
        "no work and no figure has {word:?} in its name"
    );
    let machine = match Machine::open(arguments.driver, arguments.settings()) {
        Ok(machine) => machine,
        Err(error) if arguments.driver == Choice::Real => {
            let note = format!("no GPU answers: {error:#}");
            let findings: Vec<Finding> = wanted
                .iter()
                .flat_map(|work| work.unmeasured(&note))
                .collect();
            report_end(arguments, &findings)?;
            eprintln!("bench: nothing was measured, for {note}");
            return Ok(ExitCode::from(NO_GPU));
        }
        Err(error) => return Err(error),
    };
    report::print_head(&machine);
    let mut findings = Vec::new();
    for work in wanted {
        let (measured, found) = work.run(&machine);
        report::print_sides(work.name, &measured);
        findings.extend(found);
    }
    report_end(arguments, &findings)?;
    let has_failed = findings.iter().any(|finding| finding.pass == Some(false));
    Ok(match has_failed {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    })
}

fn report_end(arguments: &Arguments, findings: &[Finding]) -> Result<()> {
    report::print_findings(findings);
    match &arguments.json {
        Some(path) => report::write(path, findings),
        None => Ok(()),
    }
}
