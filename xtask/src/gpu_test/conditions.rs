//! What this machine has of what rows need: GPUs, the CUDA libraries that Candle links, NVIDIA's memory checker.

use super::arguments::Arguments;
use super::cell::{Cell, Driver, State};
use crate::files::matching;
use anyhow::{Context, Result};
use itertools::Itertools;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use xshell::{Shell, cmd};

/// NVIDIA's memory checker, and the exit code by which it says that it found errors.
const SANITIZER: &str = "compute-sanitizer";
pub const SANITIZER_ERRORS: i32 = 86;

#[derive(Default)]
pub struct Conditions {
    /// What the probe found, if it was asked.
    pub gpus: Option<Answer>,
    pub libraries: Libraries,
    /// The memory checker, if it was looked for and is here.
    pub sanitizer: Option<PathBuf>,
}

impl Conditions {
    /// What can be known before anything is built. It asks `probe` if a row is for the real driver.
    /// A usage error if there is no row, which is one on every machine.
    pub fn find(arguments: &Arguments, probe: impl FnOnce() -> Result<Answer>) -> Result<Self> {
        let most = arguments.select(None)?;
        let needs_gpu = most.iter().any(|cell| cell.driver == Driver::Real);
        Ok(Self {
            gpus: needs_gpu.then(probe).transpose()?,
            libraries: Libraries::default(),
            sanitizer: arguments.sanitize.then(sanitizer).flatten(),
        })
    }

    pub fn gpu_count(&self) -> Option<u32> {
        Some(self.gpus.as_ref()?.as_ref().ok()?.count)
    }

    /// Why a cell cannot be run here, and what becomes of its row.
    pub fn obstacle(&self, cell: &Cell) -> Option<Obstacle> {
        let count = match &self.gpus {
            Some(Err(obstacle)) if cell.driver == Driver::Real => return Some(obstacle.clone()),
            Some(Ok(gpus)) if cell.driver == Driver::Real => gpus.count,
            _ => return None,
        };
        let missing = &self.libraries.missing;
        let reason = if count < cell.devices {
            format!("needs {} GPUs, this machine has {count}", cell.devices)
        } else if cell.is_sanitized() && self.sanitizer.is_none() {
            format!("{SANITIZER} is neither on PATH nor in a CUDA toolkit")
        } else if cell.suite == "facade" && !missing.is_empty() {
            format!("missing {}", missing.join(", "))
        } else {
            return None;
        };
        Some((State::Skipped, reason))
    }

    /// A command that runs `program` under the memory checker.
    pub fn sanitized(&self, program: &Path) -> Command {
        let mut command = Command::new(self.sanitizer.as_deref().unwrap_or(SANITIZER.as_ref()));
        // The tests make calls that must fail.
        let options = "--tool memcheck --target-processes application-only --report-api-errors no";
        command.args(options.split(' ')).arg("--error-exitcode");
        command.arg(SANITIZER_ERRORS.to_string()).arg(program);
        command
    }
}

/// The memory checker on `PATH`, or in a CUDA toolkit.
fn sanitizer() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let named = ["CUDA_HOME", "CUDA_PATH"].map(std::env::var_os);
    let named = named.into_iter().flatten().map(PathBuf::from);
    let toolkits = named.chain(matching("/usr/local/cuda*"));
    let folders = toolkits.flat_map(|toolkit| [toolkit.join("bin"), toolkit.join(SANITIZER)]);
    let folders = std::env::split_paths(&path).chain(folders);
    let mut programs = folders.map(|folder| folder.join(SANITIZER));
    programs.find(|program| program.is_file())
}

#[derive(Clone, Debug)]
pub struct Gpus {
    pub name: String,
    pub count: u32,
    /// The CUDA version of the driver.
    pub cuda: String,
}

/// What becomes of a row that cannot be run, and why.
pub type Obstacle = (State, String);
pub type Answer = Result<Gpus, Obstacle>;

pub fn compile_probe(shell: &Shell, folder: &Path) -> Result<PathBuf> {
    let (source, program) = (folder.join("probe.c"), folder.join("probe"));
    shell.write_file(&source, include_str!("probe.c"))?;
    let cc = cmd!(shell, "cc -O1 -s -Wall -Wextra -o {program} {source} -ldl");
    cc.quiet().run()?;
    Ok(program)
}

