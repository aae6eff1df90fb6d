//! `headers`: the bindings, built and tested against each version of the CUDA headers.

use crate::workspace::Workspace;
use crate::{display, setup, tests};
use anyhow::{Result, ensure};
use std::time::Instant;

/// The versions covered. `xtask/pins` has the wheel of each.
pub const VERSIONS: [&str; 6] = ["11.8", "12.0", "12.4", "12.9", "13.0", "13.5"];

/// Builds and tests `cuda-vmm-sys` against each, prints a row each, and fails if one fails.
pub fn run(workspace: &Workspace) -> Result<()> {
    setup::ensure(workspace, false, false)?;
    let target = workspace.target.join("headers");
    let (mut rows, mut failures) = (Vec::new(), Vec::new());
    for version in VERSIONS {
        let folder = setup::ensure_headers(workspace, version)?;
        let defined = setup::cuda_version(&folder.join("include"));
        let started = Instant::now();
        eprintln!("xtask: CUDA {version}: building and testing");
        let test = workspace.cargo("test --package cuda-vmm-sys --target-dir");
        let test = test.arg(&target).env("CUDA_HOME", &folder);
        let test = test.env_remove("DOCS_RS").quiet().ignore_status();
        let output = test.output()?;
        let taken = display::time(started.elapsed()).to_string();
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        let counts = tests::count(&text);
        let log = target.join(format!("{version}.log"));
        workspace.shell.write_file(&log, &text)?;
        let has_run = counts.passed > 0 && counts.failed == 0;
        let is_right = defined.is_some() && defined == number(version);
        let passed = output.status.success() && has_run && is_right;
        if !passed {
            eprintln!("{text}");
            failures.push(format!("{version} (log: {})", workspace.short(&log)));
        }
        let defined = defined.map_or_else(|| "?".to_owned(), |number| number.to_string());
        let state = if passed { "PASS" } else { "FAIL" };
        let tests = counts.passed.to_string();
        rows.push([version, &defined, state, &tests, &taken].map(str::to_owned));
    }
    let head = ["header", "CUDA_VERSION", "state", "tests", "time"];
    println!("{}", display::table(head, rows));
    let failures = failures.join(", ");
    ensure!(failures.is_empty(), "failed against {failures}");
    Ok(())
}

/// What `CUDA_VERSION` is for a version such as `12.4`.
fn number(version: &str) -> Option<u32> {
    let (major, minor) = version.split_once('.')?;
    Some(major.parse::<u32>().ok()? * 1000 + minor.parse::<u32>().ok()? * 10)
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn every_version_has_a_number() {
        let expected = [11080, 12000, 12040, 12090, 13000, 13050];
        assert_eq!(VERSIONS.map(number), expected.map(Some));
        assert_eq!(number("13"), None);
    }
}
