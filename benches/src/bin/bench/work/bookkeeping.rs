//! The host memory that bookkeeping takes.

use super::{Outcome, Work};
use crate::ALLOCATOR;
use crate::demand::{Demand, Reach};
use crate::machine::Machine;
use anyhow::Result;
use cuda_vmm_benches::bookkeeping_memory;

const HELD: Demand = Demand::count(
    "host memory of the bookkeeping, worst of four fillings of 128 GiB: 64 KiB and 0.01% of the bytes mapped",
    "bytes",
    Reach::AtMostTimes(1.0),
);

/// Against what is allowed.
pub const WORK: Work = Work {
    name: "bookkeeping",
    demands: &[HELD],
    measure,
};

fn measure(_: &Machine) -> Result<Outcome> {
    let fillings = bookkeeping_memory(&ALLOCATOR)?;
    let share = |filling: &cuda_vmm_benches::Filling| {
        filling.held_bytes as f64 / filling.allowed_bytes() as f64
    };
    let worst = fillings.iter().max_by(|a, b| share(a).total_cmp(&share(b)));
    let mut outcome = Outcome::default();
    if let Some(worst) = worst {
        let note = format!(
            "{} bytes mapped, on a driver that does nothing",
            worst.mapped_bytes
        );
        let allowed_bytes = worst.allowed_bytes() as f64;
        outcome.add_noted(&HELD, worst.held_bytes as f64, Some(allowed_bytes), note);
    }
    Ok(outcome)
}
