//! `bench`: what the bookkeeping costs on the CPU, what the pools cost on a GPU, what
//! serving several models comes to, or what it costs to have models sleep.

use crate::gpu_test::{
    BENCH, BENCH_CANDLE, BENCH_SERVE, BENCHES, COMPUTE_CAP, Passed, SERVE, SERVER,
};
use crate::workspace::{Workspace, code};
use crate::{gpu_test, setup};
use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};
use fs_err as fs;
use serde_json::Value;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The pools
    Pools,
    /// Tensors and caches that grow
    Candle,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Simulate serving several models on one GPU, in four pools; what follows goes to the program.
    /// With `--real` first, measure the server of this workspace over HTTP instead
    #[command(disable_help_flag = true)]
    Serving(Passed),
    /// Measure two models that take turns on a GPU with room for one, and what a neighbour feels of
    /// it; on the CPU with `--device cpu`. What follows goes to the program
    #[command(disable_help_flag = true)]
    Sleep(Passed),
}

#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Arguments {
    #[command(subcommand)]
    task: Option<Task>,
    /// Measure on the GPU of this machine
    #[arg(long)]
    gpu: bool,
    /// Measure only this part; all without, but the pools if arguments are given
    #[arg(long, value_enum, requires = "gpu")]
    part: Option<Part>,
    /// The oldest GPU for which Candle's kernels are compiled, as NVIDIA numbers them without the dot
    #[arg(long, default_value_t = 90, value_parser = clap::value_parser!(u32).range(53..1000), requires = "gpu")]
    compute_cap: u32,
    /// Write a list of `name`, `ours`, `peer`, `ratio`, `reach`, `pass`, `unit`, `note` to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Arguments of the part's measuring program (`--gpu -- --help` lists them)
    #[arg(last = true, requires = "gpu")]
    arguments: Vec<OsString>,
}

/// Where the files are that say what is asked of the server.
const WORKLOADS: &str = "benches/serve/workloads";

/// Measures, and returns the exit code: 1 if something is not reached, 2 if no GPU answers.
pub fn run(workspace: &Workspace, arguments: &Arguments) -> Result<u8> {
    setup::ensure(workspace, false, false)?;
    match &arguments.task {
        Some(Task::Serving(passed)) => serving(workspace, &passed.arguments),
        Some(Task::Sleep(passed)) => sleep(workspace, &passed.arguments),
        None if arguments.gpu => on_gpu(workspace, arguments),
        None => on_cpu(workspace, arguments.json.as_deref()),
    }
}

/// Measures models that sleep and wake.
fn sleep(workspace: &Workspace, arguments: &[OsString]) -> Result<u8> {
    let mut program = match is_on(arguments, "cpu") {
        true => by_cargo(workspace, BENCH_CANDLE.name)?,
        false => gpu_test::with_cuda(workspace, COMPUTE_CAP, BENCH_CANDLE)?,
    };
    let only = ["--only", "sleeping models"];
    code(program.args(only).args(arguments))
}

/// Simulates a server, or measures the real one if that is the first argument.
fn serving(workspace: &Workspace, arguments: &[OsString]) -> Result<u8> {
    let plots = |folder: &str| workspace.target.join(folder);
    match real(arguments) {
        None => {
            let arguments = with(arguments, "--plots", &plots("serving"));
            code(by_cargo(workspace, "bench-serving")?.args(arguments))
        }
        Some(arguments) => {
            let file = match is_on(arguments, "cuda") {
                true => "h200.toml",
                false => "cpu.toml",
            };
            let workloads = workspace.root.join(WORKLOADS).join(file);
            let all = with(arguments, "--workloads", &workloads);
            let all = with(&all, "--plots", &plots("serving-real"));
            // The measuring program starts the server that lies beside it.
            let [server, program] = [SERVE.name, BENCH_SERVE.name]
                .map(|program| format!("--package {SERVER} --bin {program}"));
            let mut program = match is_on(arguments, "cuda") {
                true => {
                    gpu_test::with_cuda(workspace, COMPUTE_CAP, SERVE)?;
                    gpu_test::with_cuda(workspace, COMPUTE_CAP, BENCH_SERVE)?
                }
                false => {
                    workspace
                        .cargo(&format!("build --release {server}"))
                        .run()?;
                    workspace.program(&program)?
                }
            };
            code(program.args(all))
        }
    }
}

/// Whether the models are to run on this device.
fn is_on(arguments: &[OsString], device: &str) -> bool {
    let is_apart = |pair: &[OsString]| pair[0] == "--device" && pair[1] == device;
    let joined = OsString::from(format!("--device={device}"));
    arguments.windows(2).any(is_apart) || arguments.contains(&joined)
}

/// What follows `--real`, if the arguments begin with it.
fn real(arguments: &[OsString]) -> Option<&[OsString]> {
    let (first, rest) = arguments.split_first()?;
    (first == "--real").then_some(rest)
}

