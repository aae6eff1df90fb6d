//! `gpu-test`: the tests that need a GPU, on this machine or packed for another.

mod build;
mod probe;
mod stubs;

use crate::files;
use crate::progress;
use crate::workspace::Workspace;
use anyhow::{Context, Result, ensure};
use build::Built;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// The script that runs the bundle where the GPU is.
const RUN: &str = include_str!("run.sh");
/// The most that a packed bundle may weigh.
const LIMIT_BYTES: u64 = 60_000_000;
/// The exit code for rows that did not run.
const SKIPPED: u8 = 2;

/// What kind of row a binary is, as the `run` script distinguishes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Tests that do not link Candle.
    Core,
    /// A program that shows success by its exit code.
    Program,
    /// Tests that link Candle, and so the CUDA libraries.
    Candle,
}

/// One row of the report.
#[derive(Clone, Debug)]
pub struct Row {
    /// What it is.
    pub kind: Kind,
    /// What the report calls it.
    pub name: String,
    /// The executable.
    pub executable: PathBuf,
}

/// Makes the folder `bundle`, or without one runs in place where there is a GPU.
pub fn run(workspace: &Workspace, bundle: Option<&Path>, compute_cap: u32) -> Result<ExitCode> {
    if let Some(folder) = bundle {
        make(workspace, folder, compute_cap)?;
        println!("On the machine with the GPU, which needs no toolchain:");
        println!("    OUT=FOLDER {}/run", folder.display());
        println!(
            "It writes FOLDER/report.md, and exits with 0 (every row PASS), 1 (a row FAIL) or 2 (some SKIPPED)."
        );
        return Ok(ExitCode::SUCCESS);
    }
    let program = probe::compile(&workspace.target.join("gpu-test"))?;
    if let probe::Answer::NoGpu(reason) = probe::ask(&program)? {
        for name in build::names(workspace)? {
            println!("{:<8} {name}", "SKIPPED");
        }
        println!("The matrix needs a GPU ({reason}).");
        println!("To run it elsewhere: cargo xtask gpu-test --bundle FOLDER");
        return Ok(ExitCode::from(SKIPPED));
    }
    let folder = workspace.target.join("gpu-test").join("bundle");
    make(workspace, &folder, compute_cap)?;
    let status = Command::new(folder.join("run"))
        .status()
        .context("the bundle's run script could not be started")?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

fn make(workspace: &Workspace, folder: &Path, compute_cap: u32) -> Result<()> {
    let target = workspace.target.join("gpu-test");
    let built = build::all(workspace, &target, compute_cap)?;
    let stage = target.join("stage");
    files::remove_tree(&stage)?;
    files::make(&stage.join("bin"))?;
    for (index, row) in built.rows.iter().enumerate() {
        let file = stage.join("bin").join(file_name(index, row));
        fs::copy(&row.executable, &file)
            .with_context(|| format!("copying {}", row.executable.display()))?;
        files::executable(&file)?;
    }
    let program = probe::compile(&target)?;
    fs::copy(&program, stage.join("bin/probe")).context("copying the probe")?;
    for (name, text) in [
        ("rows", rows_text(&built)),
        ("libraries", lines(&built.libraries)),
        ("built", lines(&built.facts)),
    ] {
        fs::write(stage.join(name), text).with_context(|| format!("writing {name}"))?;
    }

    files::make(folder)?;
    let archive = folder.join("bundle.tar.gz");
    progress::during("packing the bundle", || {
        let status = Command::new("tar")
            .arg("-czf")
            .arg(&archive)
            .arg("-C")
            .arg(&stage)
            .args(["bin", "rows", "libraries", "built"])
            .status()
            .context("tar could not be started")?;
        ensure!(status.success(), "tar: {status}");
        Ok(())
    })?;
    let script = folder.join("run");
    fs::write(&script, RUN).with_context(|| format!("writing {}", script.display()))?;
    files::executable(&script)?;
    let bytes = fs::metadata(&archive)?.len();
    ensure!(
        bytes <= LIMIT_BYTES,
        "{} has {bytes} bytes, more than the {LIMIT_BYTES} allowed",
        archive.display()
    );
    println!(
        "{}: {} rows, {:.1} MB packed",
        workspace.short(folder),
        built.rows.len(),
        bytes as f64 / 1e6
    );
    Ok(())
}

fn file_name(index: usize, row: &Row) -> String {
    let name: String = row
        .name
        .chars()
        .map(|letter| {
            if letter.is_ascii_alphanumeric() {
                letter
            } else {
                '-'
            }
        })
        .collect();
    format!("{index:02}-{name}")
}

fn rows_text(built: &Built) -> String {
    let mut text = String::new();
    for (index, row) in built.rows.iter().enumerate() {
        let kind = match row.kind {
            Kind::Core => "core",
            Kind::Program => "program",
            Kind::Candle => "candle",
        };
        text += &format!("{kind}\t{}\t{}\n", file_name(index, row), row.name);
    }
    text
}

fn lines(lines: &[String]) -> String {
    lines.iter().map(|line| format!("{line}\n")).collect()
}

#[cfg(test)]
mod tests;
