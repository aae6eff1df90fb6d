//! Paged attention in an engine: blocks, tables, prompts, decode steps.
//!
//! `cargo run --example paged_attention` runs on the CPU device, with the simulated driver. With
//! `--features attention` it runs on GPU 0. docs/PAGED_ATTENTION.md explains the steps.

use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::attention::{
    DecodePlan, GqaOptions, KvBatch, Mask, PromptSpan, Rotary, Slots, decode, prompt, write,
};
use candle_cuda_vmm::{BlockId, ElasticBlockAllocator, Result, TensorPool};

const NUM_BLOCKS: usize = 256;
const BLOCK_SIZE: usize = 16;
/// The most blocks of a sequence.
const BLOCKS_MAX: usize = 8;
const QUERY_HEADS: usize = 8;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 64;
const BATCH_MAX: usize = 4;

/// A sequence: its blocks, and how many tokens it has.
struct Sequence {
    blocks: Vec<BlockId>,
    length: usize,
}

impl Sequence {
    /// Allocates the blocks that `count` more tokens need, and counts the tokens.
    fn extend(&mut self, count: usize, allocator: &ElasticBlockAllocator) -> Result<()> {
        let blocks = (self.length + count).div_ceil(BLOCK_SIZE);
        self.blocks
            .extend(allocator.allocate(blocks - self.blocks.len())?);
        self.length += count;
        Ok(())
    }
}

/// One layer of a model: what it needs to attend.
struct Layer {
    k: Tensor,
    v: Tensor,
    rotary: Rotary,
    options: GqaOptions,
}

/// Projections of new tokens. A model computes them from its hidden states.
struct NewTokens {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl NewTokens {
    fn random(count: usize, device: &Device) -> Result<Self> {
        let random = |heads| Tensor::randn(0f32, 1., (count, heads, HEAD_DIM), device);
        Ok(Self {
            q: random(QUERY_HEADS)?,
            k: random(KV_HEADS)?,
            v: random(KV_HEADS)?,
        })
    }
}

/// The tables and lengths of a batch, on the device.
struct Inputs {
    tables: Tensor,
    lengths: Tensor,
}

impl Inputs {
    fn new(sequences: &[Sequence], device: &Device) -> Result<Self> {
        let mut tables = vec![0u32; sequences.len() * BLOCKS_MAX];
        for (table, sequence) in tables.chunks_exact_mut(BLOCKS_MAX).zip(sequences) {
            for (entry, block) in table.iter_mut().zip(&sequence.blocks) {
                *entry = *block as u32;
            }
        }
        let lengths: Vec<_> = sequences.iter().map(|it| it.length as u32).collect();
        Ok(Self {
            tables: Tensor::from_vec(tables, (sequences.len(), BLOCKS_MAX), device)?,
            lengths: Tensor::new(lengths, device)?,
        })
    }
}

fn rotary(device: &Device) -> Result<Rotary> {
    let half = HEAD_DIM / 2;
    let frequency = |at| 10_000f32.powf(-(at as f32) / half as f32);
    let angles = (0..BLOCKS_MAX * BLOCK_SIZE)
        .flat_map(|position| (0..half).map(move |at| position as f32 * frequency(at)));
    let angles = Tensor::from_iter(angles, device)?.reshape(((), half))?;
    Rotary::new(&angles.cos()?, &angles.sin()?)
}

impl Layer {
    /// Attends chunks of prompts: `counts` new tokens of each sequence, which are counted already.
    fn prefill(
        &self,
        kv: &KvBatch,
        sequences: &[Sequence],
        counts: &[usize],
        new: &NewTokens,
        device: &Device,
    ) -> Result<Tensor> {
        let (mut owners, mut rows, mut spans) = (Vec::new(), Vec::new(), Vec::new());
        for (at, (sequence, count)) in sequences.iter().zip(counts).enumerate() {
            owners.extend(std::iter::repeat_n(at as u32, *count));
            rows.extend((sequence.length - count..sequence.length).map(|row| row as u32));
            spans.push(PromptSpan::new(at, *count, sequence.length));
        }
        let (owners, rows) = (Tensor::new(owners, device)?, Tensor::new(rows, device)?);
        let slots = Slots::At {
            sequences: &owners,
            rows: &rows,
        };
        // A token's position is its row.
        let rotary = Some((&self.rotary, &rows));
        let q = write(&new.q, &new.k, &new.v, rotary, kv, slots)?;
        Ok(prompt(&q, kv, &spans, &self.options)?)
    }

