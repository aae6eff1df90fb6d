//! One case: an unpacked bundle of scripts, a command line, and what must come of it.

use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};
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
    /// The task; a bundle's unless told otherwise.
    task: Option<String>,
    line: String,
    /// A script; one GPU unless told otherwise.
    probe: Option<String>,
    /// Scripts, by their places in the case's folder.
    pub files: BTreeMap<String, String>,
    absent_files: Vec<String>,
    /// The CUDA libraries that the facade needs.
    libraries: Vec<String>,

    code: i32,
    /// All lines that are printed, if the matrix is not run.
    list: Option<Vec<String>>,
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
            task: (place == "in-place").then(|| "gpu-test".to_owned()),
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
        let task = self.task.as_deref().unwrap_or("run-bundle");
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        command.arg(task);
        if self.task.is_none() {
            command.arg("--folder").arg(folder.join("bundle"));
            command.arg("--beside").arg(folder);
        }
        command.args(self.line.split_whitespace());
        let runs_rows = self.code != 64 && self.list.is_none();
        if runs_rows {
            command.arg("--json").arg(folder.join("out/report.json"));
        }
        let started = Instant::now();
        let output = with_variables(&mut command, folder).output().unwrap();
        let printed = printed(&output);

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
        let report = fs::read_to_string(folder.join("out/report.md"));
        match report {
            Ok(report) if runs_rows => contains(&report, &self.report),
            report => assert!(report.is_err() && !runs_rows, "{printed}"),
        }
        if runs_rows {
            let json = fs::read_to_string(folder.join("out/report.json")).unwrap();
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
    pub fn make_bundle(&self, folder: &Path, scripts: &BTreeMap<String, String>) {
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
        for place in ["bundle/programs", "cuda", "out"] {
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

/// Sets the variables of a run. Those of `CUDA_VMM_` must not reach a program.
pub fn with_variables<'a>(command: &'a mut Command, folder: &Path) -> &'a mut Command {
    command.env("CUDA_VMM_DRIVER_PATH", "/elsewhere");
    command.env("CUDA_VMM_TEST_CANDLE_DEVICE", "own-stream");
    command.env("OUT", folder.join("out"));
    command.env("LD_LIBRARY_PATH", folder.join("cuda"));
    command
        .env("CUDA_HOME", folder.join("toolkit"))
        .env_remove("CUDA_PATH")
}

/// All that a process printed.
pub fn printed(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

pub fn contains(text: &str, parts: &[impl AsRef<str>]) {
    for part in parts.iter().map(AsRef::as_ref) {
        assert!(text.contains(part), "{part} in {text}");
    }
}
