//! Running a measuring program, and reading the list of figures that it writes.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

/// Runs a program, which writes its list to a file of this name; returns its output and the list.
#[allow(dead_code, reason = "each test uses a part")]
pub fn run(program: &str, name: &str, arguments: &[&str]) -> (Output, Vec<Value>) {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.json"));
    let mut command = Command::new(program);
    // A driver that is not there, for runs on the real one.
    command.env("CUDA_VMM_DRIVER_PATH", "/nowhere/libcuda.so.1");
    let output = command.args(arguments).arg("--json").arg(&file).output();
    let output = output.expect("the program starts");
    let text = std::fs::read(&file).unwrap_or_else(|_| panic!("no list: {output:?}"));
    (output, serde_json::from_slice(&text).expect("JSON"))
}

/// The exit code of a program that fails before it measures.
pub fn exit_code(program: &str, arguments: &[&str]) -> Option<i32> {
    let output = Command::new(program).args(arguments).output();
    output.expect("the program starts").status.code()
}
