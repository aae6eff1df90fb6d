//! Building what the bundle holds.

use super::{Kind, Row, stubs};
use crate::setup;
use crate::workspace::{self, Workspace};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The package whose tests and demo make the rows without Candle.
const CORE: &str = "cuda-vmm";
/// The package of the facade.
const FACADE: &str = "candle-cuda-vmm";
/// The facade's test that holds every row with Candle, so that Candle's kernels are packed once.
const CANDLE_TEST: &str = "device";

/// What was built.
pub struct Built {
    /// The rows, in order.
    pub rows: Vec<Row>,
    /// The CUDA libraries that the Candle rows need, the driver's left out.
    pub libraries: Vec<String>,
    /// Lines `what: value` for the report.
    pub facts: Vec<String>,
}

/// The names of the rows, without building anything.
pub fn names(workspace: &Workspace) -> Result<Vec<String>> {
    let metadata = workspace.metadata(&["--no-deps"])?;
    let mut rows = Vec::new();
    for package in array(&metadata["packages"]) {
        for target in array(&package["targets"]) {
            rows.extend(row(&package["name"], target));
        }
    }
    rows.sort();
    Ok(rows.into_iter().map(|(_, name)| name).collect())
}

/// Builds every row's executable, for GPUs of `compute_cap` (90 for 9.0) and newer.
pub fn all(workspace: &Workspace, target: &Path, compute_cap: u32) -> Result<Built> {
    setup::ensure(workspace, true, false)?;
    let builder = Builder {
        workspace,
        target,
        compute_cap,
    };
    let mut rows = builder.core()?;
    rows.extend(builder.candle()?);
    let mut built = Vec::new();
    let mut libraries = BTreeSet::new();
    for ((_, name), kind, executable) in rows {
        if kind == Kind::Core && tests_that_run(&executable)? == 0 {
            eprintln!("xtask: {name}: left out, it has no test that runs unasked");
            continue;
        }
        if kind == Kind::Candle {
            libraries.extend(stubs::needed(&executable)?);
        }
        built.push(Row {
            kind,
            name,
            executable,
        });
    }
    Ok(Built {
        rows: built,
        libraries: libraries.into_iter().collect(),
        facts: vec![
            format!("Built from: commit {}", commit(workspace)),
            format!(
                "Built with: {}",
                first_line(Command::new("rustc").arg("--version"))
            ),
            format!(
                "Candle's kernels for: compute capability {}.{}",
                compute_cap / 10,
                compute_cap % 10
            ),
        ],
    })
}

type Found = (Order, Kind, PathBuf);
/// Where a row stands, and its name.
type Order = (u8, String);

struct Builder<'a> {
    workspace: &'a Workspace,
    target: &'a Path,
    compute_cap: u32,
}

impl Builder<'_> {
    /// The core's tests and the demo.
    fn core(&self) -> Result<Vec<Found>> {
        let messages = self.cargo(
            &[
                "test",
                "--no-run",
                "--package",
                CORE,
                "--features",
                "simulator",
            ],
            None,
        )?;
        let mut found = executables(&messages);
        let messages = self.cargo(
            &[
                "build",
                "--package",
                CORE,
                "--features",
                "simulator",
                "--example",
                "demo",
            ],
            None,
        )?;
        found.extend(executables(&messages));
        Ok(found)
    }

    /// The facade's test, linked against libraries that are made here for what it asks for.
    fn candle(&self) -> Result<Vec<Found>> {
        let messages = self.cargo(&["build", "--package", FACADE, "--features", "cuda"], None)?;
        let folder = self.target.join("stubs");
        stubs::make(&folder, &archives(&messages))?;
        let messages = self.cargo(
            &[
                "test",
                "--no-run",
                "--package",
                FACADE,
                "--features",
                "cuda",
                "--test",
                CANDLE_TEST,
            ],
            Some(&folder),
        )?;
        let found = executables(&messages);
        ensure!(
            !found.is_empty(),
            "{FACADE} has no test named {CANDLE_TEST}"
        );
        Ok(found)
    }

    /// Runs cargo with the pinned CUDA compiler, and answers its messages.
    fn cargo(&self, arguments: &[&str], libraries: Option<&Path>) -> Result<Vec<Value>> {
        let toolkit = setup::toolkit_folder(self.workspace);
        let bin = toolkit.join("bin");
        let mut path = vec![bin.clone()];
        path.extend(std::env::split_paths(
            &std::env::var_os("PATH").unwrap_or_default(),
        ));
        let mut command = self.workspace.cargo(arguments);
        command
            .args(["--release", "--message-format", "json-render-diagnostics"])
            .arg("--target-dir")
            .arg(self.target)
            .env("PATH", std::env::join_paths(path).context("PATH")?)
            .env("CUDA_HOME", &toolkit)
            .env("CUDA_PATH", &toolkit)
            .env("NVCC", bin.join("nvcc"))
            .env("CUDA_COMPUTE_CAP", self.compute_cap.to_string())
            .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
            .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
            .stdout(Stdio::piped());
        if let Some(libraries) = libraries {
            // The C compiler, which links, searches there after what it is told on its command line.
            command.env("LIBRARY_PATH", libraries);
        }
        let line = workspace::line(&command);
        eprintln!("xtask: {line}");
        let output = command
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("could not start {line}"))?;
        ensure!(output.status.success(), "{line}: {}", output.status);
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter(|line| line.starts_with('{'))
            .map(|line| serde_json::from_str(line).context("cargo's message is not JSON"))
            .collect()
    }
}

