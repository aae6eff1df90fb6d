//! The course of a run: which work is wanted, measuring it, and the exit code.

use crate::demand::Finding;
use crate::machine::Machine;
use crate::report;
use crate::work::Work;
use anyhow::{Result, ensure};
use clap::Parser;
use std::path::Path;
use std::process::ExitCode;

/// The exit code where no GPU answers.
const NO_GPU: u8 = 2;
/// The exit code of a usage error.
const USAGE: u8 = 64;

/// Reads the arguments of the program of this name and runs it; answers its exit code.
pub fn start<A: Parser>(program: &str, run: impl FnOnce(&A) -> Result<ExitCode>) -> ExitCode {
    let arguments = match A::try_parse() {
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
            eprintln!("{program}: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The work that a word means; all of it without one.
///
/// # Errors
///
/// If that is none.
pub fn chosen<'a>(all: &'a [Work], word: Option<&str>) -> Result<Vec<&'a Work>> {
    let word = word.unwrap_or_default();
    let chosen: Vec<_> = all.iter().filter(|work| work.is_meant_by(word)).collect();
    ensure!(
        !chosen.is_empty(),
        "no work and no figure has {word:?} in its name"
    );
    Ok(chosen)
}

/// Measures, and tells on the way.
pub fn measure(wanted: &[&Work], machine: &Machine, json: Option<&Path>) -> Result<ExitCode> {
    report::print_head(machine);
    let mut findings = Vec::new();
    for work in wanted {
        let (measured, found) = work.run(machine);
        report::print_sides(work.name, &measured);
        findings.extend(found);
    }
    end(json, &findings)?;
    let has_failed = findings.iter().any(|finding| finding.pass == Some(false));
    Ok(match has_failed {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    })
}

/// Reports every figure without a verdict, as there is no GPU to measure on.
pub fn without_gpu(wanted: &[&Work], reason: &str, json: Option<&Path>) -> Result<ExitCode> {
    let note = format!("no GPU answers: {reason}");
    let wanted = wanted.iter();
    let findings: Vec<_> = wanted.flat_map(|work| work.unmeasured(&note)).collect();
    end(json, &findings)?;
    eprintln!("bench: nothing was measured, for {note}");
    Ok(ExitCode::from(NO_GPU))
}

fn end(json: Option<&Path>, findings: &[Finding]) -> Result<()> {
    report::print_findings(findings);
    match json {
        Some(path) => report::write(path, findings),
        None => Ok(()),
    }
}
