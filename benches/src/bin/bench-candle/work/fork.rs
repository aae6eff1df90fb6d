//! Sequences that begin alike: the time of a fork, the memory of branches, and attention over them.

use super::growth::{LAYERS, Layers, attend, tokens};
use crate::machine::Machine;
use anyhow::Result;
use candle_cuda_vmm::kv_cache::Sequence;
use candle_cuda_vmm::{EngineOptions, TensorPool, WorkerMode};
use cuda_vmm_benches::{Outcome, Sides, time};

/// Tokens that all have: 4 GiB.
const PREFIX: [usize; 2] = [32_768, 128];

/// A sequence with the prefix, in pages of this many MiB. Nothing runs beside it.
fn prefix(machine: &Machine, page_mib: usize) -> Result<Sequence> {
    let engine = EngineOptions::new().worker(WorkerMode::Manual);
    let options = machine.pool_options(false).ahead_bytes_max(0);
    let options = options.engine(engine).page_bytes(page_mib << 20);
    let sequence = TensorPool::with_options(&machine.candle, options)?.sequence();
    let count = machine.sized(PREFIX);
    Layers::new(machine, &sequence, 2 * count)?.fill(machine, count)?;
    Ok(sequence)
}

pub fn measure(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let mut sides = Sides::default();
    for page_mib in [2, 16, 32, 64] {
        let sequence = prefix(machine, page_mib)?;
        sides.add(&format!("fork, {page_mib} MiB"), move || {
            machine.candle.synchronize()?;
            time(|| sequence.fork()).map(|(_, taken)| taken)
        });
    }
    outcome.measure(sides, &machine.settings, machine.settings.rounds.min(50))?;
    let sequence = prefix(machine, 2)?;
    let more = tokens(machine, machine.sized([256, 4]))?;
    let branch = |_| -> Result<_> {
        let fork = sequence.fork()?;
        let mut layers = Layers::new(machine, &fork, 0)?;
        Ok((layers.append(&more)?, fork))
    };
    let branches = (0..machine.sized([64, 3])).map(branch);
    let branches = branches.collect::<Result<Vec<_>>>()?;
    machine.candle.synchronize()?;
    sequence.pool().engine().trim()?;
    let held_bytes = sequence.pool().committed_bytes();
    outcome.count("held by branches", held_bytes as f64);
    let copies_bytes = branches.len() * sequence.bytes();
    let note = format!("copies take {copies_bytes} bytes");
    outcome.note("held by branches", note);
    drop(branches);
    let (fork, own) = (sequence.fork()?, prefix(machine, 2)?);
    let mut sides = Sides::default();
    for (name, sequence) in [("gqa over aliases", &fork), ("gqa over own memory", &own)] {
        let layers = Layers::new(machine, sequence, machine.sized(LAYERS))?;
        sides.add(name, attend(machine, layers)?);
    }
    outcome.measure(sides, &machine.settings.patient(3), machine.settings.rounds)
}
