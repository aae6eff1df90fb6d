//! What code and documents keep, as tests.
//!
//! `docs/ARCHITECTURE.md` names what is there, and `docs/ERRORS.md` every public error's variants. The
//! code of the recipes in `docs` is that of their examples.
//!
//! No circles between modules: those of a folder can be read in an order, after what they use. A
//! source uses what its paths name. The check looks through re-exports, which are no use by
//! themselves. Tests do not count, nor does a folder's own file, which joins its modules.

use itertools::Itertools;
use petgraph::algo::tarjan_scc;
use petgraph::graphmap::DiGraphMap;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use syn::visit::{self, Visit};
use syn::{Item, ItemMod, ItemUse, Macro, Meta, UseTree, Visibility};
use walkdir::WalkDir;

/// Where `docs/ERRORS.md` has the error, and where the source has it.
const ERRORS: [(&str, &str); 6] = [
    ("cuda_vmm::VmmError", "cuda-vmm/src/error.rs"),
    (
        "cuda_vmm::pool::blocks::BlockError",
        "cuda-vmm/src/error/block.rs",
    ),
    ("candle_cuda_vmm::VmmError", "candle-cuda-vmm/src/error.rs"),
    (
        "candle_cuda_vmm::graph::GraphError",
        "candle-cuda-vmm/src/error/graph.rs",
    ),
    ("cuda_vmm_sys::LoadError", "cuda-vmm-sys/src/load.rs"),
    ("cuda_vmm_sim::SimError", "cuda-vmm-sim/src/simulator.rs"),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The sources below a folder and their paths, except for those below folders of another name.
fn sources(folder: &Path, except: &str) -> Vec<(PathBuf, String)> {
    let entries = WalkDir::new(folder).into_iter();
    let entries = entries.filter_entry(|entry| !entry.path().ends_with(except));
    let paths = entries.map(|entry| entry.expect("an entry").into_path());
    let paths = paths.filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    let source = |path: &PathBuf| fs::read_to_string(path).expect("a source");
    paths.map(|path| (path.clone(), source(&path))).collect()
}

/// The words of a source, without its comments, with a space around each.
fn words(source: &str) -> String {
    let code = source.lines();
    let code = code.filter(|line| !line.trim_start().starts_with("//"));
    let is_word = |letter: char| letter.is_alphanumeric() || letter == '_';
    let words = code.flat_map(|line| line.split(|letter| !is_word(letter)));
    format!(" {} ", words.filter(|word| !word.is_empty()).join(" "))
}

/// Whether one source has `Type`, or `Type::function`, or defines `macro!`.
fn has_item(words: &str, item: &str) -> bool {
    let has = |key: &str, name: &str| words.contains(&format!(" {key}{name} "));
    match item.strip_suffix('!') {
        Some(name) => has("macro_rules ", name),
        None => item.split("::").all(|name| {
            let is_type = name.starts_with(char::is_uppercase) && has("", name);
            is_type || has("fn ", name) || has("mod ", name)
        }),
    }
}

#[test]
fn the_map_names_what_is_there() {
    let page = fs::read_to_string(root().join("docs/ARCHITECTURE.md")).expect("the page");
    let folders = ["crates", "benches", "xtask"].into_iter();
    let sources = folders.flat_map(|folder| sources(&root().join(folder), "target"));
    let sources: Vec<_> = sources.map(|(_, source)| words(&source)).collect();
    let is_item = |span: &str| {
        span.contains("::") || span.ends_with('!') || span.starts_with(char::is_uppercase)
    };
    // The diagram is no prose.
    let prose = page.split("\n```").step_by(2);
    let spans = prose.flat_map(|text| text.split('`').skip(1).step_by(2));
    let missing = spans.filter(|span| match span.contains('/') {
        true => !root().join(span).exists(),
        false => is_item(span) && !sources.iter().any(|words| has_item(words, span)),
    });
    assert_eq!(missing.collect_vec(), [""; 0], "not in the tree");
}

#[test]
fn the_code_of_recipes_is_that_of_their_examples() {
    let read = |path: String| fs::read_to_string(root().join(path)).expect("the file");
    let recipes = [
        ("PAGED_ATTENTION", "paged_attention"),
        ("CAPTURED_STEPS", "captured_step"),
    ];
    for (page, name) in recipes {
        let page = read(format!("docs/{page}.md"));
        let example = read(format!("crates/candle-cuda-vmm/examples/{name}.rs"));
        let blocks = page.split("\n```rust\n").skip(1);
        let blocks = blocks.filter_map(|rest| rest.split("\n```").next());
        let missing = blocks.filter(|block| !example.contains(block));
        assert_eq!(missing.collect_vec(), [""; 0], "not in the example");
    }
}

/// The first cell of each row of the tables under a heading.
fn rows<'a>(page: &'a str, heading: &str) -> Vec<&'a str> {
    let section = page.split(&format!("\n## `{heading}`\n")).nth(1);
    let section = section.and_then(|rest| rest.split("\n## ").next());
    let lines = section.unwrap_or_default().lines();
    let cells = lines.filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    cells.collect()
}

#[test]
fn the_page_of_errors_has_every_variant() {
    let page = fs::read_to_string(root().join("docs/ERRORS.md")).expect("the page is there");
    for (path, file) in ERRORS {
        let source = fs::read_to_string(root().join("crates").join(file)).expect("the source");
        let items = syn::parse_file(&source).expect("Rust").items.into_iter();
        let mut errors = items.filter_map(|item| match item {
            Item::Enum(item) if path.ends_with(&format!("::{}", item.ident)) => Some(item),
            _ => None,
        });
        let (error, rows) = (errors.next().expect(path), rows(&page, path));
        assert!(error.variants.len() > 3, "{path}");
        for variant in error.variants {
            let name = variant.ident.to_string();
            let has = rows.contains(&&*name);
            assert!(has, "docs/ERRORS.md, {path}: {name} is missing");
        }
    }
}

/// Where crates begin.
const CRATES: [&str; 9] = [
    "crates/cuda-vmm/src",
    "crates/candle-cuda-vmm/src",
    "crates/cuda-vmm-sim/src",
    "benches/src",
    "benches/src/bin/bench",
    "benches/src/bin/bench-candle",
    "benches/src/bin/bench-serving",
    "benches/serve/src",
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
    let path = join(before, &last).trim_end_matches("::self").to_owned();
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
    for folder in CRATES.map(|folder| root().join(folder)) {
        let found = sources(&folder, "src/bin").into_iter();
        let modules = modules(found.map(|(path, text)| {
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
        circles(&modules(files.iter().map(owned)))
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
