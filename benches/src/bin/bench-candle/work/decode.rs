//! Decode attention: the device's time of graphs of launches, over more K and V than its cache
//! holds.

use crate::machine::{DTYPE, HEAD_DIM, KV_HEADS, Machine};
use anyhow::Result;
use candle_core::{DType, Tensor};
use candle_cuda_vmm::attention::{DecodePlan, GqaOptions, KvBatch, decode_into};
use candle_cuda_vmm::attention::{Rotary, Slots, write};
use cuda_vmm_benches::{Outcome, Sides, time};
use std::time::Duration;

const QUERY_HEADS: usize = 32;
/// Launches of a graph, at least.
const LAUNCHES: usize = 32;
/// K and V that a graph reads, at least, in bytes.
const READ_BYTES: usize = 512 << 20;
const BLOCK: usize = 16;
/// Names, sequences, keys of each, and how K and V lie.
const CASES: [(&str, usize, usize, Lies); 10] = [
    ("1 × 1,024", 1, 1 << 10, Lies::Plain),
    ("1 × 8,192", 1, 8 << 10, Lies::Plain),
    ("1 × 32,768", 1, 32 << 10, Lies::Plain),
    ("1 × 131,072", 1, 128 << 10, Lies::Plain),
    ("8 × 32,768", 8, 32 << 10, Lies::Plain),
    ("32 × 4,096", 32, 4 << 10, Lies::Plain),
    ("32 × 4,096, blocks", 32, 4 << 10, Lies::Blocks),
    ("32 × 4,096, pool", 32, 4 << 10, Lies::Pool),
    ("32 × 8,192", 32, 8 << 10, Lies::Plain),
    ("32 × 8,192, F8", 32, 8 << 10, Lies::Narrow),
];

#[derive(Clone, Copy, PartialEq)]
enum Lies {
    Plain,
    /// In F8E4M3.
    Narrow,
    /// In blocks in random order.
    Blocks,
    /// In memory of a pool.
    Pool,
}

/// The time of one of these launches, in a graph if the device has them.
fn graph<'a>(
    machine: &'a Machine,
    launches: usize,
    mut launch: impl FnMut(usize) -> candle_core::Result<()> + 'a,
) -> Result<Box<dyn FnMut() -> Result<Duration> + 'a>> {
    launch(0)?;
    machine.candle.synchronize()?;
    #[cfg(feature = "attention")]
    if let candle_core::Device::Cuda(device) = &machine.candle {
        use candle_core::cuda::cudarc::driver::sys::{
            CUgraphInstantiate_flags, CUstreamCaptureMode,
        };
        let stream = device.cuda_stream();
        let _guard = cuda_vmm::CaptureGuard::new();
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)?;
        let captured = (0..launches).try_for_each(&mut launch);
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(flags)?;
        captured?;
        let graph = anyhow::Context::context(graph, "nothing was captured")?;
        return Ok(Box::new(move || {
            let replay = || graph.launch().and_then(|()| stream.synchronize());
            Ok(time(replay)?.1 / launches as u32)
        }));
    }
    Ok(Box::new(move || {
        let all = || (0..launches).try_for_each(&mut launch);
        Ok(time(all)?.1 / launches as u32)
    }))
}

