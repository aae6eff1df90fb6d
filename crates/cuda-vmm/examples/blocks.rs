//! A paged cache whose memory follows its use, in place of one allocation for all of it: `cargo run
//! --example blocks --features simulator`.

use cuda_vmm::pool::blocks::{BlockAllocator, BlockBacking, ElementSize, LayerSpec, TensorSpec};
use cuda_vmm::{Driver, Engine, EngineOptions, Stream};

fn main() -> cuda_vmm::Result<()> {
    let device = Driver::detect()?.device(0)?;
    let engine = Engine::new(&device, EngineOptions::new())?;
    let stream = Stream::new(&device)?;
    let f16 = ElementSize::new(2)?;
    let mut tensors = Vec::new();
    for layer in 0..4 {
        for part in ["k", "v"] {
            let name = format!("{layer}.{part}");
            tensors.push(TensorSpec::new(name, &[16, 8, 128], f16)?);
        }
    }
    // 4 GiB of addresses, where there was an allocation of 4 GiB.
    let backing = BlockBacking::new(&engine, LayerSpec::new(tensors)?, 1 << 14, 2 << 20)?;
    backing.use_stream(&stream)?;
    let allocator = BlockAllocator::new(backing.clone());
    let mut sequences = Vec::new();
    for _ in 0..32 {
        sequences.push(allocator.allocate(128)?);
    }
    println!("busy:      {}", backing.stats());
    // Most sequences end; their blocks stay backed, and could be found again.
    for sequence in sequences.drain(2..) {
        allocator.free(sequence)?;
    }
    println!("idle:      {}", backing.stats());
    // Blocks in use may move; the tables here are the sequences themselves.
    let plan = allocator.reclaim_candidates_with_moves(usize::MAX, 1.0, |_| None);
    allocator.commit(&plan, &stream)?;
    for block in sequences.iter_mut().flatten() {
        if let Some((_, to)) = plan.moves().iter().find(|(from, _)| from == block) {
            *block = *to;
        }
    }
    stream.synchronize()?;
    engine.step();
    println!("reclaimed: {}", backing.stats());
    Ok(())
}