    /// Attends one new token of each sequence, which is counted already.
    fn decode(
        &self,
        kv: &KvBatch,
        positions: &Tensor,
        new: &NewTokens,
        plan: &DecodePlan,
    ) -> Result<Tensor> {
        let rotary = Some((&self.rotary, positions));
        let q = write(&new.q, &new.k, &new.v, rotary, kv, Slots::Last)?;
        Ok(decode(&q, kv, &self.options, plan)?)
    }
}

fn run(device: &Device) -> Result<()> {
    // Addresses for all blocks. None has memory yet.
    let pool = TensorPool::new(device)?;
    let shape = (BLOCK_SIZE, KV_HEADS, HEAD_DIM);
    let blocks = pool.blocks(NUM_BLOCKS, ["k", "v"].map(|name| (name, shape, DType::F32)))?;
    let allocator = blocks.allocator();
    // SAFETY: tables name allocated blocks only, which are backed until they are freed below, after
    // the work. No operation reads a whole tensor.
    #[allow(unsafe_code)]
    let mut tensors = unsafe { blocks.reserved_tensors()? };
    let (v, k) = (tensors.remove(1), tensors.remove(0));
    let layer = Layer {
        k,
        v,
        rotary: rotary(device)?,
        options: GqaOptions::new(1. / (HEAD_DIM as f32).sqrt()).mask(Mask::Causal),
    };
    let plan = DecodePlan::new(device, BATCH_MAX, QUERY_HEADS)?;

    // Three prompts in one batch.
    let counts = [20, 1, 70];
    let mut sequences = Vec::new();
    for count in counts {
        let (blocks, length) = (Vec::new(), 0);
        let mut sequence = Sequence { blocks, length };
        sequence.extend(count, &allocator)?;
        sequences.push(sequence);
    }
    let inputs = Inputs::new(&sequences, device)?;
    let kv = KvBatch::blocks(&layer.k, &layer.v, &inputs.tables)?
        .lengths(&inputs.lengths)?
        .checked_by(&blocks);
    let new = NewTokens::random(counts.iter().sum(), device)?;
    let attended = layer.prefill(&kv, &sequences, &counts, &new, device)?;
    assert_eq!(attended.dims(), [91, QUERY_HEADS, HEAD_DIM]);

    // A token for each sequence. Tables and lengths are written to the same tensors, so that a
    // captured launch finds them.
    for _step in 0..20 {
        for sequence in &mut sequences {
            sequence.extend(1, &allocator)?;
        }
        let next = Inputs::new(&sequences, device)?;
        inputs.tables.slice_set(&next.tables, 0, 0)?;
        inputs.lengths.slice_set(&next.lengths, 0, 0)?;
        let positions: Vec<_> = sequences.iter().map(|it| it.length as u32 - 1).collect();
        let positions = Tensor::new(positions, device)?;
        let new = NewTokens::random(sequences.len(), device)?;
        let attended = layer.decode(&kv, &positions, &new, &plan)?;
        assert_eq!(attended.dims(), [3, QUERY_HEADS, HEAD_DIM]);
    }
    let used: usize = sequences.iter().map(|it| it.blocks.len()).sum();
    println!(
        "{used} blocks of {NUM_BLOCKS} are in use: {:?}",
        blocks.stats()
    );

    // The work is queued before the blocks are freed.
    for sequence in sequences {
        allocator.free(sequence.blocks)?;
    }
    device.synchronize()?;
    Ok(())
}

fn main() -> Result<()> {
    let device = match cfg!(feature = "attention") {
        true => Device::new_cuda(0)?,
        false => Device::Cpu,
    };
    run(&device)
}

#[cfg(all(test, feature = "simulator"))]
mod tests {
    #[test]
    fn it_runs_on_the_cpu() {
        super::run(&candle_core::Device::Cpu).unwrap();
    }
}
