//! The PTX of kernels of tests and measuring programs, which are built without a CUDA compiler.

use crate::setup;
use crate::workspace::Workspace;
use anyhow::{Context, Result, ensure};
use std::fs;
use xshell::cmd;

/// The sources. The PTX of each is beside it.
const SOURCES: [&str; 3] = [
    "benches/src/bin/bench-candle/work/read.cu",
    "benches/src/bin/bench/traffic.cu",
    "crates/cuda-vmm/tests/common/gather.cu",
];

/// For the oldest GPU that the pinned compiler knows.
const COMPILE: [&str; 3] = ["--ptx", "--gpu-architecture=compute_75", "--output-file"];
const ASSEMBLE: [&str; 2] = ["--gpu-name=sm_75", "--output-file"];

/// A version of PTX that every supported driver reads: the compiler's own needs a driver as new.
/// The assembler refuses instructions that are newer than the version.
const VERSION: &str = ".version 7.0";

/// Compiles the sources with the pinned toolkit. It is an error if PTX differs; that is updated.
pub fn check(workspace: &Workspace) -> Result<()> {
    setup::ensure(workspace, true, false)?;
    let (shell, toolkit) = (&workspace.shell, setup::toolkit_folder(workspace));
    let [nvcc, ptxas] = ["bin/nvcc", "bin/ptxas"].map(|name| toolkit.join(name));
    let output = tempfile::NamedTempFile::new_in(&workspace.target).context("making a file")?;
    let mut updated = Vec::new();
    for source in SOURCES.map(|source| workspace.root.join(source)) {
        let made = output.path();
        cmd!(shell, "{nvcc} {COMPILE...} {made} {source}").run()?;
        let made = fs::read_to_string(made).context("reading the compiler's PTX")?;
        let (file, text) = (source.with_extension("ptx"), committed(&made));
        if fs::read_to_string(&file).unwrap_or_default() != text {
            fs::write(&file, text).with_context(|| format!("writing {}", file.display()))?;
            updated.push(workspace.short(&file));
        }
        let object = output.path();
        cmd!(shell, "{ptxas} {ASSEMBLE...} {object} {file}").run()?;
    }
    let updated = updated.join(", ");
    ensure!(updated.is_empty(), "out of date, generated anew: {updated}");
    Ok(())
}

/// The compiler's PTX without comments and empty lines, with [`VERSION`].
fn committed(text: &str) -> String {
    let lines = text.lines().map(str::trim_end);
    let kept = lines.filter(|line| !line.is_empty() && !line.trim_start().starts_with("//"));
    kept.flat_map(|line| match line.starts_with(".version") {
        true => [VERSION, "\n"],
        false => [line, "\n"],
    })
    .collect()
}
