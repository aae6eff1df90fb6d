//! No circles between modules: those of one folder can be read in an order, each after those that
//! it uses.
//!
//! A source uses what its paths name: those that begin with `crate`, `super` or a child's name. The
//! check looks through re-exports, which are no use by themselves. Tests do not count, nor does a
//! folder's own file, which joins its modules.

use std::collections::{BTreeMap, BTreeSet};
use std::{fs, path::Path};

/// Where crates begin.
const CRATES: [&str; 8] = [
    "crates/cuda-vmm/src",
    "crates/candle-cuda-vmm/src",
    "crates/cuda-vmm-sim/src",
    "benches/src",
    "benches/src/bin/bench",
    "benches/src/bin/bench-candle",
    "benches/src/bin/bench-serving",
    "xtask/src",
];

/// Texts by the paths of their modules: `""`, `"pool"`, `"pool::blocks"`.
type Texts = BTreeMap<String, String>;

#[derive(Default)]
struct Module {
    /// Paths that it uses itself.
    used: Vec<String>,
    /// What its `use` declarations bring in, by name.
    named: BTreeMap<String, String>,
}

fn join(module: &str, name: &str) -> String {
    [module, name].join(if module.is_empty() { "" } else { "::" })
}

fn read(folder: &Path, module: &str, texts: &mut Texts) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let is_own = ["lib", "main", "mod"].contains(&&*name);
        let name = if is_own {
            module.to_owned()
        } else {
            join(module, &name)
        };
        if path.is_dir() && !path.ends_with("src/bin") {
            read(&path, &name, texts);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            texts.insert(name, fs::read_to_string(&path).expect("a source"));
        }
    }
}

/// Splits a source, up to its tests, into paths and signs. `tests` gets the tests that have files
/// of their own.
fn words(text: &str, tests: &mut Vec<String>) -> Vec<String> {
    let (mut spaced, mut is_test) = (String::new(), false);
    for line in text.lines() {
        let line = line.split("//").next().unwrap_or_default().trim();
        if is_test && line.starts_with("mod ") {
            match line[4..].strip_suffix(';') {
                Some(name) => tests.push(name.to_owned()),
                None => break,
            }
        }
        is_test = line.starts_with("#[cfg(") && line.contains("test");
        for sign in line.chars().chain([' ']) {
            match sign.is_alphanumeric() || "_: ".contains(sign) {
                true => spaced.push(sign),
                false => spaced.extend([' ', sign, ' ']),
            }
        }
    }
    spaced.split_whitespace().map(str::to_owned).collect()
}

/// Reads what a `use` names, from the word `at`; returns where that ends.
fn tree(words: &[String], mut at: usize, before: &str, named: &mut Vec<(String, String)>) -> usize {
    let path = [before, &words[at]].concat();
    if words[at] == "{" {
        while words[at] != "}" {
            at = if words[at + 1] == "}" {
                at + 1
            } else {
                tree(words, at + 1, before, named)
            };
        }
        at + 1
    } else if path.ends_with("::") {
        tree(words, at + 1, &path, named)
    } else {
        let is_renamed = words[at + 1] == "as";
        at += if is_renamed { 2 } else { 0 };
        let path = path.trim_end_matches("::self").trim_end_matches("::*");
        let name = path.rsplit("::").next().unwrap_or_default();
        let name = if is_renamed { &words[at] } else { name };
        named.push((name.to_owned(), path.to_owned()));
        at + 1
    }
}

fn modules(texts: &Texts) -> BTreeMap<String, Module> {
    let (mut modules, mut tests) = (BTreeMap::new(), Vec::new());
    for (name, text) in texts {
        let (mut module, mut own_tests, mut at) = (Module::default(), Vec::new(), 0);
        let words = words(text, &mut own_tests);
        tests.extend(own_tests.iter().map(|test| join(name, test)));
        while at < words.len() {
            let before = at.checked_sub(1).map_or("", |at| &words[at]);
            let first = words[at].split_once("::").map_or("", |(first, _)| first);
            if words[at] == "use" {
                let mut named = Vec::new();
                at = tree(&words, at + 1, "", &mut named);
                if !["pub", ")"].contains(&before) {
                    module
                        .used
                        .extend(named.iter().map(|(_, path)| path.clone()));
                }
                module.named.extend(named);
                continue;
            }
            let is_ours =
                ["crate", "super"].contains(&first) || texts.contains_key(&join(name, first));
            if !first.is_empty() && is_ours && before != "in" {
                module
                    .used
                    .push(words[at].trim_end_matches("::").to_owned());
            }
            at += 1;
        }
        modules.insert(name.clone(), module);
    }
    modules.retain(|name, _| !tests.contains(name));
    modules
}

