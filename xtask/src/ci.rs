//! `ci`: every check, in order, until one fails.

use crate::workspace::{self, Workspace};
use crate::{consumers, headers, package, progress, setup, table, tests};
use anyhow::{Context, Result};
use std::time::Instant;

type Step = (&'static str, fn(&Workspace) -> Result<()>);

const STEPS: [Step; 8] = [
    ("test", tests::run),
    ("formatting", formatting),
    ("clippy", clippy),
    ("documentation", documentation),
    ("documentation without CUDA", documentation_without_cuda),
    ("packaging", package::run),
    ("consumers", consumers::run),
    ("headers", headers::run),
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

fn documentation(workspace: &Workspace) -> Result<()> {
    workspace::run(
        workspace
            .cargo(&["doc", "--workspace", "--no-deps"])
            .args(tests::FEATURES)
            .env("RUSTDOCFLAGS", "-D warnings"),
    )
}

/// As documentation hosts build it, which have no `cuda.h`.
fn documentation_without_cuda(workspace: &Workspace) -> Result<()> {
    workspace::run(
        workspace
            .cargo(&[
                "doc",
                "--package",
                "cuda-vmm-sys",
                "--no-deps",
                "--target-dir",
            ])
            .arg(workspace.target.join("documentation"))
            .env("DOCS_RS", "1")
            .env("RUSTDOCFLAGS", "-D warnings"),
    )
}
