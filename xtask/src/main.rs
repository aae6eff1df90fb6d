//! The project's own tasks, run as `cargo xtask <task>`.

mod files;
mod headers;
mod machine;
mod pins;
mod progress;
mod setup;
mod table;
mod tests;
mod wheels;
mod workspace;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use std::ffi::OsString;
use std::process::ExitCode;
use workspace::Workspace;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The project's own tasks", version)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Bring what the machine lacks for a build into the target folder; needs python3 with pip, but no root
    Setup {
        /// Bring the CUDA compiler too, which a build with Candle's `cuda` feature needs
        #[arg(long)]
        cuda: bool,
    },
    /// Run the demo; what follows goes to it
    #[command(disable_help_flag = true)]
    Demo {
        /// Arguments of the demo (`--help` lists them)
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Run every test that needs no GPU
    Test,
    /// Build and test the bindings against CUDA headers 11.8 to 13.5
    Headers,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match start(arguments.task) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(task: Task) -> Result<ExitCode> {
    let workspace = Workspace::find()?;
    match task {
        Task::Setup { cuda } => setup::ensure(&workspace, cuda, true)?,
        Task::Demo { arguments } => {
            setup::ensure(&workspace, false, false)?;
            let mut demo = workspace.cargo(&["run", "--release", "--package", "cuda-vmm"]);
            demo.args(["--features", "simulator", "--example", "demo", "--"])
                .args(arguments);
            let status = demo.status().context("cargo could not be started")?;
            // Cargo has said what went wrong, and hands on the demo's own exit code.
            let code = status.code().and_then(|code| u8::try_from(code).ok());
            return Ok(code.map_or(ExitCode::FAILURE, ExitCode::from));
        }
        Task::Test => tests::run(&workspace)?,
        Task::Headers => headers::run(&workspace)?,
    }
    Ok(ExitCode::SUCCESS)
}
