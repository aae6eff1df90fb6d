//! `ci`: every check, in order, until one fails.

use crate::workspace::{Workspace, code};
use crate::{consumers, display, documentation, gpu_test, headers, licences, server, setup, tests};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::Instant;

type Step = (&'static str, fn(&Workspace) -> Result<()>);

const STEPS: [Step; 14] = [
    ("test", tests::run),
    ("long tests", tests::long),
    ("server", server::run),
    ("gpu-test, simulated", gpu_test_simulated),
    ("gpu-test without a GPU", gpu_test_without_gpu),
    ("formatting", |it| cargo(it, "fmt --all --check")),
    ("clippy", clippy),
    ("documentation", documentation::workspace),
    ("documentation as hosted", documentation::hosted),
    ("licences", licences::run),
    ("packaging", consumers::pack),
    ("consumers", consumers::run),
    ("headers", headers::run),
    // Last, as a machine that has never done it builds Candle's kernels for many minutes.
    ("test --cuda", |it| cargo(it, "xtask test --cuda")),
];

/// Runs the steps, tells the time of each, and prints a table at the end.
pub fn run(workspace: &Workspace) -> Result<()> {
    setup::ensure(workspace, false, true)?;
    // Nothing is built twice, and what a second build would use takes more disk than all the rest.
    workspace.shell.set_var("CARGO_INCREMENTAL", "0");
    let mut rows: Vec<[String; 3]> = Vec::new();
    let mut failure = None;
    for (name, step) in STEPS {
        if failure.is_some() {
            rows.push([name, "NOT RUN", ""].map(str::to_owned));
            continue;
        }
        eprintln!("xtask: ci: {name}");
        let started = Instant::now();
        let result = step(workspace);
        let taken = display::time(started.elapsed()).to_string();
        let state = if result.is_ok() { "PASS" } else { "FAIL" };
        eprintln!("xtask: ci: {name}: {state} in {taken}");
        rows.push([name.to_owned(), state.to_owned(), taken]);
        let result = result.context(format!("ci stopped at the step {name}"));
        failure = result.err();
    }
    println!("{}", display::table(["step", "state", "time"], rows));
    failure.map_or(Ok(()), Err)
}

fn cargo(workspace: &Workspace, line: &str) -> Result<()> {
    Ok(workspace.cargo(line).run()?)
}

fn clippy(workspace: &Workspace) -> Result<()> {
    let clippy = workspace.cargo("clippy --workspace --all-targets");
    let clippy = clippy.args(tests::FEATURES.split(' '));
    Ok(clippy.args(["--", "-D", "warnings"]).run()?)
}

fn gpu_test_simulated(workspace: &Workspace) -> Result<()> {
    let line = "xtask gpu-test --driver simulated --stress-seconds 5";
    Ok(workspace.cargo(line).env_remove("OUT").run()?)
}

/// Without a GPU every row must be skipped, and the exit code say so.
fn gpu_test_without_gpu(workspace: &Workspace) -> Result<()> {
    if gpu_test::has_gpu(workspace)? {
        eprintln!("xtask: this machine has a GPU, so there is nothing to check");
        return Ok(());
    }
    let file = workspace.target.join("gpu-test/without-gpu.json");
    // As one types it: this program's own file may have been built anew since it was started.
    let command = workspace.cargo("xtask gpu-test --json").arg(&file);
    let code = code(&mut command.env_remove("OUT").into())?;
    ensure!(code == 2, "gpu-test without a GPU ends with {code}");
    let report = workspace.shell.read_file(&file)?;
    let report: Value = serde_json::from_str(&report).context("gpu-test's report is not JSON")?;
    let rows = report["rows"].as_array().map_or(&[][..], Vec::as_slice);
    let is_skipped = !rows.is_empty() && rows.iter().all(|row| row["state"] == "SKIPPED");
    ensure!(is_skipped, "not every row is SKIPPED: {report}");
    Ok(())
}
