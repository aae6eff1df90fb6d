//! Licences: of every package that a user of the libraries gets, by the list in `deny.toml`.

use crate::package;
use crate::workspace::Workspace;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;

/// Fails if a package has a licence that is not allowed, or comes from elsewhere than a registry.
pub fn run(workspace: &Workspace) -> Result<()> {
    let file = workspace.root.join("deny.toml");
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    let allowed = allowed(&text)?;
    let metadata = workspace.metadata(&["--all-features"])?;
    let ours: BTreeSet<String> = package::libraries(workspace)?
        .into_iter()
        .map(|library| library.name)
        .collect();
    let packages = dependencies(&metadata, &ours)?;
    let mut problems = Vec::new();
    for package in &packages {
        let name = format!(
            "{} {}",
            text_of(package, "name"),
            text_of(package, "version")
        );
        if !is_allowed(text_of(package, "license"), &allowed) {
            problems.push(format!("{name}: {:?}", text_of(package, "license")));
        }
        let own = ours.contains(text_of(package, "name"));
        if !own && !text_of(package, "source").starts_with("registry+") {
            problems.push(format!("{name} is not from a registry"));
        }
    }
    println!(
        "{} packages, {} licences allowed",
        packages.len(),
        allowed.len()
    );
    if !problems.is_empty() {
        bail!("deny.toml does not allow:\n{}", problems.join("\n"));
    }
    Ok(())
}

/// The list `allow` of the file's table `licenses`.
fn allowed(text: &str) -> Result<BTreeSet<&str>> {
    let (_, rest) = text
        .split_once("\nallow = [")
        .context("deny.toml has no list of allowed licences")?;
    let (list, _) = rest
        .split_once(']')
        .context("the list of allowed licences does not end")?;
    let allowed: BTreeSet<&str> = list
        .split(',')
        .map(|word| word.trim().trim_matches('"'))
        .filter(|word| !word.is_empty())
        .collect();
    ensure!(!allowed.is_empty(), "no licence is allowed");
    Ok(allowed)
}

/// What these packages need when they are built and when they run, with themselves.
fn dependencies<'a>(metadata: &'a Value, names: &BTreeSet<String>) -> Result<Vec<&'a Value>> {
    let packages: BTreeMap<&str, &Value> = array(&metadata["packages"])
        .map(|package| (text_of(package, "id"), package))
        .collect();
    let nodes: BTreeMap<&str, &Value> = array(&metadata["resolve"]["nodes"])
        .map(|node| (text_of(node, "id"), node))
        .collect();
    let mut open: Vec<&str> = packages
        .values()
        .filter(|package| names.contains(text_of(package, "name")))
        .map(|package| text_of(package, "id"))
        .collect();
    let mut found = BTreeMap::new();
    while let Some(id) = open.pop() {
        let package = packages
            .get(id)
            .with_context(|| format!("cargo metadata has no package {id}"))?;
        if found.insert(id, *package).is_some() {
            continue;
        }
        let node = nodes
            .get(id)
            .with_context(|| format!("cargo metadata resolves no {id}"))?;
        let needed = array(&node["deps"])
            .filter(|dependency| array(&dependency["dep_kinds"]).any(|kind| kind["kind"] != "dev"));
        open.extend(needed.map(|dependency| text_of(dependency, "pkg")));
    }
    Ok(found.into_values().collect())
}

/// Whether an expression such as `(MIT OR Apache-2.0) AND Unicode-3.0` can be met by allowed licences.
fn is_allowed(expression: &str, allowed: &BTreeSet<&str>) -> bool {
    let text = expression
        .replace('/', " OR ")
        .replace('(', " ( ")
        .replace(')', " ) ");
    let words: Vec<&str> = text.split_whitespace().collect();
    let mut rest = words.as_slice();
    alternatives(&mut rest, allowed) == Some(true) && rest.is_empty()
}

/// Terms joined by `OR`; nothing if it is no expression.
fn alternatives(rest: &mut &[&str], allowed: &BTreeSet<&str>) -> Option<bool> {
    let mut met = conjunction(rest, allowed)?;
    while let [word, others @ ..] = *rest {
        if *word != "OR" {
            break;
        }
        *rest = others;
        met |= conjunction(rest, allowed)?;
    }
    Some(met)
}

/// Terms joined by `AND`.
fn conjunction(rest: &mut &[&str], allowed: &BTreeSet<&str>) -> Option<bool> {
    let mut met = term(rest, allowed)?;
    while let [word, others @ ..] = *rest {
        if *word != "AND" {
            break;
        }
        *rest = others;
        met &= term(rest, allowed)?;
    }
    Some(met)
}

/// A licence, with its exception if it has one, or an expression in brackets.
fn term(rest: &mut &[&str], allowed: &BTreeSet<&str>) -> Option<bool> {
    match *rest {
        ["(", others @ ..] => {
            *rest = others;
            let met = alternatives(rest, allowed)?;
            let [")", others @ ..] = *rest else {
                return None;
            };
            *rest = others;
            Some(met)
        }
        // An exception allows more than its licence, but it is another licence to a list.
        [licence, "WITH", exception, others @ ..] => {
            *rest = others;
            Some(allowed.contains(format!("{licence} WITH {exception}").as_str()))
        }
        [licence, others @ ..] => {
            *rest = others;
            Some(allowed.contains(licence))
        }
        [] => None,
    }
}

fn array(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text_of<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn expressions_are_met_by_what_is_allowed() {
        let allowed = BTreeSet::from(["MIT", "Unicode-3.0"]);
        for met in [
            "MIT",
            "Apache-2.0 OR MIT",
            "MIT/Apache-2.0",
            "(MIT OR Apache-2.0) AND Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception OR MIT",
            "GPL-3.0 AND MIT OR MIT",
        ] {
            assert!(is_allowed(met, &allowed), "{met}");
        }
        for unmet in [
            "",
            "Apache-2.0",
            "MIT AND Apache-2.0",
            "MIT WITH an-exception",
            "(MIT OR Apache-2.0) AND BSD-3-Clause",
            "(MIT",
            "MIT MIT",
            "OR MIT",
        ] {
            assert!(!is_allowed(unmet, &allowed), "{unmet}");
        }
    }

    #[test]
    fn the_list_of_the_checkout_is_read() {
        let text = include_str!("../../deny.toml");
        assert!(allowed(text).unwrap().contains("Apache-2.0"));
        assert!(allowed("[licenses]\n").is_err());
        assert!(allowed("\nallow = []").is_err());
    }

    #[test]
    fn what_only_tests_need_is_left_out() {
        let metadata = serde_json::json!({
            "packages": [{"id": "a", "name": "a"}, {"id": "b", "name": "b"}, {"id": "c", "name": "c"}, {"id": "d", "name": "d"}],
            "resolve": {"nodes": [
                {"id": "a", "deps": [
                    {"pkg": "b", "dep_kinds": [{"kind": null}]},
                    {"pkg": "c", "dep_kinds": [{"kind": "dev"}]},
                ]},
                {"id": "b", "deps": [{"pkg": "d", "dep_kinds": [{"kind": "dev"}, {"kind": "build"}]}]},
                {"id": "c", "deps": []},
                {"id": "d", "deps": []},
            ]},
        });
        let names = BTreeSet::from(["a".to_owned()]);
        let found: Vec<_> = dependencies(&metadata, &names)
            .unwrap()
            .into_iter()
            .map(|package| text_of(package, "name"))
            .collect();
        assert_eq!(found, ["a", "b", "d"]);
    }
}
