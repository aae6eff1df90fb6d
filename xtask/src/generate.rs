//! `generate`: the decoder that is an example of the facade.

use crate::workspace::Workspace;
use crate::{gpu_test, setup};
use anyhow::{Context, Result};
use clap::Args;
use std::ffi::OsString;

/// How it is built, and what goes to it.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Build for GPUs, and run on GPU 0 unless told otherwise
    #[arg(long)]
    cuda: bool,
    /// With --cuda: the oldest GPU for which Candle's kernels are compiled, as NVIDIA numbers them without the dot
    #[arg(long, default_value_t = 90, value_parser = clap::value_parser!(u32).range(53..1000))]
    compute_cap: u32,
    /// Arguments of the example (`--help` lists them)
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Builds and runs it, and answers its exit code.
pub fn run(workspace: &Workspace, arguments: &Arguments) -> Result<u8> {
    let mut command = match arguments.cuda {
        true => gpu_test::generate(workspace, arguments.compute_cap)?,
        false => {
            setup::ensure(workspace, false, false)?;
            let mut cargo = workspace.cargo(&["run", "--release", "--package", "candle-cuda-vmm"]);
            cargo
                .arg("--manifest-path")
                .arg(workspace.root.join("Cargo.toml"));
            cargo.args(["--example", "generate", "--"]);
            cargo
        }
    };
    // The paths among its arguments are from where the caller is.
    command.current_dir(std::env::current_dir().context("the current folder is gone")?);
    let status = command
        .args(&arguments.arguments)
        .status()
        .context("the example could not be started")?;
    // What went wrong has been said.
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.unwrap_or(1))
}
