//! Packing the library crates as a registry would get them, and unpacking them for consumers.

use crate::workspace::Workspace;
use anyhow::{Result, ensure};
use fs_err as fs;
use std::path::PathBuf;
use xshell::cmd;

/// Where the unpacked packages lie, each in a folder of its name.
pub fn folder(workspace: &Workspace) -> PathBuf {
    workspace.target.join("consumers/packages")
}

/// Packs every library, and unpacks it into a folder of its own.
///
/// Cargo's own verification is left out: it takes siblings from an overlay whose unpacked sources it
/// keeps in cargo's home, stale once a crate changes under the same version. The consumers build what
/// was packed instead.
pub fn run(workspace: &Workspace) -> Result<()> {
    let names = workspace.libraries().flat_map(|it| ["--package", &it.name]);
    let package = workspace.cargo("package --no-verify --allow-dirty");
    package.args(names).run()?;

    let (shell, folder) = (&workspace.shell, folder(workspace));
    shell.remove_path(&folder)?;
    shell.create_dir(&folder)?;
    for library in workspace.libraries() {
        let name = &library.name;
        let stem = format!("{name}-{}", library.version);
        let packed = workspace.target.join(format!("package/{stem}.crate"));
        cmd!(shell, "tar -xzf {packed} -C {folder}").quiet().run()?;
        let unpacked = folder.join(&stem);
        for file in ["README.md", "Cargo.toml", "src/lib.rs"] {
            let has = unpacked.join(file).is_file();
            ensure!(has, "the package of {name} has no {file}");
        }
        fs::rename(unpacked, folder.join(name.as_str()))?;
    }
    Ok(())
}
