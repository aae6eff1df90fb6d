//! The simulation of serving runs to its end in its short form, and tells every figure.

mod support;

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use support::{exit_code, run};

const BENCH: &str = env!("CARGO_BIN_EXE_bench-serving");

fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("serving-{name}"));
    std::fs::create_dir_all(&folder).expect("a folder");
    folder
}

/// Runs it in its short form, and returns its list of figures.
fn list(arguments: &[&str], folder: &Path) -> Vec<Value> {
    let plots = folder.join("plots");
    let short = ["--quick", "--plots", plots.to_str().expect("a path")];
    let name = folder.file_name().and_then(|name| name.to_str());
    let arguments = [&short, arguments].concat();
    let (output, list) = run(BENCH, name.expect("a name"), &arguments);
    assert!(output.status.success(), "{output:?}");
    list
}

fn names(list: &[Value]) -> Vec<&str> {
    let names = list.iter().map(|finding| finding["name"].as_str());
    names.map(|name| name.expect("a name")).collect()
}

#[test]
fn every_workload_has_its_rows_which_a_short_run_does_not_judge() {
    let folder = folder("all");
    let list = list(&[], &folder);
    let names = names(&list);
    let expected: Vec<_> = include_str!("support/bench_serving.txt").lines().collect();
    assert_eq!(names, expected);
    for finding in &list {
        assert!(finding["pass"].is_null(), "{finding}");
        let has_ratio = finding["ratio"].as_f64().is_some_and(|ratio| ratio > 0.0);
        assert_eq!(has_ratio, finding["name"] != "(b) traces", "{finding}");
    }
    let absent = list.iter().find(|finding| finding["name"] == "(b) traces");
    let note = &absent.expect("it is told")["note"];
    assert_eq!(note, "not run: no trace was given (--trace FILE)");
    for plot in ["ramps", "ramps-12", "ramps-20", "idle", "single"] {
        let svg = std::fs::read_to_string(folder.join("plots").join(format!("{plot}.svg")));
        assert!(svg.expect("a plot").contains("</svg>"), "{plot}");
    }
}

fn never_slower(workload: &str) -> [String; 3] {
    [
        "mean time to first token",
        "p99 time to first token",
        "mean time per token",
    ]
    .map(|figure| format!("{workload}: {figure}: page at a time"))
}

#[test]
fn traces_are_replayed_and_a_run_is_the_same_again() {
    let folder = folder("traces");
    let trace = folder.join("trace.csv");
    let mut text = "TIMESTAMP,ContextTokens,GeneratedTokens\n".to_owned();
    for second in 10..40 {
        text += &format!("2023-11-16 18:15:{second}.5,{},{}\n", 100 * second, second);
    }
    std::fs::write(&trace, text).expect("a trace");
    let trace = trace.to_str().expect("a path");
    let arguments = ["--trace", trace, "--trace", trace];
    let first = list(&arguments, &folder);
    for name in never_slower("(b) 2 traces, 4 times as slow") {
        assert!(names(&first).contains(&name.as_str()), "{name} is missing");
    }
    assert_eq!(first, list(&arguments, &folder));
}

#[test]
fn a_trace_that_cannot_be_read_is_an_error_that_names_it() {
    let mut command = Command::new(BENCH);
    let output = command.args(["--trace", "/nowhere/trace.csv"]).output();
    let output = output.expect("the program starts");
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&output.stderr);
    let expected = "cannot open the trace /nowhere/trace.csv";
    assert!(errors.contains(expected), "{errors}");
    assert_eq!(exit_code(BENCH, &["--nonsense"]), Some(64));
}
