//! Counts and times of the models, in Prometheus's text format.

use super::figures::{Label, Rest};
use super::hosted::Hosted;
use crate::engine::StepTimes;
use crate::scheduler::Counts;
use std::fmt::Write;
use std::time::Duration;

type Count = fn(&Counts) -> u64;

const COUNTS: [(&str, &str, Count); 6] = [
    ("running", "gauge", |it| it.running as u64),
    ("waiting", "gauge", |it| it.waiting as u64),
    ("preemptions_total", "counter", |it| it.preemptions),
    ("computed_tokens_total", "counter", |it| it.computed_tokens),
    ("cached_tokens_total", "counter", |it| it.cached_tokens),
    ("generated_tokens_total", "counter", |it| {
        it.generated_tokens
    }),
];

type Slept = fn(&Rest) -> f64;

const SLEPT: [(&str, &str, &str, Slept); 5] = [
    ("asleep", "gauge", "1 if the model sleeps.", |it| {
        f64::from(u8::from(it.is_asleep))
    }),
    (
        "sleeps_total",
        "counter",
        "Times that it fell asleep.",
        |it| it.sleeps as f64,
    ),
    (
        "sleep_seconds_total",
        "counter",
        "How long it took to put it to sleep.",
        |it| it.sleep_time.as_secs_f64(),
    ),
    ("wakes_total", "counter", "Times that it woke.", |it| {
        it.wakes as f64
    }),
    (
        "wake_seconds_total",
        "counter",
        "From the first request to a model that sleeps until it is awake.",
        |it| it.wake_time.as_secs_f64(),
    ),
];

/// Writes how models sleep. How much memory sleeps, and what of it the host has, is in the snapshot.
pub(super) fn write_sleeps(models: &[Hosted], text: &mut String) {
    // Writing to a string cannot fail.
    for (name, kind, help, value) in SLEPT {
        _ = writeln!(text, "# HELP cuda_vmm_serve_{name} {help}");
        _ = writeln!(text, "# TYPE cuda_vmm_serve_{name} {kind}");
        for model in models {
            let (id, value) = (Label(&model.info().id), value(&model.work().rest));
            _ = writeln!(text, "cuda_vmm_serve_{name}{{model=\"{id}\"}} {value}");
        }
    }
}

/// All but the model's time.
const OWN: &str = "step_own_seconds";

type Time = fn(&StepTimes) -> Duration;

const TIMES: [(&str, Time); 2] = [("step_seconds", StepTimes::total), (OWN, StepTimes::own)];

/// Writes what each model has and did, and how long steps without prompts took, by their number of
/// sequences up to a power of two: all of it, what is the server's own, and that as a share. Steps
/// with prompts, which may have sequences that decode too, are told by their tokens of prompts.
pub(super) fn write_metrics(models: &[Hosted], text: &mut String) {
    // Writing to a string cannot fail.
    for (name, kind, count) in COUNTS {
        _ = writeln!(text, "# TYPE cuda_vmm_serve_{name} {kind}");
        for model in models {
            let (id, count) = (Label(&model.info().id), count(&model.work().counts));
            _ = writeln!(text, "cuda_vmm_serve_{name}{{model=\"{id}\"}} {count}");
        }
    }
    let (mut all, mut with_prompts) = (Vec::new(), Vec::new());
    for model in models {
        let id = Label(&model.info().id);
        let times = model.times();
        for (sequences, times) in &times.decode {
            all.push((format!("model=\"{id}\",sequences=\"{sequences}\""), *times));
        }
        for (tokens, times) in &times.prompt {
            let labels = format!("model=\"{id}\",prompt_tokens=\"{tokens}\"");
            with_prompts.push((labels, *times));
        }
    }
    let kinds = [("", &all), ("prompt_", &with_prompts)];
    for (kind, all) in kinds {
        for (name, time) in TIMES {
            // The model's time of prompts is not known apart.
            if kind == "prompt_" && name == OWN {
                continue;
            }
            let name = format!("cuda_vmm_serve_{kind}{name}");
            _ = writeln!(text, "# TYPE {name} summary");
            for (labels, times) in all {
                let (sum, count) = (time(times).as_secs_f64(), times.steps());
                _ = writeln!(text, "{name}_sum{{{labels}}} {sum}");
                _ = writeln!(text, "{name}_count{{{labels}}} {count}");
            }
        }
        let name = format!("cuda_vmm_serve_{kind}step_sequences_total");
        _ = writeln!(text, "# TYPE {name} counter");
        for (labels, times) in all {
            _ = writeln!(text, "{name}{{{labels}}} {}", times.sequences());
        }
    }
    let name = "cuda_vmm_serve_prompt_step_tokens_total";
    _ = writeln!(text, "# TYPE {name} counter");
    for (labels, times) in &with_prompts {
        _ = writeln!(text, "{name}{{{labels}}} {}", times.prompt_tokens());
    }
    let name = "cuda_vmm_serve_step_own_ratio";
    _ = writeln!(text, "# TYPE {name} summary");
    for (labels, times) in &all {
        for quantile in [0.5, 0.99] {
            let share = times.share(quantile);
            _ = writeln!(text, "{name}{{{labels},quantile=\"{quantile}\"}} {share}");
        }
    }
}
