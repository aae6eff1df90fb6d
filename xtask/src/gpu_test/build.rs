//! Building the programs, for this machine or for a bundle.

use super::cell::{CUDA, FACADE, Program, Programs};
use super::stand_ins;
use crate::files::matching;
use crate::setup;
use crate::tests::FEATURES;
use crate::workspace::Workspace;
use anyhow::{Context, Result};
use cargo_metadata::{Artifact, Message, TargetKind};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use xshell::{Cmd, cmd};

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

/// Builds programs for the simulated driver as the task `test` does, which then builds nothing.
pub fn simulated(workspace: &Workspace, wanted: &BTreeSet<Program>) -> Result<Programs> {
    setup::ensure(workspace, false, false)?;
    let test = format!("test --no-run --workspace {FEATURES}");
    executables(workspace, &messages(workspace.cargo(&test))?, wanted)
}

/// Builds for release, with the pinned CUDA compiler.
pub struct Builder<'a> {
    workspace: &'a Workspace,
    pub target: PathBuf,
    /// The oldest GPUs for which it compiles kernels: 90 for 9.0.
    compute_cap: u32,
}

impl<'a> Builder<'a> {
    pub fn new(workspace: &'a Workspace, compute_cap: u32) -> Self {
        Self {
            workspace,
            target: workspace.target.join("gpu-test"),
            compute_cap,
        }
    }

    /// Has cargo build programs. With CUDA it links them against [`Self::stubs`].
    pub fn programs(&self, wanted: &BTreeSet<Program>) -> Result<Programs> {
        let mut groups: BTreeMap<_, BTreeSet<Program>> = BTreeMap::new();
        for it in wanted {
            let group = groups.entry((it.package, it.features(), it.kind));
            group.or_default().insert(*it);
        }
        let mut built = Programs::new();
        for ((package, features, kind), programs) in groups {
            setup::ensure(self.workspace, true, false)?;
            let is_test = kind == "test";
            let build = if is_test { "test --no-run" } else { "build" };
            let build = format!("{build} --package {package} --features={features}");
            let build = self.cargo(&build);
            let names: BTreeSet<_> = programs.iter().map(|it| it.name).collect();
            let kind = format!("--{kind}");
            let mut build = build.args(names.iter().flat_map(|name| [&*kind, name]));
            if features == CUDA {
                // The C compiler, which links, searches there after what it is told on its command line.
                build = build.env("LIBRARY_PATH", self.stubs()?);
            }
            built.extend(executables(self.workspace, &messages(build)?, &programs)?);
        }
        Ok(built)
    }

    /// Makes libraries to link against for what the facade asks for.
    fn stubs(&self) -> Result<PathBuf> {
        let facade = format!("build --package {FACADE} --features {CUDA}");
        let messages = messages(self.cargo(&facade))?;
        let folders = messages.iter().filter_map(|message| match message {
            Message::BuildScriptExecuted(script) => Some(&script.out_dir),
            _ => None,
        });
        let archives = folders.flat_map(|folder| matching(&format!("{folder}/*.a")));
        let archives = files(&messages, ".rlib").chain(archives).collect();
        let stubs = self.target.join("stubs");
        stand_ins::make_stubs(&self.workspace.shell, &stubs, &archives)?;
        Ok(stubs)
    }

    pub fn manifest(&self, programs: &Programs) -> Result<Manifest> {
        let is_linked = |it: &Program| it.kind == "test" && it.features() == CUDA;
        let facade = programs.iter().filter(|(it, _)| is_linked(it));
        let facade = facade.map(|(_, path)| path.clone()).collect();
        let libraries = stand_ins::needed(&self.workspace.shell, &facade)?;
        let (major, minor) = (self.compute_cap / 10, self.compute_cap % 10);
        let kernels = format!("compute capability {major}.{minor}");
        let shell = &self.workspace.shell;
        let git = cmd!(shell, "git describe --always --dirty --abbrev=12");
        let known = |command: Cmd<'_>| {
            let line = command.quiet().ignore_stderr().read();
            line.unwrap_or_else(|_| "not known".to_owned())
        };
        Ok(Manifest {
            commit: known(git),
            compiler: known(cmd!(shell, "rustc --version")),
            candle_kernels: (!libraries.is_empty()).then_some(kernels),
            libraries,
        })
    }

    pub fn simulated_library(&self) -> Result<PathBuf> {
        let messages = messages(self.cargo("build --package cuda-vmm-sim-library"))?;
        let library = files(&messages, "libcuda_vmm_sim_library.so").next();
        library.context("cuda-vmm-sim-library made no shared library")
    }

    /// The facade's lints with Candle's CUDA devices, with all kernels and without those of attention.
    pub fn clippy(&self) -> Result<()> {
        for features in [CUDA, "cuda"] {
            let line = format!("clippy --package {FACADE} --features {features} --all-targets");
            self.cargo(&line).args(["--", "-D", "warnings"]).run()?;
        }
        Ok(())
    }

    fn cargo(&self, line: &str) -> Cmd<'_> {
        let toolkit = setup::toolkit_folder(self.workspace);
        let bin = toolkit.join("bin");
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::iter::once(bin.clone()).chain(std::env::split_paths(&path));
        let path = std::env::join_paths(path).expect("they come from such a variable");
        let cargo = self.workspace.cargo(line).arg("--release");
        let cargo = cargo.arg("--target-dir").arg(&self.target);
        let cargo = cargo.envs(["CUDA_HOME", "CUDA_PATH"].map(|name| (name, &toolkit)));
        let cargo = cargo.env("NVCC", bin.join("nvcc")).env("PATH", path);
        let cargo = cargo.env("CUDA_COMPUTE_CAP", self.compute_cap.to_string());
        let profile = [("DEBUG", "0"), ("STRIP", "symbols")];
        cargo.envs(profile.map(|(key, value)| (format!("CARGO_PROFILE_RELEASE_{key}"), value)))
    }
}

