//! Generates the bindings from the machine's `cuda.h`, or selects the hand-written declarations.

#[cfg(feature = "bindgen")]
#[macro_use]
#[path = "../src/names.rs"]
#[allow(unused_macros)]
mod names;

#[cfg(feature = "bindgen")]
mod allowlist;
#[cfg(feature = "bindgen")]
mod bindings;
#[cfg(feature = "bindgen")]
mod compiler;
#[cfg(feature = "bindgen")]
mod header;
#[cfg(feature = "bindgen")]
mod libclang;
#[cfg(feature = "bindgen")]
mod places;

fn main() {
    println!("cargo::rustc-check-cfg=cfg(cuda_vmm_sys_declared)");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=src/functions.rs");
    println!("cargo::rerun-if-changed=src/names.rs");
    println!("cargo::rerun-if-env-changed=DOCS_RS");

    let linux = std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|system| system == "linux");
    if !cfg!(feature = "bindgen") || !linux || std::env::var_os("DOCS_RS").is_some() {
        println!("cargo::rustc-cfg=cuda_vmm_sys_declared");
        return;
    }
    #[cfg(feature = "bindgen")]
    if let Err(problem) = generate() {
        eprintln!("\n{problem}\n");
        std::process::exit(1);
    }
}

#[cfg(feature = "bindgen")]
fn generate() -> Result<(), String> {
    let include = header::find()?;
    libclang::find()?;
    bindings::generate(&include)
}
