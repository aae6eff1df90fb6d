//! No circles between modules: those of a folder can be read in an order, after what they use.
//!
//! A source uses what its paths name. The check looks through re-exports, which are no use by
//! themselves. Tests do not count, nor does a folder's own file, which joins its modules.

use crate::pages;
use itertools::Itertools;
use petgraph::algo::tarjan_scc;
use petgraph::graphmap::DiGraphMap;
use std::collections::BTreeMap;
use syn::visit::{self, Visit};
use syn::{ItemMod, ItemUse, Macro, Meta, UseTree, Visibility};

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

/// Modules by their paths: `""`, `"pool"`, `"pool::blocks"`.
type Modules = BTreeMap<String, Module>;

#[derive(Default)]
struct Module {
    /// Paths that it uses itself.
    used: Vec<String>,
    /// What its `use` declarations bring in, by name.
    named: BTreeMap<String, String>,
    tests: Vec<String>,
}

impl Visit<'_> for Module {
    fn visit_item_mod(&mut self, item: &ItemMod) {
        let is_test = |meta: &Meta| {
            let tokens = meta.require_list().map(|list| list.tokens.to_string());
            meta.path().is_ident("cfg") && tokens.is_ok_and(|tokens| tokens.contains("test"))
        };
        match item.attrs.iter().any(|attribute| is_test(&attribute.meta)) {
            true => self.tests.push(item.ident.to_string()),
            false => visit::visit_item_mod(self, item),
        }
    }

    fn visit_item_use(&mut self, item: &ItemUse) {
        let mut named = Vec::new();
        flatten(&item.tree, "", &mut named);
        if matches!(item.vis, Visibility::Inherited) {
            self.used.extend(named.iter().map(|(_, path)| path.clone()));
        }
        self.named.extend(named);
    }

    fn visit_path(&mut self, path: &syn::Path) {
        let words = path.segments.iter().map(|segment| &segment.ident);
        self.used.push(words.map(ToString::to_string).join("::"));
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, item: &Macro) {
        let text = item.tokens.to_string().replace(" :: ", "::");
        let words = text.split(|sign: char| !sign.is_alphanumeric() && !"_:".contains(sign));
        let paths = words.filter(|word| word.contains("::"));
        self.used.extend(paths.map(str::to_owned));
    }

    // A path that says who may see an item uses nothing.
    fn visit_visibility(&mut self, _: &Visibility) {}
}

/// What a `use` brings in: names, and the paths that they stand for.
fn flatten(tree: &UseTree, before: &str, named: &mut Vec<(String, String)>) {
    let (last, name) = match tree {
        UseTree::Path(it) => return flatten(&it.tree, &join(before, &it.ident.to_string()), named),
        UseTree::Group(it) => return it.items.iter().for_each(|it| flatten(it, before, named)),
        UseTree::Name(it) => (it.ident.to_string(), None),
        UseTree::Rename(it) => (it.ident.to_string(), Some(it.rename.to_string())),
        UseTree::Glob(_) => ("self".to_owned(), None),
    };
    let path = join(before, &last);
    let path = path.trim_end_matches("::self").to_owned();
    let word = path.rsplit("::").next().map(str::to_owned);
    named.push((name.or(word).unwrap_or_default(), path));
}

fn join(module: &str, name: &str) -> String {
    [module, name].join(if module.is_empty() { "" } else { "::" })
}

/// The modules of sources, by their paths, without those of tests.
fn modules(sources: impl Iterator<Item = (String, String)>) -> Modules {
    let module = |(name, text): (String, String)| {
        let mut module = Module::default();
        module.visit_file(&syn::parse_file(&text).expect("Rust"));
        (name, module)
    };
    let mut modules: Modules = sources.map(module).collect();
    let tests = modules.iter();
    let tests = tests.flat_map(|(name, it)| it.tests.iter().map(move |test| join(name, test)));
    for test in tests.collect_vec() {
        modules.remove(&test);
    }
    modules
}

