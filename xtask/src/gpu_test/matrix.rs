//! The matrix on one machine: running the rows that are asked for, and telling what came of them.

use super::arguments::Arguments;
use super::build::Manifest;
use super::conditions::Libraries;
use super::report::{self, Report};
use super::runner::Runner;
use anyhow::Result;
use fs_err as fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// The exit code of what was interrupted, as a shell has it.
const INTERRUPTED: u8 = 130;

/// Runs the rows, prints and writes what came of them, and returns the exit code. The report goes
/// `beside` if `$OUT` names no folder; `command` is what one types.
pub fn run(
    arguments: &Arguments,
    mut runner: Runner,
    manifest: &Manifest,
    beside: &Path,
    command: String,
) -> Result<u8> {
    let started = Instant::now();
    let gpus = runner.conditions.gpu_count();
    let cells = arguments.select(gpus)?;
    runner.stress_seconds = arguments.stress_seconds;
    runner.limit_seconds = arguments.limit_seconds;
    runner.conditions.libraries = Libraries::find(&manifest.libraries);
    // Better found out now than after the last row that a report cannot be written.
    let out = std::env::var_os("OUT").filter(|out| !out.is_empty());
    let out = out.map_or_else(|| beside.into(), PathBuf::from);
    fs::create_dir_all(&out)?;
    let (markdown, json) = (out.join("report.md"), &arguments.json);
    for path in json.iter().chain([&markdown]) {
        fs::write(path, "")?;
    }
    let machine = report::machine(&command, &runner.conditions, manifest);
    let rows = runner.run(&cells)?;
    let (ended, asked) = (rows.len(), cells.len());
    let remark = match arguments.left_out(gpus) {
        _ if ended < asked => format!("Interrupted after {ended} of {asked} rows."),
        0 => String::new(),
        count => format!(
            "{count} rows for two devices were not asked for, as this machine has one GPU; \
             --devices 2 demands them."
        ),
    };
    let report = Report::new(machine, &rows, remark);
    fs::write(&markdown, report.markdown()?)?;
    if let Some(path) = json {
        fs::write(path, serde_json::to_string_pretty(&report)? + "\n")?;
    }
    report.print(started.elapsed(), &markdown.display().to_string());
    Ok(match ended == asked {
        true => report.exit_code(),
        false => INTERRUPTED,
    })
}
