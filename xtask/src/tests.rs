//! `test`: everything that needs no GPU; and counting what a test runner says.

use crate::workspace::{self, Workspace};
use crate::{progress, setup};
use anyhow::Result;
use std::env;
use std::ffi::OsString;
use std::process::Command;
use std::time::Instant;

/// What turns on the simulator wherever it is optional, and what else of the core is.
pub const FEATURES: [&str; 2] = ["--features", "cuda-vmm/simulator,cuda-vmm/serde"];

/// Runs the workspace's tests, then the long property test and the model checker's scenarios in release builds.
pub fn run(workspace: &Workspace) -> Result<()> {
    let started = Instant::now();
    setup::ensure(workspace, false, false)?;
    workspace::run(workspace.cargo(&["test", "--workspace"]).args(FEATURES))?;
    workspace::run(
        workspace
            .cargo(&["test", "--release", "--package", "cuda-vmm"])
            .args(["--features", "simulator", "--test", "random_operations"])
            .args(["--", "--include-ignored"]),
    )?;
    workspace::run(&mut model_check(workspace))?;
    eprintln!(
        "xtask: test: PASS in {}",
        progress::seconds(started.elapsed())
    );
    Ok(())
}

/// The model checker's scenarios. Its flag is one for the whole build, which so has a target folder of its own, or
/// each build would throw the other's away.
fn model_check(workspace: &Workspace) -> Command {
    let mut command = workspace.cargo(&["test", "--release", "--package", "cuda-vmm"]);
    command
        .args(["--features", "simulator", "--test", "shuttle"])
        .arg("--target-dir")
        .arg(workspace.target.join("shuttle"));
    // Where both are set, cargo looks at the encoded flags alone.
    let (name, separator) = match env::var_os("CARGO_ENCODED_RUSTFLAGS") {
        Some(_) => ("CARGO_ENCODED_RUSTFLAGS", "\u{1f}"),
        None => ("RUSTFLAGS", " "),
    };
    let flags = env::var_os(name).unwrap_or_default();
    command.env(name, with_flags(flags, separator, ["--cfg", "shuttle"]));
    command
}

/// The compiler's flags with some more behind them.
fn with_flags(mut flags: OsString, separator: &str, more: [&str; 2]) -> OsString {
    for flag in more {
        if !flags.is_empty() {
            flags.push(separator);
        }
        flags.push(flag);
    }
    flags
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
    fn flags_are_put_behind_those_that_are_set() {
        let more = ["--cfg", "shuttle"];
        assert_eq!(with_flags("".into(), " ", more), "--cfg shuttle");
        assert_eq!(
            with_flags("-C\u{1f}debuginfo=1".into(), "\u{1f}", more),
            "-C\u{1f}debuginfo=1\u{1f}--cfg\u{1f}shuttle"
        );
    }

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
