//! How many packages a user of ours gets, and whether they have become more.

use crate::table;
use crate::workspace::Workspace;
use anyhow::{Context, Result, bail, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;

/// The recorded numbers, from the root of the checkout.
const FILE: &str = "xtask/consumers/dependencies.txt";
/// Other systems get others.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// A name for each user, the package, and its features.
const USERS: [(&str, &str, &[&str]); 6] = [
    ("sys", "cuda-vmm-sys", &[]),
    ("sys-bare", "cuda-vmm-sys", &["--no-default-features"]),
    ("core", "cuda-vmm", &[]),
    ("core-bare", "cuda-vmm", &["--no-default-features"]),
    ("facade", "candle-cuda-vmm", &[]),
    (
        "facade-bare",
        "candle-cuda-vmm",
        &["--no-default-features", "--features", "simulator"],
    ),
];

/// Counts what each user gets, prints it beside what is recorded, and fails if one differs.
pub fn check(workspace: &Workspace) -> Result<()> {
    let file = workspace.root.join(FILE);
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    let recorded = recorded(&text)?;
    let mut counts = BTreeMap::new();
    let mut rows = Vec::new();
    for (name, package, features) in USERS {
        let count = count(workspace, package, features)?;
        counts.insert(name, count);
        let recorded = recorded.get(name).map(usize::to_string);
        let recorded = recorded.unwrap_or_else(|| "none".to_owned());
        rows.push(vec![name.to_owned(), count.to_string(), recorded]);
    }
    let head = ["user of", "packages", "recorded"];
    print!("{}", table::render(&head, &rows, &[1, 2]));
    let differing = differing(&counts, &recorded);
    if !differing.is_empty() {
        bail!(
            "users get another number of packages than {FILE} says. If that is meant, write there:\n{}",
            differing.join("\n")
        );
    }
    Ok(())
}

/// How many packages a program gets that depends on this one, what only builds need among them.
fn count(workspace: &Workspace, package: &str, features: &[&str]) -> Result<usize> {
    let mut command = workspace.cargo(&["tree", "--edges", "normal,build", "--prefix", "none"]);
    let output = command
        .args(["--format", "{p}", "--target", TARGET, "--package", package])
        .args(features)
        .output()
        .context("cargo tree could not be started")?;
    ensure!(
        output.status.success(),
        "cargo tree failed:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(packages(&String::from_utf8_lossy(&output.stdout)))
}

/// The packages of a tree without indentation, each once.
fn packages(tree: &str) -> usize {
    let lines = tree.lines().map(|line| line.trim_end_matches(" (*)"));
    let packages: BTreeSet<&str> = lines.filter(|line| !line.is_empty()).collect();
    packages.len()
}

/// The lines that the file would need.
fn differing(counts: &BTreeMap<&str, usize>, recorded: &BTreeMap<&str, usize>) -> Vec<String> {
    counts
        .iter()
        .filter(|(name, count)| recorded.get(*name) != Some(*count))
        .map(|(name, count)| format!("{name} {count}"))
        .collect()
}

/// The numbers of the file: a name and a number on each line that is no comment.
fn recorded(text: &str) -> Result<BTreeMap<&str, usize>> {
    let lines = text
        .lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty());
    lines
        .map(|line| {
            let (name, number) = line
                .split_once(' ')
                .with_context(|| format!("{FILE}: {line:?} is not a name and a number"))?;
            let number = number
                .trim()
                .parse()
                .with_context(|| format!("{FILE}: {line:?} has no number"))?;
            Ok((name, number))
        })
        .collect()
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn a_package_counts_once_for_each_version() {
        let tree = "cuda-vmm v0.2.0 (/b)\nlibc v0.2.1\nthiserror v2.0.1 (proc-macro)\n\nlibc v0.2.1 (*)\nlibc v0.1.9\n";
        assert_eq!(packages(tree), 4);
    }

    #[test]
    fn a_number_that_grew_shrank_or_is_not_recorded_differs() {
        let recorded = recorded("# a comment\n\nsys 27\ncore 17\nfacade 138\n").unwrap();
        let counts = BTreeMap::from([("sys", 28), ("core", 16), ("facade", 138), ("new", 1)]);
        assert_eq!(
            differing(&counts, &recorded),
            ["core 16", "new 1", "sys 28"]
        );
    }

    #[test]
    fn a_line_without_a_number_is_refused() {
        assert!(recorded("sys").is_err());
        assert!(recorded("sys many").is_err());
    }
}
