//! Building the test programs, for this machine or for a bundle.

use super::arguments::COMPUTE_CAP;
use super::cell::{Cell, Driver};
use super::manifest::Manifest;
use super::program::{Program, Programs};
use super::stubs;
use crate::workspace::{self, Workspace};
use crate::{bench, setup, tests};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The features of the core's programs.
const CORE_FEATURES: [&str; 4] = ["--package", Program::CORE, "--features", "simulator"];
/// The package that is the simulated driver as a shared library.
const LIBRARY: &str = "cuda-vmm-sim-library";
/// The core's example that a bundle holds.
const DEMO: &str = "demo";
/// The facade's.
pub const GENERATE: &str = "generate";

/// What a bundle holds.
pub struct Everything {
    /// The test programs.
    pub programs: Programs,
    /// Other programs, by name.
    pub others: Vec<(&'static str, PathBuf)>,
    /// This program.
    pub xtask: PathBuf,
    /// What the build says of itself.
    pub manifest: Manifest,
}

/// Builds programs for the simulated driver just as the task `test` does, so that after it nothing is
/// left to build.
pub fn simulated(workspace: &Workspace, wanted: &BTreeSet<Program>) -> Result<Programs> {
    setup::ensure(workspace, false, false)?;
    let mut command = workspace.cargo(&["test", "--no-run", "--workspace"]);
    let messages = messages(command.args(tests::FEATURES))?;
    pick(wanted, &messages)
}

/// Builds programs for the real driver, for GPUs of `compute_cap` (90 for 9.0) and newer; `manifest`
/// then tells of Candle's part, if that is wanted.
pub fn real(
    workspace: &Workspace,
    target: &Path,
    compute_cap: u32,
    wanted: &BTreeSet<Program>,
    manifest: &mut Manifest,
) -> Result<Programs> {
    setup::ensure(workspace, true, false)?;
    let builder = Builder {
        workspace,
        target,
        compute_cap,
    };
    let (facade, core): (BTreeSet<Program>, BTreeSet<Program>) = wanted
        .iter()
        .partition(|program| program.package == Program::FACADE);
    let mut programs = Programs::new();
    if !core.is_empty() {
        programs.extend(builder.core(&core)?);
    }
    if !facade.is_empty() {
        let built = builder.candle(&facade)?;
        let mut libraries = BTreeSet::new();
        for executable in built.values() {
            libraries.extend(stubs::needed(executable)?);
        }
        manifest.libraries = libraries.into_iter().collect();
        manifest.candle_kernels = Some(format!(
            "compute capability {}.{}",
            compute_cap / 10,
            compute_cap % 10
        ));
        programs.extend(built);
    }
    Ok(programs)
}

/// Builds the simulated driver as a shared library.
pub fn simulated_library(workspace: &Workspace, target: &Path) -> Result<PathBuf> {
    let builder = Builder {
        workspace,
        target,
        compute_cap: COMPUTE_CAP,
    };
    let mut command = builder.cargo(&["build", "--package", LIBRARY])?;
    let messages = messages(&mut command)?;
    let files = messages
        .iter()
        .filter(|message| message["target"]["name"] == LIBRARY.replace('-', "_"))
        .flat_map(|message| array(&message["filenames"]));
    files
        .filter_map(Value::as_str)
        .map(PathBuf::from)
        .find(|path| path.extension().is_some_and(|kind| kind == "so"))
        .with_context(|| format!("{LIBRARY} made no shared library"))
}

/// The facade's lints with Candle's feature `cuda`, in the build that [`real`] has made.
pub fn clippy(workspace: &Workspace, target: &Path) -> Result<()> {
    let builder = Builder {
        workspace,
        target,
        compute_cap: COMPUTE_CAP,
    };
    let mut command = builder.cargo(&["clippy", "--package", Program::FACADE])?;
    command.args([
        "--features",
        "cuda",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]);
    workspace::run(&mut command)
}

/// Builds all that a bundle holds.
pub fn everything(workspace: &Workspace, target: &Path, compute_cap: u32) -> Result<Everything> {
    let (real_ones, simulated_ones): (BTreeSet<Program>, BTreeSet<Program>) = Cell::all(false)
        .iter()
        .flat_map(Cell::programs)
        .partition(|program| program.driver == Driver::Real);
    let mut manifest = Manifest::of(workspace);
    let mut programs = real(workspace, target, compute_cap, &real_ones, &mut manifest)?;
    let builder = Builder {
        workspace,
        target,
        compute_cap,
    };
    let (facade, core): (BTreeSet<Program>, BTreeSet<Program>) = simulated_ones
        .iter()
        .partition(|program| program.package == Program::FACADE);
    programs.extend(builder.core(&core)?);
    programs.extend(builder.facade_without_cuda(&facade)?);
    Ok(Everything {
        programs,
        others: vec![
            (DEMO, builder.demo()?),
            (GENERATE, builder.generate()?),
            (bench::PROGRAM, builder.bench()?),
            (bench::CANDLE_PROGRAM, builder.bench_candle()?),
        ],
        xtask: builder.xtask()?,
        manifest,
    })
}

/// Builds the facade's example for the real driver; answers it, and the CUDA libraries that it needs.
pub fn generate(
    workspace: &Workspace,
    target: &Path,
    compute_cap: u32,
) -> Result<(PathBuf, Vec<String>)> {
    with_libraries(workspace, target, compute_cap, |builder| builder.generate())
}

/// Builds the measuring program of Candle's part for the real driver; answers it, and the CUDA libraries that it needs.
pub fn bench_candle(
    workspace: &Workspace,
    target: &Path,
    compute_cap: u32,
) -> Result<(PathBuf, Vec<String>)> {
    with_libraries(workspace, target, compute_cap, |builder| {
        builder.bench_candle()
    })
}

fn with_libraries(
    workspace: &Workspace,
    target: &Path,
    compute_cap: u32,
    build: impl FnOnce(&Builder) -> Result<PathBuf>,
) -> Result<(PathBuf, Vec<String>)> {
    setup::ensure(workspace, true, false)?;
    let executable = build(&Builder {
        workspace,
        target,
        compute_cap,
    })?;
    let libraries = stubs::needed(&executable)?;
    Ok((executable, libraries.into_iter().collect()))
}

/// Builds for release, with the pinned CUDA compiler.
struct Builder<'a> {
    workspace: &'a Workspace,
    target: &'a Path,
    compute_cap: u32,
}

