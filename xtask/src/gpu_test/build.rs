//! Building the programs, for this machine or for a bundle.

use super::cell::{CORE, FACADE, Program};
use super::conditions::{first_line, matching};
use super::runner::Programs;
use super::stand_ins;
use crate::setup;
use crate::tests::FEATURES;
use crate::workspace::{Workspace, array, text};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;
use xshell::Cmd;

pub const GENERATE: &str = "generate";
/// The package of the benches.
pub const BENCHES: &str = "cuda-vmm-benches";
/// Its program that measures pools on a GPU.
pub const BENCH: &str = "bench";
/// Its program that measures tensors and caches, with Candle on CUDA devices.
pub const BENCH_CANDLE: &str = "bench-candle";
/// The feature with which Candle has CUDA devices.
const CUDA: &str = "cuda";

/// Programs that are no test: the name, the package, its features, and the kind of target.
pub const OTHERS: [Other; 4] = [
    ("demo", CORE, "simulator", "example"),
    (GENERATE, FACADE, CUDA, "example"),
    (BENCH, BENCHES, "", "bin"),
    (BENCH_CANDLE, BENCHES, CUDA, "bin"),
];
pub type Other = (&'static str, &'static str, &'static str, &'static str);

/// What a build says of itself, and a bundle carries along.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub commit: String,
    pub compiler: String,
    /// The oldest GPUs for which Candle's kernels are built, if they are.
    pub candle_kernels: Option<String>,
    /// The CUDA libraries that the facade's tests need, the driver's left out.
    pub libraries: Vec<String>,
}

/// Whether a program that is no test needs the CUDA libraries.
pub fn needs_libraries(name: &str) -> bool {
    let mut others = OTHERS.iter().filter(|other| other.0 == name);
    others.any(|other| other.2 == CUDA)
}

/// Builds programs for the simulated driver just as the task `test` does, so that after it nothing is left to build.
pub fn simulated(workspace: &Workspace, wanted: &BTreeSet<Program>) -> Result<Programs> {
    setup::ensure(workspace, false, false)?;
    let test = format!("test --no-run --workspace {FEATURES}");
    let messages = messages(workspace.cargo(&test))?;
    let path = |it: &Program| executable(&messages, it.package, "test", it.target);
    wanted.iter().map(|it| Ok((*it, path(it)?))).collect()
}

/// Builds for release, with the pinned CUDA compiler.
pub struct Builder<'a> {
    pub workspace: &'a Workspace,
    pub target: PathBuf,
    /// The oldest GPUs for which it compiles kernels: 90 for 9.0.
    pub compute_cap: u32,
}

