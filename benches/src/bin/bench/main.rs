//! Measures the pools on a GPU, beside the driver's own calls and other allocators, in one run.

mod arguments;
mod bare;
mod machine;
mod traffic;
mod work;

use anyhow::Result;
use arguments::{Arguments, Choice};
use cuda_vmm_benches::program;
use machine::Machine;
use std::process::ExitCode;

const FIGURES: &str = include_str!("../../../figures/bench.csv");

fn main() -> ExitCode {
    program::start("bench", run)
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let may_be_absent = arguments.driver == Choice::Real;
    let open = || Machine::open(arguments);
    let work = (work::ALL, FIGURES);
    program::measure(work, &arguments.wanted, may_be_absent, open, |machine| {
        (&machine.device, machine.is_real())
    })
}
