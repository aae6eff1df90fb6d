//! Packing the library crates as a registry would get them, and unpacking them for consumers.

use crate::files;
use crate::workspace::{self, Workspace};
use anyhow::{Context, Result, ensure};
use std::path::PathBuf;
use std::process::Command;

/// A library crate of the workspace that can be published.
#[derive(Clone, Debug)]
pub struct Library {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// Where the unpacked packages lie, each in a folder of its name.
pub fn folder(workspace: &Workspace) -> PathBuf {
    workspace.target.join("consumers").join("packages")
}

/// Every crate of the workspace that may be published.
pub fn libraries(workspace: &Workspace) -> Result<Vec<Library>> {
    let metadata = workspace.metadata(&["--no-deps"])?;
    let mut libraries = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        // `publish = false` is an empty list of registries.
        if package["publish"].as_array().is_some_and(Vec::is_empty) {
            continue;
        }
        let text = |key: &str| {
            package[key]
                .as_str()
                .map(str::to_owned)
                .with_context(|| format!("cargo metadata names a package without {key}"))
        };
        libraries.push(Library {
            name: text("name")?,
            version: text("version")?,
        });
    }
    ensure!(!libraries.is_empty(), "the workspace has no library crate");
    Ok(libraries)
}

/// Packs every library, and unpacks it into a folder of its own.
///
/// Cargo's own verification is left out: it takes siblings from an overlay whose unpacked sources
/// it keeps in cargo's home, stale once a crate changes under the same version. The consumers build
/// what was packed instead.
pub fn run(workspace: &Workspace) -> Result<()> {
    let libraries = libraries(workspace)?;
    let mut command = workspace.cargo(&["package", "--no-verify", "--allow-dirty"]);
    for library in &libraries {
        command.args(["--package", &library.name]);
    }
    workspace::run(&mut command)?;

    let folder = folder(workspace);
    files::remove_tree(&folder)?;
    files::make(&folder)?;
    for library in &libraries {
        let stem = format!("{}-{}", library.name, library.version);
        let packed = workspace
            .target
            .join("package")
            .join(format!("{stem}.crate"));
        let status = Command::new("tar")
            .arg("-xzf")
            .arg(&packed)
            .arg("-C")
            .arg(&folder)
            .status()
            .context("tar could not be started")?;
        ensure!(status.success(), "tar -xzf {}: {status}", packed.display());
        let unpacked = folder.join(&stem);
        for file in ["README.md", "Cargo.toml", "src/lib.rs"] {
            ensure!(
                unpacked.join(file).is_file(),
                "the package of {} has no {file}",
                library.name
            );
        }
        let named = folder.join(&library.name);
        std::fs::rename(&unpacked, &named)
            .with_context(|| format!("moving {} to {}", unpacked.display(), named.display()))?;
    }
    Ok(())
}
