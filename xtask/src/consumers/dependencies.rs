//! How many packages a user of ours gets, and whether they have become more.

use crate::display;
use crate::workspace::Workspace;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;

/// The recorded numbers, from the root of the checkout.
const FILE: &str = "xtask/consumers/dependencies.txt";
/// Other systems get others.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// A name for each user, and the package with its features.
const USERS: [(&str, &str); 6] = [
    ("sys", "--package cuda-vmm-sys"),
    ("sys-bare", "--package cuda-vmm-sys --no-default-features"),
    ("core", "--package cuda-vmm"),
    ("core-bare", "--package cuda-vmm --no-default-features"),
    ("facade", "--package candle-cuda-vmm"),
    (
        "facade-bare",
        "--package candle-cuda-vmm --no-default-features --features simulator",
    ),
];

/// Counts what each user gets, prints it beside what is recorded, and fails if one differs.
pub fn check(workspace: &Workspace) -> Result<()> {
    let text = workspace.shell.read_file(FILE)?;
    let recorded = recorded(&text)?;
    let mut counts = BTreeMap::new();
    for (name, arguments) in USERS {
        // What only builds need is among them.
        let all = ["--format", "{p}", "--target", TARGET];
        let tree = workspace.tree(all.into_iter().chain(arguments.split(' ')))?;
        counts.insert(name, tree.len());
    }
    let rows = counts.iter().map(|(name, count)| {
        let recorded = recorded.get(name).map(usize::to_string);
        let recorded = recorded.unwrap_or_else(|| "none".to_owned());
        [(*name).to_owned(), count.to_string(), recorded]
    });
    println!(
        "{}",
        display::table(["user of", "packages", "recorded"], rows)
    );
    let differing = differing(&counts, &recorded).join("\n");
    ensure!(
        differing.is_empty(),
        "users get another number of packages than {FILE} says. If that is meant, write there:\n{differing}"
    );
    Ok(())
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
            let pair = line.split_once(' ');
            let pair = pair.and_then(|(name, number)| Some((name, number.trim().parse().ok()?)));
            pair.with_context(|| format!("{FILE}: {line:?} is not a name and a number"))
        })
        .collect()
}

#[cfg(test)]
mod unit {
    use super::*;

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
