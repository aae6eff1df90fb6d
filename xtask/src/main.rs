//! The project's own tasks, run as `cargo xtask <task>`.

#[cfg(test)]
mod architecture;
mod bench;
mod ci;
mod consumers;
mod documentation;
#[cfg(test)]
mod errors_page;
mod files;
mod generate;
mod gpu_test;
mod headers;
mod kernels;
mod licences;
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
    ///
    /// Prints on standard output what a program outside this checkout puts into its .cargo/config.toml.
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
    /// Generate tokens with a language model over a KV cache; what follows goes to the example
    #[command(disable_help_flag = true)]
    Generate(generate::Arguments),
    /// Run every test that needs no GPU
    Test {
        /// Run instead the tests of Candle's CUDA devices, over the simulated driver; builds Candle's kernels once, which
        /// takes minutes
        #[arg(long)]
        cuda: bool,
    },
    /// Measure what the bookkeeping costs, with --gpu what the pools cost on the GPU of this machine, or simulate serving
    ///
    /// Exit code: 0, everything that is demanded is reached; 1, something is not; 2, no GPU answers; 64, wrong usage.
    Bench(bench::Arguments),
    /// Run every check: the tests, formatting, lints, documentation, licences, packages, consumers, headers
    Ci,
    /// Pack the library crates, build and run small programs that depend on the packages, and count what users depend on
    Consumers,
    /// Build and test the bindings against CUDA headers 11.8 to 13.5
    Headers,
    /// Run the matrix of tests that need a GPU, or the same on the simulator
    ///
    /// The report goes to the folder $OUT if that is set, else to target/gpu-test. Exit code: 0, every row PASS; 1, a
    /// row FAIL; 2, no row FAIL, but some SKIPPED, for want of a GPU or of what else this machine lacks; 64, wrong usage.
    GpuTest {
        #[command(flatten)]
        matrix: gpu_test::Arguments,
        /// Run nothing, but pack all programs into this folder, for a machine that has a GPU and no toolchain
        #[arg(long, value_name = "FOLDER", conflicts_with_all = ["driver", "devices", "only", "list", "json", "stress_seconds", "sanitize"])]
        bundle: Option<PathBuf>,
        /// The oldest GPU for which Candle's kernels are compiled, as NVIDIA numbers them without the dot
        #[arg(long, default_value_t = gpu_test::COMPUTE_CAP, value_parser = clap::value_parser!(u32).range(53..1000))]
        compute_cap: u32,
    },
    /// Run the matrix of tests that need a GPU, or the same on the simulator
    ///
    /// The report goes to the folder $OUT if that is set, else beside `run`. Exit code: 0, every row PASS; 1, a row
    /// FAIL; 2, no row FAIL, but some SKIPPED, for want of a GPU or of what else this machine lacks; 64, wrong usage.
    #[command(
        hide = true,
        override_usage = "run [OPTIONS]\n       run program NAME [ARGUMENTS]..."
    )]
    RunBundle(gpu_test::BundleArguments),
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Telling why can only fail if there is nobody left to tell.
            let _ = error.print();
            let tells_more = std::env::args_os().nth(1).is_some_and(|task| {
                ["gpu-test", "run-bundle", "bench"]
                    .iter()
                    .any(|other| task == *other)
            });
            return match error.exit_code() {
                0 => ExitCode::SUCCESS,
                // For these, 2 says that something could not be run.
                _ if tells_more => ExitCode::from(USAGE),
                _ => ExitCode::from(2),
            };
        }
    };
    match start(arguments.task) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: error: {error:#}");
            match error.is::<gpu_test::Usage>() {
                true => ExitCode::from(USAGE),
                false => ExitCode::FAILURE,
            }
        }
    }
}

fn start(task: Task) -> Result<ExitCode> {
    match task {
        Task::Setup { cuda } => {
            let workspace = Workspace::find()?;
            setup::ensure(&workspace, cuda, true)?;
            let configuration = setup::configuration(&workspace.setup_folder());
            if !configuration.is_empty() {
                eprintln!("xtask: for a program outside this checkout, in its .cargo/config.toml:");
                print!("{configuration}");
            }
        }
        Task::Demo { arguments } => {
            let workspace = Workspace::find()?;
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
        Task::Generate(arguments) => {
            return Ok(ExitCode::from(generate::run(
                &Workspace::find()?,
                &arguments,
            )?));
        }
        Task::Test { cuda: false } => tests::run(&Workspace::find()?)?,
        Task::Test { cuda: true } => gpu_test::without_gpu(&Workspace::find()?)?,
        Task::Bench(arguments) => {
            return Ok(ExitCode::from(bench::run(&Workspace::find()?, &arguments)?));
        }
        Task::Ci => ci::run(&Workspace::find()?)?,
        Task::Consumers => {
            let workspace = Workspace::find()?;
            package::run(&workspace)?;
            consumers::run(&workspace)?;
        }
        Task::Headers => headers::run(&Workspace::find()?)?,
        Task::GpuTest {
            matrix,
            bundle,
            compute_cap,
        } => {
            let code = gpu_test::run(&matrix, bundle.as_deref(), compute_cap)?;
            return Ok(ExitCode::from(code));
        }
        // Where a bundle runs, there is no workspace.
        Task::RunBundle(arguments) => {
            return Ok(ExitCode::from(gpu_test::run_bundle(&arguments)?));
        }
    }
    Ok(ExitCode::SUCCESS)
}
