//! What others have published and consumers are built with, as cargo brings it from the registry. Nothing of it is kept
//! in the repository.

use crate::files;
use crate::workspace::Workspace;
use anyhow::{Context, Result, ensure};
use cargo_metadata::{MetadataCommand, Package};
use fs_err as fs;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The oldest Candle that the facade takes.
const CANDLE: &str = "0.11.0";
/// The version before this workspace's first.
const BEFORE: &str = "0.1.1";
/// For each source of `candle-core`, what is there once, and what takes its place.
type Changes = BTreeMap<String, BTreeMap<String, String>>;

/// What cargo says of the packages in its own store.
pub struct Published(Vec<Package>);

impl Published {
    /// Has cargo bring them, by a manifest that names them.
    pub fn find(workspace: &Workspace, base: &Path) -> Result<Self> {
        let manifest = format!(
            "[package]\nname = \"published\"\nedition = \"2024\"\n\n[workspace]\n\n[dependencies]\n\
             candle-core = \"={CANDLE}\"\ncandle-nn = \"={CANDLE}\"\ncandle-cuda-vmm = \"={BEFORE}\"\n"
        );
        let path = base.join("published/Cargo.toml");
        let shell = &workspace.shell;
        shell.write_file(&path, manifest)?;
        shell.write_file(base.join("published/src/lib.rs"), "")?;
        let metadata = MetadataCommand::new().manifest_path(path).exec()?;
        Ok(Self(metadata.packages))
    }

    /// Copies Candle, with a constant by which a program can tell it from the registry's. Its
    /// `Device::new_cuda` returns the CPU device, so that programs which want a GPU run without one.
    pub fn copy_candle_to(&self, packages: &Path) -> Result<()> {
        for name in ["candle-core", "candle-nn"] {
            let folder = packages.join(format!("{name}-{CANDLE}"));
            files::copy_tree(&self.folder(name, CANDLE)?, &folder)?;
        }
        let changes: Changes = toml::from_str(include_str!("candle.toml"))?;
        for (file, changes) in changes {
            let file = packages.join(format!("candle-core-{CANDLE}/src/{file}.rs"));
            let mut text = fs::read_to_string(&file)?;
            for (from, to) in changes {
                let count = text.matches(&from).count();
                ensure!(count == 1, "{from:?} is {count} times in {file:?}");
                text = text.replace(&from, &to);
            }
            fs::write(&file, text)?;
        }
        Ok(())
    }

    /// Copies the examples of the version before, as they are.
    pub fn copy_examples_to(&self, folder: &Path) -> Result<()> {
        let package = self.folder("candle-cuda-vmm", BEFORE)?;
        files::copy_tree(&package.join("examples"), folder)
    }

    fn folder(&self, name: &str, version: &str) -> Result<PathBuf> {
        let mut packages = self.0.iter();
        let package = packages.find(|it| it.name == name && it.version.to_string() == version);
        let package = package.with_context(|| format!("cargo brought no {name} {version}"))?;
        Ok(package.manifest_path.with_file_name("").into())
    }
}
