//! The criterion benches, and reading what criterion estimates.

use super::PACKAGE;
use super::finding::Finding;
use crate::files;
use crate::workspace::{self, Workspace};
use anyhow::{Context, Result};
use serde_json::Value;
use std::path::Path;

/// The benches' names, and how many microseconds each may take, if that is demanded.
const DEMANDS: [(&str, Option<f64>); 8] = [
    (
        "allocate and deallocate one page, no stream named",
        Some(2.0),
    ),
    (
        "allocate and deallocate one page, one stream named",
        Some(2.0),
    ),
    (
        "allocate and deallocate one page of one model in 64",
        Some(2.0),
    ),
    ("take back a parked page", None),
    (ONE_THREAD, None),
    (TWO_THREADS, None),
    ("allocate and deallocate a token in a live page", None),
    ("allocate a token in a live page", None),
];

/// What a page takes one thread, and each of two threads at the same time.
const ONE_THREAD: &str = "take back a parked page of a model, one thread";
const TWO_THREADS: &str = "take back a parked page of a model, each of two threads";

/// So many times as many pages two threads together are to take back as one does.
const TWO_THREADS_LEAST: f64 = 1.7;

/// What two threads do together, against one; nothing where there is one core only.
fn two_against_one(estimates: &[(String, f64)], cores: usize) -> Option<Finding> {
    let us = |name: &str| {
        let found = estimates.iter().find(|(bench, _)| bench == name);
        found.map(|(_, us)| *us)
    };
    let (one, two) = us(ONE_THREAD).zip(us(TWO_THREADS)).filter(|_| cores > 1)?;
    Some(Finding::at_least(
        "take back parked pages: two threads on two models, one thread on one".to_owned(),
        2.0 / two,
        1.0 / one,
        "pages/µs",
        TWO_THREADS_LEAST,
    ))
}

/// Runs all benches and answers with their figures.
pub fn run(workspace: &Workspace) -> Result<Vec<Finding>> {
    // A folder of its own, emptied, so that no estimate is from an earlier run.
    let folder = workspace.target.join("bench/criterion");
    files::remove_tree(&folder)?;
    let mut command = workspace.cargo(&["bench", "--package", PACKAGE, "--benches"]);
    workspace::run(command.env("CRITERION_HOME", &folder))?;
    let estimates = estimates(&folder)?;
    let mut findings: Vec<_> = DEMANDS
        .iter()
        .map(|(name, most)| {
            let found = estimates.iter().find(|(bench, _)| bench == name);
            let estimate = found.map(|(_, estimate)| *estimate);
            Finding::at_most((*name).to_owned(), estimate, "µs", *most)
        })
        .collect();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    findings.extend(two_against_one(&estimates, cores));
    let others = estimates
        .into_iter()
        .filter(|(bench, _)| DEMANDS.iter().all(|(name, _)| name != bench));
    findings.extend(others.map(|(name, us)| Finding::at_most(name, Some(us), "µs", None)));
    Ok(findings)
}

/// The benches below `folder` and their middle estimates in microseconds.
fn estimates(folder: &Path) -> Result<Vec<(String, f64)>> {
    let mut found = Vec::new();
    for (_, group) in files::entries(folder)? {
        for (_, bench) in files::entries(&group)? {
            let new = bench.join("new");
            if new.join("benchmark.json").is_file() {
                found.push(estimate(&new)?);
            }
        }
    }
    Ok(found)
}

/// The name of a bench and its estimate in microseconds: criterion's slope, where it has one, else the mean.
fn estimate(folder: &Path) -> Result<(String, f64)> {
    let read = |file: &str| {
        let path = folder.join(file);
        let text = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        let value: Value = serde_json::from_slice(&text)
            .with_context(|| format!("{} is not JSON", path.display()))?;
        anyhow::Ok(value)
    };
    let (bench, estimates) = (read("benchmark.json")?, read("estimates.json")?);
    let name = bench["function_id"].as_str().or(bench["full_id"].as_str());
    let ns = ["slope", "mean"]
        .iter()
        .find_map(|kind| estimates[kind]["point_estimate"].as_f64());
    let name = name.context("criterion names no bench")?;
    let ns = ns.with_context(|| format!("criterion has no estimate of {name:?}"))?;
    Ok((name.to_owned(), ns / 1e3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_slope_is_taken_where_there_is_one() {
        let folder = tempfile::tempdir().unwrap();
        for (bench, slope) in [
            ("one", json!({"point_estimate": 1500.0})),
            ("two", Value::Null),
        ] {
            let new = folder.path().join("group").join(bench).join("new");
            files::make(&new).unwrap();
            let name = json!({"function_id": bench, "full_id": format!("group/{bench}")});
            let estimates = json!({"mean": {"point_estimate": 1600.0}, "slope": slope});
            std::fs::write(new.join("benchmark.json"), name.to_string()).unwrap();
            std::fs::write(new.join("estimates.json"), estimates.to_string()).unwrap();
        }
        files::make(&folder.path().join("report")).unwrap();
        let mut found = estimates(folder.path()).unwrap();
        found.sort_by(|a, b| a.0.cmp(&b.0));
        assert_eq!(found, [("one".to_owned(), 1.5), ("two".to_owned(), 1.6)]);
    }

    #[test]
    fn two_threads_that_take_as_long_as_one_do_twice_as_much() {
        let estimates = [(ONE_THREAD, 0.5), (TWO_THREADS, 0.5)];
        let estimates = estimates.map(|(name, us)| (name.to_owned(), us));
        let finding = two_against_one(&estimates, 2).unwrap();
        assert_eq!((finding.ratio, finding.pass), (Some(2.0), Some(true)));
        let estimates = [(ONE_THREAD, 0.5), (TWO_THREADS, 1.0)];
        let estimates = estimates.map(|(name, us)| (name.to_owned(), us));
        let finding = two_against_one(&estimates, 2).unwrap();
        assert_eq!((finding.ratio, finding.pass), (Some(1.0), Some(false)));
        assert_eq!(two_against_one(&estimates, 1), None);
        assert_eq!(two_against_one(&estimates[..1], 2), None);
    }

    #[test]
    fn the_demands_name_the_benches_that_there_are() {
        let benches =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../benches/benches/bookkeeping.rs");
        let source = std::fs::read_to_string(benches).unwrap();
        for (name, _) in DEMANDS {
            assert!(source.contains(&format!("{name:?}")), "{name}");
        }
    }
}
