//! Licences: of every package that a user of the libraries gets, by the list in `deny.toml`.

use crate::workspace::Workspace;
use anyhow::{Context, Result, ensure};
use itertools::Itertools;
use spdx::{Expression, ParseMode};
use std::collections::BTreeSet;

/// Fails if a package has a licence that is not allowed, or comes from elsewhere than a registry.
pub fn run(workspace: &Workspace) -> Result<()> {
    let deny = workspace.shell.read_file("deny.toml")?;
    let allowed = allowed(&deny)?;
    let names: Vec<_> = workspace.libraries().map(|it| &**it.name).collect();
    let packages = dependencies(workspace, &names)?;
    let problem = |line: &String| problem(line, &names, &allowed);
    let problems = packages.iter().filter_map(problem).join("\n");
    let (count, licences) = (packages.len(), allowed.len());
    println!("{count} packages, {licences} licences allowed");
    ensure!(problems.is_empty(), "deny.toml does not allow:\n{problems}");
    Ok(())
}

/// The list `allow` of the file's table `licenses`.
fn allowed(text: &str) -> Result<BTreeSet<String>> {
    let file: toml::Table = text.parse()?;
    let list = file.get("licenses").and_then(|it| it.get("allow"));
    let allowed: BTreeSet<_> = list.context("deny.toml has no list")?.clone().try_into()?;
    ensure!(!allowed.is_empty(), "no licence is allowed");
    Ok(allowed)
}

/// These packages and what they need to be built and to run, with a licence behind a bar each.
fn dependencies(workspace: &Workspace, names: &[&str]) -> Result<BTreeSet<String>> {
    let packages = names.join(" --package ");
    let arguments = format!("--all-features --target all --package {packages}");
    workspace.tree(&format!("{arguments} --format {{p}}|{{l}}"))
}

/// What is wrong with a line of [`dependencies`].
fn problem(line: &str, ours: &[&str], allowed: &BTreeSet<String>) -> Option<String> {
    let (package, licence) = line.split_once('|')?;
    if !ours.contains(&package.split(' ').next()?) && package.contains('(') {
        return Some(format!("{package} is not from a registry"));
    }
    (!is_allowed(licence, allowed)).then(|| format!("{package}: {licence:?}"))
}

/// Whether an expression such as `(MIT OR Apache-2.0) AND Unicode-3.0` can be met by allowed licences.
fn is_allowed(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let mode = ParseMode {
        // Old packages have a slash between alternatives.
        allow_slash_as_or_operator: true,
        allow_deprecated: true,
        ..ParseMode::STRICT
    };
    let parsed = Expression::parse_mode(expression, mode);
    // An exception allows more than its licence, but it is another licence to a list.
    parsed.is_ok_and(|parsed| parsed.evaluate(|term| allowed.contains(&term.to_string())))
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn expressions_are_met_by_what_is_allowed() {
        let allowed = BTreeSet::from(["MIT", "Unicode-3.0"].map(str::to_owned));
        let met = "MIT; Apache-2.0 OR MIT; MIT/Apache-2.0; (MIT OR Apache-2.0) AND Unicode-3.0; \
            Apache-2.0 WITH LLVM-exception OR MIT; GPL-3.0 AND MIT OR MIT";
        for expression in met.split("; ") {
            assert!(is_allowed(expression, &allowed), "{expression}");
        }
        let not_met = "; Apache-2.0; MIT AND Apache-2.0; MIT WITH LLVM-exception; \
            MIT WITH an-exception; (MIT OR Apache-2.0) AND BSD-3-Clause; (MIT; MIT MIT; OR MIT";
        for expression in not_met.split("; ") {
            assert!(!is_allowed(expression, &allowed), "{expression}");
        }
    }

    #[test]
    fn the_list_of_the_checkout_is_read() {
        let text = include_str!("../../deny.toml");
        assert!(allowed(text).unwrap().contains("Apache-2.0"));
        assert!(allowed("[licenses]\n").is_err());
        assert!(allowed("[licenses]\nallow = []").is_err());
    }

    #[test]
    fn what_is_not_from_a_registry_or_not_allowed_is_a_problem() {
        for (line, is_problem) in [
            ("ours v1.0.0 (/checkout/ours)|MIT", false),
            ("other v1.0.0|MIT", false),
            ("ours v1.0.0 (/checkout/ours)|", true),
            ("other v1.0.0|ISC", true),
            ("other v1.0.0 (/elsewhere)|MIT", true),
        ] {
            let problem = problem(line, &["ours"], &BTreeSet::from(["MIT".to_owned()]));
            assert_eq!(problem.is_some(), is_problem, "{line}: {problem:?}");
        }
    }

    #[test]
    fn what_only_tests_need_is_left_out() {
        let packages = dependencies(&Workspace::find().unwrap(), &["cuda-vmm"]).unwrap();
        let has = |name| packages.iter().any(|it| it.split(' ').next() == Some(name));
        assert!(has("cuda-vmm") && has("cuda-vmm-sys") && has("bindgen"));
        assert!(!has("proptest") && !has("indicatif"), "{packages:?}");
    }
}
