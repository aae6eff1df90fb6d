//! `bench serving`: the simulation of serving several models on one GPU, which needs none.

use super::PACKAGE;
use crate::workspace::Workspace;
use anyhow::{Context, Result};
use std::ffi::OsString;
use std::process::Command;

/// The program.
const PROGRAM: &str = "bench-serving";
/// The folder of the plots within the target folder, where no other is named.
const PLOTS: &str = "serving";

/// Builds and runs it, and answers its exit code.
pub fn run(workspace: &Workspace, arguments: &[OsString]) -> Result<u8> {
    let status = command(workspace, arguments)?
        .status()
        .context("the program could not be started")?;
    // What went wrong has been said.
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.unwrap_or(1))
}

fn command(workspace: &Workspace, arguments: &[OsString]) -> Result<Command> {
    let mut command = workspace.cargo(&["run", "--release", "--package", PACKAGE]);
    // The paths among its arguments are from where the caller is.
    command.current_dir(std::env::current_dir().context("the current folder is gone")?);
    command
        .arg("--manifest-path")
        .arg(workspace.root.join("Cargo.toml"));
    command.args(["--bin", PROGRAM, "--"]);
    if !names_plots(arguments) {
        command.arg("--plots").arg(workspace.target.join(PLOTS));
    }
    command.args(arguments);
    Ok(command)
}

fn names_plots(arguments: &[OsString]) -> bool {
    let mut texts = arguments.iter().map(|argument| argument.to_string_lossy());
    texts.any(|text| text == "--plots" || text.starts_with("--plots="))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::path::PathBuf;

    fn arguments_of(given: &[&str]) -> Vec<String> {
        let workspace = Workspace {
            root: PathBuf::from("/checkout"),
            target: PathBuf::from("/built"),
        };
        let given: Vec<OsString> = given.iter().map(OsString::from).collect();
        let command = command(&workspace, &given).unwrap();
        let arguments = command.get_args().map(OsStr::to_string_lossy);
        let own = arguments.skip_while(|argument| argument != "--").skip(1);
        own.map(Into::into).collect()
    }

    #[test]
    fn plots_go_to_the_target_folder_unless_told_otherwise() {
        let plots = ["--plots", "/built/serving", "--quick"];
        assert_eq!(arguments_of(&["--quick"]), plots);
        for told in [&["--plots", "x"][..], &["--plots=x"]] {
            assert_eq!(arguments_of(told), told);
        }
    }
}
