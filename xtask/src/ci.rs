//! `ci`: every check, in order, until one fails.

use crate::workspace::{self, Workspace};
use crate::{
    consumers, documentation, gpu_test, headers, licences, package, progress, setup, table, tests,
};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::process::Command;
use std::time::Instant;

type Step = (&'static str, fn(&Workspace) -> Result<()>);

const STEPS: [Step; 13] = [
    ("test", tests::run),
    ("long tests", tests::long),
    ("gpu-test, simulated", gpu_test_simulated),
    ("gpu-test without a GPU", gpu_test_without_gpu),
    ("formatting", formatting),
    ("clippy", clippy),
    ("documentation", documentation::workspace),
    ("documentation as hosted", documentation::hosted),
    ("licences", licences::run),
    ("packaging", package::run),
    ("consumers", consumers::run),
    ("headers", headers::run),
    // Last, as a machine that has never done it builds Candle's kernels for many minutes.
    ("test --cuda", test_cuda),
];

/// Runs the steps, tells the time of each, and prints a table at the end.
pub fn run(workspace: &Workspace) -> Result<()> {
    setup::ensure(workspace, false, true)?;
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut failure = None;
    for (name, step) in STEPS {
        if failure.is_some() {
            rows.push(vec![name.to_owned(), "NOT RUN".to_owned(), String::new()]);
            continue;
        }
        eprintln!("xtask: ci: {name}");
        let started = Instant::now();
        let result = step(workspace);
        let taken = progress::seconds(started.elapsed());
        let state = if result.is_ok() { "PASS" } else { "FAIL" };
        eprintln!("xtask: ci: {name}: {state} in {taken}");
        rows.push(vec![name.to_owned(), state.to_owned(), taken]);
        failure = result.err().map(|error| (name, error));
    }
    print!("{}", table::render(&["step", "state", "time"], &rows, &[2]));
    match failure {
        Some((name, error)) => Err(error).context(format!("ci stopped at the step {name}")),
        None => Ok(()),
    }
}

fn gpu_test_simulated(workspace: &Workspace) -> Result<()> {
    let mut command = gpu_test(workspace);
    command.args(["--driver", "simulated", "--stress-seconds", "5"]);
    workspace::run(&mut command)
}

/// Without a GPU every row must be skipped, and the exit code say so.
fn gpu_test_without_gpu(workspace: &Workspace) -> Result<()> {
    if gpu_test::has_gpu(workspace)? {
        eprintln!("xtask: this machine has a GPU, so there is nothing to check");
        return Ok(());
    }
    let file = workspace.target.join("gpu-test/without-gpu.json");
    let mut command = gpu_test(workspace);
    command.arg("--json").arg(&file);
    let output = command.output().context("gpu-test could not be started")?;
    ensure!(
        output.status.code() == Some(2),
        "gpu-test without a GPU: {}, where exit code 2 is right:\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    let text = std::fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
    let report: Value = serde_json::from_slice(&text).context("gpu-test's report is not JSON")?;
    let rows = report["rows"].as_array().map_or(&[][..], Vec::as_slice);
    ensure!(
        !rows.is_empty() && rows.iter().all(|row| row["state"] == "SKIPPED"),
        "gpu-test without a GPU did not skip every row: {report}"
    );
    Ok(())
}

fn test_cuda(workspace: &Workspace) -> Result<()> {
    workspace::run(&mut workspace.cargo(&["xtask", "test", "--cuda"]))
}

/// The task `gpu-test`, as one types it: this program's own file may have been built anew since it was started.
fn gpu_test(workspace: &Workspace) -> Command {
    let mut command = workspace.cargo(&["xtask", "gpu-test"]);
    command.env_remove("OUT");
    command
}

fn formatting(workspace: &Workspace) -> Result<()> {
    workspace::run(&mut workspace.cargo(&["fmt", "--all", "--check"]))
}

fn clippy(workspace: &Workspace) -> Result<()> {
    workspace::run(
        workspace
            .cargo(&["clippy", "--workspace", "--all-targets"])
            .args(tests::FEATURES)
            .args(["--", "-D", "warnings"]),
    )
}
