//! The `run` script of a bundle, from end to end.

use crate::fake::{Fake, GPU, printed};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const RUN: &str = include_str!("../../src/gpu_test/run.sh");

/// Packs the fake as a bundle is packed, this project's own `xtask` in it.
fn pack(fake: &Fake) -> PathBuf {
    let packed = fake.path().join("packed");
    fs::create_dir(&packed).unwrap();
    let xtask = fake.path().join("bundle/bin/xtask");
    fs::copy(env!("CARGO_BIN_EXE_xtask"), xtask).unwrap();
    let mut tar = Command::new("tar");
    tar.env("XZ_OPT", "-0").arg("-cJf");
    tar.arg(packed.join("bundle.tar.xz"));
    tar.arg("-C").arg(fake.path().join("bundle")).arg(".");
    assert!(tar.status().unwrap().success());
    fs::write(packed.join("run"), RUN).unwrap();
    packed
}

/// Runs it where there is neither cargo nor a workspace.
fn run(fake: &Fake, packed: &Path, line: &str) -> Output {
    let temporary = fake.path().join("temporary");
    fs::create_dir_all(&temporary).unwrap();
    let mut command = Command::new("sh");
    command.arg(packed.join("run")).args(line.split(' '));
    fake.environment(&mut command);
    command.current_dir(&temporary).env("TMPDIR", &temporary);
    command.env("PATH", "/usr/bin:/bin").env_remove("OUT");
    command.env_remove("CARGO_MANIFEST_DIR");
    let output = command.output().unwrap();
    let left = fs::read_dir(&temporary).unwrap().count();
    assert_eq!(left, 0, "something was left behind");
    output
}

#[test]
fn a_bundle_runs_by_itself_and_cleans_up() {
    let fake = Fake::new(GPU);
    fake.script("bundle/programs/demo", "echo \"demo $*\"; exit 5\n");
    let packed = pack(&fake);

    let output = run(&fake, &packed, "--only core,2MiB");
    assert_eq!(output.status.code(), Some(0), "{}", printed(&output));
    let report = fs::read_to_string(packed.join("report.md")).unwrap();
    let command = format!("| Command | `{}/run --only core,2MiB` |", packed.display());
    for part in ["| real | 1 | 2MiB | - | core | PASS |", &command] {
        assert!(report.contains(part), "{part} in {report}");
    }

    let output = run(&fake, &packed, "--only nonsense");
    assert_eq!(output.status.code(), Some(64), "{}", printed(&output));
    let output = run(&fake, &packed, "--list --only leaks,2,32MiB");
    assert_eq!(printed(&output), "real/2/32MiB/-/leaks\n");
    let output = run(&fake, &packed, "program demo --quick");
    assert_eq!(output.status.code(), Some(5));
    assert_eq!(printed(&output), "demo --quick\n");
    let output = run(&fake, &packed, "--help");
    assert_eq!(output.status.code(), Some(0));
    let help = printed(&output);
    assert!(help.contains("Usage: run [OPTIONS]"), "{help}");
    assert!(
        !help.contains("--folder") && !help.contains("--bundle"),
        "{help}"
    );
}
