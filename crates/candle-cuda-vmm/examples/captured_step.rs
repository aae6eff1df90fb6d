//! A decode step that is captured once, and replayed while sequences grow, come and go.
//!
//! `cargo run --example captured_step` runs on the CPU device, with the simulated driver. With
//! `--features attention` it runs on GPU 0. docs/CAPTURED_STEPS.md explains the steps.

use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::attention::{DecodePlan, GqaOptions, KvBatch, Slots, decode, write};
use candle_cuda_vmm::device::cuda_with_own_stream;
use candle_cuda_vmm::graph::{DecodeGraph, DecodeGraphOptions, StepBlocks};
use candle_cuda_vmm::{BlockId, ElasticBlocksOptions, Result, TensorPool};

const NUM_BLOCKS: usize = 256;
const BLOCK_SIZE: usize = 16;
/// The most blocks of a sequence.
const BLOCKS_MAX: usize = 8;
const HEADS: usize = 8;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 64;
const VOCABULARY: usize = 100;
const BATCH_MAX: usize = 4;

/// A model of one layer.
struct Model {
    embedding: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head: Tensor,
    plan: DecodePlan,
}

impl Model {
    fn random(device: &Device) -> Result<Self> {
        let hidden = HEADS * HEAD_DIM;
        let random = |rows, columns| Tensor::randn(0f32, 0.1, (rows, columns), device);
        Ok(Self {
            embedding: random(VOCABULARY, hidden)?,
            q: random(hidden, hidden)?,
            k: random(hidden, KV_HEADS * HEAD_DIM)?,
            v: random(hidden, KV_HEADS * HEAD_DIM)?,
            head: random(hidden, VOCABULARY)?,
            plan: DecodePlan::new(device, BATCH_MAX, HEADS)?,
        })
    }

    /// Appends a token to each sequence, and returns the most likely tokens after them: U32
    /// `[batch]`.
    fn step(&self, tokens: &Tensor, kv: &KvBatch) -> candle_core::Result<Tensor> {
        let hidden = self.embedding.index_select(tokens, 0)?;
        let heads = |weight: &Tensor| hidden.matmul(weight)?.reshape((kv.batch(), (), HEAD_DIM));
        let (q, k, v) = (heads(&self.q)?, heads(&self.k)?, heads(&self.v)?);
        let q = write(&q, &k, &v, None, kv, Slots::Last)?;
        let options = GqaOptions::new(1. / (HEAD_DIM as f32).sqrt());
        let mixed = decode(&q, kv, &options, &self.plan)?;
        mixed.flatten_from(1)?.matmul(&self.head)?.argmax(1)
    }
}

/// What the step reads on the device: for the largest batch, at addresses that stay.
struct Inputs {
    tokens: Tensor,
    lengths: Tensor,
    tables: Tensor,
    k: Tensor,
    v: Tensor,
}

impl Inputs {
    /// K and V of the first `batch` sequences.
    fn kv(&self, batch: usize) -> Result<KvBatch> {
        let (tables, lengths) = (&self.tables, &self.lengths);
        let kv = KvBatch::blocks(&self.k, &self.v, &tables.narrow(0, 0, batch)?)?;
        kv.lengths(&lengths.narrow(0, 0, batch)?)
    }

    /// Writes the inputs of the next step. Rows behind the sequences get a length of 0.
    fn set(&self, sequences: &[Sequence]) -> Result<()> {
        let (mut tokens, mut lengths) = ([0u32; BATCH_MAX], [0u32; BATCH_MAX]);
        let mut tables = [[0u32; BLOCKS_MAX]; BATCH_MAX];
        for (at, sequence) in sequences.iter().enumerate() {
            (tokens[at], lengths[at]) = (sequence.token, sequence.length as u32);
            for (entry, block) in tables[at].iter_mut().zip(&sequence.blocks) {
                *entry = *block as u32;
            }
        }
        let device = self.tables.device();
        let to_device = |new: &[u32]| Tensor::new(new, device);
        self.tokens.slice_set(&to_device(&tokens)?, 0, 0)?;
        self.lengths.slice_set(&to_device(&lengths)?, 0, 0)?;
        let tables = to_device(tables.as_flattened())?.reshape(self.tables.shape())?;
        self.tables.slice_set(&tables, 0, 0)?;
        Ok(())
    }
}

/// A sequence: its blocks, how many tokens it has, and the last of them.
struct Sequence {
    blocks: Vec<BlockId>,
    length: usize,
    token: u32,
}

fn run(device: &Device) -> Result<()> {
    let pool = TensorPool::new(device)?;
    let shape = (BLOCK_SIZE, KV_HEADS, HEAD_DIM);
    let entries = ["k", "v"].map(|name| (name, shape, DType::F32));
    // The worker makes the memory of the next blocks, so that no step waits for it.
    let options = ElasticBlocksOptions::new().ahead_blocks_max(4 * BATCH_MAX);
    let blocks = pool.blocks_with_options(NUM_BLOCKS, entries, options)?;
    let allocator = blocks.allocator();
    // SAFETY: tables name allocated blocks only, which `named` checks before each launch. No
    // operation reads a whole tensor.
    #[allow(unsafe_code)]
    let mut tensors = unsafe { blocks.reserved_tensors()? };
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::U32, device);
    let inputs = Inputs {
        tokens: zeros(&[BATCH_MAX])?,
        lengths: zeros(&[BATCH_MAX])?,
        tables: zeros(&[BATCH_MAX, BLOCKS_MAX])?,
        v: tensors.remove(1),
        k: tensors.remove(0),
    };

    // Buckets of 1, 2 and 4 sequences, captured before the first request.
    let model = Model::random(device)?;
    let step = |bucket| {
        let tokens = inputs.tokens.narrow(0, 0, bucket)?;
        model.step(&tokens, &inputs.kv(bucket)?)
    };
    let mut graph = DecodeGraph::new(device, DecodeGraphOptions::up_to(BATCH_MAX), step)?;
    let mut named = StepBlocks::new(&blocks);
    graph.capture_all(&mut named, |progress| {
        println!("captured {} of {}", progress.done, progress.total);
    })?;

    let mut sequences: Vec<Sequence> = Vec::new();
    for round in 0..60 {
        // A sequence comes every ten steps, and one goes every twenty.
        if round % 10 == 0 && sequences.len() < BATCH_MAX {
            let (blocks, length, token) = (Vec::new(), 0, round as u32);
            sequences.push(Sequence {
                blocks,
                length,
                token,
            });
        }
        if round % 20 == 19 {
            let ended = sequences.swap_remove(0);
            named.forget(ended.blocks.iter().copied());
            allocator.free(ended.blocks)?;
        }
        for sequence in &mut sequences {
            sequence.length += 1;
            let missing = sequence.length.div_ceil(BLOCK_SIZE) - sequence.blocks.len();
            let new = allocator.allocate(missing)?;
            named.name(new.iter().copied())?;
            sequence.blocks.extend(new);
        }
        inputs.set(&sequences)?;
        let next = graph.replay(sequences.len(), &mut named)?.to_vec1()?;
        for (sequence, token) in sequences.iter_mut().zip(next) {
            sequence.token = token;
        }
    }
    println!("{:?}; {:?}", graph.counts(), blocks.stats());
    Ok(())
}

fn main() -> Result<()> {
    let device = match cfg!(feature = "attention") {
        true => cuda_with_own_stream(0)?,
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
