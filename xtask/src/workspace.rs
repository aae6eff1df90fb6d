//! Where the checkout and its target folder are, and how cargo is called in it.

use anyhow::{Context, Result};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use xshell::{Cmd, Shell};

/// The checkout and its target folder.
pub struct Workspace {
    /// Runs commands in the checkout.
    pub shell: Shell,
    pub root: PathBuf,
    /// The target folder, as cargo itself names it.
    pub target: PathBuf,
}

impl Workspace {
    pub fn find() -> Result<Self> {
        let own = std::env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = own.parent().context("xtask lies in no folder")?.to_owned();
        let mut workspace = Self {
            shell: Shell::new()?,
            target: root.join("target"),
            root,
        };
        workspace.shell.change_dir(&workspace.root);
        let metadata = workspace.metadata(&["--no-deps"])?;
        workspace.target = text(&metadata, "target_directory").into();
        Ok(workspace)
    }

    /// The project's own set-up folder, where the build script of `cuda-vmm-sys` looks.
    pub fn setup_folder(&self) -> PathBuf {
        self.target.join("cuda-vmm-setup")
    }

    /// A cargo command that runs in the checkout, with the arguments of `line`.
    pub fn cargo(&self, line: &str) -> Cmd<'_> {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        // What cargo told this program about its own package is no business of other builds.
        let own = std::env::vars_os().map(|(name, _)| name).filter(|name| {
            let name = name.to_string_lossy();
            name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")
        });
        let cargo = own.fold(self.shell.cmd(cargo), Cmd::env_remove);
        cargo.args(line.split_whitespace())
    }

    /// A command by which cargo builds a program in release and runs it in the caller's folder: the paths among the arguments
    /// that follow are relative to that.
    pub fn program(&self, line: &str) -> Result<Command> {
        let run = self.cargo("run --release --manifest-path");
        let run = run.arg(self.root.join("Cargo.toml"));
        let mut command = Command::from(run.args(line.split_whitespace()).arg("--"));
        command.current_dir(std::env::current_dir().context("the current folder is gone")?);
        Ok(command)
    }

    pub fn metadata(&self, arguments: &[&str]) -> Result<Value> {
        let command = self.cargo("metadata --format-version 1").quiet();
        let text = command.args(arguments).read()?;
        serde_json::from_str(&text).context("cargo metadata prints no JSON")
    }

    /// What packages need when they are built and when they run, as `cargo tree` prints it, each package once.
    pub fn tree(&self, arguments: &str) -> Result<BTreeSet<String>> {
        let tree = format!("tree --edges normal,build --prefix none {arguments}");
        Ok(packages(&self.cargo(&tree).quiet().read()?))
    }

    /// `path` relative to the checkout if it lies below it.
    pub fn short(&self, path: &Path) -> String {
        let short = path.strip_prefix(&self.root).unwrap_or(path);
        short.display().to_string()
    }
}

/// The packages of a tree without indentation, each once.
fn packages(tree: &str) -> BTreeSet<String> {
    let lines = tree.lines().filter(|line| !line.is_empty());
    let plain = |line: &str| line.replace(" (*)", "").replace(" (proc-macro)", "");
    lines.map(plain).collect()
}

/// Runs a program with this one's own input and output, and returns its exit code; it has said itself what went wrong.
pub fn code(command: &mut Command) -> Result<u8> {
    let program = command.get_program().display().to_string();
    let status = command.status();
    let status = status.with_context(|| format!("{program} could not be started"))?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.unwrap_or(1))
}

/// The elements of a JSON array; none if it is no array.
pub fn array(value: &Value) -> impl Iterator<Item = &Value> + Clone {
    value.as_array().into_iter().flatten()
}

/// The text of a member; empty if it has none.
pub fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_counts_once_for_each_version() {
        let tree = "cuda-vmm v0.2.0 (/b)\nlibc v0.2.1\nthiserror v2.0.1 (proc-macro)\n\nlibc v0.2.1 (*)\nlibc v0.1.9\n";
        assert_eq!(packages(tree).len(), 4);
    }
}
