//! The machine's C compiler, whose own headers libclang borrows.

use crate::places::WITHOUT;
use std::path::PathBuf;
use std::process::Command;

/// What to tell a user whose headers cannot be read, and who has no C compiler.
pub fn missing() -> String {
    format!(
        "No C compiler was found: neither does the variable CC name one, nor is there a `cc`, `gcc` or `clang`. cuda.h \
         includes headers of the C library and of the compiler (stdlib.h, stddef.h), which come with one.\n\
         To mend it, either\n  \
         - install one (for example `apt-get install gcc libc6-dev`), or\n  \
         - {WITHOUT}"
    )
}

/// The folder of the compiler's own headers.
pub fn include() -> Option<PathBuf> {
    println!("cargo::rerun-if-env-changed=CC");
    let named = std::env::var("CC").ok();
    let usual = ["cc", "gcc", "clang"];
    include_of(named.iter().map(String::as_str).chain(usual))
}

/// The folder of the headers of the first of these compilers that is there and has one.
pub fn include_of<'a>(mut compilers: impl Iterator<Item = &'a str>) -> Option<PathBuf> {
    compilers.find_map(|compiler| {
        // A variable may name a wrapper and options too, as in `ccache gcc -m64`.
        let mut words = compiler.split_whitespace();
        let output = Command::new(words.next()?)
            .args(words)
            .arg("-print-file-name=include")
            .output()
            .ok()?;
        let folder = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
        folder.is_dir().then_some(folder)
    })
}
