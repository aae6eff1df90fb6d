//! Turns the model checker on for this package.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cfg=model_check");
    // The sources ask for features of `cuda-vmm` that this package has not.
    println!("cargo:rustc-check-cfg=cfg(feature, values(\"bindgen\", \"serde\", \"simulator\"))");
}
