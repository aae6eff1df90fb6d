//! Building the programs, for this machine or for a bundle.

use super::cell::{CORE, FACADE, Program};
use super::conditions::first_line;
use super::runner::Programs;
use super::stand_ins::{self, Symbols};
use crate::bench;
use crate::workspace::{Workspace, array};
use crate::{setup, tests};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use xshell::Cmd;

/// The facade's example.
pub const GENERATE: &str = "generate";
/// The feature with which Candle has CUDA devices.
const CUDA: &str = "cuda";
/// The package that is the simulated driver as a shared library.
const LIBRARY: &str = "cuda-vmm-sim-library";

/// Programs that are no test: the name, the package, its features, and the kind of target.
pub const OTHERS: [(&str, &str, &str, &str); 4] = [
    ("demo", CORE, "simulator", "example"),
    (GENERATE, FACADE, CUDA, "example"),
    (bench::PROGRAM, bench::PACKAGE, "", "bin"),
    (bench::CANDLE_PROGRAM, bench::PACKAGE, CUDA, "bin"),
];

/// What a build says of itself, and a bundle carries along.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The commit, with a mark if files differ from it.
    pub commit: String,
    /// The Rust compiler.
    pub compiler: String,
    /// The oldest GPUs for which Candle's kernels are built, if they are.
    pub candle_kernels: Option<String>,
    /// The CUDA libraries that the facade's tests need, the driver's left out.
    pub libraries: Vec<String>,
}

/// Whether a program that is no test needs the CUDA libraries.
pub fn needs_libraries(name: &str) -> bool {
    OTHERS
        .iter()
        .any(|(other, _, features, _)| *other == name && *features == CUDA)
}

/// Builds programs for the simulated driver just as the task `test` does, so that after it nothing is left to build.
pub fn simulated(workspace: &Workspace, wanted: &BTreeSet<Program>) -> Result<Programs> {
    setup::ensure(workspace, false, false)?;
    let test = workspace
        .cargo("test --no-run --workspace")
        .args(tests::FEATURES);
    pick(wanted, &messages(test)?)
}

/// Builds for release, with the pinned CUDA compiler.
pub struct Builder<'a> {
    workspace: &'a Workspace,
    /// Where it builds.
    pub target: PathBuf,
    compute_cap: u32,
}

impl<'a> Builder<'a> {
    /// Builds for GPUs of `compute_cap` (90 for 9.0) and newer.
    pub fn new(workspace: &'a Workspace, compute_cap: u32) -> Self {
        let target = workspace.target.join("gpu-test");
        Self {
            workspace,
            target,
            compute_cap,
        }
    }

    /// Builds test programs.
    pub fn programs(&self, wanted: &BTreeSet<Program>) -> Result<Programs> {
        let mut programs = Programs::new();
        for (package, has_cuda, features) in [
            (CORE, true, "simulator"),
            (CORE, false, "simulator"),
            (FACADE, true, CUDA),
            // Its tests for CPU devices start on any machine.
            (FACADE, false, ""),
        ] {
            let mut mine = wanted.clone();
            mine.retain(|it| it.package == package && it.driver.is_library() == has_cuda);
            let names: Vec<&str> = mine.iter().map(|program| program.target).collect();
            programs.extend(pick(
                &mine,
                &self.build(package, features, "test", &names)?,
            )?);
        }
        Ok(programs)
    }

    /// Builds one of [`OTHERS`], or of a package without features.
    pub fn other(
        &self,
        (name, package, features, kind): (&str, &str, &str, &str),
    ) -> Result<PathBuf> {
        executable(
            &self.build(package, features, kind, &[name])?,
            package,
            kind,
            name,
        )
    }

    /// What the build of these programs says of itself.
    pub fn manifest(&self, programs: &Programs) -> Result<Manifest> {
        let facade = programs
            .iter()
            .filter(|(it, _)| it.package == FACADE && it.driver.is_library());
        let libraries = self.needed(facade.map(|(_, path)| path.clone()).collect())?;
        let cap = format!(
            "compute capability {}.{}",
            self.compute_cap / 10,
            self.compute_cap % 10
        );
        let mut git = Command::new("git");
        git.current_dir(&self.workspace.root);
        git.args(["describe", "--always", "--dirty", "--abbrev=12"]);
        let known = |line: Option<String>| line.unwrap_or_else(|| "not known".to_owned());
        Ok(Manifest {
            commit: known(first_line(&mut git)),
            compiler: known(first_line(Command::new("rustc").arg("--version"))),
            candle_kernels: (!libraries.is_empty()).then_some(cap),
            libraries,
        })
    }

    /// The CUDA libraries that programs need, the driver's left out.
    pub fn needed(&self, programs: BTreeSet<PathBuf>) -> Result<Vec<String>> {
        if programs.is_empty() {
            return Ok(Vec::new());
        }
        let symbols = stand_ins::symbols(&self.workspace.shell, Symbols::Asked, &programs)?;
        Ok(stand_ins::needed(&symbols))
    }

    /// Builds the simulated driver as a shared library.
    pub fn simulated_library(&self) -> Result<PathBuf> {
        let messages = messages(self.cargo("build").args(["--package", LIBRARY]))?;
        let own = messages
            .iter()
            .filter(|it| it["target"]["name"] == LIBRARY.replace('-', "_"));
        let library = own.flat_map(files).find(|path| has_extension(path, "so"));
        library.with_context(|| format!("{LIBRARY} made no shared library"))
    }

