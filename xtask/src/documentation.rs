//! Documentation: of the checkout, and of each library as a documentation host builds it.

use crate::workspace::Workspace;
use crate::{files, tests};
use anyhow::{Result, ensure};
use fs_err as fs;

/// What hosted documentation must say: the package, a page, and its badge.
const BADGES: [(&str, &str, &str); 3] = [
    ("cuda-vmm", "cuda_vmm/struct.Driver.html", SIMULATOR),
    ("candle-cuda-vmm", ERROR, CUDA),
    ("candle-cuda-vmm", ERROR, "id=\"method.from_cuda_result\""),
];
const ERROR: &str = "candle_cuda_vmm/error/enum.VmmError.html";
const CUDA: &str = "Available on <strong>crate feature <code>cuda</code></strong> only.";
const SIMULATOR: &str = "Available on <strong>crate feature <code>simulator</code></strong> only.";

/// The documentation of the whole workspace, in which nothing may be amiss.
pub fn workspace(workspace: &Workspace) -> Result<()> {
    let doc = format!("doc --workspace --no-deps {}", tests::FEATURES);
    let doc = workspace.cargo(&doc);
    Ok(doc.env("RUSTDOCFLAGS", "-D warnings").run()?)
}

/// Each library's as a host builds it: by its manifest, offline, with unstable rustdoc features.
pub fn hosted(workspace: &Workspace) -> Result<()> {
    // It allows unfinished features, as a host's does. Cargo takes dependencies as built.
    let rustdoc = workspace.target.join("documentation/rustdoc");
    let script = "#!/bin/sh\nRUSTC_BOOTSTRAP=1 exec rustdoc \"$@\"\n";
    workspace.shell.write_file(&rustdoc, script)?;
    files::executable(&rustdoc)?;
    for library in workspace.libraries() {
        let name = library.name.as_str();
        let mut doc = workspace.cargo(&format!("doc --offline --no-deps --package {name}"));
        let words = &library.metadata["docs"]["rs"];
        if words["no-default-features"] == true {
            doc = doc.arg("--no-default-features");
        }
        for feature in words["features"].as_array().into_iter().flatten() {
            doc = doc.args(["--features", feature.as_str().unwrap_or_default()]);
        }
        let doc = doc.env("DOCS_RS", "1").env("RUSTDOC", &rustdoc);
        doc.env("RUSTDOCFLAGS", "--cfg docsrs -D warnings").run()?;
        for (_, page, badge) in BADGES.iter().filter(|(of, ..)| *of == name) {
            let file = workspace.target.join("doc").join(page);
            let has = fs::read_to_string(&file)?.contains(badge);
            ensure!(has, "{} has no {badge:?}", file.display());
        }
    }
    Ok(())
}
