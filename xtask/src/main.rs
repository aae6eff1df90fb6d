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
mod server;
mod setup;
mod tests;
#[cfg(test)]
mod tidy;
mod workspace;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use gpu_test::{OldestGpu, Passed, Program};
use std::process::ExitCode;
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
    Demo(Passed),
    /// Generate tokens with a language model over a KV cache; what follows goes to the example
    #[command(disable_help_flag = true)]
    Generate(Example),
    /// Use everything at random for some minutes, and check all bytes; what follows goes to the example
    #[command(disable_help_flag = true)]
    Soak(Example),
    /// Serve language models that share memory, over HTTP as OpenAI's; what follows goes to the server
    #[command(disable_help_flag = true)]
    Serve(Example),
    /// Run every test that needs no GPU
    Test {
        /// Run instead the tests of Candle's CUDA devices, over the simulated driver; builds Candle's kernels once, which
        /// takes minutes
        #[arg(long)]
        cuda: bool,
        /// Run instead the tests of the server, and OpenAI's own client for Python against it
        #[arg(long, conflicts_with = "cuda")]
        server: bool,
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
        Task::Demo(passed) => {
            setup::ensure(&workspace, false, false)?;
            let demo = "--package cuda-vmm --features simulator --example demo";
            return code(workspace.program(demo)?.args(passed.arguments));
        }
        Task::Serve(server) => return server.run(&workspace, gpu_test::SERVE),
        Task::Generate(example) => return example.run(&workspace, gpu_test::GENERATE),
        Task::Soak(example) => return example.run(&workspace, gpu_test::SOAK),
        Task::Test { cuda: true, .. } => gpu_test::without_gpu(&workspace)?,
        Task::Test { server: true, .. } => server::run(&workspace)?,
        Task::Test { .. } => tests::run(&workspace)?,
        Task::Bench(arguments) => return bench::run(&workspace, &arguments),
        Task::Ci => ci::run(&workspace)?,
        Task::Consumers => consumers::pack(&workspace).and_then(|()| consumers::run(&workspace))?,
        Task::Headers => headers::run(&workspace)?,
        Task::GpuTest(asked) => return gpu_test::run(&workspace, &asked),
        Task::RunBundle(_) => {}
    }
    Ok(0)
}

/// A program that runs on the CPU or on a GPU.
#[derive(Args)]
struct Example {
    /// Build for GPUs, and run on GPU 0 unless told otherwise
    #[arg(long)]
    cuda: bool,
    #[command(flatten)]
    oldest: OldestGpu,
    #[command(flatten)]
    passed: Passed,
}

impl Example {
    fn run(&self, workspace: &Workspace, program: Program) -> Result<u8> {
        let mut command = if self.cuda {
            gpu_test::with_cuda(workspace, self.oldest.compute_cap, program)?
        } else {
            setup::ensure(workspace, false, false)?;
            let (package, kind, name) = (program.package, program.kind, program.name);
            workspace.program(&format!("--package {package} --{kind} {name}"))?
        };
        code(command.args(&self.passed.arguments))
    }
}
