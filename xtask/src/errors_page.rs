//! `docs/ERRORS.md` has every variant of every public error.

use std::fs;
use std::path::Path;
use syn::Item;

/// Where the page has the error, and where the source has it.
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
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let page = fs::read_to_string(root.join("docs/ERRORS.md")).expect("the page is there");
    for (path, file) in ERRORS {
        let source = fs::read_to_string(root.join("crates").join(file)).expect("the source");
        let items = syn::parse_file(&source).expect("Rust").items.into_iter();
        let mut errors = items.filter_map(|item| match item {
            Item::Enum(item) if path.ends_with(&format!("::{}", item.ident)) => Some(item),
            _ => None,
        });
        let (error, rows) = (errors.next().expect(path), rows(&page, path));
        assert!(error.variants.len() > 3, "{path}");
        let names = error
            .variants
            .iter()
            .map(|variant| variant.ident.to_string());
        for name in names {
            let has = rows.contains(&&*name);
            assert!(has, "docs/ERRORS.md, {path}: {name} is missing");
        }
    }
}
