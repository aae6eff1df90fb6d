//! What the bookkeeping costs on the CPU: the times that criterion estimates, and the host memory that a test measures.

use super::finding::{Reach, has_failed, judge};
use crate::gpu_test::BENCHES;
use crate::workspace::Workspace;
use anyhow::{Context, Result, ensure};
use fs_err as fs;
use serde_json::Value;
use std::path::Path;

/// The names of the criterion benches that may take [`PAGE_US_MOST`], and of those of which nothing is demanded.
const PAGES: [&str; 3] = [
    "allocate and deallocate one page, no stream named",
    "allocate and deallocate one page, one stream named",
    "allocate and deallocate one page of one model in 64",
];
const OPEN: [&str; 5] = [
    "take back a parked page",
    ONE_THREAD,
    TWO_THREADS,
    "allocate and deallocate a token in a live page",
    "allocate a token in a live page",
];
const PAGE_US_MOST: Reach = Reach::AtMost(2.0);

/// What a page takes one thread, and each of two threads at the same time.
const ONE_THREAD: &str = "take back a parked page of a model, one thread";
const TWO_THREADS: &str = "take back a parked page of a model, each of two threads";
/// What two threads do together, against one, and how many times as much it must be.
const TOGETHER: &str = "take back parked pages: two threads on two models, one thread on one";
const TOGETHER_LEAST: Reach = Reach::AtLeastTimes(1.7);

/// Runs all benches and the test of the memory, and returns their figures.
pub fn run(workspace: &Workspace) -> Result<Vec<Value>> {
    // A folder of its own, emptied, so that no estimate is from an earlier run.
    let folder = workspace.target.join("bench/criterion");
    workspace.shell.remove_path(&folder)?;
    let benches = workspace.cargo("bench --benches --package").arg(BENCHES);
    benches.env("CRITERION_HOME", &folder).run()?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut findings = times(&estimates(&folder)?, cores);

    let test = workspace.cargo("test --test memory --package").arg(BENCHES);
    // It fails if too much is held, which its figures tell.
    let test = test.args(["--", "--nocapture"]).ignore_status();
    let output = test.output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let held: Vec<_> = text.lines().filter_map(held).collect();
    let is_told = output.status.success() || held.iter().any(has_failed);
    let status = output.status;
    ensure!(is_told && !held.is_empty(), "{test}: {status}\n{text}");
    findings.extend(held);
    Ok(findings)
}

/// The figures of the benches: those that have a name here, what two threads do if there are two cores, and others.
fn times(estimates: &[(String, f64)], cores: usize) -> Vec<Value> {
    let us = |name: &str| {
        let mut found = estimates.iter().filter(|(bench, _)| bench == name);
        found.next().map(|(_, us)| *us)
    };
    let time = |name: &str, reach| judge(name, "µs", [us(name), None], reach);
    let mut findings = PAGES.map(|name| time(name, PAGE_US_MOST)).to_vec();
    findings.extend(OPEN.map(|name| time(name, Reach::Open)));
    let threads = us(ONE_THREAD).zip(us(TWO_THREADS));
    if let Some((one, two)) = threads.filter(|_| cores > 1) {
        let figures = [Some(2.0 / two), Some(1.0 / one)];
        findings.push(judge(TOGETHER, "pages/µs", figures, TOGETHER_LEAST));
    }
    let mut others: Vec<_> = estimates.iter().map(|(name, _)| name.as_str()).collect();
    others.retain(|name| !PAGES.contains(name) && !OPEN.contains(name));
    findings.extend(others.iter().map(|name| time(name, Reach::Open)));
    findings
}