/// The arguments, with a path for this one if they do not have it.
fn with(arguments: &[OsString], name: &str, path: &Path) -> Vec<OsString> {
    let mut texts = arguments.iter().map(|argument| argument.to_string_lossy());
    let begins = |text: &str| {
        text.strip_prefix(name)
            .is_some_and(|it| it.starts_with('='))
    };
    if texts.any(|text| text == name || begins(&text)) {
        return arguments.to_vec();
    }
    [&[name.into(), path.into()], arguments].concat()
}

fn by_cargo(workspace: &Workspace, program: &str) -> Result<Command> {
    workspace.program(&format!("--package {BENCHES} --bin {program}"))
}

/// Runs the measuring programs, which print and write all by themselves.
fn on_gpu(workspace: &Workspace, arguments: &Arguments) -> Result<u8> {
    let (mut codes, mut findings) = (Vec::new(), Vec::<Value>::new());
    for part in parts(arguments.part, !arguments.arguments.is_empty()) {
        let mut command = match part {
            Part::Pools => by_cargo(workspace, BENCH.name)?,
            Part::Candle if gpu_test::has_gpu(workspace)? => {
                gpu_test::with_cuda(workspace, arguments.compute_cap, BENCH_CANDLE)?
            }
            // It says that no GPU answers, for which Candle's kernels need not be compiled.
            Part::Candle => by_cargo(workspace, BENCH_CANDLE.name)?,
        };
        if let Some(json) = &arguments.json {
            // A list of an earlier run is not to be taken for this one's.
            workspace.shell.remove_path(std::path::absolute(json)?)?;
            command.arg("--json").arg(json);
        }
        codes.push(code(command.args(&arguments.arguments))?);
        let json = arguments.json.as_ref();
        if let Some(text) = json.and_then(|json| fs::read_to_string(json).ok()) {
            let list: Vec<Value> = serde_json::from_str(&text).context("the list of figures")?;
            findings.extend(list);
        }
    }
    if let Some(json) = &arguments.json {
        fs::write(json, serde_json::to_string_pretty(&findings)? + "\n")?;
    }
    Ok(worst(&codes))
}

/// Which parts are measured. Arguments are one program's.
fn parts(part: Option<Part>, has_arguments: bool) -> Vec<Part> {
    match (part, has_arguments) {
        (Some(part), _) => vec![part],
        (None, true) => vec![Part::Pools],
        (None, false) => vec![Part::Pools, Part::Candle],
    }
}

/// The exit code of all: of one that failed, otherwise of one for which no GPU answers.
fn worst(codes: &[u8]) -> u8 {
    let failed = codes.iter().find(|code| ![0, 2].contains(*code));
    *failed.or(codes.iter().max()).unwrap_or(&0)
}

/// Runs the criterion bench, which prints, judges and writes its figures by itself.
fn on_cpu(workspace: &Workspace, json: Option<&Path>) -> Result<u8> {
    let bench = workspace.cargo("bench --benches --package").arg(BENCHES);
    let mut bench = Command::from(bench);
    if let Some(json) = json {
        bench.env("BENCH_JSON", std::path::absolute(json)?);
    }
    Ok(u8::from(code(&mut bench)? != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plots_go_to_the_target_folder_unless_told_otherwise() {
        let given = |arguments: &[&str]| {
            let arguments: Vec<_> = arguments.iter().map(OsString::from).collect();
            with(&arguments, "--plots", Path::new("/built/serving"))
        };
        let plots = ["--plots", "/built/serving", "--quick"];
        assert_eq!(given(&["--quick"]), plots);
        for told in [&["--plots", "x"][..], &["--plots=x"]] {
            assert_eq!(given(told), told);
        }
    }

    #[test]
    fn the_real_server_is_measured_if_that_is_said_first() {
        let arguments = ["--real", "--quick"].map(OsString::from);
        assert_eq!(real(&arguments), Some(&arguments[1..]));
        assert_eq!(real(&arguments[1..]), None);
        assert_eq!(real(&[]), None);
        let is_on_gpu = |line: &str| {
            let words: Vec<_> = line.split(' ').map(OsString::from).collect();
            is_on(&words, "cuda")
        };
        assert!(is_on_gpu("--quick --device cuda") && is_on_gpu("--device=cuda"));
        assert!(!is_on_gpu("--device cpu") && !is_on_gpu("--device") && !is_on_gpu("cuda"));
    }

    #[test]
    fn arguments_are_for_one_part() {
        assert_eq!(parts(None, false), [Part::Pools, Part::Candle]);
        assert_eq!(parts(None, true), [Part::Pools]);
        assert_eq!(parts(Some(Part::Candle), true), [Part::Candle]);
        assert_eq!(parts(Some(Part::Pools), false), [Part::Pools]);
    }

    #[test]
    fn a_failure_counts_for_more_than_no_gpu() {
        let all = [[0, 0], [0, 2], [2, 1], [64, 2]].map(|codes| worst(&codes));
        assert_eq!((all, worst(&[])), ([0, 2, 1, 64], 0));
    }
}
