//! The measuring program runs to its end on the simulated driver, and says so where there is no
//! driver.

mod support;

use support::{exit_code, run};

const BENCH: &str = env!("CARGO_BIN_EXE_bench");

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
    let (output, list) = run(BENCH, "nowhere", &[]);
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
    let arguments = ["--driver", "simulated", "--rounds", "1", "--only", "slack"];
    let (output, list) = run(BENCH, "only", &arguments);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(list.len(), 2);
    assert_eq!(exit_code(BENCH, &["--only", "nonsense"]), Some(1));
    assert_eq!(exit_code(BENCH, &["--rounds", "0"]), Some(64));
}