/// Runs the probe. Without a driver or a GPU, rows are skipped; a driver that fails fails them.
pub fn ask_probe(program: &Path) -> Result<Answer> {
    let output = Command::new(program).output();
    let output = output.with_context(|| format!("{} does not start", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let value = |key: &str| {
        let mut pairs = text.lines().filter_map(|line| line.split_once('='));
        let (_, value) = pairs.find(|(name, _)| *name == key)?;
        Some(value.trim().to_owned())
    };
    let reason = value("reason").unwrap_or_else(|| format!("the probe: {}", output.status));
    let failing = format!("the CUDA driver is here, but fails: {reason}");
    let [name, count, cuda] = ["name", "devices", "cuda"].map(|key| value(key).unwrap_or_default());
    let (state, reason) = match output.status.code() {
        // Rows of the real driver are not for the simulator, by whatever name it was opened.
        Some(0) if name.starts_with("Simulated device ") => {
            let reason = "the libcuda.so.1 that is found here is the simulated one";
            (State::Skipped, reason.to_owned())
        }
        Some(0) => {
            let count = count.parse().context("the number of GPUs")?;
            return Ok(Ok(Gpus { name, count, cuda }));
        }
        Some(2) => (State::Skipped, reason),
        _ => (State::Fail, failing),
    };
    Ok(Err((state, reason)))
}

/// What was found of the libraries that were looked for.
#[derive(Clone, Debug, Default)]
pub struct Libraries {
    /// The folders that hold them, where the dynamic loader must be told.
    pub folders: Vec<PathBuf>,
    pub missing: Vec<String>,
}

impl Libraries {
    /// Looks in `LD_LIBRARY_PATH`, `/usr/local`, Python packages, and where the loader itself does.
    pub fn find(names: &[String]) -> Self {
        if names.is_empty() {
            return Self::default();
        }
        let given = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
        let mut folders: Vec<_> = std::env::split_paths(&given).collect();
        folders.retain(|folder| !folder.as_os_str().is_empty());
        folders.extend(matching("/usr/local/cuda*/lib64"));
        folders.extend(matching("/usr/local/cuda*/targets/*/lib"));
        let wheels = lines("python3", &["-c", include_str!("wheels.py")]);
        folders.extend(wheels.into_iter().map(PathBuf::from));
        let loader = ["ldconfig", "/sbin/ldconfig"].map(|program| lines(program, &["-p"]));
        // The first line is a heading.
        let loader = loader.iter().flat_map(|lines| lines.iter().skip(1));
        let loader = loader.filter_map(|line| Some(line.split_whitespace().next()?.to_owned()));
        Self::find_in(names, &folders, &loader.collect())
    }

    fn find_in(names: &[String], folders: &[PathBuf], loader: &BTreeSet<String>) -> Self {
        let mut found = Self::default();
        for name in names {
            match folders.iter().find(|folder| folder.join(name).exists()) {
                Some(folder) if found.folders.contains(folder) => {}
                Some(folder) => found.folders.push(folder.clone()),
                None if loader.contains(name) => {}
                None => found.missing.push(name.clone()),
            }
        }
        found
    }

    /// `LD_LIBRARY_PATH` for a program that links them: their folders, and after them what it says already.
    pub fn path(&self) -> Result<OsString> {
        let given = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
        let mut folders = self.folders.clone();
        folders.extend(std::env::split_paths(&given).filter(|path| path.is_absolute()));
        std::env::join_paths(folders).context("the folders of CUDA libraries")
    }

    pub fn describe(&self) -> String {
        let mut found = self.folders.iter().map(|it| it.display()).join(":");
        if found.is_empty() {
            found = "those of the dynamic loader".to_owned();
        }
        match &*self.missing.join(", ") {
            "" => found,
            missing => format!("{found}; missing: {missing}"),
        }
    }
}

/// The lines that a program prints; none if it cannot be started or fails.
pub fn lines(program: &str, arguments: &[&str]) -> Vec<String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.ok().filter(|output| output.status.success());
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let text = text.unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_is_in_a_folder_or_known_to_the_loader_or_missing() {
        let folder = tempfile::tempdir().unwrap();
        let folders = ["one", "two"].map(|name| folder.path().join(name));
        let shell = Shell::new().unwrap();
        for file in ["one/a.so", "two/a.so", "two/b.so"] {
            shell.write_file(folder.path().join(file), "").unwrap();
        }
        let names = ["a.so", "b.so", "c.so", "d.so"].map(str::to_owned);
        let found = Libraries::find_in(&names, &folders, &BTreeSet::from(["c.so".to_owned()]));
        assert_eq!(found.folders, folders);
        assert_eq!(found.missing, ["d.so"]);
        assert!(found.describe().ends_with("two; missing: d.so"));
    }

    #[test]
    fn sanitized_rows_are_skipped_where_there_is_no_sanitizer() {
        let (name, cuda, count) = ("Test GPU".to_owned(), "13.0".to_owned(), 1);
        let mut conditions = Conditions {
            gpus: Some(Ok(Gpus { name, count, cuda })),
            ..Conditions::default()
        };
        let [plain, sanitized] = [false, true].map(|sanitized| Cell::all(sanitized).remove(0));
        assert_eq!(conditions.obstacle(&plain), None);
        let (state, reason) = conditions.obstacle(&sanitized).unwrap();
        assert_eq!(state, State::Skipped);
        assert!(reason.contains("compute-sanitizer"), "{reason}");
        conditions.sanitizer = Some(PathBuf::from("compute-sanitizer"));
        assert_eq!(conditions.obstacle(&sanitized), None);
    }
}
