//! Finds the machine's C compiler, whose headers libclang uses.

use crate::places::WITHOUT;
use std::path::PathBuf;
use std::process::Command;

/// Returns the message for a machine without a C compiler, if the CUDA headers cannot be read.
pub fn missing() -> String {
    format!(
        "No C compiler was found: neither does the variable CC name one, nor is there a `cc`, `gcc` or `clang`. cuda.h \
         includes headers of the C library and of the compiler (stdlib.h, stddef.h), which come with one.\n\
         To mend it, either\n  \
         - install one (for example `apt-get install gcc libc6-dev`), or\n  \
         - {WITHOUT}"
    )
}

/// Returns the folder of the compiler's own headers.
pub fn include() -> Option<PathBuf> {
    println!("cargo::rerun-if-env-changed=CC");
    let named = std::env::var("CC").ok();
    let usual = ["cc", "gcc", "clang"];
    include_of(named.iter().map(String::as_str).chain(usual))
}

/// Returns the folder of the headers of the first of these compilers that exists and has one.
pub fn include_of<'a>(mut compilers: impl Iterator<Item = &'a str>) -> Option<PathBuf> {
    compilers.find_map(|compiler| {
        // The variable may contain a wrapper and options, as in `ccache gcc -m64`.
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
