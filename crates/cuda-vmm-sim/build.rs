//! Gives the shared library the name by which programs look for the CUDA driver.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let exported = std::env::var_os("CARGO_FEATURE_CDYLIB").is_some();
    let linux = std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|system| system == "linux");
    if exported && linux {
        println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libcuda.so.1");
    }
}