fn batch(machine: &Machine, sequences: usize, keys: usize, lies: Lies) -> Result<KvBatch> {
    let device = &machine.candle;
    let random = |shape: [usize; 4]| Tensor::randn(0f32, 1.0, &shape, device)?.to_dtype(DTYPE);
    let rows = [sequences, keys, KV_HEADS, HEAD_DIM];
    let lengths = Tensor::full(keys as u32, sequences, device)?;
    let kv = match lies {
        Lies::Plain | Lies::Narrow => {
            let dtype = if lies == Lies::Narrow {
                DType::F8E4M3
            } else {
                DTYPE
            };
            let made = || random(rows)?.to_dtype(dtype)?.transpose(1, 2);
            KvBatch::rows(&made()?, &made()?)?
        }
        Lies::Pool => {
            let pool = machine.pool(false)?;
            let made = || -> Result<Tensor> {
                let mut tensor = pool.tensor(&rows[1..], DTYPE)?;
                tensor.append(&random(rows)?)?;
                Ok(tensor.view()?.transpose(1, 2)?)
            };
            KvBatch::rows(&made()?, &made()?)?
        }
        Lies::Blocks => {
            let blocks = sequences * keys / BLOCK;
            let shape = [blocks, BLOCK, KV_HEADS, HEAD_DIM];
            // Odd, so it has a common divisor with no number of blocks here: each comes once.
            let table = (0..blocks).map(|at| (at * 7919 % blocks) as u32);
            let table = Tensor::from_iter(table, device)?.reshape((sequences, keys / BLOCK))?;
            KvBatch::blocks(&random(shape)?, &random(shape)?, &table)?
        }
    };
    Ok(kv.lengths(&lengths)?)
}

pub fn measure(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let device = &machine.candle;
    let options = GqaOptions::new(1.0 / (HEAD_DIM as f32).sqrt());
    for (name, sequences, keys, lies) in CASES {
        let (sequences, keys) = machine.sized([(sequences, keys), (2, 64)]);
        let bytes = 2 * sequences * keys * KV_HEADS * HEAD_DIM * DTYPE.size_in_bytes();
        let sets = machine.sized([(READ_BYTES / bytes).max(2), 2]);
        let made = (0..sets).map(|_| batch(machine, sequences, keys, lies));
        let sets: Vec<_> = made.collect::<Result<_>>()?;
        let plan = DecodePlan::new(device, sequences, QUERY_HEADS)?;
        let shape = (sequences, QUERY_HEADS, HEAD_DIM);
        let q = Tensor::randn(0f32, 1.0, shape, device)?.to_dtype(DTYPE)?;
        let output = q.zeros_like()?;
        let decode = |at: usize| decode_into(&q, &sets[at % sets.len()], &options, &plan, &output);
        let launches = sets.len().max(machine.sized([LAUNCHES, 2]));
        let copied = Tensor::zeros(bytes / 2, DType::U8, device)?;
        let target = copied.copy()?;
        let mut sides = Sides::default();
        sides.add(name, graph(machine, launches, decode)?);
        // As many bytes read and written together as K and V have.
        let copy = graph(machine, launches, |_| target.slice_set(&copied, 0, 0))?;
        sides.add(&format!("copy, {name}"), copy);
        sides.add(&format!("eager, {name}"), || {
            machine.candle.synchronize()?;
            Ok(time(|| (0..launches).try_for_each(decode))?.1 / launches as u32)
        });
        outcome.measure(sides, &machine.settings, 20)?;
    }
    rows(machine, outcome)
}

/// Rotating and writing the new tokens of 64 sequences.
fn rows(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let device = &machine.candle;
    let sequences = machine.sized([64, 2]);
    let kv = batch(machine, sequences, 1024, Lies::Blocks)?;
    let new = |heads| {
        let made = Tensor::randn(0f32, 1.0, (sequences, heads, HEAD_DIM), device)?;
        made.to_dtype(DTYPE)
    };
    let (q, k, v) = (new(QUERY_HEADS)?, new(KV_HEADS)?, new(KV_HEADS)?);
    let angles = Tensor::randn(0f32, 1.0, (2048, HEAD_DIM / 2), device)?;
    let rotary = Rotary::new(&angles.cos()?, &angles.sin()?)?;
    let at = Tensor::full(1023u32, sequences, device)?;
    let write = |_| write(&q, &k, &v, Some((&rotary, &at)), &kv, Slots::Last).map(drop);
    let mut sides = Sides::default();
    let launches = machine.sized([LAUNCHES, 2]);
    sides.add("write, 64", graph(machine, launches, write)?);
    outcome.measure(sides, &machine.settings, 20)
}
