//! The `run` script, tried with a bundle of small scripts in place of the binaries.

use super::{RUN, files};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const GPU: &str = "#!/bin/sh\nprintf 'cuda=13.0\\ndevices=1\\nname=Test GPU\\n'\n";
const NO_GPU: &str = "#!/bin/sh\necho reason=no driver library\nexit 2\n";
const GOOD: &str = "#!/bin/sh\n[ \"$CUDA_VMM_TEST_DRIVER\" = real ] || exit 9\n\
    echo 'test result: ok. 7 passed; 0 failed; 0 ignored'\n";
/// As a program that opens the driver: what the dynamic loader would write then.
const OPENS: &str = "#!/bin/sh\n\
    echo 'calling init: /usr/lib/libcuda.so.1' >\"$LD_DEBUG_OUTPUT.1\"\n\
    echo a demo\necho 'test result: ok. 7 passed; 0 failed; 0 ignored'\n";
const BAD: &str = "#!/bin/sh\necho 'what went wrong'\necho 'test result: FAILED. 3 passed; 1 failed; 0 ignored'\nexit 101\n";
const EMPTY: &str = "#!/bin/sh\necho 'test result: ok. 0 passed; 0 failed; 4 ignored'\n";

struct Bundle(PathBuf);

impl Bundle {
    fn new(name: &str, probe: &str, rows: &[(&str, &str)], libraries: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("xtask-run-{name}-{}", std::process::id()));
        files::remove_tree(&folder).unwrap();
        let stage = folder.join("stage");
        files::make(&stage.join("bin")).unwrap();
        let program = |file: &str, text: &str| {
            let path = stage.join("bin").join(file);
            fs::write(&path, text).unwrap();
            files::executable(&path).unwrap();
        };
        program("probe", probe);
        let mut text = String::new();
        for (index, (kind, script)) in rows.iter().enumerate() {
            program(&format!("row{index}"), script);
            text += &format!("{kind}\trow{index}\t{kind} {index}\n");
        }
        fs::write(stage.join("rows"), text).unwrap();
        fs::write(stage.join("libraries"), libraries).unwrap();
        fs::write(stage.join("built"), "Built from: commit abc\n").unwrap();
        let packed = Command::new("tar")
            .arg("-czf")
            .arg(folder.join("bundle.tar.gz"))
            .arg("-C")
            .arg(&stage)
            .arg(".")
            .status()
            .unwrap();
        assert!(packed.success());
        fs::write(folder.join("run"), RUN).unwrap();
        Self(folder)
    }

    /// The exit code and the report.
    fn run(&self, arguments: &[&str]) -> (i32, String) {
        let status = Command::new("sh")
            .arg(self.0.join("run"))
            .args(arguments)
            .env_remove("OUT")
            .env("LD_LIBRARY_PATH", self.0.join("cuda"))
            .output()
            .unwrap()
            .status;
        let report = fs::read_to_string(self.0.join("report.md")).unwrap_or_default();
        (status.code().unwrap(), report)
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = files::remove_tree(Path::new(&self.0));
    }
}

#[test]
fn all_rows_passing_is_0_and_the_report_names_the_gpu() {
    let bundle = Bundle::new("pass", GPU, &[("core", GOOD), ("program", OPENS)], "");
    let (code, report) = bundle.run(&[]);
    assert_eq!(code, 0, "{report}");
    for part in [
        "| GPU | Test GPU |",
        "| Built from | commit abc |",
        "| core 0 | PASS |",
        "| 7 |",
        "| 7 | simulated |",
        "| 7 | real |",
        "2 PASS, 0 FAIL, 0 SKIPPED; 1 rows opened the real driver",
        "a demo",
    ] {
        assert!(report.contains(part), "{part} in {report}");
    }
}

#[test]
fn a_failing_row_is_1_and_its_log_stands_in_the_report() {
    let bundle = Bundle::new("fail", GPU, &[("core", GOOD), ("core", BAD)], "");
    let (code, report) = bundle.run(&[]);
    assert_eq!(code, 1, "{report}");
    assert!(report.contains("| core 1 | FAIL |"), "{report}");
    assert!(report.contains("what went wrong"), "{report}");
}

#[test]
fn a_row_in_which_no_test_ran_is_no_pass() {
    let bundle = Bundle::new("empty", GPU, &[("core", EMPTY)], "");
    let (code, report) = bundle.run(&[]);
    assert_eq!(code, 1, "{report}");
    assert!(report.contains("no test ran"), "{report}");
}

#[test]
fn without_a_gpu_every_row_is_skipped_by_name() {
    let bundle = Bundle::new("none", NO_GPU, &[("core", GOOD), ("candle", GOOD)], "");
    let (code, report) = bundle.run(&[]);
    assert_eq!(code, 2, "{report}");
    assert!(report.contains("| core 0 | SKIPPED |"), "{report}");
    assert!(report.contains("| candle 1 | SKIPPED |"), "{report}");
}

#[test]
fn a_driver_that_fails_is_a_failure() {
    let probe = "#!/bin/sh\necho reason=cuInit answered code 999\nexit 1\n";
    let bundle = Bundle::new("broken", probe, &[("core", GOOD)], "");
    let (code, report) = bundle.run(&[]);
    assert_eq!(code, 1, "{report}");
    assert!(report.contains("999"), "{report}");
}

#[test]
fn only_the_candle_rows_are_skipped_where_their_libraries_are_missing() {
    let rows = [("core", GOOD), ("candle", OPENS)];
    let bundle = Bundle::new("libraries", GPU, &rows, "libxtask-absent.so.13\n");
    let (code, report) = bundle.run(&[]);
    assert_eq!(code, 2, "{report}");
    assert!(report.contains("| core 0 | PASS |"), "{report}");
    assert!(
        report.contains("| candle 1 | SKIPPED |")
            && report.contains("missing libxtask-absent.so.13"),
        "{report}"
    );

    files::make(&bundle.0.join("cuda")).unwrap();
    fs::write(bundle.0.join("cuda/libxtask-absent.so.13"), "").unwrap();
    let (code, report) = bundle.run(&[]);
    assert_eq!(code, 0, "{report}");
}

#[test]
fn a_demo_that_simulates_is_a_failure_and_so_is_a_report_without_the_driver() {
    let bundle = Bundle::new("simulates", GPU, &[("program", GOOD)], "");
    let (code, report) = bundle.run(&[]);
    assert_eq!(code, 1, "{report}");
    assert!(report.contains("did not open the real driver"), "{report}");

    let bundle = Bundle::new("only", GPU, &[("core", GOOD)], "");
    assert_eq!(bundle.run(&[]).0, 1);
}

#[test]
fn arguments_are_a_usage_error() {
    let bundle = Bundle::new("usage", GPU, &[("core", GOOD)], "");
    assert_eq!(bundle.run(&["--unknown"]).0, 64);
}

#[test]
fn the_script_is_well_formed() {
    let bundle = Bundle::new("syntax", GPU, &[], "");
    let status = Command::new("sh")
        .arg("-n")
        .arg(bundle.0.join("run"))
        .status()
        .unwrap();
    assert!(status.success());
}
