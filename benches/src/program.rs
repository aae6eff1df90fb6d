//! The course of a measuring program: its arguments, which work is wanted, and the exit code.

use crate::figure::Figure;
use crate::report;
use crate::work::{Outcome, Work};
use anyhow::{Result, ensure};
use clap::{Args, Parser};
use cuda_vmm::Device;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;

const USAGE: i32 = 64;
const NO_GPU: u8 = 2;

/// Reads the arguments of the program of this name and runs it; returns its exit code.
pub fn start<A: Parser>(program: &str, run: impl FnOnce(&A) -> Result<ExitCode>) -> ExitCode {
    let arguments = A::try_parse().unwrap_or_else(|error| {
        // Printing can only fail if nothing reads the output.
        let _ = error.print();
        std::process::exit(if error.exit_code() == 0 { 0 } else { USAGE })
    });
    run(&arguments).unwrap_or_else(|error| {
        eprintln!("{program}: error: {error:#}");
        ExitCode::FAILURE
    })
}

/// Which work is measured, and where its figures go.
#[derive(Debug, Args)]
pub struct Wanted {
    /// Write a list of `name`, `ours`, `peer`, `ratio`, `reach`, `pass`, `unit`, `note` to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Measure only work whose name, or a figure of it, contains this
    #[arg(long, value_name = "WORD")]
    #[arg(default_value = "", hide_default_value = true)]
    pub only: String,
}

/// Measures what is wanted of all work on a machine, and tells on the way; an error if nothing is.
/// If the machine cannot be opened and may be absent, every figure is reported without a verdict.
/// `device` returns a machine's device, and whether times mean something there.
pub fn measure<M>(
    (all, figures): (&[Work<M>], &str),
    wanted: &Wanted,
    may_be_absent: bool,
    open: impl FnOnce() -> Result<M>,
    device: fn(&M) -> (&Device, bool),
) -> Result<ExitCode> {
    let figures = of_wanted_work(Figure::list(figures)?, &wanted.only);
    let is_wanted = |work: &&Work<M>| figures.iter().any(|figure| figure.work == work.0);
    let chosen: Vec<_> = all.iter().filter(is_wanted).collect();
    let (is_any, word) = (!chosen.is_empty(), &wanted.only);
    ensure!(is_any, "no work and no figure has {word:?} in its name");
    let json = wanted.json.as_deref();
    let machine = match open() {
        Err(error) if may_be_absent => {
            let note = format!("no GPU answers: {error:#}");
            let blank = |figure: &Figure| figure.blank().noted(&note);
            report::end(&figures.iter().map(blank).collect::<Vec<_>>(), json)?;
            eprintln!("nothing was measured, for {note}");
            return Ok(ExitCode::from(NO_GPU));
        }
        machine => machine?,
    };
    let (device, is_real) = device(&machine);
    report::print_head(device, is_real);
    let mut findings = Vec::new();
    for work in chosen {
        let outcome = Outcome::of(*work, &machine);
        report::print_sides(work.0, outcome.timed());
        let mine = figures.iter().filter(|figure| figure.work == work.0);
        findings.extend(mine.map(|figure| outcome.judge(figure, is_real)));
    }
    report::end(&findings, json)
}

/// All figures of the work whose name, or a figure of it, contains a word.
fn of_wanted_work(mut figures: Vec<Figure>, word: &str) -> Vec<Figure> {
    let is_named = |one: &&Figure| one.work.contains(word) || one.name.contains(word);
    let named = figures.iter().filter(is_named);
    let wanted: BTreeSet<_> = named.map(|figure| figure.work.clone()).collect();
    figures.retain(|figure| wanted.contains(&figure.work));
    figures
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_find_work_by_its_figures_too() {
        let figures = || Figure::list(include_str!("../figures/bench.csv")).unwrap();
        let has = |word, work: &str| {
            let found = of_wanted_work(figures(), word);
            found.iter().filter(|figure| figure.work == work).count()
        };
        assert_eq!(has("1 GiB", "allocate 1 GiB"), 5);
        // All figures of the work.
        assert_eq!(has("single-handle", "allocate 1 GiB"), 5);
        assert_eq!(has("tear down", "allocate 1 GiB"), 0);
        assert_eq!(of_wanted_work(figures(), "").len(), figures().len());
    }
}
