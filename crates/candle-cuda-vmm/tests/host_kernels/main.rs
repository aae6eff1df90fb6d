//! Runs the kernels of the feature `attention` on the host, without a GPU.
//!
//! A C++ compiler builds the same `.cu` files with functions in place of a GPU's instructions:
//! threads are fibers, and thread blocks run one after the other, in any order. The programs
//! compare random cases with plain loops. What must not be read is not a number.
#![cfg(feature = "attention")]

use std::path::Path;
use std::process::Command;

/// Builds a program of this folder and runs it. Each kernel has `rounds` random cases.
fn run(name: &str, rounds: u32) {
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/host_kernels");
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let built = Command::new(&compiler)
        .args(["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"])
        .arg("-Wno-unknown-pragmas")
        // The toolkit's headers have warnings of their own.
        .args(["-isystem", env!("CUDA_VMM_TOOLKIT_HEADERS"), "-o"])
        .args([&program, &folder.join(name).with_extension("cpp")])
        .output();
    let built = built.unwrap_or_else(|error| panic!("{}: {error}", compiler.display()));
    let text = String::from_utf8_lossy(&built.stderr);
    assert!(built.status.success(), "{}: {text}", compiler.display());
    // Another seed finds other cases.
    let seed = std::env::var("CUDA_VMM_TEST_SEED").unwrap_or_else(|_| "1".to_owned());
    let ran = Command::new(&program)
        .args([seed, rounds.to_string()])
        .output();
    let ran = ran.unwrap_or_else(|error| panic!("{}: {error}", program.display()));
    let text = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success(), "{name}: {}\n{text}", ran.status);
    println!("{text}");
}

#[test]
fn decode_is_a_softmax_in_double_precision() {
    run("decode", 3);
}

#[test]
fn writing_is_what_plain_loops_write() {
    run("write", 40);
}

#[test]
fn reading_is_what_plain_loops_read() {
    run("read", 40);
}

#[test]
fn a_layers_steps_are_plain_loops_in_double_precision() {
    run("fused", 80);
}

#[test]
fn tokens_are_those_of_a_sorted_row() {
    run("sample", 60);
}
