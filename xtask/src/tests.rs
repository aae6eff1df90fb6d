//! `test`: everything that needs no GPU; and counting what a test runner says.

use crate::workspace::Workspace;
use crate::{display, setup};
use anyhow::Result;
use serde::Serialize;
use std::time::Instant;

/// What turns on the simulator wherever it is optional, and what else of the core is.
pub const FEATURES: &str = "--features cuda-vmm/simulator,cuda-vmm/serde";

/// All but the server, whose dependencies take minutes to compile.
const WITHOUT_SERVER: &str = "--workspace --exclude cuda-vmm-serve";

/// Runs the workspace's tests.
pub fn run(workspace: &Workspace) -> Result<()> {
    let started = Instant::now();
    setup::ensure(workspace, false, false)?;
    // The model check's documentation is that of `cuda-vmm`.
    let documented = format!("{WITHOUT_SERVER} --exclude cuda-vmm-model-check {FEATURES}");
    let packages = format!("{WITHOUT_SERVER} {FEATURES}");
    run_packages(workspace, &packages, &documented)?;
    eprintln!("xtask: test: PASS in {}", display::time(started.elapsed()));
    Ok(())
}

/// Runs the tests of some packages, and those of the documentation of some, with nextest if it is
/// installed: it runs the tests of all programs side by side, and ends those that hang.
pub fn run_packages(workspace: &Workspace, packages: &str, documented: &str) -> Result<()> {
    let run = |line: &str, packages| workspace.cargo(&format!("{line} {packages}")).run();
    let nextest = workspace.cargo("nextest --version").quiet();
    if nextest.ignore_stdout().ignore_stderr().run().is_ok() {
        run(
            "nextest run --status-level slow --final-status-level fail",
            packages,
        )?;
        run("test --doc", documented)?;
    } else {
        run("test", packages)?;
    }
    Ok(())
}

/// Runs a thousand cases of the property test, and the model checker in fifteen times the orders.
pub fn long(workspace: &Workspace) -> Result<()> {
    let cases = "test --release --package cuda-vmm --features simulator --test random_operations";
    workspace.cargo(cases).run()?;
    let orders = workspace.cargo("test --package cuda-vmm-model-check");
    Ok(orders.env("SHUTTLE_ITERATIONS", "3000").run()?)
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    #[serde(rename = "tests_passed")]
    pub passed: u64,
    #[serde(rename = "tests_failed")]
    pub failed: u64,
}

/// Adds up every `test result:` line of `text`.
pub fn count(text: &str) -> Counts {
    let mut counts = Counts::default();
    let lines = text.lines().map(str::trim);
    let results = lines.filter_map(|line| line.strip_prefix("test result: "));
    for part in results.flat_map(|result| result.split([';', '.'])) {
        match part.trim().split_once(' ') {
            Some((number, "passed")) => counts.passed += number.parse::<u64>().unwrap_or(0),
            Some((number, "failed")) => counts.failed += number.parse::<u64>().unwrap_or(0),
            _ => {}
        }
    }
    counts
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn summary_lines_are_added_up() {
        let text = "running 2 tests\n\
            test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out\n\
            other\n\
            test result: FAILED. 3 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out\n";
        let (passed, failed) = (5, 1);
        assert_eq!(count(text), Counts { passed, failed });
        assert_eq!(count("nothing ran"), Counts::default());
    }
}
