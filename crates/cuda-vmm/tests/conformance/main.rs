//! One table of small cases that the simulated and the real driver must answer alike.
//!
//! `CUDA_VMM_TEST_DRIVER=real|simulated` chooses the driver; where it is unset, `Driver::detect()` does.
//! Every case makes raw calls in a state of its own and lists what they answered. The expected answers
//! follow measurements on an H100 and an H200 with driver 580.159; a group fails with every difference.
#![allow(
    clippy::macro_metavars_in_unsafe,
    reason = "every call of the table is unsafe"
)]

#[path = "../common/mod.rs"]
mod common;

mod capture;
mod graph;
mod kit;
mod rules;
mod work;

use cuda_vmm::Device;
use kit::Kit;
use std::sync::{Mutex, PoisonError};

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

/// Runs a group's cases one after the other, and fails with all that were answered otherwise.
fn check(group: &str, cases: &[Case], answers: impl Fn(&Device, &Case) -> Vec<String>) {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let driver = common::driver();
    let device = driver.device(0).expect("the first device");
    let books = || driver.simulator().map(|simulator| simulator.books(0));
    let mut differences = Vec::new();
    for case in cases {
        let before = books();
        let answered = answers(&device, case);
        if answered != case.expected {
            differences.push(format!(
                "{}\n  expected {}\n  this driver answered {}",
                case.name,
                case.expected.join(", "),
                answered.join(", ")
            ));
        }
        let after = books();
        if before != after {
            let name = &case.name;
            differences.push(format!("{name}\n  left {after:?}\n  of {before:?}"));
        }
    }
    println!("{group}: {} cases", cases.len());
    assert!(!cases.is_empty(), "{group} has no cases");
    assert!(
        differences.is_empty(),
        "{group}: {} differences\n{}",
        differences.len(),
        differences.join("\n")
    );
}

fn check_here(group: &str, cases: &[Case]) {
    check(group, cases, |device, case| Kit::run(device, &case.run));
}

/// Whether the driver has `cuCtxRecordEvent`, without which its cases are left out.
fn has_context_events() -> bool {
    let driver = common::driver();
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
    check_here("work", &work::cases(has_context_events()));
}

#[test]
fn capture() {
    let mut cases = capture::cases(has_context_events());
    cases.push(graph::replay());
    check_here("capture", &cases);
}

/// What a process of its own writes before its answers, one to a line.
const ANSWER: &str = "answer: ";

/// Cases that poison the context, each in a process of its own.
#[test]
fn poison() {
    let mut cases = work::poisoning_cases();
    cases.extend(graph::poisoning_cases());
    if let Some(role) = common::role() {
        let case = cases.iter().find(|case| case.name == role);
        let case = case.expect("a case of this name");
        let device = common::driver().device(0).expect("the first device");
        for answer in Kit::run_and_leave(&device, &case.run) {
            println!("{ANSWER}{answer}");
        }
        return;
    }
    check("poison", &cases, |_, case| {
        let mut command = common::alone("poison", &case.name);
        let output = command.output().expect("a process of its own");
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
