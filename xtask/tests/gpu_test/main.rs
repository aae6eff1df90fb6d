//! The matrix as a bundle runs it, with shell scripts in place of the programs; no GPU is needed.

mod case;
mod script;

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
    let Cases {
        scripts,
        wrong,
        case,
    } = toml::from_str(include_str!("cases.toml")).expect("the cases");
    let wrong = wrong.into_iter().flat_map(|(place, lines)| {
        let case = move |line| Case::wrong(&place, line);
        lines.into_iter().map(case)
    });
    let mut trials = Vec::new();
    for case in case.into_iter().chain(wrong) {
        let (name, scripts) = (case.name.clone(), scripts.clone());
        trials.push(trial(&name, move || case.check(&scripts)));
    }
    let name = "a bundle runs by itself and cleans up";
    trials.push(trial(name, move || script::check(&scripts)));
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

/// A test that fails if `check` panics.
fn trial(name: &str, check: impl FnOnce() + Send + 'static) -> Trial {
    Trial::test(name, || {
        check();
        Ok(())
    })
}
