//! Packing the library crates as a registry would get them, and unpacking them for consumers.

use crate::workspace::{Workspace, array, text};
use anyhow::{Result, ensure};
use fs_err as fs;
use serde_json::Value;
use std::path::PathBuf;
use xshell::cmd;

/// Where the unpacked packages lie, each in a folder of its name.
pub fn folder(workspace: &Workspace) -> PathBuf {
    workspace.target.join("consumers/packages")
}

/// What cargo says of every crate of the workspace that may be published.
pub fn libraries(workspace: &Workspace) -> Result<Vec<Value>> {
    let metadata = workspace.metadata(&["--no-deps"])?;
    // `publish = false` is an empty list of registries.
    let packages = array(&metadata["packages"]);
    let libraries = packages.filter(|package| package["publish"] != Value::Array(Vec::new()));
    Ok(libraries.cloned().collect())
}

/// Packs every library, and unpacks it into a folder of its own.
///
/// Cargo's own verification is left out: it takes siblings from an overlay whose unpacked sources it keeps in cargo's home,
/// stale once a crate changes under the same version. The consumers build what was packed instead.
pub fn run(workspace: &Workspace) -> Result<()> {
    let libraries = libraries(workspace)?;
    let names = libraries.iter().map(|library| text(library, "name"));
    let names = names.flat_map(|name| ["--package", name]);
    let package = workspace.cargo("package --no-verify --allow-dirty");
    package.args(names).run()?;

    let (shell, folder) = (&workspace.shell, folder(workspace));
    shell.remove_path(&folder)?;
    shell.create_dir(&folder)?;
    for library in &libraries {
        let name = text(library, "name");
        let stem = format!("{name}-{}", text(library, "version"));
        let packed = workspace.target.join(format!("package/{stem}.crate"));
        cmd!(shell, "tar -xzf {packed} -C {folder}").quiet().run()?;
        let unpacked = folder.join(&stem);
        for file in ["README.md", "Cargo.toml", "src/lib.rs"] {
            let has = unpacked.join(file).is_file();
            ensure!(has, "the package of {name} has no {file}");
        }
        fs::rename(unpacked, folder.join(name))?;
    }
    Ok(())
}
