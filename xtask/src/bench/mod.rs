//! `bench`: what the bookkeeping costs on the CPU, or what the pools cost on a GPU.

mod criterion;
mod finding;
mod memory;

use crate::workspace::Workspace;
use crate::{setup, table};
use anyhow::{Context, Result};
use clap::Args;
use finding::Finding;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The package of the benches.
pub const PACKAGE: &str = "cuda-vmm-benches";
/// Its program that measures on a GPU.
pub const PROGRAM: &str = "bench";

/// What is to be measured.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Measure on the GPU of this machine
    #[arg(long)]
    gpu: bool,
    /// Write a list of `name`, `ours`, `peer`, `ratio`, `reach`, `pass`, `unit`, `note` to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Arguments of the measuring program (`--gpu -- --help` lists them)
    #[arg(last = true, requires = "gpu")]
    arguments: Vec<OsString>,
}

/// Measures, and answers with the exit code: 1 if something is not reached, 2 if no GPU answers.
pub fn run(workspace: &Workspace, arguments: &Arguments) -> Result<u8> {
    setup::ensure(workspace, false, false)?;
    // The path is from where the caller is, and cargo runs elsewhere.
    let json = arguments.json.as_deref().map(std::path::absolute);
    let json = json.transpose().context("the path of the JSON file")?;
    match arguments.gpu {
        true => on_gpu(workspace, json.as_deref(), &arguments.arguments),
        false => on_cpu(workspace, json.as_deref()),
    }
}

/// Runs the measuring program, which prints and writes all by itself.
fn on_gpu(workspace: &Workspace, json: Option<&Path>, arguments: &[OsString]) -> Result<u8> {
    let mut command = workspace.cargo(&["run", "--release", "--package", PACKAGE]);
    command.args(["--bin", PROGRAM, "--"]);
    if let Some(json) = json {
        command.arg("--json").arg(json);
    }
    command.args(arguments);
    let status = command.status().context("cargo could not be started")?;
    // Cargo has said what went wrong, and hands on the program's own exit code.
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.unwrap_or(1))
}

/// Runs the criterion benches and the test of the bookkeeping's memory.
fn on_cpu(workspace: &Workspace, json: Option<&Path>) -> Result<u8> {
    let mut findings = criterion::run(workspace)?;
    findings.extend(memory::run(workspace)?);
    let head = ["figure", "ours", "peer", "ratio", "reach", "pass"];
    let rows: Vec<_> = findings.iter().map(Finding::cells).collect();
    print!("\n{}", table::render(&head, &rows, &[1, 2, 3, 4]));
    if let Some(json) = json {
        let text = serde_json::to_string_pretty(&findings)?;
        std::fs::write(json, text + "\n").with_context(|| format!("writing {}", json.display()))?;
    }
    Ok(u8::from(findings.iter().any(Finding::has_failed)))
}
