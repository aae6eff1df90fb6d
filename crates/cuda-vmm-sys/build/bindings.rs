//! Runs bindgen over the headers with an explicit allowlist.

use crate::{allowlist, compiler};
use bindgen::callbacks::{DeriveTrait, ImplementsTrait, ParseCallbacks};
use std::path::{Path, PathBuf};

/// From 13.2 on the header has `id` in an anonymous union with the same layout. One definition for
/// all headers keeps field access the same; the layout test checks it.
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

/// Writes `bindings.rs` to the output folder.
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
        // NVIDIA holds the copyright of the header's comments.
        .generate_comments(false)
        .prepend_enum_name(false)
        .formatter(bindgen::Formatter::None)
        .layout_tests(true);
    // These are macros of no type.
    builder = builder.allowlist_var("^CU_MEMHOSTREGISTER_[A-Z_]+$");
    // The wheel of libclang has no headers of its own, so it uses the C compiler's.
    let borrowed = compiler::include();
    if let Some(folder) = &borrowed {
        builder = builder
            .clang_arg("-idirafter")
            .clang_arg(folder.display().to_string());
    }
    for name in allowlist::types() {
        builder = builder.allowlist_type(format!("^{name}$"));
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    builder
        .generate()
        .map_err(|error| {
            let remedy = match borrowed {
                Some(_) => String::new(),
                None => format!("\n{}", compiler::missing()),
            };
            format!(
                "cuda-vmm-sys: bindgen could not read the headers in {}: {error}{remedy}",
                include.display()
            )
        })?
        .write_to_file(out.join("bindings.rs"))
        .map_err(|error| format!("cuda-vmm-sys: the bindings could not be written: {error}"))
}
