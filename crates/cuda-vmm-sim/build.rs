//! Gives the shared library, the example `cuda`, the name by which programs look for the CUDA driver. Cargo has
//! no way to say this of one example; linkers heed it for shared libraries only.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|system| system == "linux") {
        println!("cargo::rustc-link-arg=-Wl,-soname,libcuda.so.1");
    }
}
