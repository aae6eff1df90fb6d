//! A machine with nothing installed but Rust and a linker, as far as a build can see.

use crate::workspace::Workspace;
use anyhow::Result;
use std::path::{Path, PathBuf};
use xshell::{Cmd, cmd};

/// Variables by which a build could find CUDA or a C compiler.
const VARIABLES: &str = "CUDA_HOME CUDA_PATH CUDA_ROOT CUDA_TOOLKIT_ROOT_DIR CUDA_TOOLKIT_PATH \
    VIRTUAL_ENV CONDA_PREFIX LLVM_CONFIG_PATH CPATH DOCS_RS";

pub struct Bare {
    /// The only folder of `PATH`: a linker is in it, under names that are not those of C compilers.
    path: PathBuf,
    rustc: PathBuf,
    linker_variable: String,
}

impl Bare {
    pub fn make(workspace: &Workspace, base: &Path) -> Result<Self> {
        let shell = &workspace.shell;
        let sysroot = cmd!(shell, "rustc --print sysroot").quiet().read()?;
        let host = cmd!(shell, "rustc --print host-tuple").quiet().read()?;
        let triple = host.to_uppercase().replace(['-', '.'], "_");

        // Rust links by way of a C compiler, which here has another name and no other program to find.
        let path = base.join("bare-path");
        shell.remove_path(&path)?;
        shell.create_dir(&path)?;
        for (program, name) in [("cc", "linker"), ("ld", "ld")] {
            let file = which::which(program)?;
            fs_err::os::unix::fs::symlink(file, path.join(name))?;
        }
        Ok(Self {
            path,
            rustc: Path::new(&sysroot).join("bin/rustc"),
            linker_variable: format!("CARGO_TARGET_{triple}_LINKER"),
        })
    }

    /// Lets `command` see no more than that.
    pub fn apply<'a>(&self, command: Cmd<'a>) -> Cmd<'a> {
        let command = VARIABLES.split(' ').fold(command, Cmd::env_remove);
        let nowhere = ["CC", "CXX", "LIBCLANG_PATH"].map(|name| (name, "/nothing/is/here"));
        let command = command.envs(nowhere).env("RUSTC", &self.rustc);
        let command = command.env(&self.linker_variable, self.path.join("linker"));
        command.env("PATH", &self.path)
    }
}
