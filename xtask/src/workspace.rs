//! Where the checkout and its target folder are, and how cargo is called in it.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The checkout and its target folder.
#[derive(Clone, Debug)]
pub struct Workspace {
    /// The folder of the workspace's `Cargo.toml`.
    pub root: PathBuf,
    /// The target folder, as cargo itself names it.
    pub target: PathBuf,
}

impl Workspace {
    /// Asks cargo.
    pub fn find() -> Result<Self> {
        let own = std::env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = own
            .parent()
            .context("the xtask folder has no parent folder")?
            .to_owned();
        let mut workspace = Self {
            target: root.join("target"),
            root,
        };
        let metadata = workspace.metadata(&["--no-deps"])?;
        workspace.target = metadata["target_directory"]
            .as_str()
            .map(PathBuf::from)
            .context("cargo metadata names no target_directory")?;
        Ok(workspace)
    }

    /// The project's own set-up folder, where the build script of `cuda-vmm-sys` looks.
    pub fn setup_folder(&self) -> PathBuf {
        self.target.join("cuda-vmm-setup")
    }

    /// A cargo command that runs in the checkout.
    pub fn cargo<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Command {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        command.current_dir(&self.root).args(arguments);
        // What cargo told this program about its own package is no business of the builds below.
        for (name, _) in std::env::vars_os() {
            let name_text = name.to_string_lossy();
            if name_text.starts_with("CARGO_PKG_") || name_text.starts_with("CARGO_MANIFEST_") {
                command.env_remove(&name);
            }
        }
        command
    }

    /// What `cargo metadata` says.
    pub fn metadata(&self, arguments: &[&str]) -> Result<Value> {
        let mut command = self.cargo(&["metadata", "--format-version", "1"]);
        let output = command
            .args(arguments)
            .output()
            .context("cargo metadata could not be started")?;
        if !output.status.success() {
            bail!(
                "cargo metadata failed:\n{}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        serde_json::from_slice(&output.stdout).context("cargo metadata's answer is not JSON")
    }

    /// `path` relative to the checkout where it lies below it.
    pub fn short(&self, path: &Path) -> String {
        path.strip_prefix(&self.root)
            .unwrap_or(path)
            .display()
            .to_string()
    }
}

/// Runs `command` with this program's own output, and makes anything but success an error.
pub fn run(command: &mut Command) -> Result<()> {
    let line = line(command);
    eprintln!("xtask: {line}");
    let status = command
        .status()
        .with_context(|| format!("could not start {line}"))?;
    if !status.success() {
        bail!("{line}: {status}");
    }
    Ok(())
}

/// A command as one would type it.
pub fn line(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let mut line = program
        .file_name()
        .unwrap_or(program.as_os_str())
        .to_string_lossy()
        .into_owned();
    for argument in command.get_args() {
        line.push(' ');
        line += &argument.to_string_lossy();
    }
    line
}