impl Builder<'_> {
    /// The core's tests.
    fn core(&self, wanted: &BTreeSet<Program>) -> Result<Programs> {
        let mut command = self.cargo(&["test", "--no-run"])?;
        command.args(CORE_FEATURES).args(named(wanted));
        pick(wanted, &messages(&mut command)?)
    }

    /// The facade's tests.
    fn candle(&self, wanted: &BTreeSet<Program>) -> Result<Programs> {
        let mut command = self.cargo(&["test", "--no-run"])?;
        command.args(named(wanted));
        pick(
            wanted,
            &self.messages_with_cuda(&mut command, Program::FACADE)?,
        )
    }

    /// The facade's example.
    fn generate(&self) -> Result<PathBuf> {
        let mut command = self.cargo(&["build", "--example", GENERATE])?;
        let messages = self.messages_with_cuda(&mut command, Program::FACADE)?;
        executable(&messages, Program::FACADE, "example", GENERATE)
            .with_context(|| format!("{} has no example named {GENERATE}", Program::FACADE))
    }

    /// The measuring program of Candle's part.
    fn bench_candle(&self) -> Result<PathBuf> {
        let (package, name) = (bench::PACKAGE, bench::CANDLE_PROGRAM);
        let mut command = self.cargo(&["build", "--bin", name])?;
        let messages = self.messages_with_cuda(&mut command, package)?;
        executable(&messages, package, "bin", name)
            .with_context(|| format!("{package} has no program named {name}"))
    }

    /// Runs cargo for a package with CUDA, to link against libraries that are made here for what the facade asks for.
    fn messages_with_cuda(&self, command: &mut Command, package: &str) -> Result<Vec<Value>> {
        let facade = ["--package", Program::FACADE, "--features", "cuda"];
        let messages_of_build = messages(self.cargo(&["build"])?.args(facade))?;
        let folder = self.target.join("stubs");
        stubs::make(&folder, &archives(&messages_of_build))?;
        // The C compiler, which links, searches there after what it is told on its command line.
        command.args(["--package", package, "--features", "cuda"]);
        messages(command.env("LIBRARY_PATH", folder))
    }

    /// The facade's tests for CPU devices, which start on any machine.
    fn facade_without_cuda(&self, wanted: &BTreeSet<Program>) -> Result<Programs> {
        let mut command = self.cargo(&["test", "--no-run", "--package", Program::FACADE])?;
        pick(wanted, &messages(command.args(named(wanted)))?)
    }

    fn demo(&self) -> Result<PathBuf> {
        let mut command = self.cargo(&["build"])?;
        command.args(CORE_FEATURES).args(["--example", DEMO]);
        let messages = messages(&mut command)?;
        executable(&messages, Program::CORE, "example", DEMO)
            .with_context(|| format!("{} has no example named {DEMO}", Program::CORE))
    }

    fn bench(&self) -> Result<PathBuf> {
        let (package, name) = (bench::PACKAGE, bench::PROGRAM);
        let mut command = self.cargo(&["build", "--package", package, "--bin", name])?;
        executable(&messages(&mut command)?, package, "bin", name)
            .with_context(|| format!("{package} has no program named {name}"))
    }

    fn xtask(&self) -> Result<PathBuf> {
        let package = env!("CARGO_PKG_NAME");
        let messages = messages(self.cargo(&["build"])?.args(["--package", package]))?;
        executable(&messages, package, "bin", package)
            .with_context(|| format!("{package} has no program of its name"))
    }

    fn cargo(&self, arguments: &[&str]) -> Result<Command> {
        let toolkit = setup::toolkit_folder(self.workspace);
        let bin = toolkit.join("bin");
        let mut path = vec![bin.clone()];
        path.extend(std::env::split_paths(
            &std::env::var_os("PATH").unwrap_or_default(),
        ));
        let mut command = self.workspace.cargo(arguments);
        command
            .arg("--release")
            .arg("--target-dir")
            .arg(self.target)
            .env("PATH", std::env::join_paths(path).context("PATH")?)
            .env("CUDA_HOME", &toolkit)
            .env("CUDA_PATH", &toolkit)
            .env("NVCC", bin.join("nvcc"))
            .env("CUDA_COMPUTE_CAP", self.compute_cap.to_string())
            .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
            .env("CARGO_PROFILE_RELEASE_STRIP", "symbols");
        Ok(command)
    }
}