/// The module that has what a path names in a module; none if another crate has it.
fn resolve(modules: &Modules, module: &str, path: &str, steps: u8) -> Option<String> {
    let (mut at, mut is_ours) = (module.to_owned(), false);
    let mut words = path.split("::");
    while let Some(word) = words.next() {
        let child = join(&at, word);
        match word {
            "crate" => at.clear(),
            "super" => at.truncate(at.rfind("::").unwrap_or_default()),
            "self" => {}
            _ if modules.contains_key(&child) => at = child,
            _ => {
                let named = modules.get(&at)?.named.get(word).filter(|_| steps > 0);
                let named = named.map(|it| words.fold(it.clone(), |path, word| join(&path, word)));
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

/// The modules that are in circles, after the folder that has them.
fn circles(modules: &Modules) -> Vec<String> {
    let mut graphs: BTreeMap<String, DiGraphMap<&str, ()>> = BTreeMap::new();
    for (user, module) in modules {
        let resolve = |path: &String| resolve(modules, user, path, 9);
        let used = module.used.iter().filter_map(resolve);
        for (used, _) in used.filter_map(|used| modules.get_key_value(&used)) {
            let pairs = user.split("::").zip(used.split("::"));
            let common = pairs.take_while(|(user, used)| user == used).count();
            let [ours, theirs] = [user, used].map(|it| it.split("::").nth(common));
            if let (Some(ours), Some(theirs)) = (ours, theirs.filter(|it| !it.is_empty())) {
                let folder = user.split("::").take(common).join("::");
                graphs.entry(folder).or_default().add_edge(ours, theirs, ());
            }
        }
    }
    let circles = graphs.iter().flat_map(|(folder, graph)| {
        let groups = tarjan_scc(graph).into_iter();
        let groups = groups.filter(|group| group.len() > 1);
        groups.map(move |group| format!("{folder}: {}", group.iter().sorted().join(", ")))
    });
    circles.collect()
}

#[test]
fn no_modules_need_each_other() {
    for folder in CRATES.map(|folder| pages::root().join(folder)) {
        let sources = pages::sources(&folder, "src/bin").into_iter();
        let modules = modules(sources.map(|(path, text)| {
            let name = path.strip_prefix(&folder).expect("it is below");
            let name = name.with_extension("");
            let mut words = name.iter().map(|word| word.to_string_lossy()).collect_vec();
            words.pop_if(|last| ["lib", "main", "mod"].contains(&&**last));
            (words.join("::"), text)
        }));
        assert!(modules.len() > 2, "{folder:?}: {}", modules.len());
        let circles = circles(&modules);
        assert!(circles.is_empty(), "{folder:?}: {circles:#?}");
    }
}

#[test]
fn a_circle_is_found_in_its_folder() {
    let found = |files: &[(&str, &str)]| {
        let owned = |(name, text): &(&str, &str)| ((*name).to_owned(), (*text).to_owned());
        let sources = files.iter().map(owned);
        circles(&modules(sources))
    };
    let root = ("", "mod a;\nmod b;\npub use a::{c::C as See, A};\n");
    let test = "#[cfg(test)]\nmod tests {\n    use crate::b;\n}\n";
    let a = ("a", &*format!("mod c;\npub use c::C;\n{test}"));
    let b = "use crate::{See, sys::Other};\nfn of(_: &crate::A) {}\n";
    let find = |more: &[_]| found(&[&[root, a, ("b", b)], more].concat());
    assert!(find(&[("a::c", "// Not crate::b.\npub struct C;\n")]).is_empty());
    let used = "fn of() { print!(\"{}\", super::super::b::of()) }\n";
    for c in ["use super::super::b::B;\n", used] {
        assert_eq!(find(&[("a::c", c)]), [": a, b"]);
    }
    let d = ("a::d", "fn of() -> super::C { todo!() }\n");
    assert_eq!(find(&[("a::c", "use super::d;\n"), d]), ["a: c, d"]);
}
