//! The matrix as a bundle runs it, with shell scripts in place of the programs; no GPU is needed.

mod case;

use case::Case;
use libtest_mimic::{Arguments, Trial};
use serde::Deserialize;
use std::collections::BTreeMap;

/// What `cases.toml` holds.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Cases {
    scripts: BTreeMap<String, String>,
    wrong: BTreeMap<String, Vec<String>>,
    case: Vec<Case>,
}

fn main() {
    let cases: Cases = toml::from_str(include_str!("cases.toml")).expect("the cases");
    let wrong = cases.wrong.into_iter().flat_map(|(place, lines)| {
        let case = move |line| Case::wrong(&place, line);
        lines.into_iter().map(case)
    });
    let trials = cases.case.into_iter().chain(wrong).map(|case| {
        let (name, scripts) = (case.name.clone(), cases.scripts.clone());
        Trial::test(name, move || {
            case.check(&scripts);
            Ok(())
        })
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit();
}
