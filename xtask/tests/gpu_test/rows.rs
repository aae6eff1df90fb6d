//! What becomes of rows.

use crate::fake::{BAD, BROKEN, CLOSED, EMPTY, Fake, GPU, NO_GPU, OPENS, TWO_GPUS};
use serde_json::{Value, json};
use std::fs;
use std::time::{Duration, Instant};

const ROW: &str = "real/1/2MiB/-/core";
const ONE: &str = "--only real/1/2MiB/-/core";

#[test]
fn all_rows_passing_is_0_and_the_report_names_the_machine() {
    let ran = Fake::new(GPU).run("").ends(0);
    for part in [
        "| GPU | Test GPU |",
        "| GPUs | 1 |",
        "| Built from | commit abc |",
        "| real | 1 | 16MiB | own-stream | facade | PASS |",
        "24 PASS, 0 FAIL, 0 SKIPPED",
        "24 rows for two devices were not asked for",
    ] {
        assert!(ran.report.contains(part), "{part} in {}", ran.report);
    }
    for part in [
        "PASS    real/1/2MiB/-/core",
        "24 PASS, 0 FAIL, 0 SKIPPED",
        "--devices 2",
    ] {
        assert!(ran.printed.contains(part), "{part} in {}", ran.printed);
    }
    assert!(!ran.printed.contains('\u{1b}'), "{}", ran.printed);
}

#[test]
fn the_json_report_has_every_field() {
    let ran = Fake::new(TWO_GPUS).run("--only facade,2,32MiB --only real/2/2MiB/-/core");
    let ran = ran.ends(0);
    let machine = &ran.json["machine"];
    let (gpu, commit) = (&machine["gpu"], &machine["commit"]);
    let cuda = (&machine["gpus"], &machine["cuda"]);
    assert_eq!((gpu, commit), (&json!("Test GPU"), &json!("abc")));
    assert_eq!(cuda, (&json!(2), &json!("13.0")));
    let others = "driver kernel date command compiler candle_kernels cuda_libraries";
    for key in others.split(' ') {
        assert!(machine.get(key).is_some(), "{key} in {machine}");
    }
    let counts = ["passed", "failed", "skipped"].map(|state| &ran.json[state]);
    assert_eq!(counts, [3, 0, 0]);
    for (page, candle_device, suite) in [
        ("32MiB", json!("own-stream"), "facade"),
        ("2MiB", Value::Null, "core"),
    ] {
        let name = format!(
            "real/2/{page}/{}/{suite}",
            candle_device.as_str().unwrap_or("-")
        );
        let row = ran.row(&name);
        assert!(row["seconds"].is_f64());
        let expected = json!({
            "name": name, "driver": "real", "devices": 2, "page": page, "candle_device": candle_device,
            "suite": suite, "state": "PASS", "seconds": row["seconds"],
            "tests_passed": 14, "tests_failed": 0, "note": "",
        });
        assert_eq!(*row, expected);
    }
}

#[test]
fn a_failing_row_is_1_and_its_log_stands_in_the_report() {
    let fake = Fake::new(GPU);
    fake.program("cuda-vmm-conformance", BAD);
    let ran = fake.run("--only core,2MiB --only pools,2MiB").ends(1);
    ran.expect(ROW, "FAIL", "conformance: exit code 101, 1 tests failed");
    ran.expect("real/1/2MiB/-/pools", "PASS", "");
    // The other program ran all the same.
    assert_eq!(ran.row(ROW)["tests_passed"], 10);
    assert_eq!(ran.row(ROW)["tests_failed"], 1);
    assert!(ran.report.contains("what went wrong"), "{}", ran.report);
}