/// The benches below `folder` and their middle estimates in microseconds: criterion's slope if it has one, else the mean.
fn estimates(folder: &Path) -> Result<Vec<(String, f64)>> {
    let read = |path: &Path| -> Result<Value> {
        let value = serde_json::from_str(&fs::read_to_string(path)?);
        value.with_context(|| format!("{} is not JSON", path.display()))
    };
    let files = glob::glob(&folder.join("*/*/new/benchmark.json").to_string_lossy())?;
    let mut found = Vec::new();
    for file in files {
        let file = file?;
        let bench = read(&file)?;
        let estimates = read(&file.with_file_name("estimates.json"))?;
        let name = bench["function_id"].as_str().or(bench["full_id"].as_str());
        let name = name.context("criterion names no bench")?;
        let mut kinds = ["slope", "mean"].iter();
        let ns = kinds.find_map(|kind| estimates[kind]["point_estimate"].as_f64());
        let ns = ns.with_context(|| format!("criterion has no estimate of {name:?}"))?;
        found.push((name.to_owned(), ns / 1e3));
    }
    Ok(found)
}

/// The figure in a line such as `2097152 bytes mapped: 4736 bytes of bookkeeping, 65745 allowed`.
fn held(line: &str) -> Option<Value> {
    let (mapped, rest) = line.split_once(" bytes mapped: ")?;
    let (held, rest) = rest.split_once(" bytes of bookkeeping, ")?;
    let allowed = rest.strip_suffix(" allowed")?;
    let mapped: u64 = mapped.parse().ok()?;
    let name = format!("host memory of the bookkeeping, {mapped} bytes mapped: 64 KiB and 0.01%");
    let figures = [held.parse().ok()?, allowed.parse().ok()?];
    Some(judge(
        &name,
        "bytes",
        figures.map(Some),
        Reach::AtMostTimes(1.0),
    ))
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
            fs::create_dir_all(&new).unwrap();
            let name = json!({"function_id": bench, "full_id": format!("group/{bench}")});
            let estimates = json!({"mean": {"point_estimate": 1600.0}, "slope": slope});
            fs::write(new.join("benchmark.json"), name.to_string()).unwrap();
            fs::write(new.join("estimates.json"), estimates.to_string()).unwrap();
        }
        fs::create_dir_all(folder.path().join("report")).unwrap();
        let found = estimates(folder.path()).unwrap();
        assert_eq!(found, [("one".to_owned(), 1.5), ("two".to_owned(), 1.6)]);
    }

    #[test]
    fn two_threads_that_take_as_long_as_one_do_twice_as_much() {
        let two_against_one = |us: &[f64], cores| {
            let names = [ONE_THREAD, TWO_THREADS].map(str::to_owned);
            let estimates: Vec<_> = names.into_iter().zip(us.iter().copied()).collect();
            let mut findings = times(&estimates, cores).into_iter();
            let finding = findings.find(|finding| finding["name"] == TOGETHER);
            finding.map(|finding| (finding["ratio"].as_f64(), finding["pass"].as_bool()))
        };
        let both = [[0.5, 0.5], [0.5, 1.0]].map(|us| two_against_one(&us, 2));
        let passes = Some((Some(2.0), Some(true)));
        assert_eq!(both, [passes, Some((Some(1.0), Some(false)))]);
        assert_eq!(two_against_one(&[0.5, 1.0], 1), None);
        assert_eq!(two_against_one(&[0.5], 2), None);
    }

    #[test]
    fn the_demands_name_the_benches_that_there_are() {
        let benches =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../benches/benches/bookkeeping.rs");
        let source = fs::read_to_string(benches).unwrap();
        for name in PAGES.iter().chain(&OPEN) {
            assert!(source.contains(&format!("{name:?}")), "{name}");
        }
    }

    #[test]
    fn figures_are_found_among_the_lines_of_a_test() {
        let line = "2097152 bytes mapped: 4736 bytes of bookkeeping, 65745 allowed";
        let found = held(line).unwrap();
        assert_eq!(
            (&found["ours"], &found["peer"]),
            (&json!(4736.0), &json!(65745.0))
        );
        assert_eq!(found["pass"], true);
        let much = line.replace("4736", "65746");
        assert!(has_failed(&held(&much).unwrap()));
        assert_eq!(held("test result: ok. 1 passed; 0 failed"), None);
    }
}