/// Arguments that name the test targets.
fn named(programs: &BTreeSet<Program>) -> Vec<&'static str> {
    programs
        .iter()
        .flat_map(|program| ["--test", program.target])
        .collect()
}

/// Runs cargo, and answers its messages.
fn messages(command: &mut Command) -> Result<Vec<Value>> {
    command.args(["--message-format", "json-render-diagnostics"]);
    let line = workspace::line(command);
    eprintln!("xtask: {line}");
    let output = command
        .stdout(Stdio::piped())
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

/// The executables of the wanted programs.
fn pick(wanted: &BTreeSet<Program>, messages: &[Value]) -> Result<Programs> {
    let mut programs = Programs::new();
    for program in wanted {
        let executable = executable(messages, program.package, "test", program.target)
            .with_context(|| format!("{} has no test named {}", program.package, program.target))?;
        programs.insert(*program, executable);
    }
    Ok(programs)
}

/// The executable of a target among those that cargo tells of.
fn executable(messages: &[Value], package: &str, kind: &str, name: &str) -> Option<PathBuf> {
    messages.iter().find_map(|message| {
        let executable = message["executable"].as_str()?;
        // A package's identity ends with name@version, or with #version after a folder of its name.
        let identity = message["package_id"].as_str()?;
        let is_of_package = identity.contains(&format!("#{package}@"))
            || identity.contains(&format!("/{package}#"));
        let target = &message["target"];
        let is_target = target["name"] == name && array(&target["kind"]).iter().any(|k| k == kind);
        // Programs and examples may have tests of their own, built from the same target.
        let is_test = message["profile"]["test"] == true;
        (is_of_package && is_target && is_test == (kind == "test"))
            .then(|| PathBuf::from(executable))
    })
}

/// The Rust and C archives that cargo tells of.
fn archives(messages: &[Value]) -> BTreeSet<PathBuf> {
    let mut archives = BTreeSet::new();
    let is = |path: &Path, wanted: &str| path.extension().is_some_and(|kind| kind == wanted);
    for message in messages {
        let files = array(&message["filenames"]).iter();
        archives.extend(
            files
                .filter_map(|file| file.as_str().map(PathBuf::from))
                .filter(|path| is(path, "rlib")),
        );
        let out = message["out_dir"].as_str().map(Path::new);
        let entries = out.and_then(|out| out.read_dir().ok());
        archives.extend(
            entries
                .into_iter()
                .flatten()
                .flatten()
                .map(|entry| entry.path())
                .filter(|path| is(path, "a")),
        );
    }
    archives
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

#[cfg(test)]
mod unit {
    use super::*;
    use serde_json::json;

    fn message(package: &str, kind: &str, name: &str, test: bool, file: &str) -> Value {
        json!({
            "profile": { "test": test },
            "reason": "compiler-artifact",
            "package_id": package,
            "target": { "kind": [kind], "name": name },
            "executable": file,
        })
    }

    #[test]
    fn programs_are_told_apart_by_package_kind_and_name() {
        let core = "path+file:///checkout/crates/cuda-vmm#0.2.0";
        let facade = "path+file:///checkout/crates/candle-cuda-vmm#0.2.0";
        let messages = [
            message(facade, "test", "device", true, "facade"),
            message(core, "example", "demo", true, "demo-tests"),
            message(core, "example", "demo", false, "demo"),
            message(core, "test", "device", true, "core"),
            message(
                "path+file:///x#cuda-vmm-sim@0.2.0",
                "test",
                "share",
                true,
                "sim",
            ),
        ];
        let program = |package, target| Program {
            driver: Driver::Real,
            package,
            target,
        };
        let wanted = BTreeSet::from([
            program(Program::CORE, "device"),
            program(Program::FACADE, "device"),
        ]);
        let found: Vec<PathBuf> = pick(&wanted, &messages).unwrap().into_values().collect();
        assert_eq!(found, [Path::new("facade"), Path::new("core")]);
        let demo = executable(&messages, Program::CORE, "example", DEMO);
        assert_eq!(demo.as_deref(), Some(Path::new("demo")));
        let wanted = BTreeSet::from([program(Program::CORE, "share")]);
        let error = pick(&wanted, &messages).unwrap_err();
        assert_eq!(error.to_string(), "cuda-vmm has no test named share");
    }
}