    /// The facade's lints with Candle's feature `cuda`, in the build of its programs.
    pub fn clippy(&self) -> Result<()> {
        let clippy = self
            .cargo("clippy --all-targets")
            .args(["--package", FACADE]);
        Ok(clippy
            .args(["--features", CUDA, "--", "-D", "warnings"])
            .run()?)
    }

    /// Has cargo build targets of one kind; returns its messages. With CUDA they are linked against libraries that are made
    /// here for what the facade asks for.
    fn build(
        &self,
        package: &str,
        features: &str,
        kind: &str,
        names: &[&str],
    ) -> Result<Vec<Value>> {
        if names.is_empty() {
            return Ok(Vec::new());
        }
        setup::ensure(self.workspace, true, false)?;
        let mut build = self.cargo(if kind == "test" {
            "test --no-run"
        } else {
            "build"
        });
        build = build.args(["--package", package, "--features", features]);
        for name in names {
            build = build.arg(format!("--{kind}")).arg(name);
        }
        if features == CUDA {
            let facade = self
                .cargo("build")
                .args(["--package", FACADE, "--features", CUDA]);
            let folder = self.target.join("stubs");
            let archives = archives(&messages(facade)?);
            stand_ins::make_stubs(&self.workspace.shell, &folder, &archives)?;
            // The C compiler, which links, searches there after what it is told on its command line.
            build = build.env("LIBRARY_PATH", folder);
        }
        messages(build)
    }

    fn cargo(&self, line: &str) -> Cmd<'_> {
        let toolkit = setup::toolkit_folder(self.workspace);
        let bin = toolkit.join("bin");
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::iter::once(bin.clone()).chain(std::env::split_paths(&path));
        // They come from a variable of this kind.
        let path = std::env::join_paths(path).expect("folders have no colon");
        let cargo = self
            .workspace
            .cargo(line)
            .arg("--release")
            .arg("--target-dir");
        cargo
            .arg(&self.target)
            .env("PATH", path)
            .env("CUDA_HOME", &toolkit)
            .env("CUDA_PATH", &toolkit)
            .env("NVCC", bin.join("nvcc"))
            .env("CUDA_COMPUTE_CAP", self.compute_cap.to_string())
            .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
            .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
    }
}

/// Runs cargo, and returns its messages.
fn messages(command: Cmd<'_>) -> Result<Vec<Value>> {
    let command = command.args(["--message-format", "json-render-diagnostics"]);
    eprintln!("xtask: {command}");
    let text = command.quiet().read()?;
    let lines = text.lines().filter(|line| line.starts_with('{'));
    lines
        .map(|line| serde_json::from_str(line).context("cargo's message is not JSON"))
        .collect()
}

/// The executables of the wanted programs.
fn pick(wanted: &BTreeSet<Program>, messages: &[Value]) -> Result<Programs> {
    let path = |it: &Program| executable(messages, it.package, "test", it.target);
    wanted
        .iter()
        .map(|program| Ok((*program, path(program)?)))
        .collect()
}

/// The executable of a target among those that cargo tells of.
fn executable(messages: &[Value], package: &str, kind: &str, name: &str) -> Result<PathBuf> {
    let found = messages.iter().find_map(|message| {
        let executable = message["executable"].as_str()?;
        // A package's identity ends with name@version, or with #version after a folder of its name.
        let identity = message["package_id"].as_str()?;
        let is_of_package = identity.contains(&format!("#{package}@"))
            || identity.contains(&format!("/{package}#"));
        let target = &message["target"];
        let is_target = target["name"] == name && array(&target["kind"]).any(|k| k == kind);
        // Programs and examples may have tests of their own, built from the same target.
        let is_test = message["profile"]["test"] == true;
        (is_of_package && is_target && is_test == (kind == "test")).then(|| executable.into())
    });
    found.with_context(|| format!("{package} has no {kind} named {name}"))
}

/// The Rust and C archives that cargo tells of.
fn archives(messages: &[Value]) -> BTreeSet<PathBuf> {
    let rust = messages
        .iter()
        .flat_map(files)
        .filter(|path| has_extension(path, "rlib"));
    let folders = messages
        .iter()
        .filter_map(|message| message["out_dir"].as_str());
    let entries = folders.filter_map(|folder| Path::new(folder).read_dir().ok());
    let files = entries.flatten().flatten().map(|entry| entry.path());
    rust.chain(files.filter(|path| has_extension(path, "a")))
        .collect()
}

/// The files that a message tells of.
fn files(message: &Value) -> impl Iterator<Item = PathBuf> {
    array(&message["filenames"]).filter_map(|file| Some(file.as_str()?.into()))
}

fn has_extension(path: &Path, wanted: &str) -> bool {
    path.extension()
        .is_some_and(|extension| extension == wanted)
}

#[cfg(test)]
mod unit {
    use super::super::cell::Driver;
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
        let driver = Driver::Real;
        let program = |package, target| Program {
            driver,
            package,
            target,
        };
        let wanted = BTreeSet::from([program(CORE, "device"), program(FACADE, "device")]);
        let found: Vec<PathBuf> = pick(&wanted, &messages).unwrap().into_values().collect();
        assert_eq!(found, [Path::new("facade"), Path::new("core")]);
        let demo = executable(&messages, CORE, "example", "demo").unwrap();
        assert_eq!(demo, Path::new("demo"));
        let wanted = BTreeSet::from([program(CORE, "share")]);
        let error = pick(&wanted, &messages).unwrap_err();
        assert_eq!(error.to_string(), "cuda-vmm has no test named share");
    }
}
