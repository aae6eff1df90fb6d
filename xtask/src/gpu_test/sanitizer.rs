//! NVIDIA's memory checker, under which a program can be run.

use super::libraries;
use std::path::{Path, PathBuf};
use std::process::Command;

const NAME: &str = "compute-sanitizer";

/// The exit code by which it says that it found errors.
pub const ERRORS: i32 = 86;

/// Finds it on `PATH`, or in a CUDA toolkit.
pub fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let named = ["CUDA_HOME", "CUDA_PATH"]
        .into_iter()
        .filter_map(std::env::var_os)
        .map(PathBuf::from);
    for toolkit in named.chain(libraries::toolkits()) {
        folders.push(toolkit.join("bin"));
        folders.push(toolkit.join(NAME));
    }
    folders
        .into_iter()
        .map(|folder| folder.join(NAME))
        .find(|program| program.is_file())
}

/// A command that runs `program` under it.
pub fn command(sanitizer: &Path, program: &Path) -> Command {
    let mut command = Command::new(sanitizer);
    command
        .args(["--tool", "memcheck"])
        .args(["--target-processes", "application-only"])
        // The tests make calls that must fail.
        .args(["--report-api-errors", "no"])
        .args(["--error-exitcode", &ERRORS.to_string()])
        .arg(program);
    command
}

/// Its own summary, in what the program and it have printed.
pub fn summary(text: &str) -> Option<&str> {
    text.lines()
        .rev()
        .find_map(|line| line.find("ERROR SUMMARY").map(|start| line[start..].trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_is_the_last_line_that_says_so() {
        let text =
            "========= COMPUTE-SANITIZER\ntest result: ok\n========= ERROR SUMMARY: 0 errors\n";
        assert_eq!(summary(text), Some("ERROR SUMMARY: 0 errors"));
        assert_eq!(summary("test result: ok"), None);
    }
}
