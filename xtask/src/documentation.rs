//! Documentation: of the checkout, and of each library as a documentation host builds it.

use crate::workspace::{self, Workspace};
use crate::{files, package, tests};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// What hosted documentation must say: the package, a page, and its badge.
const BADGES: [(&str, &str, &str); 3] = [
    (
        "cuda-vmm",
        "cuda_vmm/struct.Driver.html",
        "Available on <strong>crate feature <code>simulator</code></strong> only.",
    ),
    (
        "candle-cuda-vmm",
        "candle_cuda_vmm/error/enum.VmmError.html",
        "Available on <strong>crate feature <code>cuda</code></strong> only.",
    ),
    (
        "candle-cuda-vmm",
        "candle_cuda_vmm/error/enum.VmmError.html",
        "id=\"method.from_cuda_result\"",
    ),
];

/// The documentation of the whole workspace, in which nothing may be amiss.
pub fn workspace(workspace: &Workspace) -> Result<()> {
    workspace::run(
        workspace
            .cargo(&["doc", "--workspace", "--no-deps"])
            .args(tests::FEATURES)
            .env("RUSTDOCFLAGS", "-D warnings"),
    )
}

/// Each library's as a host builds it: by its own manifest's words, offline, with no `cuda.h`, and with the features that
/// rustdoc has not finished.
pub fn hosted(workspace: &Workspace) -> Result<()> {
    let metadata = workspace.metadata(&["--no-deps"])?;
    let rustdoc = unfinished(workspace)?;
    for library in package::libraries(workspace)? {
        let mut command = workspace.cargo(&["doc", "--offline", "--no-deps", "--package"]);
        command.arg(&library.name);
        let packages = metadata["packages"].as_array().into_iter().flatten();
        let words = packages
            .into_iter()
            .find(|package| package["name"] == library.name.as_str())
            .map(|package| &package["metadata"]["docs"]["rs"])
            .unwrap_or(&Value::Null);
        if words["no-default-features"] == true {
            command.arg("--no-default-features");
        }
        for feature in words["features"].as_array().into_iter().flatten() {
            command.args(["--features", feature.as_str().unwrap_or_default()]);
        }
        workspace::run(
            command
                .env("DOCS_RS", "1")
                .env("RUSTDOC", &rustdoc)
                .env("RUSTDOCFLAGS", "--cfg docsrs -D warnings"),
        )?;
        for (_, page, text) in BADGES.iter().filter(|(name, ..)| *name == library.name) {
            let file = workspace.target.join("doc").join(page);
            let html =
                fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
            ensure!(html.contains(text), "{} has no {text:?}", file.display());
        }
    }
    Ok(())
}

/// A rustdoc that allows unfinished features, as a host's does. Only rustdoc: for what it depends on, cargo takes what is
/// built already.
fn unfinished(workspace: &Workspace) -> Result<PathBuf> {
    let folder = workspace.target.join("documentation");
    files::make(&folder)?;
    let script = folder.join("rustdoc");
    fs::write(
        &script,
        "#!/bin/sh\nRUSTC_BOOTSTRAP=1 exec rustdoc \"$@\"\n",
    )
    .with_context(|| format!("writing {}", script.display()))?;
    files::executable(Path::new(&script))?;
    Ok(script)
}
