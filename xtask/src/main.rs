//! The project's own tasks, run as `cargo xtask <task>`.

mod bench;
mod ci;
mod consumers;
mod display;
mod documentation;
mod files;
mod gpu_test;
mod headers;
mod kernels;
mod licences;
mod setup;
mod tests;
#[cfg(test)]
mod tidy;
mod workspace;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::ffi::OsString;
use std::process::{Command, ExitCode};
use workspace::{Workspace, code};

/// The exit code of a usage error where 2 has another meaning.
const USAGE: u8 = 64;

/// The project's own tasks
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
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
    Generate {
        /// Build for GPUs, and run on GPU 0 unless told otherwise
        #[arg(long)]
        cuda: bool,
        /// With --cuda: the oldest GPU for which Candle's kernels are compiled, as NVIDIA numbers them without the dot
        #[arg(long, default_value_t = gpu_test::COMPUTE_CAP, value_parser = clap::value_parser!(u32).range(53..1000))]
        compute_cap: u32,
        /// Arguments of the example (`--help` lists them)
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Use everything at random for some minutes, and check all bytes; what follows goes to the example
    #[command(disable_help_flag = true)]
    Soak {
        /// Build for GPUs, and run on GPU 0
        #[arg(long)]
        cuda: bool,
        /// Arguments of the example (`--help` lists them)
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
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
    GpuTest(gpu_test::InPlace),
    /// Run the matrix of tests that need a GPU, or the same on the simulator
    ///
    /// The report goes to the folder $OUT if that is set, else beside `run`. Exit code: 0, every row PASS; 1, a row
    /// FAIL; 2, no row FAIL, but some SKIPPED, for want of a GPU or of what else this machine lacks; 64, wrong usage.
    #[command(
        hide = true,
        override_usage = "run [OPTIONS]\n       run program NAME [ARGUMENTS]..."
    )]
    RunBundle(gpu_test::InBundle),
}

fn main() -> ExitCode {
    let arguments = Arguments::try_parse().unwrap_or_else(|error| {
        // Telling why can only fail if there is nobody left to tell.
        let _ = error.print();
        let task = std::env::args().nth(1).unwrap_or_default();
        // For these, 2 says that something could not be run.
        let has_other = ["gpu-test", "run-bundle", "bench"].contains(&task.as_str());
        let code = error.exit_code();
        let is_usage = code != 0 && has_other;
        std::process::exit(if is_usage { USAGE.into() } else { code })
    });
    let code = start(arguments.task).unwrap_or_else(|error| {
        eprintln!("xtask: error: {error:#}");
        let is_usage = error.is::<gpu_test::Usage>();
        if is_usage { USAGE } else { 1 }
    });
    code.into()
}

/// Does the task, and returns the exit code.
fn start(task: Task) -> Result<u8> {
    // On the machine where a bundle runs, there is no workspace.
    if let Task::RunBundle(asked) = task {
        return gpu_test::run_bundle(&asked);
    }
    let workspace = Workspace::find()?;
    match task {
        Task::Setup { cuda } => {
            setup::ensure(&workspace, cuda, true)?;
            let configuration = setup::configuration(&workspace.setup_folder())?;
            if !configuration.is_empty() {
                eprintln!("xtask: for a program outside this checkout, in its .cargo/config.toml:");
                print!("{configuration}");
            }
        }
        Task::Demo { arguments } => {
            setup::ensure(&workspace, false, false)?;
            let demo = "--package cuda-vmm --features simulator --example demo";
            return code(workspace.program(demo)?.args(arguments));
        }
        Task::Generate {
            cuda,
            compute_cap,
            arguments,
        } => {
            let mut generate = example(&workspace, cuda, compute_cap, gpu_test::GENERATE)?;
            return code(generate.args(arguments));
        }
        Task::Soak { cuda, arguments } => {
            let mut soak = example(&workspace, cuda, gpu_test::COMPUTE_CAP, gpu_test::SOAK)?;
            return code(soak.args(arguments));
        }
        Task::Test { cuda: false } => tests::run(&workspace)?,
        Task::Test { cuda: true } => gpu_test::without_gpu(&workspace)?,
        Task::Bench(arguments) => return bench::run(&workspace, &arguments),
        Task::Ci => ci::run(&workspace)?,
        Task::Consumers => {
            consumers::pack(&workspace)?;
            consumers::run(&workspace)?;
        }
        Task::Headers => headers::run(&workspace)?,
        Task::GpuTest(asked) => return gpu_test::run(&workspace, &asked),
        Task::RunBundle(_) => {}
    }
    Ok(0)
}

/// An example of the facade, built for GPUs or not.
fn example(
    workspace: &Workspace,
    cuda: bool,
    compute_cap: u32,
    program: gpu_test::Program,
) -> Result<Command> {
    if cuda {
        return gpu_test::with_cuda(workspace, compute_cap, program);
    }
    setup::ensure(workspace, false, false)?;
    let (package, name) = (program.package, program.name);
    workspace.program(&format!("--package {package} --example {name}"))
}
