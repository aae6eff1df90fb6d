//! The course of a run: which work is wanted, measuring it, and the exit code.

use crate::demand::Finding;
use crate::machine::Machine;
use crate::work::Work;
use crate::{listing, report};
use anyhow::{Result, ensure};
use std::path::Path;
use std::process::ExitCode;

/// The exit code where no GPU answers.
const NO_GPU: u8 = 2;

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
    listing::print_findings(findings);
    match json {
        Some(path) => listing::write(path, findings),
        None => Ok(()),
    }
}