/// The module that has what a path names in a module; none if another crate has it.
fn resolve(
    modules: &BTreeMap<String, Module>,
    module: &str,
    path: &str,
    steps: u8,
) -> Option<String> {
    let (mut at, mut is_ours) = (module.to_owned(), false);
    for (index, word) in path.split("::").enumerate() {
        let child = join(&at, word);
        match word {
            "crate" => at.clear(),
            "super" => at.truncate(at.rfind("::").unwrap_or_default()),
            "self" => {}
            _ if modules.contains_key(&child) => at = child,
            _ => {
                let rest = path
                    .split("::")
                    .skip(index + 1)
                    .map(|word| format!("::{word}"));
                let named = modules.get(&at)?.named.get(word).filter(|_| steps > 0);
                let named = named.map(|named| named.clone() + &rest.collect::<String>());
                return match named.filter(|named| named != path) {
                    Some(named) => resolve(modules, &at, &named, steps - 1),
                    None => is_ours.then_some(at),
                };
            }
        }
        is_ours = true;
    }
    Some(at)
}

/// One word of a module's path; none of the root's.
fn word(module: &str, at: usize) -> Option<&str> {
    module.split("::").nth(at).filter(|word| !word.is_empty())
}

/// The folders that have a circle, and the circle.
fn circles(texts: &Texts) -> Vec<(String, String)> {
    let modules = modules(texts);
    let mut graphs: BTreeMap<String, BTreeMap<&str, BTreeSet<String>>> = BTreeMap::new();
    for (user, module) in &modules {
        for used in module
            .used
            .iter()
            .filter_map(|path| resolve(&modules, user, path, 9))
        {
            let pairs = user.split("::").zip(used.split("::"));
            let common: Vec<_> = pairs.take_while(|(user, used)| user == used).collect();
            let at = common.len();
            if let (Some(user), Some(used)) = (word(user, at), word(&used, at)) {
                let folder = common
                    .iter()
                    .map(|(name, _)| *name)
                    .collect::<Vec<_>>()
                    .join("::");
                let graph = graphs.entry(folder).or_default();
                graph.entry(user).or_default().insert(used.to_owned());
            }
        }
    }
    let mut circles = Vec::new();
    for (folder, mut graph) in graphs {
        // What uses nothing that is left is in no circle.
        let mut before = usize::MAX;
        while graph.len() < before {
            before = graph.len();
            let left: BTreeSet<_> = graph.keys().map(|name| (*name).to_owned()).collect();
            graph
                .values_mut()
                .for_each(|used| used.retain(|name| left.contains(name)));
            graph.retain(|_, used| !used.is_empty());
        }
        let (mut trail, mut at) = (Vec::new(), graph.keys().next().copied());
        while let Some(name) = at.filter(|name| !trail.contains(name)) {
            trail.push(name);
            at = graph[name].iter().next().map(|name| &**name);
        }
        if let Some(name) = at {
            trail.drain(
                ..trail
                    .iter()
                    .position(|other| *other == name)
                    .unwrap_or_default(),
            );
            circles.push((folder, [&trail[..], &[name]].concat().join(" -> ")));
        }
    }
    circles
}

#[test]
fn no_modules_need_each_other() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for source in CRATES {
        let mut texts = Texts::new();
        read(&root.join(source), "", &mut texts);
        assert!(texts.len() > 2, "{source} has {} modules", texts.len());
        let circles = circles(&texts);
        assert!(circles.is_empty(), "{source}: {circles:#?}");
    }
}

#[test]
fn a_circle_is_found_in_its_folder() {
    let found = |files: &[(&str, &str)]| {
        let texts = files
            .iter()
            .map(|(name, text)| ((*name).to_owned(), (*text).to_owned()));
        circles(&texts.collect())
    };
    let circle = |folder: &str, circle: &str| vec![(folder.to_owned(), circle.to_owned())];
    let root = ("", "mod a;\nmod b;\npub use a::{c::C as See, A};\n");
    let a = (
        "a",
        "mod c;\npub use c::C;\n#[cfg(test)]\nmod tests {\n    use crate::b;\n}\n",
    );
    let b = (
        "b",
        "use crate::{See, sys::Other};\nfn of(_: &crate::A) {}\n",
    );
    assert_eq!(
        found(&[root, a, b, ("a::c", "// Not crate::b.\npub struct C;\n")]),
        []
    );
    let c = ("a::c", "use super::super::b::B;\n");
    assert_eq!(found(&[root, a, b, c]), circle("", "a -> b -> a"));
    let (c, d) = (
        ("a::c", "use super::d;\n"),
        ("a::d", "fn of() -> super::C { todo!() }\n"),
    );
    assert_eq!(found(&[root, a, b, c, d]), circle("a", "c -> d -> c"));
}
