//! How many packages a user of ours gets, and whether they have become more.

use crate::display;
use crate::workspace::Workspace;
use anyhow::{Result, ensure};

/// Other systems get others.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// A name for each user, the package with its features, and how many packages it gets: that crate and what only the build
/// needs among them. Those that are bare have a machine without `cuda.h`, libclang or a C compiler. A change that adds one
/// writes the new number here.
const USERS: [(&str, &str, usize); 6] = [
    ("sys", "cuda-vmm-sys", 25),
    ("sys-bare", "cuda-vmm-sys --no-default-features", 9),
    ("core", "cuda-vmm", 32),
    ("core-bare", "cuda-vmm --no-default-features", 17),
    ("facade", "candle-cuda-vmm", 147),
    (
        "facade-bare",
        "candle-cuda-vmm --no-default-features --features simulator",
        140,
    ),
];

/// Counts what each user gets, prints it beside what is recorded, and fails if one differs.
pub fn check(workspace: &Workspace) -> Result<()> {
    let mut rows = Vec::new();
    let mut differing = Vec::new();
    for (name, package, recorded) in USERS {
        let arguments = format!("--format {{p}} --target {TARGET} --package {package}");
        let tree = workspace.tree(&arguments)?;
        if tree.len() != recorded {
            differing.push(format!("{name}: {}", tree.len()));
        }
        rows.push([
            name.to_owned(),
            tree.len().to_string(),
            recorded.to_string(),
        ]);
    }
    println!(
        "{}",
        display::table(["user of", "packages", "recorded"], rows)
    );
    ensure!(
        differing.is_empty(),
        "users get another number of packages than {} says. If that is meant, write there: {}",
        file!(),
        differing.join(", ")
    );
    Ok(())
}
