//! The test that measures the host memory of the bookkeeping, and reading what it prints.

use super::PACKAGE;
use super::finding::Finding;
use crate::workspace::{self, Workspace};
use anyhow::{Context, Result, ensure};
use std::process::Stdio;

/// Runs the test and answers with its figures, which tell whether too much is held.
pub fn run(workspace: &Workspace) -> Result<Vec<Finding>> {
    let mut command = workspace.cargo(&["test", "--package", PACKAGE, "--test", "memory"]);
    command.args(["--", "--nocapture"]).stderr(Stdio::inherit());
    let line = workspace::line(&command);
    eprintln!("xtask: {line}");
    let output = command
        .output()
        .with_context(|| format!("could not start {line}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let findings: Vec<_> = text.lines().filter_map(finding).collect();
    ensure!(
        !findings.is_empty()
            && (output.status.success() || findings.iter().any(Finding::has_failed)),
        "{line}: {}\n{text}",
        output.status
    );
    Ok(findings)
}

/// The figure in a line such as `2097152 bytes mapped: 4736 bytes of bookkeeping, 65745 allowed`.
fn finding(line: &str) -> Option<Finding> {
    let (mapped, rest) = line.split_once(" bytes mapped: ")?;
    let (held, rest) = rest.split_once(" bytes of bookkeeping, ")?;
    let allowed = rest.strip_suffix(" allowed")?;
    let mapped: u64 = mapped.parse().ok()?;
    Some(Finding::within(
        format!("host memory of the bookkeeping, {mapped} bytes mapped: 64 KiB and 0.01%"),
        held.parse().ok()?,
        allowed.parse().ok()?,
        "bytes",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_found_among_the_lines_of_a_test() {
        let line = "2097152 bytes mapped: 4736 bytes of bookkeeping, 65745 allowed";
        let found = finding(line).unwrap();
        assert_eq!((found.ours, found.peer), (Some(4736.0), Some(65745.0)));
        assert_eq!(found.pass, Some(true));
        let much = line.replace("4736", "65746");
        assert!(finding(&much).unwrap().has_failed());
        assert_eq!(finding("test result: ok. 1 passed; 0 failed"), None);
    }
}
