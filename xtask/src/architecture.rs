//! `docs/ARCHITECTURE.md` names paths and items that are there.

use std::fs;
use std::path::Path;
use walkdir::WalkDir;

/// The words of each source below a folder, without its comments, with a space around each.
fn sources(folder: &Path) -> Vec<String> {
    let entries = WalkDir::new(folder).into_iter();
    let entries = entries.filter_entry(|entry| !entry.path().ends_with("target"));
    let paths = entries.map(|entry| entry.expect("an entry").into_path());
    let paths = paths.filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    let words = paths.map(|path| {
        let source = fs::read_to_string(&path).expect("a source");
        let code = source.lines();
        let code = code.filter(|line| !line.trim_start().starts_with("//"));
        let is_word = |letter: char| letter.is_alphanumeric() || letter == '_';
        let words = code.flat_map(|line| line.split(|letter| !is_word(letter)));
        let words: Vec<_> = words.filter(|word| !word.is_empty()).collect();
        format!(" {} ", words.join(" "))
    });
    words.collect()
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
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let page = fs::read_to_string(root.join("docs/ARCHITECTURE.md")).expect("the page");
    let sources = ["crates", "benches", "xtask"].map(|folder| sources(&root.join(folder)));
    let sources = sources.concat();
    let is_item = |span: &str| {
        span.contains("::") || span.ends_with('!') || span.starts_with(char::is_uppercase)
    };
    // The diagram is no prose.
    let prose = page.split("\n```").step_by(2);
    let spans = prose.flat_map(|text| text.split('`').skip(1).step_by(2));
    let missing = spans.filter(|span| match span.contains('/') {
        true => !root.join(span).exists(),
        false => is_item(span) && !sources.iter().any(|words| has_item(words, span)),
    });
    let missing: Vec<_> = missing.collect();
    assert!(missing.is_empty(), "not in the tree: {missing:?}");
}
