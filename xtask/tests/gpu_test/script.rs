//! The `run` script of a bundle, from end to end.

use crate::case::{Case, contains, printed, with_variables};
use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

const RUN: &str = include_str!("../../src/gpu_test/run.sh");

/// Packs a bundle of scripts as a bundle is packed, this project's own `xtask` in it, and runs it
/// where there is neither cargo nor a workspace.
pub fn check(scripts: &BTreeMap<String, String>) {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut case = Case::default();
    let demo = "echo \"demo $*\"; exit 5\n".to_owned();
    case.files.insert("bundle/programs/demo".to_owned(), demo);
    case.make_bundle(folder, scripts);
    let (bundle, packed, temporary) = (
        folder.join("bundle"),
        folder.join("packed"),
        folder.join("temporary"),
    );
    fs::copy(env!("CARGO_BIN_EXE_xtask"), bundle.join("bin/xtask")).unwrap();
    fs::create_dir(&packed).unwrap();
    let mut tar = Command::new("tar");
    tar.env("XZ_OPT", "-0")
        .arg("-cJf")
        .arg(packed.join("bundle.tar.xz"));
    assert!(
        tar.arg("-C")
            .arg(bundle)
            .arg(".")
            .status()
            .unwrap()
            .success()
    );
    fs::write(packed.join("run"), RUN).unwrap();
    fs::create_dir(&temporary).unwrap();
    let run = |line: &str, code: i32| {
        let mut command = Command::new("sh");
        command.arg(packed.join("run")).args(line.split(' '));
        with_variables(&mut command, folder).env_remove("OUT");
        command.current_dir(&temporary).env("TMPDIR", &temporary);
        command
            .env("PATH", "/usr/bin:/bin")
            .env_remove("CARGO_MANIFEST_DIR");
        let output = command.output().unwrap();
        let left = fs::read_dir(&temporary).unwrap().count();
        assert_eq!(left, 0, "something was left behind");
        assert_eq!(output.status.code(), Some(code), "{}", printed(&output));
        printed(&output)
    };

    run("--only core,2MiB", 0);
    let report = fs::read_to_string(packed.join("report.md")).unwrap();
    let command = format!("| Command | `{}/run --only core,2MiB` |", packed.display());
    contains(
        &report,
        &["| real | 1 | 2MiB | - | core | PASS |", &command],
    );
    run("--only nonsense", 64);
    assert_eq!(
        run("--list --only leaks,2,32MiB", 0),
        "real/2/32MiB/-/leaks\n"
    );
    assert_eq!(run("program demo --quick", 5), "demo --quick\n");
    let help = run("--help", 0);
    contains(&help, &["Usage: run [OPTIONS]"]);
    assert!(
        !help.contains("--folder") && !help.contains("--bundle"),
        "{help}"
    );
}
