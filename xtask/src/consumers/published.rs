//! What others have published and consumers are built with, as cargo brings it from the registry. Nothing of it is kept
//! in the repository.

use crate::files;
use crate::workspace::Workspace;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// The oldest Candle that the facade takes.
pub const CANDLE: &str = "0.11.0";
/// The version before this workspace's first.
const BEFORE: &str = "0.1.1";

/// Unpacked packages in cargo's own store.
pub struct Published {
    candle_core: PathBuf,
    candle_nn: PathBuf,
    before: PathBuf,
}

impl Published {
    /// Has cargo bring them, by a manifest that names them.
    pub fn find(workspace: &Workspace, base: &Path) -> Result<Self> {
        let folder = base.join("published");
        files::make(&folder.join("src"))?;
        let manifest = format!(
            "[package]\nname = \"published\"\nedition = \"2024\"\n\n[workspace]\n\n[dependencies]\n\
             candle-core = \"={CANDLE}\"\ncandle-nn = \"={CANDLE}\"\ncandle-cuda-vmm = \"={BEFORE}\"\n"
        );
        fs::write(folder.join("Cargo.toml"), manifest).context("writing a manifest")?;
        fs::write(folder.join("src/lib.rs"), "").context("writing a library")?;
        let mut at = workspace.clone();
        at.root = folder;
        let metadata = at.metadata(&[])?;
        Ok(Self {
            candle_core: package(&metadata, "candle-core", CANDLE)?,
            candle_nn: package(&metadata, "candle-nn", CANDLE)?,
            before: package(&metadata, "candle-cuda-vmm", BEFORE)?,
        })
    }

    /// Copies Candle, with two changes: a constant by which a program can tell the copy from the registry's, and
    /// `Device::new_cuda`, which gives the CPU device, so that programs which want a GPU run without one.
    pub fn copy_candle_to(&self, packages: &Path) -> Result<()> {
        for (name, from) in [
            ("candle-core", &self.candle_core),
            ("candle-nn", &self.candle_nn),
        ] {
            let folder = packages.join(format!("{name}-{CANDLE}"));
            files::remove_tree(&folder)?;
            files::copy_tree(from, &folder)?;
        }
        let source = packages.join(format!("candle-core-{CANDLE}")).join("src");
        replace(
            &source.join("device.rs"),
            "Ok(Self::Cuda(crate::CudaDevice::new(ordinal)?))",
            "let _ = ordinal;\n        Ok(Self::Cpu)",
        )?;
        let library = source.join("lib.rs");
        let mut text = read(&library)?;
        text += "\n/// Says that this copy is not the registry's.\npub const FROM_A_PATH: &str = env!(\"CARGO_PKG_VERSION\");\n";
        fs::write(&library, text).with_context(|| format!("writing {}", library.display()))
    }

    /// Copies the examples of the version before, as they are.
    pub fn copy_examples_to(&self, folder: &Path) -> Result<()> {
        files::copy_tree(&self.before.join("examples"), folder)
    }
}

/// The folder of a package that cargo names.
fn package(metadata: &Value, name: &str, version: &str) -> Result<PathBuf> {
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let manifest = packages
        .into_iter()
        .find(|package| package["name"] == name && package["version"] == version)
        .and_then(|package| package["manifest_path"].as_str())
        .with_context(|| format!("cargo brought no {name} {version}"))?;
    let folder = Path::new(manifest).parent();
    Ok(folder
        .with_context(|| format!("{manifest} lies in no folder"))?
        .to_owned())
}

fn replace(file: &Path, from: &str, to: &str) -> Result<()> {
    let text = read(file)?;
    let count = text.matches(from).count();
    ensure!(
        count == 1,
        "{from:?} is {count} times in {}",
        file.display()
    );
    fs::write(file, text.replace(from, to)).with_context(|| format!("writing {}", file.display()))
}

fn read(file: &Path) -> Result<String> {
    fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))
}