fn messages(command: Cmd<'_>) -> Result<Vec<Message>> {
    let command = command.args(["--message-format", "json-render-diagnostics"]);
    eprintln!("xtask: {command}");
    let text = command.quiet().read()?;
    let messages = Message::parse_stream(text.as_bytes()).collect::<std::io::Result<_>>();
    messages.context("cargo's messages cannot be read")
}

fn artifacts(messages: &[Message]) -> impl Iterator<Item = &Artifact> {
    messages.iter().filter_map(|message| match message {
        Message::CompilerArtifact(artifact) => Some(artifact),
        _ => None,
    })
}

/// The executables of programs among those that cargo tells of.
fn executables(
    workspace: &Workspace,
    messages: &[Message],
    wanted: &BTreeSet<Program>,
) -> Result<Programs> {
    let path = |program: &Program| {
        let (package, kind, name) = (program.package, program.kind, program.name);
        let (id, target_kind) = (&workspace.package(package)?.id, TargetKind::from(kind));
        let mut mine = artifacts(messages).filter(|it| {
            let is_target = it.target.name == name && it.target.kind.contains(&target_kind);
            // Programs and examples may have tests of their own, built from the same target.
            is_target && it.profile.test == (kind == "test") && it.package_id == *id
        });
        let found = mine.find_map(|it| it.executable.clone());
        found.with_context(|| format!("{package} has no {kind} named {name}"))
    };
    let paths = wanted.iter().map(|it| Ok((*it, path(it)?.into())));
    paths.collect()
}

/// The files with this ending that cargo tells of.
fn files(messages: &[Message], ending: &str) -> impl Iterator<Item = PathBuf> {
    let files = artifacts(messages).flat_map(|artifact| &artifact.filenames);
    let mine = files.filter(move |file| file.as_str().ends_with(ending));
    mine.map(PathBuf::from)
}

#[cfg(test)]
mod unit {
    use super::*;
    use crate::gpu_test::cell::{CORE, DEMO, other};
    use serde_json::json;

    #[test]
    fn programs_are_told_apart_by_package_kind_and_name() {
        let workspace = Workspace::find().unwrap();
        let artifact = |package, kind, name, is_test, file| {
            let artifact = json!({
                "reason": "compiler-artifact", "package_id": workspace.package(package).unwrap().id,
                "manifest_path": "", "executable": file, "filenames": [], "features": [], "fresh": true,
                "profile": {
                    "opt_level": "0", "debug_assertions": true, "overflow_checks": true, "test": is_test
                },
                "target": { "kind": [kind], "name": name, "crate_types": [], "src_path": "" },
            });
            serde_json::from_value(artifact).unwrap()
        };
        let messages = [
            artifact(FACADE, "test", "device", true, "facade"),
            artifact(CORE, "example", "demo", true, "demo-tests"),
            artifact(CORE, "example", "demo", false, "demo"),
            artifact(CORE, "test", "device", true, "core"),
            artifact("cuda-vmm-sim", "test", "share", true, "sim"),
        ];
        let test = |package, name| other(package, "test", name);
        let wanted = [test(FACADE, "device"), test(CORE, "device"), DEMO];
        let found = executables(&workspace, &messages, &wanted.into()).unwrap();
        let files = ["facade", "core", "demo"].map(PathBuf::from);
        assert_eq!(wanted.map(|it| found[&it].clone()), files);
        let absent = [test(CORE, "share")].into();
        let error = executables(&workspace, &messages, &absent).unwrap_err();
        assert_eq!(error.to_string(), "cuda-vmm has no test named share");
    }
}
