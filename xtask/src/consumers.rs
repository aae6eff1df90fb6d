//! Small programs outside the workspace that depend on the packages, as users' programs do.

mod dependencies;
mod machine;
mod published;

use crate::workspace::{self, Workspace};
use crate::{files, package, setup};
use anyhow::{Context, Result, ensure};
use published::Published;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;

/// A program by its folder in `xtask/consumers`.
struct Consumer {
    name: &'static str,
    /// What it is built with.
    machine: Machine,
    /// Its programs, and what each must print.
    programs: &'static [(Program, &'static [&'static str])],
}

/// What the machine has that builds a consumer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Machine {
    /// What this one has.
    Own,
    /// Rust and a linker: no header, no libclang, no C compiler.
    Bare,
}

/// A program of a consumer.
#[derive(Clone, Copy)]
enum Program {
    /// Its `main`.
    Main,
    /// An example of candle-cuda-vmm 0.1.1, as it was published.
    Example(&'static str),
}

const POOL: &[&str] = &["address: 0x", "allocated: 1073741824\n", "deallocated: 0\n"];

const CONSUMERS: [Consumer; 7] = [
    Consumer {
        name: "sys",
        machine: Machine::Own,
        programs: &[(Program::Main, &["driver: "])],
    },
    Consumer {
        name: "sys-bare",
        machine: Machine::Bare,
        programs: &[(Program::Main, &["driver: "])],
    },
    Consumer {
        name: "core",
        machine: Machine::Bare,
        programs: &[(Program::Main, &["driver: "])],
    },
    Consumer {
        name: "core-simulator",
        machine: Machine::Bare,
        programs: &[(Program::Main, &["allocated: 4194304\n", "deallocated: 0\n"])],
    },
    Consumer {
        name: "facade",
        machine: Machine::Bare,
        programs: &[(Program::Main, POOL)],
    },
    Consumer {
        name: "engine",
        // Candle 0.11.0 compiles C.
        machine: Machine::Own,
        programs: &[(
            Program::Main,
            &[
                "candle: 0.11.0 of a path\n",
                "address: 0x",
                "allocated: 1073741824\n",
                "deallocated: 0\n",
                "cache: [1, 8, 1, 128] [1, 8, 1, 128]\n",
            ],
        )],
    },
    Consumer {
        name: "upgrade",
        machine: Machine::Own,
        programs: &[
            (
                Program::Example("simple_usage"),
                &[
                    "Total physical memory usage: 1536 MB\n",
                    "Final physical memory usage: 0 bytes\n",
                    "Example completed successfully!\n",
                ],
            ),
            (
                Program::Example("kv_cache_simulation"),
                &["Simulation completed successfully!\n"],
            ),
        ],
    },
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
    let libraries = package::libraries(workspace)?;
    let version = &libraries
        .first()
        .context("the workspace has no library crate")?
        .version;
    let published = Published::find(workspace, &base)?;
    published.copy_candle_to(&packages)?;
    let bare = machine::Bare::make(&base)?;

    for consumer in &CONSUMERS {
        let template = workspace.root.join("xtask/consumers").join(consumer.name);
        let folder = base.join(consumer.name);
        files::remove_tree(&folder)?;
        files::copy_tree(&template, &folder)?;
        fs::rename(folder.join("Cargo.toml.in"), folder.join("Cargo.toml"))
            .with_context(|| format!("{} has no Cargo.toml.in", template.display()))?;
        fill_in(
            &folder.join("Cargo.toml"),
            &[
                ("@VERSION@", version),
                ("@PACKAGES@", &packages.display().to_string()),
            ],
        )?;
        // The versions of everything else are those that the workspace is tested with.
        fs::copy(workspace.root.join("Cargo.lock"), folder.join("Cargo.lock"))
            .context("copying Cargo.lock")?;
        let examples = consumer.programs.iter();
        if examples
            .clone()
            .any(|(program, _)| matches!(program, Program::Example(_)))
        {
            published.copy_examples_to(&folder.join("examples"))?;
        }

        for (program, prints) in consumer.programs {
            let mut command = workspace.cargo(&["run", "--quiet", "--target-dir"]);
            command.arg(base.join("target")).current_dir(&folder);
            // Nobody looks at these programs with a debugger.
            command.env("CARGO_PROFILE_DEV_DEBUG", "0");
            if let Program::Example(name) = program {
                command.args(["--example", name]);
            }
            if consumer.machine == Machine::Bare {
                bare.apply(&mut command);
            }
            expect(consumer.name, &mut command, prints)?;
        }
    }
    Ok(())
}

/// Runs a program, which must succeed and print all of these.
fn expect(name: &str, command: &mut Command, prints: &[&str]) -> Result<()> {
    eprintln!("xtask: {name}: {}", workspace::line(command));
    let output = command
        .stderr(std::process::Stdio::inherit())
        .output()
        .context("cargo could not be started")?;
    std::io::stdout()
        .write_all(&output.stdout)
        .context("writing what the program printed")?;
    ensure!(
        output.status.success(),
        "the consumer {name}: {}",
        output.status
    );
    let text = String::from_utf8_lossy(&output.stdout);
    for part in prints {
        ensure!(
            text.contains(part),
            "the consumer {name} did not print {part:?}"
        );
    }
    Ok(())
}

fn fill_in(file: &Path, values: &[(&str, &str)]) -> Result<()> {
    let mut text =
        fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    for (name, value) in values {
        text = text.replace(name, value);
    }
    fs::write(file, text).with_context(|| format!("writing {}", file.display()))
}
