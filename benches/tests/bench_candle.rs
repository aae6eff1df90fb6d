//! The measuring program of Candle's part runs to its end on a CPU, and says so where there is no
//! GPU.

mod support;

use support::{exit_code, run};

const BENCH: &str = env!("CARGO_BIN_EXE_bench-candle");

#[test]
fn on_a_cpu_every_figure_is_measured_and_only_counts_are_judged() {
    let (output, list) = run(BENCH, "candle-cpu", &["--device", "cpu"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(list.len(), 19, "{list:?}");
    let mut judged = Vec::new();
    for finding in &list {
        let name = finding["name"].as_str().expect("a name");
        let ours = finding["ours"].as_f64();
        assert!(ours.is_some_and(|ours| ours > 0.0), "{finding}");
        let is_open = name.contains("view") || finding["ratio"].is_number();
        assert!(is_open, "{finding}");
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
    let (output, list) = run(BENCH, "candle-blocks", &arguments);
    assert!(output.status.success(), "{output:?}");
    let note = list[0]["note"].as_str().expect("a note");
    let (_, curve) = note.split_once("committed: ").expect("a curve");
    let mebibytes: Vec<u32> = curve
        .split(", ")
        .map(|point| point.split(' ').nth(2).expect("a size").parse())
        .collect::<Result<_, _>>()
        .expect("numbers");
    let most = *mebibytes.iter().max().expect("points");
    let (first, last) = (mebibytes[0], mebibytes[mebibytes.len() - 1]);
    assert!(first < most && last < most / 2, "{curve}");
}

#[cfg(not(feature = "cuda"))]
#[test]
fn without_a_gpu_every_figure_is_reported_without_a_verdict() {
    let (output, list) = run(BENCH, "candle-nowhere", &[]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert_eq!(list.len(), 19);
    for finding in &list {
        assert!(finding["pass"].is_null() && finding["ours"].is_null());
        let note = finding["note"].as_str().expect("a note");
        assert!(note.contains("no GPU answers"), "{note}");
    }
}

#[test]
fn wrong_usage_has_an_exit_code_of_its_own() {
    assert_eq!(exit_code(BENCH, &["--device", "abacus"]), Some(64));
}
