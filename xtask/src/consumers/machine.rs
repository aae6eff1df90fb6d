//! A machine with nothing installed but Rust and a linker, as far as a build can see.

use crate::files;
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Variables by which a build could find CUDA or a C compiler.
const VARIABLES: [&str; 10] = [
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_ROOT",
    "CUDA_TOOLKIT_ROOT_DIR",
    "CUDA_TOOLKIT_PATH",
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
    "LLVM_CONFIG_PATH",
    "CPATH",
    "DOCS_RS",
];

/// The environment of a bare machine.
pub struct Bare {
    /// The only folder of `PATH`: a linker is in it, under names that are not those of C compilers.
    path: PathBuf,
    rustc: PathBuf,
    linker_variable: String,
    linker: PathBuf,
}

impl Bare {
    /// Makes its folder below `base`.
    pub fn make(base: &Path) -> Result<Self> {
        let sysroot = said(Command::new("rustc").args(["--print", "sysroot"]))?;
        let version = said(Command::new("rustc").arg("-vV"))?;
        let host = version
            .lines()
            .find_map(|line| line.strip_prefix("host: "))
            .context("rustc -vV names no host")?;
        let triple = host.to_uppercase().replace(['-', '.'], "_");

        // Rust links by way of a C compiler, which here has another name and no other program to find.
        let path = base.join("bare-path");
        files::remove_tree(&path)?;
        files::make(&path)?;
        for (program, name) in [("cc", "linker"), ("ld", "ld")] {
            let program = find(program)?;
            #[cfg(unix)]
            std::os::unix::fs::symlink(&program, path.join(name))
                .with_context(|| format!("linking to {}", program.display()))?;
            #[cfg(not(unix))]
            let _ = name;
        }
        Ok(Self {
            linker: path.join("linker"),
            path,
            rustc: Path::new(&sysroot).join("bin/rustc"),
            linker_variable: format!("CARGO_TARGET_{triple}_LINKER"),
        })
    }

    /// Lets `command` see no more than that.
    pub fn apply(&self, command: &mut Command) {
        for variable in VARIABLES {
            command.env_remove(variable);
        }
        for variable in ["CC", "CXX", "LIBCLANG_PATH"] {
            command.env(variable, "/nothing/is/here");
        }
        command
            .env("PATH", &self.path)
            .env("RUSTC", &self.rustc)
            .env(&self.linker_variable, &self.linker);
    }
}

/// The file of a program, by the variable `PATH`.
fn find(program: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
        .with_context(|| format!("there is no {program} on PATH"))
}

/// What `command` prints, without the end of the line.
fn said(command: &mut Command) -> Result<String> {
    let output = command.output().context("rustc could not be started")?;
    ensure!(output.status.success(), "rustc: {}", output.status);
    let text = String::from_utf8(output.stdout).context("rustc printed no text")?;
    Ok(text.trim().to_owned())
}
