//! `test`: everything that needs no GPU; and counting what a test runner says.

use crate::workspace::{self, Workspace};
use crate::{progress, setup};
use anyhow::Result;
use std::time::Instant;

/// What turns on the simulator wherever it is optional, and what else of the core is.
pub const FEATURES: [&str; 2] = ["--features", "cuda-vmm/simulator,cuda-vmm/serde"];

/// Runs the workspace's tests, with nextest if it is installed: it runs the tests of all programs side by side.
pub fn run(workspace: &Workspace) -> Result<()> {
    let started = Instant::now();
    setup::ensure(workspace, false, false)?;
    match has_nextest(workspace) {
        true => {
            let mut nextest = workspace.cargo(&["nextest", "run", "--workspace"]);
            nextest.args(["--status-level", "slow", "--final-status-level", "fail"]);
            workspace::run(nextest.args(FEATURES))?;
            let mut examples = workspace.cargo(&["test", "--doc", "--workspace"]);
            // Its documentation is that of `cuda-vmm`.
            examples.args(["--exclude", "cuda-vmm-model-check"]);
            workspace::run(examples.args(FEATURES))?;
        }
        false => workspace::run(workspace.cargo(&["test", "--workspace"]).args(FEATURES))?,
    }
    eprintln!(
        "xtask: test: PASS in {}",
        progress::seconds(started.elapsed())
    );
    Ok(())
}

/// Runs what takes longer: a thousand cases of the property test in a release build, and the model checker's scenarios in
/// six times as many orders.
pub fn long(workspace: &Workspace) -> Result<()> {
    workspace::run(
        workspace
            .cargo(&["test", "--release", "--package", "cuda-vmm"])
            .args(["--features", "simulator", "--test", "random_operations"]),
    )?;
    let mut model_check = workspace.cargo(&["test", "--package", "cuda-vmm-model-check"]);
    workspace::run(model_check.env("SHUTTLE_ITERATIONS", "3000"))
}

fn has_nextest(workspace: &Workspace) -> bool {
    let mut command = workspace.cargo(&["nextest", "--version"]);
    let output = command.output();
    output.is_ok_and(|output| output.status.success())
}

/// Sums of the runner's own summary lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Tests that ran and passed.
    pub passed: u64,
    /// Tests that ran and failed.
    pub failed: u64,
}

/// Adds up every `test result:` line of `text`.
pub fn count(text: &str) -> Counts {
    let mut counts = Counts::default();
    for line in text.lines() {
        let Some(result) = line.trim().strip_prefix("test result: ") else {
            continue;
        };
        let parts = result.split_once(". ").map_or(result, |(_, parts)| parts);
        for part in parts.split(';') {
            match part.trim().split_once(' ') {
                Some((number, "passed")) => counts.passed += number.parse::<u64>().unwrap_or(0),
                Some((number, "failed")) => counts.failed += number.parse::<u64>().unwrap_or(0),
                _ => {}
            }
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
        assert_eq!(
            count(text),
            Counts {
                passed: 5,
                failed: 1
            }
        );
        assert_eq!(count("nothing ran"), Counts::default());
    }
}
