//! Measures tensors and caches that grow on a GPU, beside Candle's own, in one run.

// What measures and reports is the same as for the pools, which use more of it.
#[path = "../bench/course.rs"]
mod course;
#[path = "../bench/demand.rs"]
mod demand;
#[path = "../bench/listing.rs"]
mod listing;
#[path = "../bench/report.rs"]
mod report;
#[path = "../bench/samples.rs"]
mod samples;
#[allow(dead_code)]
#[path = "../bench/sides.rs"]
mod sides;
#[path = "../bench/start.rs"]
mod start;

// The decoder is the one of the facade's example, which also reads what is not needed here.
#[allow(dead_code)]
#[path = "../../../../crates/candle-cuda-vmm/examples/generate/caches.rs"]
mod caches;
#[allow(dead_code)]
#[path = "../../../../crates/candle-cuda-vmm/examples/generate/config.rs"]
mod config;
#[allow(dead_code)]
#[path = "../../../../crates/candle-cuda-vmm/examples/generate/generation.rs"]
mod generation;
#[path = "../../../../crates/candle-cuda-vmm/examples/generate/model.rs"]
mod model;
#[allow(dead_code)]
#[path = "../../../../crates/candle-cuda-vmm/examples/generate/weights.rs"]
mod weights;

mod arguments;
mod layers;
mod machine;
mod sizes;
mod work;

use anyhow::Result;
use arguments::{Arguments, Place};
use machine::Machine;
use std::process::ExitCode;

fn main() -> ExitCode {
    start::start("bench-candle", run)
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let wanted = course::chosen(work::ALL, arguments.only.as_deref())?;
    let json = arguments.json.as_deref();
    match Machine::open(arguments) {
        Ok(machine) => course::measure(&wanted, &machine, json),
        Err(error) if arguments.device == Place::Cuda => {
            course::without_gpu(&wanted, &format!("{error:#}"), json)
        }
        Err(error) => Err(error),
    }
}
