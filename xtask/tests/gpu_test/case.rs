//! One case: an unpacked bundle of scripts, a command line, and what must come of it.

use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

const PROGRAMS: &str = "cuda-vmm-conformance cuda-vmm-share cuda-vmm-device cuda-vmm-faults \
    cuda-vmm-leaks cuda-vmm-stress candle-cuda-vmm-device-real candle-cuda-vmm-cuda-real \
    candle-cuda-vmm-device-simulated";
const FACTS: &str = "gpu gpus driver cuda kernel date command commit compiler candle_kernels \
    cuda_libraries";

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Case {
    pub name: String,
    /// What is started: `bundle`, `script` for its script from end to end, or `in-place`.
    place: Option<String>,
    line: String,
    /// A script; one GPU unless told otherwise.
    probe: Option<String>,
    /// Scripts, by their places in the case's folder.
    files: BTreeMap<String, String>,
    absent_files: Vec<String>,
    variables: BTreeMap<String, String>,
    /// The CUDA libraries that the facade needs.
    libraries: Vec<String>,

    code: i32,
    /// All lines that are printed, if the matrix is not run.
    list: Option<Vec<String>>,
    helps: bool,
    /// How many rows the matrix has.
    count: Option<usize>,
    /// By the name of a row: its state, and words of its note.
    states: BTreeMap<String, String>,
    /// Parts of the JSON report, by their pointers.
    json: BTreeMap<String, String>,
    printed: Vec<String>,
    report: Vec<String>,
    /// What is not printed.
    absent: Vec<String>,
    seconds_at_most: Option<u64>,
}

impl Case {
    /// A line that cannot be followed, in a bundle or in place.
    pub fn wrong(place: &str, line: String) -> Self {
        Self {
            name: format!("{line:?} is wrong, {place}"),
            place: Some(place.to_owned()),
            line,
            probe: Some("forbidden".to_owned()),
            code: 64,
            ..Self::default()
        }
    }

