//! Measures the pools on a GPU, beside the driver's own calls and other allocators, in one run.

mod arguments;
mod bare;
mod course;
mod demand;
mod kernel;
mod listing;
mod machine;
mod recorder;
mod report;
mod samples;
mod sides;
mod start;
mod traffic;
mod work;

use anyhow::Result;
use arguments::{Arguments, Choice};
use cuda_vmm_benches::CountingAllocator;
use machine::Machine;
use std::process::ExitCode;

/// Counts only while the bookkeeping's memory is measured.
#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator::new();

fn main() -> ExitCode {
    start::start("bench", run)
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let wanted = course::chosen(work::ALL, arguments.only.as_deref())?;
    let json = arguments.json.as_deref();
    match Machine::open(arguments.driver, arguments.settings(), arguments.replay) {
        Ok(machine) => course::measure(&wanted, &machine, json),
        Err(error) if arguments.driver == Choice::Real => {
            course::without_gpu(&wanted, &format!("{error:#}"), json)
        }
        Err(error) => Err(error),
    }
}
