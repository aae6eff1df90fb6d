//! Small programs outside the workspace that depend on the packages, as users' programs do.

mod dependencies;
mod machine;
mod published;

use crate::workspace::Workspace;
use crate::{files, package, setup};
use anyhow::{Context, Result, ensure};
use fs_err as fs;
use published::Published;
use std::path::Path;

/// What the machine has that builds a consumer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Machine {
    Own,
    /// Rust and a linker: no header, no libclang, no C compiler.
    Bare,
}

use Machine::{Bare, Own};

/// What must be printed of a small pool, and of the one of the quick start.
const SIMULATED: &[&str] = &["allocated: 4194304\n", "deallocated: 0\n"];
const POOL: &[&str] = &["address: 0x", "allocated: 1073741824\n", "deallocated: 0\n"];
/// The same, with a cache.
const ENGINE: &[&str] = &[
    "candle: 0.11.0 of a path\n",
    "address: 0x",
    "allocated: 1073741824\n",
    "deallocated: 0\n",
    "cache: [1, 8, 1, 128] [1, 8, 1, 128]\n",
];
/// What examples of candle-cuda-vmm 0.1.1 must print, as they were published.
const SIMPLE_USAGE: &[&str] = &[
    "Total physical memory usage: 1536 MB\n",
    "Final physical memory usage: 0 bytes\n",
    "Example completed successfully!\n",
];
const SIMULATION: &[&str] = &["Simulation completed successfully!\n"];

/// Consumers by their folders in `xtask/consumers`; what they are built with; the example that is run in place of `main`; and
/// what must be printed. Candle 0.11.0 compiles C, so what is built with it needs more than a bare machine.
const CONSUMERS: [(&str, Machine, Option<&str>, &[&str]); 8] = [
    ("sys", Own, None, &["driver: "]),
    ("sys-bare", Bare, None, &["driver: "]),
    ("core", Bare, None, &["driver: "]),
    ("core-simulator", Bare, None, SIMULATED),
    ("facade", Bare, None, POOL),
    ("engine", Own, None, ENGINE),
    ("upgrade", Own, Some("simple_usage"), SIMPLE_USAGE),
    ("upgrade", Own, Some("kv_cache_simulation"), SIMULATION),
];

/// Counts what users of the crates depend on; builds and runs each consumer against the packages that [`package::run`]
/// unpacked.
///
/// Only one is built with bindgen: its dependencies change the features of others, which would then be built twice.
pub fn run(workspace: &Workspace) -> Result<()> {
    dependencies::check(workspace)?;
    setup::ensure(workspace, false, false)?;
    let base = workspace.target.join("consumers");
    let packages = package::folder(workspace);
    let published = Published::find(workspace, &base)?;
    published.copy_candle_to(&packages)?;
    let bare = machine::Bare::make(workspace, &base)?;
    for (name, machine, example, prints) in CONSUMERS {
        let folder = base.join(name);
        prepare(workspace, name, &folder, &packages)?;
        let (target, manifest) = (base.join("target"), folder.join("Cargo.toml"));
        let mut command = workspace.cargo("run --quiet --target-dir").arg(target);
        command = command.arg("--manifest-path").arg(manifest);
        // Nobody looks at these programs with a debugger.
        command = command.env("CARGO_PROFILE_DEV_DEBUG", "0");
        if let Some(example) = example {
            published.copy_examples_to(&folder.join("examples"))?;
            command = command.args(["--example", example]);
        }
        if machine == Bare {
            command = bare.apply(command);
        }
        eprintln!("xtask: {name}: {command}");
        let text = command.quiet().read()?;
        println!("{text}");
        for part in prints {
            let has = format!("{text}\n").contains(part);
            ensure!(has, "the consumer {name} did not print {part:?}");
        }
    }
    Ok(())
}

fn prepare(workspace: &Workspace, name: &str, folder: &Path, packages: &Path) -> Result<()> {
    let library = workspace
        .libraries()
        .next()
        .context("there is no library crate")?;
    workspace.shell.remove_path(folder)?;
    files::copy_tree(&workspace.root.join("xtask/consumers").join(name), folder)?;
    let manifest = fs::read_to_string(folder.join("Cargo.toml.in"))?;
    let manifest = manifest.replace("@VERSION@", &library.version.to_string());
    let manifest = manifest.replace("@PACKAGES@", &packages.display().to_string());
    fs::write(folder.join("Cargo.toml"), manifest)?;
    // The versions of everything else are those that the workspace is tested with.
    fs::copy(workspace.root.join("Cargo.lock"), folder.join("Cargo.lock"))?;
    Ok(())
}
