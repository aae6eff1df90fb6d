//! Generates the bindings and the C witness from the `cuda.h` of the machine that builds.

mod allowlist;
mod bindings;
mod header;
mod libclang;
mod places;

fn main() {
    println!("cargo::rustc-check-cfg=cfg(cuda_vmm_sys_declared)");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-env-changed=DOCS_RS");

    let linux = std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|system| system == "linux");
    if !linux || std::env::var_os("DOCS_RS").is_some() {
        println!("cargo::rustc-cfg=cuda_vmm_sys_declared");
        return;
    }
    if let Err(problem) = generate() {
        eprintln!("\n{problem}\n");
        std::process::exit(1);
    }
}

fn generate() -> Result<(), String> {
    let include = header::find()?;
    libclang::find()?;
    bindings::generate(&include)?;
    // The witness answers to tests only; a program that does not ask it does not contain it.
    cc::Build::new()
        .file("build/witness.c")
        .include(&include)
        .std("c11")
        .try_compile("cuda_vmm_witness")
        .map_err(|error| format!("cuda-vmm-sys: the C compiler could not compile build/witness.c against {}: {error}", include.display()))
}