#[test]
fn a_program_that_cannot_have_passed_is_a_failure_that_says_why() {
    let killed = format!("{CLOSED}kill -SEGV $$\n");
    for (script, note) in [
        (killed.as_str(), "share: signal: 11"),
        (EMPTY, "share: no test passed"),
        ("", "could not be started"),
    ] {
        let fake = Fake::new(GPU);
        fake.program("cuda-vmm-share", &format!("{OPENS}{script}"));
        if script.is_empty() {
            fs::remove_file(fake.path().join("bundle/tests/cuda-vmm-share")).unwrap();
        }
        let ran = fake.run(ONE).ends(1);
        ran.expect(ROW, "FAIL", note);
    }
}

#[test]
fn a_real_row_that_opens_no_driver_is_a_failure_and_a_simulated_one_need_not() {
    let fake = Fake::new(GPU);
    for program in ["conformance", "faults"] {
        fake.program(&format!("cuda-vmm-{program}"), CLOSED);
    }
    let ran = fake.run("--driver all --devices 1 --only core,2MiB --only pools,2MiB");
    let ran = ran.ends(1);
    for (suite, program) in [("core", "conformance"), ("pools", "faults")] {
        let note = format!("{program}: it did not open the real driver");
        ran.expect(&format!("real/1/2MiB/-/{suite}"), "FAIL", &note);
        ran.expect(&format!("simulated/1/2MiB/-/{suite}"), "PASS", "");
    }
}

#[test]
fn without_a_gpu_real_rows_are_skipped_and_simulated_rows_run() {
    let fake = Fake::new(NO_GPU);
    let ran = fake.run("").ends(2);
    assert_eq!(ran.rows().len(), 48);
    assert_eq!(ran.json["skipped"], 48);
    let ran = fake.run("--driver all").ends(2);
    assert_eq!(
        (&ran.json["passed"], &ran.json["skipped"]),
        (&json!(36), &json!(48))
    );

    // A row that fails outweighs those that are skipped.
    fake.program("cuda-vmm-leaks", BAD);
    assert_eq!(fake.run("--driver all").code, 1);
}

#[test]
fn rows_of_both_drivers_run_side_by_side_and_are_told_in_order() {
    let fake = Fake::new(GPU);
    // Each waits for the other driver's.
    let folder = fake.path().display();
    let meets = format!(
        "touch {folder}/$CUDA_VMM_TEST_DRIVER\n\
         for round in $(seq 300); do\n\
         if [ -e {folder}/real ] && [ -e {folder}/simulated ]; then\n{OPENS}{CLOSED}exit 0\nfi\n\
         sleep 0.1\ndone\n{BAD}"
    );
    fake.program("cuda-vmm-leaks", &meets);
    let ran = fake.run("--driver all --devices 1 --only leaks,2MiB --only leaks,16MiB");
    let ran = ran.ends(0);
    let names = ran.rows().iter().map(|row| row["name"].as_str().unwrap());
    let expected = ["real/1/2", "real/1/16", "simulated/1/2", "simulated/1/16"];
    let expected = expected.map(|place| format!("{place}MiB/-/leaks"));
    assert_eq!(names.collect::<Vec<_>>(), expected);
}

#[test]
fn the_simulated_driver_needs_no_probe() {
    let fake = Fake::new("exit 1\n");
    let ran = fake.run("--driver simulated --only leaks").ends(0);
    assert!(ran.json["machine"]["gpus"].is_null());
}

#[test]
fn what_the_probe_finds_decides_of_real_rows() {
    let simulated = "printf 'cuda=13.0\\ndevices=1\\nname=Simulated device 0\\n'\n";
    for (probe, code, state, words) in [
        (simulated, 2, "SKIPPED", "is the simulated one"),
        (NO_GPU, 2, "SKIPPED", "no driver library"),
        (BROKEN, 1, "FAIL", "999"),
    ] {
        let ran = Fake::new(probe).run("").ends(code);
        ran.expect(ROW, state, words);
    }
}