impl Builder<'_> {
    pub fn programs(&self, wanted: &BTreeSet<Program>) -> Result<Programs> {
        let mut programs = Programs::new();
        for (package, is_library, features) in [
            (CORE, true, "simulator"),
            (CORE, false, "simulator"),
            (FACADE, true, CUDA),
            // Its tests for CPU devices start on any machine.
            (FACADE, false, ""),
        ] {
            let mut mine = wanted.clone();
            mine.retain(|it| it.package == package && it.driver.is_library() == is_library);
            let names: Vec<&str> = mine.iter().map(|program| program.target).collect();
            let built = self.build(package, features, "test", &names)?;
            programs.extend(mine.into_iter().zip(built));
        }
        Ok(programs)
    }

    /// Builds one of [`OTHERS`], or the program of a package without features.
    pub fn other(&self, (name, package, features, kind): Other) -> Result<PathBuf> {
        Ok(self.build(package, features, kind, &[name])?.remove(0))
    }

    /// What the build of these programs says of itself.
    pub fn manifest(&self, programs: &Programs) -> Result<Manifest> {
        let mut facade = programs.clone();
        facade.retain(|it, _| it.package == FACADE && it.driver.is_library());
        let libraries = self.needed(facade.into_values().collect())?;
        let (major, minor) = (self.compute_cap / 10, self.compute_cap % 10);
        let kernels = format!("compute capability {major}.{minor}");
        let mut git = Command::new("git");
        git.current_dir(&self.workspace.root);
        git.args(["describe", "--always", "--dirty", "--abbrev=12"]);
        let known = |line: Option<String>| line.unwrap_or_else(|| "not known".to_owned());
        Ok(Manifest {
            commit: known(first_line(&mut git)),
            compiler: known(first_line(Command::new("rustc").arg("--version"))),
            candle_kernels: (!libraries.is_empty()).then_some(kernels),
            libraries,
        })
    }

    /// The CUDA libraries that programs need, the driver's left out.
    pub fn needed(&self, programs: BTreeSet<PathBuf>) -> Result<Vec<String>> {
        stand_ins::needed(&self.workspace.shell, &programs)
    }

    /// Builds the simulated driver as a shared library.
    pub fn simulated_library(&self) -> Result<PathBuf> {
        let messages = messages(self.cargo("build --package cuda-vmm-sim-library"))?;
        let library = files(&messages, "libcuda_vmm_sim_library.so").next();
        library.context("cuda-vmm-sim-library made no shared library")
    }

    /// The facade's lints with Candle's feature `cuda`, in the build of its programs.
    pub fn clippy(&self) -> Result<()> {
        let line = format!("clippy --package {FACADE} --features {CUDA} --all-targets");
        let clippy = self.cargo(&line).args(["--", "-D", "warnings"]);
        Ok(clippy.run()?)
    }

    /// Has cargo build targets of one kind, and returns their executables. With CUDA they are linked against libraries that are
    /// made here for what the facade asks for.
    fn build(
        &self,
        package: &str,
        features: &str,
        kind: &str,
        names: &[&str],
    ) -> Result<Vec<PathBuf>> {
        if names.is_empty() {
            return Ok(Vec::new());
        }
        setup::ensure(self.workspace, true, false)?;
        let verb = if kind == "test" {
            "test --no-run"
        } else {
            "build"
        };
        let targets = names.iter().map(|name| format!(" --{kind} {name}"));
        let targets: String = targets.collect();
        let line = format!("{verb} --package {package} --features={features}{targets}");
        let mut build = self.cargo(&line);
        if features == CUDA {
            let facade = format!("build --package {FACADE} --features {CUDA}");
            let messages = messages(self.cargo(&facade))?;
            let folders = messages.iter().map(|message| text(message, "out_dir"));
            let folders = folders.filter(|folder| !folder.is_empty());
            let archives = folders.flat_map(|folder| matching(&format!("{folder}/*.a")));
            let archives = files(&messages, ".rlib").chain(archives).collect();
            let stubs = self.target.join("stubs");
            stand_ins::make_stubs(&self.workspace.shell, &stubs, &archives)?;
            // The C compiler, which links, searches there after what it is told on its command line.
            build = build.env("LIBRARY_PATH", stubs);
        }
        let messages = messages(build)?;
        let path = |name: &&str| executable(&messages, package, kind, name);
        names.iter().map(path).collect()
    }

    fn cargo(&self, line: &str) -> Cmd<'_> {
        let toolkit = setup::toolkit_folder(self.workspace);
        let bin = toolkit.join("bin");
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::iter::once(bin.clone()).chain(std::env::split_paths(&path));
        let path = std::env::join_paths(path).expect("they come from such a variable");
        let cargo = self.workspace.cargo(line);
        cargo
            .args(["--release", "--target-dir"])
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
    let message = |line| serde_json::from_str(line).context("cargo's message is not JSON");
    lines.map(message).collect()
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

/// The files with this ending that cargo tells of.
fn files(messages: &[Value], ending: &str) -> impl Iterator<Item = PathBuf> {
    let files = messages.iter().map(|message| &message["filenames"]);
    let files = files.flat_map(array).filter_map(Value::as_str);
    let mine = files.filter(move |file| file.ends_with(ending));
    mine.map(PathBuf::from)
}

#[cfg(test)]
mod unit {
    use super::*;
    use serde_json::json;

    #[test]
    fn programs_are_told_apart_by_package_kind_and_name() {
        let core = "path+file:///checkout/crates/cuda-vmm#0.2.0";
        let facade = "path+file:///checkout/crates/candle-cuda-vmm#0.2.0";
        let sim = "path+file:///x#cuda-vmm-sim@0.2.0";
        let messages = [
            (facade, "test", "device", true, "facade"),
            (core, "example", "demo", true, "demo-tests"),
            (core, "example", "demo", false, "demo"),
            (core, "test", "device", true, "core"),
            (sim, "test", "share", true, "sim"),
        ];
        let messages = messages.map(|(package, kind, name, is_test, file)| {
            json!({
                "reason": "compiler-artifact", "package_id": package, "executable": file,
                "profile": { "test": is_test }, "target": { "kind": [kind], "name": name },
            })
        });
        for (package, kind, name, file) in [
            (FACADE, "test", "device", "facade"),
            (CORE, "test", "device", "core"),
            (CORE, "example", "demo", "demo"),
        ] {
            let found = executable(&messages, package, kind, name).unwrap();
            assert_eq!(found.to_str(), Some(file));
        }
        let error = executable(&messages, CORE, "test", "share").unwrap_err();
        assert_eq!(error.to_string(), "cuda-vmm has no test named share");
    }
}
