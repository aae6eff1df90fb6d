//! A bundle of small shell scripts in place of the programs, run by this project's own `xtask`.

use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};
use tempfile::TempDir;

/// Probes: one GPU, two, none, and a driver that fails.
pub const GPU: &str = "printf 'cuda=13.0\\ndevices=1\\nname=Test GPU\\n'\n";
pub const TWO_GPUS: &str = "printf 'cuda=13.0\\ndevices=2\\nname=Test GPU\\n'\n";
pub const NO_GPU: &str = "echo reason=no driver library\nexit 2\n";
pub const BROKEN: &str = "echo reason=cuInit answered code 999\nexit 1\n";

/// What the dynamic loader would write for a process that opens the driver.
pub const OPENS: &str = "if [ -n \"${LD_DEBUG_OUTPUT:-}\" ]; then\n\
    echo \"  7:\tcalling init: /usr/lib/libcuda.so.1\" >\"$LD_DEBUG_OUTPUT.1\"\n\
    fi\n";
/// Passes without opening the driver.
pub const CLOSED: &str = "echo 'test result: ok. 7 passed; 0 failed; 0 ignored'\n";
pub const BAD: &str = "echo 'what went wrong'\n\
    echo 'test result: FAILED. 3 passed; 1 failed; 0 ignored'\nexit 101\n";
pub const EMPTY: &str = "echo 'test result: ok. 0 passed; 0 failed; 4 ignored'\n";

const CORE: &str = "conformance share device faults leaks stress";
const FACADE: &str = "device-real cuda-real device-simulated";

/// The unpacked bundle, a folder for its report, and one that the dynamic loader is told of.
pub struct Fake {
    folder: TempDir,
}

/// What came of a run.
pub struct Ran {
    pub code: i32,
    pub printed: String,
    pub report: String,
    pub json: Value,
}

impl Fake {
    /// A bundle in which every program passes.
    pub fn new(probe: &str) -> Self {
        let fake = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        fake.script("bundle/bin/probe", probe);
        for (package, targets) in [("cuda-vmm", CORE), ("candle-cuda-vmm", FACADE)] {
            for target in targets.split(' ') {
                fake.program(&format!("{package}-{target}"), &format!("{OPENS}{CLOSED}"));
            }
        }
        for folder in ["bundle/programs", "cuda", "out"] {
            fs::create_dir_all(fake.path().join(folder)).unwrap();
        }
        fake.needs(&[]);
        fake
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Puts a script in place of a test program.
    pub fn program(&self, name: &str, text: &str) {
        self.script(&format!("bundle/tests/{name}"), text);
    }

    /// Makes a script.
    pub fn script(&self, file: &str, text: &str) {
        let path = self.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, format!("#!/bin/sh\n{text}")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Names the CUDA libraries that the facade is linked to.
    pub fn needs(&self, libraries: &[&str]) {
        let manifest = serde_json::json!({
            "commit": "abc", "compiler": "rustc 1", "candle_kernels": null, "libraries": libraries,
        });
        let path = self.path().join("bundle/bundle.json");
        fs::write(path, manifest.to_string()).unwrap();
    }

    /// The command that `run` starts, with a report in the folder `out`.
    pub fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        let (bundle, beside) = (self.path().join("bundle"), self.path());
        command.arg("run-bundle").arg("--folder").arg(bundle);
        command.arg("--beside").arg(beside);
        command.args(line.split_whitespace());
        self.environment(&mut command);
        command
    }

    /// Sets the variables of a run.
    pub fn environment(&self, command: &mut Command) {
        command.env("OUT", self.path().join("out"));
        command.env("LD_LIBRARY_PATH", self.path().join("cuda"));
        command.env_remove("CUDA_HOME").env_remove("CUDA_PATH");
    }

    /// Runs the rows that `line` asks for.
    pub fn run(&self, line: &str) -> Ran {
        let json = self.path().join("out/report.json");
        let mut command = self.command(line);
        let output = command.arg("--json").arg(&json).output().unwrap();
        let read = |file: &str| fs::read_to_string(self.path().join(file)).unwrap_or_default();
        Ran {
            code: output.status.code().unwrap(),
            printed: printed(&output),
            report: read("out/report.md"),
            json: serde_json::from_str(&read("out/report.json")).unwrap_or_default(),
        }
    }
}

/// All that a process printed.
pub fn printed(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

impl Ran {
    /// Fails unless the run ended with this code.
    #[track_caller]
    pub fn ends(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{}", self.printed);
        self
    }

    /// The row of this name.
    pub fn row(&self, name: &str) -> &Value {
        let row = self.rows().iter().find(|row| row["name"] == name);
        row.unwrap_or_else(|| panic!("no row {name} in {}\n{}", self.json, self.printed))
    }

    /// All rows.
    pub fn rows(&self) -> &[Value] {
        let rows = self.json["rows"].as_array();
        rows.unwrap_or_else(|| panic!("{}", self.printed))
    }

    /// Fails unless the row has this state, and its note contains these words.
    #[track_caller]
    pub fn expect(&self, name: &str, state: &str, words: &str) {
        let row = self.row(name);
        assert_eq!(row["state"], state, "{row}");
        assert!(row["note"].as_str().unwrap().contains(words), "{row}");
    }
}
