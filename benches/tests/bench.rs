//! The measuring program runs to its end on the simulated driver, and says so where there is no driver.

use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Output};

/// Runs the program, and answers what it put out and the list that it wrote.
fn run(name: &str, arguments: &[&str], no_driver: bool) -> (Output, Vec<Value>) {
    let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.json"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench"));
    command.args(arguments).arg("--json").arg(&file);
    if no_driver {
        command.env("CUDA_VMM_DRIVER_PATH", "/nowhere/libcuda.so.1");
    }
    let output = command.output().expect("the program starts");
    let text = std::fs::read(&file).unwrap_or_else(|_| panic!("no list: {output:?}"));
    let list = serde_json::from_slice(&text).expect("JSON");
    (output, list)
}

#[test]
fn on_the_simulated_driver_every_figure_is_measured_or_says_why_not() {
    let (output, list) = run(
        "simulated",
        &["--driver", "simulated", "--rounds", "1"],
        false,
    );
    assert!(output.status.success(), "{output:?}");
    assert!(list.len() > 20, "{list:?}");
    for finding in &list {
        let (name, ours, note) = (&finding["name"], &finding["ours"], &finding["note"]);
        assert!(ours.is_number() || note.is_string(), "{finding}");
        assert_ne!(finding["pass"], false, "{finding}");
        // Times of a simulated driver are no times.
        let is_time = finding["unit"] != "calls" && finding["unit"] != "bytes";
        assert!(!is_time || finding["pass"].is_null(), "{name}");
    }
}

#[test]
fn without_a_driver_every_figure_is_reported_without_a_verdict() {
    let (output, list) = run("nowhere", &[], true);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(!list.is_empty());
    for finding in &list {
        assert!(finding["pass"].is_null() && finding["ours"].is_null());
        let note = finding["note"].as_str().expect("a note");
        assert!(note.contains("/nowhere/libcuda.so.1"), "{note}");
    }
    assert!(String::from_utf8_lossy(&output.stderr).contains("no GPU answers"));
}

#[test]
fn only_some_work_can_be_asked_for_but_not_none() {
    let (output, list) = run(
        "only",
        &["--driver", "simulated", "--rounds", "1", "--only", "slack"],
        false,
    );
    assert!(output.status.success(), "{output:?}");
    assert_eq!(list.len(), 2);
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench"));
    let output = command.args(["--only", "nonsense"]).output();
    let output = output.expect("the program starts");
    assert_eq!(output.status.code(), Some(1));
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench"));
    let output = command.args(["--rounds", "0"]).output();
    assert_eq!(output.expect("it starts").status.code(), Some(64));
}