#[test]
fn a_second_gpu_is_missing_only_if_it_is_demanded() {
    let fake = Fake::new(GPU);
    let ran = fake.run("--only leaks").ends(0);
    assert_eq!(ran.rows().len(), 4);
    let ran = fake.run("--only leaks --devices 2").ends(2);
    assert_eq!(ran.rows().len(), 8);
    let reason = "needs 2 GPUs, this machine has 1";
    ran.expect("real/2/2MiB/-/leaks", "SKIPPED", reason);
    assert!(!ran.printed.contains("not asked for"), "{}", ran.printed);

    let fake = Fake::new(TWO_GPUS);
    let ran = fake.run("--only leaks").ends(0);
    assert_eq!(ran.rows().len(), 8);
    assert_eq!(fake.run("--only leaks --devices 1").rows().len(), 4);
}

#[test]
fn only_real_facade_rows_are_skipped_where_their_libraries_are_missing() {
    let fake = Fake::new(GPU);
    fake.needs(&["libxtask-absent.so.13"]);
    let line = "--driver all --devices 1 --only core,2MiB --only facade,2MiB";
    let ran = fake.run(line).ends(2);
    let reason = "missing libxtask-absent.so.13";
    ran.expect("real/1/2MiB/own-stream/facade", "SKIPPED", reason);
    ran.expect("simulated/1/2MiB/cpu/facade", "PASS", "");
    ran.expect(ROW, "PASS", "");

    fs::write(fake.path().join("cuda/libxtask-absent.so.13"), "").unwrap();
    fake.run(line).ends(0);
}

#[test]
fn a_program_past_its_time_is_stopped_and_what_it_left_behind_is_not_waited_for() {
    let fake = Fake::new(GPU);
    // The second one ends, and leaves a process that holds its output.
    let waits = format!("{OPENS}sleep 100 & sleep 100\n");
    fake.program("cuda-vmm-conformance", &waits);
    fake.program("cuda-vmm-share", &format!("sleep 20 &\n{OPENS}{CLOSED}"));
    let started = Instant::now();
    let ran = fake.run(&format!("--limit-seconds 1 {ONE}")).ends(1);
    assert!(started.elapsed() < Duration::from_secs(15));
    ran.expect(ROW, "FAIL", "conformance: stopped after 1 s");
    assert!(!ran.row(ROW)["note"].as_str().unwrap().contains("share"));
}

#[test]
fn programs_see_the_variables_of_their_row_and_no_others() {
    let fake = Fake::new(GPU);
    let script = format!("env | grep '^CUDA_VMM_' | sort\n{OPENS}{BAD}");
    fake.program("cuda-vmm-stress", &script);
    let mut command = fake.command("--driver simulated --stress-seconds 5 --only stress,1,2MiB");
    command.env("CUDA_VMM_DRIVER_PATH", "/elsewhere");
    command.env("CUDA_VMM_TEST_CANDLE_DEVICE", "own-stream");
    assert_eq!(command.output().unwrap().status.code(), Some(1));
    let report = fs::read_to_string(fake.path().join("out/report.md")).unwrap();
    let expected = "\nCUDA_VMM_TEST_DEVICES=1\nCUDA_VMM_TEST_DRIVER=simulated\n\
        CUDA_VMM_TEST_PAGE_BYTES=2097152\nCUDA_VMM_TEST_STRESS_SECONDS=5\nwhat";
    assert!(report.contains(expected), "{report}");
}

#[test]
fn the_facade_is_told_where_the_cuda_libraries_are() {
    let fake = Fake::new(GPU);
    fake.needs(&["libxtask.so.13"]);
    fs::write(fake.path().join("cuda/libxtask.so.13"), "").unwrap();
    let told = format!(
        "case \"$LD_LIBRARY_PATH\" in {}/cuda*)",
        fake.path().display()
    );
    let script = format!("{told} ;; *) exit 9 ;; esac\n{OPENS}{CLOSED}");
    fake.program("candle-cuda-vmm-device-real", &script);
    fake.run("--only facade,2MiB").ends(0);
}
