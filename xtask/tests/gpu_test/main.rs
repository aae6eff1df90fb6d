//! The matrix as a bundle runs it, with shell scripts in place of the programs; no GPU is needed.

use libtest_mimic::{Arguments, Trial};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Instant;
use xshell::{Cmd, Shell, cmd};

const XTASK: &str = env!("CARGO_BIN_EXE_xtask");
const PROGRAMS: &str = "cuda-vmm-conformance cuda-vmm-share cuda-vmm-device cuda-vmm-faults \
    cuda-vmm-leaks cuda-vmm-stress candle-cuda-vmm-device-real candle-cuda-vmm-cuda-real \
    candle-cuda-vmm-device-simulated";
const FACTS: &str = "gpu gpus driver cuda kernel date command commit compiler candle_kernels \
    cuda_libraries";

/// An unpacked bundle of scripts, a command line, and what must come of it.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Case {
    name: String,
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
    absent: Vec<String>,
    seconds_at_most: Option<u64>,
}

impl Case {
    /// A line that cannot be followed, in a bundle or in place.
    fn wrong(place: &str, line: String) -> Self {
        Self {
            name: format!("{line:?} is wrong, {place}"),
            place: Some(place.to_owned()),
            line,
            probe: Some("forbidden".to_owned()),
            code: 64,
            ..Self::default()
        }
    }

    fn check(&self, scripts: &BTreeMap<String, String>) {
        let folder = tempfile::tempdir().unwrap();
        let (shell, folder) = (&Shell::new().unwrap(), folder.path());
        self.make_bundle(shell, folder, scripts);
        let [bundle, cuda, out, packed, temporary, toolkit] =
            ["bundle", "cuda", "out", "packed", "temporary", "toolkit"].map(|it| folder.join(it));
        shell.change_dir(&temporary);
        let place = self.place.as_deref().unwrap_or("bundle");
        let (command, reports) = match place {
            "in-place" => (cmd!(shell, "{XTASK} gpu-test"), &out),
            "script" => (script(shell, &bundle, &packed), &packed),
            _ => {
                let folders = ["--folder", bundle.to_str().unwrap(), "--beside"];
                let command = cmd!(shell, "{XTASK} run-bundle {folders...} {folder}");
                (command, &out)
            }
        };
        let mut command = command.args(self.line.split_whitespace());
        let runs_rows = self.code != 64 && self.list.is_none() && !self.helps;
        if runs_rows {
            command = command.arg("--json").arg(out.join("report.json"));
        }
        // Those of CUDA_VMM_ must not reach a program.
        let kind = ("CUDA_VMM_TEST_CANDLE_DEVICE", "own-stream");
        let command = command.envs([kind, ("CUDA_VMM_DRIVER_PATH", "/elsewhere")]);
        let command = command.env("LD_LIBRARY_PATH", cuda).env_remove("CUDA_PATH");
        let command = command.env("CUDA_HOME", toolkit).envs(&self.variables);
        let command = match place {
            "script" => command.env_remove("OUT").env("TMPDIR", &temporary),
            _ => command.env("OUT", &out),
        };
        let started = Instant::now();
        let output = command.quiet().ignore_status().output().unwrap();
        let printed = [&*output.stdout, &output.stderr].concat();
        let printed = String::from_utf8(printed).unwrap();
        let contains = |text: &str, parts: &[String]| {
            for part in parts {
                let part = part.replace("{fake}", folder.to_str().unwrap());
                assert!(text.contains(&part), "{part} in {text}");
            }
        };

        assert_eq!(output.status.code(), Some(self.code), "{printed}");
        assert!(!bundle.join("bin/probe.asked").exists(), "{printed}");
        assert!(started.elapsed().as_secs() <= self.seconds_at_most.unwrap_or(u64::MAX));
        if let Some(list) = &self.list {
            assert_eq!(printed, list.join("\n") + "\n");
        }
        contains(&printed, &self.printed);
        let mut absent = self.absent.iter();
        assert_eq!(
            absent.find(|part| printed.contains(*part)),
            None,
            "{printed}"
        );
        let left = shell.read_dir(&temporary).unwrap();
        assert!(left.is_empty(), "left behind: {left:?}");
        let report = shell.read_file(reports.join("report.md"));
        if runs_rows {
            contains(&report.unwrap(), &self.report);
            let json = shell.read_file(out.join("report.json")).unwrap();
            self.check_json(serde_json::from_str(&json).unwrap());
        } else {
            assert!(report.is_err() && (self.code != 64 || !output.stderr.is_empty()));
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
    fn make_bundle(&self, shell: &Shell, folder: &Path, scripts: &BTreeMap<String, String>) {
        let fill = |text: &str| {
            let mut text = text.replace("{fake}", folder.to_str().unwrap());
            for (name, script) in scripts {
                text = text.replace(&format!("{{{name}}}"), script);
            }
            text
        };
        let script = |place: &str, text: &str| {
            let path = folder.join(place);
            let text = format!("#!/bin/sh\n{}", fill(text));
            shell.write_file(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        };
        let probe = self.probe.as_deref().unwrap_or("one");
        script("bundle/bin/probe", &scripts[probe]);
        for program in PROGRAMS.split(' ') {
            script(&format!("bundle/tests/{program}"), "{opens}{passes}");
        }
        for place in ["bundle/programs", "cuda", "out", "temporary"] {
            shell.create_dir(folder.join(place)).unwrap();
        }
        for (place, text) in &self.files {
            script(place, text);
        }
        for place in &self.absent_files {
            shell.remove_path(folder.join(place)).unwrap();
        }
        let manifest = json!({
            "commit": "abc", "compiler": "rustc 1", "candle_kernels": null, "libraries": self.libraries,
        });
        let file = folder.join("bundle/bundle.json");
        shell.write_file(file, manifest.to_string()).unwrap();
    }
}

/// Packs a bundle, with this `xtask`; returns a command that runs its script without a workspace.
fn script<'a>(shell: &'a Shell, bundle: &Path, packed: &Path) -> Cmd<'a> {
    shell.copy_file(XTASK, bundle.join("bin/xtask")).unwrap();
    let run = packed.join("run");
    let text = include_str!("../../src/gpu_test/run.sh");
    shell.write_file(&run, text).unwrap();
    let tar = cmd!(shell, "tar -C {bundle} -cJf {packed}/bundle.tar.xz .");
    tar.quiet().env("XZ_OPT", "-0").run().unwrap();
    let command = cmd!(shell, "sh {run}").env("PATH", "/usr/bin:/bin");
    command.env_remove("CARGO_MANIFEST_DIR")
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Cases {
    scripts: BTreeMap<String, String>,
    wrong: BTreeMap<String, Vec<String>>,
    case: Vec<Case>,
}

fn main() {
    let cases: Cases = toml::from_str(include_str!("cases.toml")).expect("the cases");
    let wrong = cases.wrong.into_iter().flat_map(|(place, lines)| {
        let case = move |line| Case::wrong(&place, line);
        lines.into_iter().map(case)
    });
    let trials = cases.case.into_iter().chain(wrong).map(|case| {
        let (name, scripts) = (case.name.clone(), cases.scripts.clone());
        Trial::test(name, move || {
            case.check(&scripts);
            Ok(())
        })
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit();
}