    pub fn check(&self, scripts: &BTreeMap<String, String>) {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        self.make_bundle(folder, scripts);
        let place = self.place.as_deref().unwrap_or("bundle");
        let (out, temporary) = (folder.join("out"), folder.join("temporary"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        match place {
            "in-place" => command.arg("gpu-test"),
            "script" => {
                command = packed(folder);
                command.current_dir(&temporary).env("TMPDIR", &temporary)
            }
            _ => command
                .arg("run-bundle")
                .arg("--folder")
                .arg(folder.join("bundle"))
                .arg("--beside")
                .arg(folder),
        };
        command.args(self.line.split_whitespace());
        let runs_rows = self.code != 64 && self.list.is_none() && !self.helps;
        if runs_rows {
            command.arg("--json").arg(out.join("report.json"));
        }
        if place != "script" {
            command.env("OUT", &out);
        }
        // These must not reach a program.
        command.env("CUDA_VMM_DRIVER_PATH", "/elsewhere");
        command.env("CUDA_VMM_TEST_CANDLE_DEVICE", "own-stream");
        command
            .env("LD_LIBRARY_PATH", folder.join("cuda"))
            .env_remove("CUDA_PATH");
        command
            .env("CUDA_HOME", folder.join("toolkit"))
            .envs(&self.variables);
        let started = Instant::now();
        let output = command.output().unwrap();
        let printed = [&*output.stdout, &output.stderr].concat();
        let printed = String::from_utf8(printed).unwrap();
        let contains = |text: &str, parts: &[String]| {
            for part in parts
                .iter()
                .map(|part| part.replace("{fake}", folder.to_str().unwrap()))
            {
                assert!(text.contains(&part), "{part} in {text}");
            }
        };

        assert_eq!(output.status.code(), Some(self.code), "{printed}");
        assert!(!folder.join("bundle/bin/probe.asked").exists(), "{printed}");
        if let Some(most) = self.seconds_at_most {
            assert!(started.elapsed().as_secs() < most);
        }
        if let Some(list) = &self.list {
            assert_eq!(printed, list.join("\n") + "\n");
        }
        contains(&printed, &self.printed);
        for part in &self.absent {
            assert!(!printed.contains(part), "{part} in {printed}");
        }
        assert_eq!(
            fs::read_dir(&temporary).unwrap().count(),
            0,
            "something was left behind"
        );
        let beside = if place == "script" {
            folder.join("packed")
        } else {
            out.clone()
        };
        let report = fs::read_to_string(beside.join("report.md"));
        match report {
            Ok(report) if runs_rows => contains(&report, &self.report),
            report => assert!(report.is_err() && !runs_rows, "{printed}"),
        }
        if runs_rows {
            let json = fs::read_to_string(out.join("report.json")).unwrap();
            self.check_json(serde_json::from_str(&json).unwrap());
        } else {
            assert!(self.code != 64 || !output.stderr.is_empty());
        }
    }

    fn check_json(&self, mut report: Value) {
        for fact in FACTS.split(' ') {
            assert!(report["machine"].get(fact).is_some(), "{fact} in {report}");
        }
        let rows = report["rows"].as_array_mut().unwrap();
        for row in rows.iter_mut() {
            let seconds = row.as_object_mut().unwrap().remove("seconds");
            assert!(seconds.unwrap().is_f64(), "{row}");
        }
        assert_eq!(rows.len(), self.count.unwrap_or(rows.len()));
        for (name, expected) in &self.states {
            let row = rows.iter().find(|row| row["name"] == *name).expect(name);
            let (state, words) = expected.split_once(' ').unwrap_or((expected, ""));
            assert_eq!(row["state"], state, "{row}");
            assert!(row["note"].as_str().unwrap().contains(words), "{row}");
        }
        for (pointer, expected) in &self.json {
            let expected: Value = serde_json::from_str(expected).unwrap();
            assert_eq!(report.pointer(pointer), Some(&expected), "{pointer}");
        }
    }

    /// Makes the unpacked bundle, and a folder of which the dynamic loader is told.
    fn make_bundle(&self, folder: &Path, scripts: &BTreeMap<String, String>) {
        let fill = |text: &str| {
            let text = text.replace("{fake}", folder.to_str().unwrap());
            let names = scripts.iter();
            names.fold(text, |text, (name, script)| {
                text.replace(&format!("{{{name}}}"), script)
            })
        };
        let script = |place: &str, text: &str| {
            let path = folder.join(place);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, format!("#!/bin/sh\n{}", fill(text))).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        };
        script(
            "bundle/bin/probe",
            &scripts[self.probe.as_deref().unwrap_or("one")],
        );
        for program in PROGRAMS.split(' ') {
            script(&format!("bundle/tests/{program}"), "{opens}{passes}");
        }
        for place in ["bundle/programs", "cuda", "out", "temporary"] {
            fs::create_dir_all(folder.join(place)).unwrap();
        }
        self.files
            .iter()
            .for_each(|(place, text)| script(place, text));
        for place in &self.absent_files {
            fs::remove_file(folder.join(place)).unwrap();
        }
        let manifest = json!({
            "commit": "abc", "compiler": "rustc 1", "candle_kernels": null, "libraries": self.libraries,
        });
        fs::write(folder.join("bundle/bundle.json"), manifest.to_string()).unwrap();
    }
}

/// Packs a bundle as one is packed, this project's own `xtask` in it, and returns a command that runs
/// its script where there is neither cargo nor a workspace.
fn packed(folder: &Path) -> Command {
    let (bundle, packed) = (folder.join("bundle"), folder.join("packed"));
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
    fs::write(
        packed.join("run"),
        include_str!("../../src/gpu_test/run.sh"),
    )
    .unwrap();
    let mut command = Command::new("sh");
    command
        .arg(packed.join("run"))
        .env_remove("OUT")
        .env_remove("CARGO_MANIFEST_DIR");
    command.env("PATH", "/usr/bin:/bin");
    command
}