/// Which row a target of a package makes, if any.
fn row(package: &Value, target: &Value) -> Option<Order> {
    let name = target["name"].as_str()?;
    let kind = array(&target["kind"]).first()?.as_str()?;
    match (package.as_str()?, kind) {
        (CORE, "lib") => Some((0, "core: unit tests".to_owned())),
        (CORE, "test") => Some((1, format!("core: {name}"))),
        (CORE, "example") if name == "demo" => Some((2, "demo".to_owned())),
        (FACADE, "test") if name == CANDLE_TEST => Some((3, format!("candle: {name}"))),
        _ => None,
    }
}

/// The rows among the executables that cargo tells of, in order.
fn executables(messages: &[Value]) -> Vec<Found> {
    let mut found = Vec::new();
    for message in messages {
        let Some(executable) = message["executable"].as_str() else {
            continue;
        };
        // A package's identity ends with name@version, or with #version after a folder of its name.
        let identity = message["package_id"].as_str().unwrap_or_default();
        let package = [FACADE, CORE].into_iter().find(|name| {
            identity.contains(&format!("#{name}@")) || identity.contains(&format!("/{name}#"))
        });
        let Some(package) = package else { continue };
        let Some(order) = row(&Value::from(package), &message["target"]) else {
            continue;
        };
        let kind = match order.0 {
            0 | 1 => Kind::Core,
            2 => Kind::Program,
            _ => Kind::Candle,
        };
        // The demo has tests of its own, built from the same target; the row is the program.
        let is_test = message["profile"]["test"] == true;
        if is_test == (kind == Kind::Program) {
            continue;
        }
        found.push((order, kind, PathBuf::from(executable)));
    }
    found.sort_by(|one, other| one.0.cmp(&other.0));
    found
}

/// The Rust and C archives that cargo tells of.
fn archives(messages: &[Value]) -> BTreeSet<PathBuf> {
    let mut archives = BTreeSet::new();
    for message in messages {
        for file in array(&message["filenames"]) {
            let path = PathBuf::from(file.as_str().unwrap_or_default());
            if path
                .extension()
                .is_some_and(|extension| extension == "rlib")
            {
                archives.insert(path);
            }
        }
        let out = message["out_dir"].as_str().map(Path::new);
        for entry in out
            .and_then(|out| out.read_dir().ok())
            .into_iter()
            .flatten()
            .flatten()
        {
            if entry
                .path()
                .extension()
                .is_some_and(|extension| extension == "a")
            {
                archives.insert(entry.path());
            }
        }
    }
    archives
}

/// How many tests of the executable run when none is named: those not ignored.
fn tests_that_run(executable: &Path) -> Result<usize> {
    let count = |extra: &[&str]| -> Result<usize> {
        let output = Command::new(executable)
            .arg("--list")
            .args(extra)
            .output()
            .with_context(|| format!("{} could not be started", executable.display()))?;
        ensure!(
            output.status.success(),
            "{} --list: {}",
            executable.display(),
            output.status
        );
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().filter(|line| line.ends_with(": test")).count())
    };
    Ok(count(&[])?.saturating_sub(count(&["--ignored"])?))
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// The commit that was built, with a mark if files differ from it.
fn commit(workspace: &Workspace) -> String {
    first_line(Command::new("git").current_dir(&workspace.root).args([
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
    ]))
}

fn first_line(command: &mut Command) -> String {
    command
        .output()
        .ok()
        .filter(|output| output.status.success())
        .and_then(|output| {
            String::from_utf8_lossy(&output.stdout)
                .lines()
                .next()
                .map(str::to_owned)
        })
        .unwrap_or_else(|| "not known".to_owned())
}

#[cfg(test)]
mod unit {
    use super::*;
    use serde_json::json;

    fn message(package: &str, kind: &str, name: &str, test: bool) -> Value {
        json!({
            "profile": { "test": test },
            "reason": "compiler-artifact",
            "package_id": package,
            "target": { "kind": [kind], "name": name },
            "executable": format!("/target/{name}"),
        })
    }

    #[test]
    fn rows_come_in_order_and_only_from_what_is_tested() {
        let core = "path+file:///work/crates/cuda-vmm#0.2.0";
        let found = executables(&[
            message(
                "path+file:///work/crates/candle-cuda-vmm#0.2.0",
                "test",
                "device",
                true,
            ),
            message(
                "path+file:///work/crates/candle-cuda-vmm#0.2.0",
                "test",
                "other",
                true,
            ),
            message(core, "example", "demo", true),
            message(core, "example", "demo", false),
            message(core, "example", "tour", false),
            message(core, "test", "pool", true),
            message(core, "lib", "cuda_vmm", true),
            message(
                "path+file:///elsewhere#cuda-vmm-sim@0.2.0",
                "test",
                "books",
                true,
            ),
        ]);
        let names: Vec<&str> = found
            .iter()
            .map(|((_, name), _, _)| name.as_str())
            .collect();
        assert_eq!(
            names,
            ["core: unit tests", "core: pool", "demo", "candle: device"]
        );
        let kinds: Vec<Kind> = found.iter().map(|(_, kind, _)| *kind).collect();
        assert_eq!(kinds, [Kind::Core, Kind::Core, Kind::Program, Kind::Candle]);
    }
}
