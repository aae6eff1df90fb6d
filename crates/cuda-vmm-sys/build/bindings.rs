//! Runs bindgen over the headers with an explicit allowlist.

use crate::allowlist;
use bindgen::callbacks::{DeriveTrait, ImplementsTrait, ParseCallbacks};
use std::path::{Path, PathBuf};

/// From 13.2 on the header puts `id` into an anonymous union; the layout is what it always was. One
/// definition for all headers keeps field access the same, and the witness checks it.
const LOCATION: &str = "\
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct CUmemLocation_st {
    pub type_: CUmemLocationType,
    pub id: ::std::os::raw::c_int,
}";

#[derive(Debug)]
struct LocationIsPlain;

impl ParseCallbacks for LocationIsPlain {
    fn blocklisted_type_implements_trait(
        &self,
        name: &str,
        derived: DeriveTrait,
    ) -> Option<ImplementsTrait> {
        let plain = matches!(derived, DeriveTrait::Copy | DeriveTrait::Debug);
        (name.contains("CUmemLocation_st") && plain).then_some(ImplementsTrait::Yes)
    }
}

/// Writes `bindings.rs` into the output folder.
pub fn generate(include: &Path) -> Result<(), String> {
    let mut builder = bindgen::builder()
        .header_contents(
            "cuda_vmm_sys.h",
            "#include <cuda.h>\n#include <cudaTypedefs.h>\n",
        )
        .clang_arg(format!("-I{}", include.display()))
        .parse_callbacks(Box::new(LocationIsPlain))
        .blocklist_type("CUmemLocation_st")
        .raw_line(LOCATION)
        // The header's comments are NVIDIA's text.
        .generate_comments(false)
        .prepend_enum_name(false)
        .formatter(bindgen::Formatter::None)
        .layout_tests(true);
    // The wheel of libclang has no resource headers, so it borrows the C compiler's.
    if let Some(folder) = compiler_include() {
        builder = builder
            .clang_arg("-idirafter")
            .clang_arg(folder.display().to_string());
    }
    for name in allowlist::TYPES.iter().copied().chain(function_types()) {
        builder = builder.allowlist_type(format!("^{name}$"));
    }
    for name in allowlist::MACROS {
        builder = builder.allowlist_var(format!("^{name}$"));
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    builder
        .generate()
        .map_err(|error| {
            format!(
                "cuda-vmm-sys: bindgen could not read the headers in {}: {error}",
                include.display()
            )
        })?
        .write_to_file(out.join("bindings.rs"))
        .map_err(|error| format!("cuda-vmm-sys: the bindings could not be written: {error}"))
}

/// The function-pointer types named in the one list of entry points.
fn function_types() -> impl Iterator<Item = &'static str> {
    println!("cargo::rerun-if-changed=src/functions.rs");
    include_str!("../src/functions.rs")
        .split(|character: char| !character.is_ascii_alphanumeric() && character != '_')
        .filter(|word| word.starts_with("PFN_cu") && !allowlist::DECLARED.contains(word))
}

fn compiler_include() -> Option<PathBuf> {
    let compiler = cc::Build::new().try_get_compiler().ok()?;
    let output = compiler
        .to_command()
        .arg("-print-file-name=include")
        .output()
        .ok()?;
    let folder = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
    folder.is_dir().then_some(folder)
}
