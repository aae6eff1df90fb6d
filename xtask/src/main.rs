//! The project's own tasks, run as `cargo xtask <task>`.

mod ci;
mod consumers;
mod files;
mod gpu_test;
mod headers;
mod machine;
mod package;
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
use std::path::PathBuf;
use std::process::ExitCode;
use workspace::Workspace;

/// The exit code of a usage error where 2 has another meaning.
const USAGE: u8 = 64;

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    about = "The project's own tasks"
)]
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
    /// Run every check: the tests, formatting, lints, documentation, packages, consumers, headers
    Ci,
    /// Pack the library crates, and build and run small programs that depend on the packages
    Consumers,
    /// Build and test the bindings against CUDA headers 11.8 to 13.5
    Headers,
    /// Run the tests that need a GPU; exits with 2 where there is none
    GpuTest {
        /// Pack them into this folder, for a machine that has a GPU and no toolchain
        #[arg(long, value_name = "FOLDER")]
        bundle: Option<PathBuf>,
        /// The oldest GPU for which Candle's kernels are compiled, as NVIDIA numbers them without the dot
        #[arg(long, default_value_t = 90, value_parser = clap::value_parser!(u32).range(53..1000))]
        compute_cap: u32,
    },
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Telling why can only fail if there is nobody left to tell.
            let _ = error.print();
            let gpu_test = std::env::args_os()
                .nth(1)
                .is_some_and(|task| task == "gpu-test");
            return match error.exit_code() {
                0 => ExitCode::SUCCESS,
                // For gpu-test, 2 says that rows were skipped.
                _ if gpu_test => ExitCode::from(USAGE),
                _ => ExitCode::from(2),
            };
        }
    };
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
            // The paths among its arguments are from where the caller is.
            demo.current_dir(std::env::current_dir().context("the current folder is gone")?);
            demo.arg("--manifest-path")
                .arg(workspace.root.join("Cargo.toml"));
            demo.args(["--features", "simulator", "--example", "demo", "--"])
                .args(arguments);
            let status = demo.status().context("cargo could not be started")?;
            // Cargo has said what went wrong, and hands on the demo's own exit code.
            let code = status.code().and_then(|code| u8::try_from(code).ok());
            return Ok(code.map_or(ExitCode::FAILURE, ExitCode::from));
        }
        Task::Test => tests::run(&workspace)?,
        Task::Ci => ci::run(&workspace)?,
        Task::Consumers => {
            package::run(&workspace)?;
            consumers::run(&workspace)?;
        }
        Task::Headers => headers::run(&workspace)?,
        Task::GpuTest {
            bundle,
            compute_cap,
        } => return gpu_test::run(&workspace, bundle.as_deref(), compute_cap),
    }
    Ok(ExitCode::SUCCESS)
}
