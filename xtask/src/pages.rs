//! `docs/ARCHITECTURE.md` names what is there, and `docs/ERRORS.md` every public error's variants.

use std::fs;
use std::path::{Path, PathBuf};
use syn::Item;
use walkdir::WalkDir;

/// Where `docs/ERRORS.md` has the error, and where the source has it.
const ERRORS: [(&str, &str); 5] = [
    ("cuda_vmm::VmmError", "cuda-vmm/src/error.rs"),
    (
        "cuda_vmm::pool::blocks::BlockError",
        "cuda-vmm/src/error/block.rs",
    ),
    ("candle_cuda_vmm::VmmError", "candle-cuda-vmm/src/error.rs"),
    ("cuda_vmm_sys::LoadError", "cuda-vmm-sys/src/load.rs"),
    ("cuda_vmm_sim::SimError", "cuda-vmm-sim/src/simulator.rs"),
];

pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The sources below a folder and their paths, except for those below folders of another name.
pub fn sources(folder: &Path, except: &str) -> Vec<(PathBuf, String)> {
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
    let words: Vec<_> = words.filter(|word| !word.is_empty()).collect();
    format!(" {} ", words.join(" "))
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
    let missing: Vec<_> = missing.collect();
    assert!(missing.is_empty(), "not in the tree: {missing:?}");
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
