//! Command lines, those that cannot be followed among them, and the memory checker.

use crate::fake::{BAD, Fake, GPU, OPENS, printed};
use std::process::Command;

#[test]
fn what_cannot_be_followed_is_64_and_starts_nothing() {
    let fake = Fake::new("touch \"$0.asked\"; exit 2\n");
    for line in [
        "--unknown",
        "unknown",
        "--devices 3",
        "--driver other",
        "--only nonsense",
        "--only real,",
        "--only -",
        "--only 3",
        "--only core,pools",
        "--only simulated",
        "--driver simulated --only own-stream",
        "--devices 1 --only 2",
        "--sanitize --driver simulated",
        "--stress-seconds 0",
        "--sanitize --only facade",
        "--bundle folder",
        "program",
        "program unknown",
    ] {
        let output = fake.command(line).output().unwrap();
        let (code, printed) = (output.status.code(), printed(&output));
        assert_eq!(code, Some(64), "{line}: {printed}");
        assert!(!output.stderr.is_empty(), "{line}");
    }
    assert!(!fake.path().join("bundle/bin/probe.asked").exists());
    assert!(!fake.path().join("out/report.md").exists());
}

#[test]
fn in_place_too() {
    for line in [
        "--unknown",
        "--only nonsense",
        "--bundle folder --list",
        "program demo",
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        command.arg("gpu-test").args(line.split_whitespace());
        assert_eq!(command.output().unwrap().status.code(), Some(64), "{line}");
    }
}

#[test]
fn rows_for_two_devices_alone_are_none_on_a_machine_with_one() {
    let output = Fake::new(GPU).command("--only 2,core").output().unwrap();
    let (code, printed) = (output.status.code(), printed(&output));
    assert_eq!(code, Some(64), "{printed}");
    assert!(printed.contains("--devices 2"), "{printed}");
}

#[test]
fn listing_prints_names_and_starts_nothing() {
    let fake = Fake::new("touch \"$0.asked\"; exit 2\n");
    let output = fake.command("--list --only leaks,1").output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(
        printed(&output),
        "real/1/granularity/-/leaks\nreal/1/2MiB/-/leaks\nreal/1/16MiB/-/leaks\nreal/1/32MiB/-/leaks\n"
    );
    assert!(!fake.path().join("bundle/bin/probe.asked").exists());
}

/// A memory checker that runs the program, and has this to say.
fn sanitizer(summary: &str, code: &str) -> String {
    format!(
        "case \"$*\" in *'--tool memcheck --target-processes application-only'*) ;; *) exit 7 ;; esac\n\
        for program; do :; done\n\"$program\" || exit $?\necho '========= {summary}'\nexit {code}\n"
    )
}

#[test]
fn sanitized_rows_carry_the_summary() {
    let fake = Fake::new(GPU);
    let row = "real/1/2MiB/-/core-sanitized";
    let with_sanitizer = |summary: &str, code: &str| {
        fake.script("toolkit/bin/compute-sanitizer", &sanitizer(summary, code));
        let json = fake.path().join("out/report.json");
        let mut command = fake.command("--sanitize --json");
        command
            .env("CUDA_HOME", fake.path().join("toolkit"))
            .arg(&json);
        let output = command.output().unwrap();
        let text = std::fs::read_to_string(json).unwrap();
        let report: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(report["rows"].as_array().unwrap().len(), 1);
        assert_eq!(report["rows"][0]["name"], row);
        assert_eq!(report["rows"][0]["suite"], "core-sanitized");
        let note = report["rows"][0]["note"].as_str().unwrap().to_owned();
        (output.status.code().unwrap(), note)
    };
    let clean = "ERROR SUMMARY: 0 errors";
    let both = format!("conformance: {clean}; share: {clean}");
    assert_eq!(with_sanitizer(clean, "0"), (0, both));
    for (summary, code, said) in [
        (
            "ERROR SUMMARY: 3 errors",
            "86",
            "found errors; conformance: ERROR SUMMARY: 3 errors",
        ),
        // One that gives up has checked nothing.
        ("giving up", "0", "no summary"),
    ] {
        let (code, note) = with_sanitizer(summary, code);
        assert!(code == 1 && note.contains(said), "{code} {note}");
    }
    fake.program("cuda-vmm-share", &format!("{OPENS}{BAD}"));
    let (code, note) = with_sanitizer(clean, "0");
    assert!(
        code == 1 && note.contains("share: exit code 101, 1 tests failed"),
        "{code} {note}"
    );
}

#[test]
fn programs_that_are_no_test_get_their_arguments_and_answer_their_own_code() {
    let fake = Fake::new(GPU);
    fake.script("bundle/programs/demo", "echo \"demo $*\"; exit 5\n");
    let output = fake.command("program demo --help -x").output().unwrap();
    assert_eq!(output.status.code(), Some(5));
    assert_eq!(printed(&output), "demo --help -x\n");
    let printed = printed(&fake.command("program other").output().unwrap());
    assert!(printed.contains("it has demo"), "{printed}");
}
