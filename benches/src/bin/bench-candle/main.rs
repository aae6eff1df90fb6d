//! Measures tensors and caches that grow on a GPU, beside Candle's own, in one run.

// The decoder is the one of the facade's example, which also reads what is not needed here.
#[allow(dead_code)]
#[path = "../../../../crates/candle-cuda-vmm/examples/generate"]
mod generate {
    pub mod batch;
    pub mod config;
    pub mod generation;
    pub mod model;
    pub mod paged;
    pub mod weights;
}
use generate::{batch, config, generation, model, paged, weights};

mod machine;
mod work;

use clap::Parser;
use cuda_vmm_benches::program::{self, Wanted};
use machine::{Machine, Place};
use std::process::ExitCode;

/// Measures tensors and caches that grow on a GPU, beside Candle's own.
///
/// Exit code: 0, what is demanded is reached; 1, something is not; 2, no GPU; 64, wrong usage.
#[derive(Debug, Parser)]
#[command(name = "bench-candle")]
struct Arguments {
    /// Where to run
    #[arg(long, value_enum, default_value_t = Place::Cuda)]
    device: Place,
    /// Small sizes, as on a CPU; times are not judged
    #[arg(long)]
    quick: bool,
    #[command(flatten)]
    wanted: Wanted,
}

fn main() -> ExitCode {
    program::start("bench-candle", |arguments: &Arguments| {
        let may_be_absent = arguments.device == Place::Cuda;
        let open = || Machine::open(arguments.device, arguments.quick);
        let work = (work::ALL, include_str!("../../../figures/bench-candle.csv"));
        program::measure(work, &arguments.wanted, may_be_absent, open, |machine| {
            (&machine.device, machine.is_real())
        })
    })
}
