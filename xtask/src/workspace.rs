//! Where the checkout and its target folder are, and how cargo is called in it.

use anyhow::{Context, Result};
use cargo_metadata::{MetadataCommand, Package};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use xshell::{Cmd, Shell};

pub struct Workspace {
    /// Runs commands in the checkout.
    pub shell: Shell,
    pub root: PathBuf,
    /// The target folder, as cargo itself names it.
    pub target: PathBuf,
    pub packages: Vec<Package>,
}

impl Workspace {
    pub fn find() -> Result<Self> {
        let own = std::env::var_os("CARGO_MANIFEST_DIR");
        let own = own.map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
        let mut metadata = MetadataCommand::new();
        metadata.manifest_path(own.join("Cargo.toml")).no_deps();
        let metadata = metadata.exec()?;
        let workspace = Self {
            shell: Shell::new()?,
            root: metadata.workspace_root.into(),
            target: metadata.target_directory.into(),
            packages: metadata.packages,
        };
        workspace.shell.change_dir(&workspace.root);
        Ok(workspace)
    }

    pub fn package(&self, name: &str) -> Result<&Package> {
        let package = self.packages.iter().find(|it| it.name == name);
        package.with_context(|| format!("there is no package {name}"))
    }

    /// The crates that may be published.
    pub fn libraries(&self) -> impl Iterator<Item = &Package> {
        // `publish = false` is an empty list of registries.
        let is_public = |it: &&Package| it.publish.as_ref().is_none_or(|it| !it.is_empty());
        self.packages.iter().filter(is_public)
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

    /// A command by which cargo builds a program in release and runs it in the caller's folder: the
    /// paths among the arguments that follow are relative to that.
    pub fn program(&self, line: &str) -> Result<Command> {
        let run = self.cargo("run --release --manifest-path");
        let run = run.arg(self.root.join("Cargo.toml"));
        let mut command = Command::from(run.args(line.split_whitespace()).arg("--"));
        command.current_dir(std::env::current_dir().context("the current folder is gone")?);
        Ok(command)
    }

    /// What packages need to be built and to run, as `cargo tree` prints it, each once.
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

/// Runs a program with this one's own input and output, and returns its exit code.
pub fn code(command: &mut Command) -> Result<u8> {
    let status = command.status();
    let program = command.get_program().display();
    let status = status.with_context(|| format!("{program} could not be started"))?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.unwrap_or(1))
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
