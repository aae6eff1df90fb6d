//! Small programs outside the workspace that depend on the packages, as users' programs do.

use crate::workspace::{self, Workspace};
use crate::{files, package, setup};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

/// A program by its folder in `xtask/consumers`, and what it must print.
struct Consumer {
    name: &'static str,
    prints: &'static [&'static str],
}

const CONSUMERS: [Consumer; 5] = [
    Consumer {
        name: "sys",
        prints: &["driver: "],
    },
    Consumer {
        name: "core",
        prints: &["driver: "],
    },
    Consumer {
        name: "core-simulator",
        prints: &["allocated: 4194304\n", "deallocated: 0\n"],
    },
    Consumer {
        name: "facade",
        prints: &["address: 0x", "allocated: 1073741824\n", "deallocated: 0\n"],
    },
    Consumer {
        name: "facade-patched",
        prints: &[
            "candle: a path\n",
            "address: 0x",
            "allocated: 1073741824\n",
            "deallocated: 0\n",
        ],
    },
];

/// Builds and runs each against the packages that [`package::run`] unpacked.
pub fn run(workspace: &Workspace) -> Result<()> {
    setup::ensure(workspace, false, false)?;
    let base = workspace.target.join("consumers");
    let packages = package::folder(workspace);
    let libraries = package::libraries(workspace)?;
    let version = &libraries
        .first()
        .context("the workspace has no library crate")?
        .version;
    let candle = Candle::find(workspace)?;
    candle.copy_to(&packages.join("candle-core"))?;

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
                ("@CANDLE_VERSION@", &candle.version),
                ("@PACKAGES@", &packages.display().to_string()),
            ],
        )?;
        // The versions of everything else are those that the workspace is tested with.
        fs::copy(workspace.root.join("Cargo.lock"), folder.join("Cargo.lock"))
            .context("copying Cargo.lock")?;

        let mut command = workspace.cargo(&["run", "--quiet", "--target-dir"]);
        command.arg(base.join("target")).current_dir(&folder);
        eprintln!("xtask: {}: {}", consumer.name, workspace::line(&command));
        let output = command
            .stderr(std::process::Stdio::inherit())
            .output()
            .context("cargo could not be started")?;
        std::io::stdout()
            .write_all(&output.stdout)
            .context("writing what the program printed")?;
        ensure!(
            output.status.success(),
            "the consumer {}: {}",
            consumer.name,
            output.status
        );
        let text = String::from_utf8_lossy(&output.stdout);
        for part in consumer.prints {
            ensure!(
                text.contains(part),
                "the consumer {} did not print {part:?}",
                consumer.name
            );
        }
    }
    Ok(())
}

/// The source of Candle that the workspace uses, in cargo's own store.
struct Candle {
    version: String,
    folder: PathBuf,
}

impl Candle {
    fn find(workspace: &Workspace) -> Result<Self> {
        let metadata = workspace.metadata(&[])?;
        let package = metadata["packages"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|package| package["name"] == "candle-core")
            .context("the workspace does not depend on candle-core")?;
        let text = |key: &str| {
            package[key]
                .as_str()
                .with_context(|| format!("cargo metadata names candle-core without {key}"))
        };
        let manifest = Path::new(text("manifest_path")?);
        Ok(Self {
            version: text("version")?.to_owned(),
            folder: manifest
                .parent()
                .context("the manifest of candle-core lies in no folder")?
                .to_owned(),
        })
    }

    /// Copies it, and marks the copy so that a program can tell it from the registry's.
    fn copy_to(&self, folder: &Path) -> Result<()> {
        files::remove_tree(folder)?;
        files::copy_tree(&self.folder, folder)?;
        let library = folder.join("src/lib.rs");
        let mut text = fs::read_to_string(&library)
            .with_context(|| format!("reading {}", library.display()))?;
        text += "\n/// Says that this copy is not the registry's.\npub const FROM_A_PATH: &str = \"a path\";\n";
        fs::write(&library, text).with_context(|| format!("writing {}", library.display()))
    }
}

fn fill_in(file: &Path, values: &[(&str, &str)]) -> Result<()> {
    let mut text =
        fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    for (name, value) in values {
        text = text.replace(name, value);
    }
    fs::write(file, text).with_context(|| format!("writing {}", file.display()))
}
