//! The measuring programs run to their ends without a GPU, and say so if they want one.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const BENCH: &str = env!("CARGO_BIN_EXE_bench");
const CANDLE: &str = env!("CARGO_BIN_EXE_bench-candle");
const SERVING: &str = env!("CARGO_BIN_EXE_bench-serving");

fn output(program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(program);
    // A driver that is not there, for runs on the real one.
    command.env("CUDA_VMM_DRIVER_PATH", "/nowhere/libcuda.so.1");
    let output = command.args(arguments).output();
    output.expect("the program starts")
}

/// Runs a program, which writes its list of figures to a file of this name; returns both.
fn run(program: &str, name: &str, arguments: &[&str]) -> (Output, Vec<Value>) {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.json"));
    let json = ["--json", file.to_str().expect("a path")];
    let output = output(program, &[arguments, &json].concat());
    let text = std::fs::read(&file).unwrap_or_else(|_| panic!("no list: {output:?}"));
    (output, serde_json::from_slice(&text).expect("JSON"))
}

/// The exit code of a program that fails before it measures.
fn exit_code(program: &str, arguments: &[&str]) -> Option<i32> {
    output(program, arguments).status.code()
}

/// Every figure is reported without a verdict, with a note that has these words.
fn assert_no_verdicts((output, list): &(Output, Vec<Value>), words: &str) {
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(!list.is_empty());
    for finding in list {
        assert!(finding["pass"].is_null() && finding["ours"].is_null());
        let note = finding["note"].as_str().expect("a note");
        assert!(note.contains(words), "{note}");
    }
}

#[test]
fn on_the_simulated_driver_every_figure_is_measured_or_says_why_not() {
    let arguments = ["--driver", "simulated", "--rounds", "1"];
    let (output, list) = run(BENCH, "simulated", &arguments);
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
    let ran = run(BENCH, "nowhere", &[]);
    assert_no_verdicts(&ran, "/nowhere/libcuda.so.1");
    assert!(String::from_utf8_lossy(&ran.0.stderr).contains("no GPU answers"));
}

#[test]
fn only_some_work_can_be_asked_for_but_not_none() {
    let arguments = ["--driver", "simulated", "--rounds", "1", "--only", "slack"];
    let (output, list) = run(BENCH, "only", &arguments);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(list.len(), 2);
    assert_eq!(exit_code(BENCH, &["--only", "nonsense"]), Some(1));
}

#[test]
fn wrong_usage_has_an_exit_code_of_its_own() {
    assert_eq!(exit_code(BENCH, &["--rounds", "0"]), Some(64));
    assert_eq!(exit_code(CANDLE, &["--device", "abacus"]), Some(64));
    assert_eq!(exit_code(SERVING, &["--nonsense"]), Some(64));
}

#[test]
fn on_a_cpu_every_figure_is_measured_and_only_counts_are_judged() {
    let (output, list) = run(CANDLE, "candle-cpu", &["--device", "cpu"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(list.len(), 59, "{list:?}");
    let mut judged = Vec::new();
    for finding in &list {
        let name = finding["name"].as_str().expect("a name");
        let ours = finding["ours"].as_f64();
        assert!(ours.is_some_and(|ours| ours > 0.0), "{finding}");
        let has_no_peer = [
            "view",
            "fork",
            "eager",
            "write",
            "replay",
            "captures",
            "limit for one",
        ]
        .iter()
        .any(|word| name.contains(word));
        assert!(has_no_peer || finding["ratio"].is_number(), "{finding}");
        if !finding["pass"].is_null() {
            judged.push((name, finding["pass"] == true));
        }
    }
    let reclaimed = "blocks, busy, idle, reclaimed, prefix cache warm before: live and pinned";
    assert_eq!(judged, [(reclaimed, true)]);
}

#[test]
fn the_curve_of_blocks_goes_up_and_comes_down() {
    let arguments = ["--device", "cpu", "--only", "blocks"];
    let (output, list) = run(CANDLE, "candle-blocks", &arguments);
    assert!(output.status.success(), "{output:?}");
    let note = list[0]["note"].as_str().expect("a note");
    let (_, curve) = note.split_once("committed: ").expect("a curve");
    let sizes = curve.split(", ").map(|point| point.split(' ').nth(2));
    let sizes = sizes.map(|size| size.expect("a size").parse().expect("a number"));
    let mebibytes: Vec<u32> = sizes.collect();
    let most = *mebibytes.iter().max().expect("points");
    let (first, last) = (mebibytes[0], mebibytes[mebibytes.len() - 1]);
    assert!(first < most && last < most / 2, "{curve}");
}

#[cfg(not(feature = "attention"))]
#[test]
fn without_a_gpu_every_figure_is_reported_without_a_verdict() {
    let ran = run(CANDLE, "candle-nowhere", &[]);
    assert_no_verdicts(&ran, "no GPU answers");
    assert_eq!(ran.1.len(), 59);
}

fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("serving-{name}"));
    std::fs::create_dir_all(&folder).expect("a folder");
    folder
}

/// Simulates serving in its short form, and returns its list of figures.
fn serve(arguments: &[&str], folder: &Path) -> Vec<Value> {
    let plots = folder.join("plots");
    let short = ["--quick", "--plots", plots.to_str().expect("a path")];
    let name = folder.file_name().and_then(|name| name.to_str());
    let arguments = [&short, arguments].concat();
    let (output, list) = run(SERVING, name.expect("a name"), &arguments);
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
    let list = serve(&[], &folder);
    let names = names(&list);
    let expected: Vec<_> = include_str!("serving.txt").lines().collect();
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
    let first = serve(&arguments, &folder);
    let figures = "mean time to first token; p99 time to first token; mean time per token";
    for figure in figures.split("; ") {
        let name = format!("(b) 2 traces, 4 times as slow: {figure}: page at a time");
        assert!(names(&first).contains(&name.as_str()), "{name} is missing");
    }
    assert_eq!(first, serve(&arguments, &folder));
}

#[test]
fn a_trace_that_cannot_be_read_is_an_error_that_names_it() {
    let output = output(SERVING, &["--trace", "/nowhere/trace.csv"]);
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&output.stderr);
    let expected = "cannot open the trace /nowhere/trace.csv";
    assert!(errors.contains(expected), "{errors}");
}
