//! Measures the pools on a GPU, beside the driver's own calls and other allocators, in one run.

mod arguments;
mod bare;
mod kernel;
mod machine;
mod recorder;
mod traffic;
mod work;

use anyhow::Result;
use arguments::{Arguments, Choice};
use cuda_vmm_benches::{CountingAllocator, bookkeeping_memory, program};
use machine::Machine;
use std::process::ExitCode;

/// Counts only while the bookkeeping's memory is measured.
#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator::new();

const FIGURES: &str = include_str!("../../../figures/bench.csv");

fn main() -> ExitCode {
    program::start("bench", run)
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let may_be_absent = arguments.driver == Choice::Real;
    program::measure(
        (work::ALL, FIGURES),
        &arguments.wanted,
        may_be_absent,
        || {
            let fillings = || Ok(bookkeeping_memory(&ALLOCATOR)?);
            Machine::open(arguments, fillings)
        },
    )
}
