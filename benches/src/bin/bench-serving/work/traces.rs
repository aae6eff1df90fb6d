//! Workload (b): the Azure LLM inference traces, one model each.

use super::{Course, demand, never_slower};
use crate::contest::{Contest, Sizes};
use crate::demand::{Finding, Reach};
use crate::trace;
use crate::work::ramps::SIZES;
use crate::workload::Workload;
use anyhow::Result;
use std::path::PathBuf;

/// How many times later each request arrives than in the trace. At the traces' own speed the prompts of the two services alone take
/// 1.2 times the time that one A100 of the time model has.
const STRETCH: u64 = 4;
/// How much of a trace a quick run takes, in nanoseconds of its own time.
const QUICK_NS: u64 = 60_000_000_000;

/// Replays the traces, each as a model, if there are any. In the static split each has the same part of what is shared.
///
/// # Errors
/// If a trace cannot be read, or a pool fails.
pub fn hold(course: &Course, paths: &[PathBuf]) -> Result<Option<Contest>> {
    if paths.is_empty() {
        return Ok(None);
    }
    let mut models = Vec::new();
    for path in paths {
        let mut requests = trace::read(path)?;
        if course.quick {
            requests.retain(|request| request.arrival_ns < QUICK_NS);
        }
        // Who asks for no token still gets the one that the prompt's step makes.
        for request in &mut requests {
            request.arrival_ns *= STRETCH;
            request.prompt_tokens = request.prompt_tokens.max(1);
            request.generated_tokens = request.generated_tokens.max(1);
        }
        models.push(requests);
    }
    let sizes = Sizes {
        static_tokens: SIZES.shared_tokens / models.len(),
        ..SIZES
    };
    let name = format!("(b) {} traces, {STRETCH} times as slow", models.len());
    Contest::hold(&name, &[Workload { models }], sizes).map(Some)
}

/// Judges it, or says that it was not run.
pub fn judge(course: &Course, contest: Option<&Contest>) -> Vec<Finding> {
    match contest {
        Some(contest) => never_slower(course, contest),
        None => {
            let demand = demand("(b) traces".to_owned(), "ms", Reach::Open);
            vec![demand.unmeasured("not run: no trace was given (--trace FILE)")]
        }
    }
}
