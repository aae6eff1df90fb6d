//! One table of small cases that the simulated and the real driver must answer alike.
//!
//! The environment chooses the driver, the devices and the size of memory (`common/under_test.rs`).
//! Every case makes raw calls in a state of its own and lists what they answered. The expected
//! answers follow measurements on an H100 and an H200 with driver 580.159, those of `host_memory`
//! CUDA's manual; a group fails with every difference, and shows both answers.
#![allow(
    clippy::macro_metavars_in_unsafe,
    reason = "every call of the table is unsafe"
)]

#[path = "../common/mod.rs"]
mod common;

mod access;
mod capture;
mod graph;
mod graph_memory;
mod host_memory;
mod kit;
mod order;
mod peers;
mod planted;
mod rules;
mod work;

use common::under_test;
use kit::Kit;

/// One row of the table.
struct Case {
    name: String,
    run: Box<dyn Fn(&mut Kit)>,
    expected: Vec<&'static str>,
}

impl Case {
    fn new(
        name: impl Into<String>,
        expected: &[&'static str],
        run: impl Fn(&mut Kit) + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            run: Box::new(run),
            expected: expected.to_vec(),
        }
    }
}

/// Runs cases one after the other and returns all that were answered otherwise than expected, both
/// answers with each, and what a case left behind.
fn differences(cases: &[Case], answers: impl Fn(&Case) -> Vec<String>) -> Vec<String> {
    let mut differences = Vec::new();
    for case in cases {
        let before = under_test().interposer.books();
        let answered = answers(case);
        if answered != case.expected {
            differences.push(format!(
                "{}\n  expected {}\n  this driver answered {}",
                case.name,
                case.expected.join(", "),
                answered.join(", ")
            ));
        }
        let after = under_test().interposer.books();
        if before != after {
            let name = &case.name;
            differences.push(format!("{name}\n  left {after:?}\n  of {before:?}"));
        }
    }
    differences
}

/// Fails with every difference in a group of cases, and unless the device is as it was.
fn check(group: &str, cases: &[Case], answers: impl Fn(&Case) -> Vec<String>) {
    assert!(!cases.is_empty(), "{group} has no cases");
    let differences = under_test().unchanged(|| {
        let differences = differences(cases, answers);
        // Told here too, as what is left is a failure of its own.
        for difference in &differences {
            println!("{difference}");
        }
        differences
    });
    println!("{group}: {} cases", cases.len());
    assert!(
        differences.is_empty(),
        "{group}: {} differences\n{}",
        differences.len(),
        differences.join("\n")
    );
}

fn check_here(group: &str, cases: &[Case]) {
    check(group, cases, run_here);
}

fn run_here(case: &Case) -> Vec<String> {
    Kit::run(under_test().device(), &case.run)
}

/// Whether the driver has `cuCtxRecordEvent`, without which its cases are left out.
fn has_context_events() -> bool {
    let driver = &under_test().driver;
    let has = driver.table().cuCtxRecordEvent.is_some();
    let version = driver.version();
    assert!(has || (version.major, version.minor) < (12, 5), "{version}");
    if !has {
        println!("left out: cuCtxRecordEvent, which CUDA {version} has not");
    }
    has
}

#[test]
fn rules() {
    check_here("rules", &rules::cases());
}

#[test]
fn work() {
    let mut cases = work::cases(has_context_events());
    cases.extend(access::cases());
    check_here("work", &cases);
}

#[test]
fn order() {
    check_here("order", &order::cases());
}

#[test]
fn capture() {
    let mut cases = capture::cases(has_context_events());
    cases.push(graph::replay());
    check_here("capture", &cases);
}

/// What host memory that is registered may do; CUDA's manual has the answers.
#[test]
fn host_memory() {
    check_here("host_memory", &host_memory::cases());
}

#[test]
fn graph_memory() {
    check_here("graph_memory", &graph_memory::cases());
}

/// What one device may do with another's memory; the cases take two devices.
#[test]
fn peers() {
    match under_test().devices.len() {
        1 => println!("left out: peers, which take two devices, and one was asked for"),
        _ => check_here("peers", &peers::cases()),
    }
}

/// What a process of its own writes before its answers, one to a line.
const ANSWER: &str = "answer: ";

/// Cases that poison the context or leave it with less memory, each in a process of its own.
#[test]
fn poison() {
    let mut cases = work::poisoning_cases();
    cases.extend(graph::poisoning_cases());
    cases.extend(access::poisoning_cases());
    cases.extend(graph_memory::poisoning_cases());
    if let Some(role) = common::role() {
        let case = cases.iter().find(|case| case.name == role);
        let case = case.expect("a case of this name");
        for answer in Kit::run_and_leave(under_test().device(), &case.run) {
            println!("{ANSWER}{answer}");
        }
        return;
    }
    check("poison", &cases, |case| {
        let mut command = common::alone("poison", &case.name);
        let output = under_test().choose_for(&mut command).output();
        let output = output.expect("a process of its own");
        let text = String::from_utf8_lossy(&output.stdout);
        let answers = text.lines().filter_map(|line| line.strip_prefix(ANSWER));
        let mut answers: Vec<String> = answers.map(str::to_owned).collect();
        if !output.status.success() || !text.contains("1 passed") {
            let error = String::from_utf8_lossy(&output.stderr);
            answers.push(format!("{}\n{text}\n{error}", output.status));
        }
        answers
    });
}
