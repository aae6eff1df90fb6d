//! Decode attention: the device's time of graphs of launches, over more K and V than its cache
//! holds.

use super::graph::{graph, read_rate};
use super::growth::{LAYERS, Layers};
use crate::machine::{DTYPE, HEAD_DIM, KV_HEADS, Machine};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::attention::{DecodePlan, GqaOptions, KvBatch, decode_into};
use candle_cuda_vmm::attention::{Rotary, Slots, write};
use candle_nn::rotary_emb::rope;
use cuda_vmm_benches::{Outcome, Sides, time};
use std::slice;

const QUERY_HEADS: usize = 32;
/// Launches of a graph, at least.
const LAUNCHES: usize = 32;
/// K and V that a graph reads, at least, in bytes.
const READ_BYTES: usize = 512 << 20;
const BLOCK: usize = 16;
/// Tokens in F8 that are made at once.
const NARROW_PART: usize = 4096;
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

fn batch(machine: &Machine, sequences: usize, keys: usize, lies: Lies) -> Result<KvBatch> {
    let device = &machine.candle;
    let random = |shape: [usize; 4]| Tensor::randn(0f32, 1.0, &shape, device)?.to_dtype(DTYPE);
    let rows = [sequences, keys, KV_HEADS, HEAD_DIM];
    let lengths = Tensor::full(keys as u32, sequences, device)?;
    let kv = match lies {
        Lies::Plain => KvBatch::rows(
            &random(rows)?.transpose(1, 2)?,
            &random(rows)?.transpose(1, 2)?,
        )?,
        Lies::Narrow => {
            // Candle's kernels convert nothing to it, so a part comes from the CPU.
            let part = [keys.min(NARROW_PART), KV_HEADS, HEAD_DIM];
            let made = || -> Result<Tensor> {
                let part = Tensor::randn(0f32, 1.0, &part, &Device::Cpu)?;
                let part = part.to_dtype(DType::F8E4M3)?.to_device(device)?;
                let count = sequences * keys / part.dim(0)?;
                let all = Tensor::cat(&vec![part; count], 0)?.reshape(&rows)?;
                Ok(all.transpose(1, 2)?)
            };
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
    let rate = read_rate(machine, machine.sized([2 * READ_BYTES, 1 << 16]), outcome)?;
    for (name, sequences, keys, lies) in CASES {
        let (sequences, keys) = machine.sized([(sequences, keys), (2, 64)]);
        let element = if lies == Lies::Narrow {
            1
        } else {
            DTYPE.size_in_bytes()
        };
        let bytes = 2 * sequences * keys * KV_HEADS * HEAD_DIM * element;
        let sets = machine.sized([(READ_BYTES / bytes).max(2), 2]);
        let made = (0..sets).map(|_| batch(machine, sequences, keys, lies));
        let sets: Vec<_> = made.collect::<Result<_>>()?;
        let plan = DecodePlan::new(device, sequences, QUERY_HEADS)?;
        let q = queries(machine, sequences)?;
        let output = q.zeros_like()?;
        let decode = |at: usize| decode_into(&q, &sets[at % sets.len()], &options, &plan, &output);
        let launches = sets.len().max(machine.sized([LAUNCHES, 2]));
        let mut sides = Sides::default();
        sides.add(name, graph(machine, launches, decode)?);
        sides.add(&format!("eager, {name}"), || {
            machine.candle.synchronize()?;
            Ok(time(|| (0..launches).try_for_each(decode))?.1 / launches as u32)
        });
        outcome.measure(sides, &machine.settings, 20)?;
        // What reading K and V once takes.
        outcome.times(&format!("floor, {name}"), vec![bytes as f64 / rate * 1e9]);
        let eager_us = outcome.us(&format!("eager, {name}"), 500)?;
        let terabytes = bytes as f64 / outcome.us(name, 500)? / 1e6;
        let note = format!("{terabytes:.2} TB/s; eager {eager_us:.1} µs of the host's time");
        outcome.note(name, note);
    }
    layouts(machine, &options, outcome)?;
    rows(machine, outcome)
}

fn queries(machine: &Machine, sequences: usize) -> candle_core::Result<Tensor> {
    let shape = (sequences, QUERY_HEADS, HEAD_DIM);
    Tensor::randn(0f32, 1.0, shape, &machine.candle)?.to_dtype(DTYPE)
}

/// All layers of a sequence, one after the other: in one range, and in ranges of their own.
fn layouts(machine: &Machine, options: &GqaOptions, outcome: &mut Outcome) -> Result<()> {
    let row = (1, KV_HEADS, HEAD_DIM);
    let layers = machine.sized(LAYERS);
    let keys = machine.sized([8 << 10, 64]);
    let plan = DecodePlan::new(&machine.candle, 1, QUERY_HEADS)?;
    let q = queries(machine, 1)?;
    let output = q.zeros_like()?;
    let mut sides = Sides::default();
    for name in ["one range", "ranges of their own"] {
        let sequence = machine.pool(false)?.sequence();
        let caches = match name {
            "one range" => sequence.rows_in_one_range(layers, row, row, DTYPE)?,
            _ => sequence.rows(row, row, DTYPE)?,
        };
        let mut caches = Layers::new(machine, &caches, keys)?.fill(machine, keys)?;
        let views = caches.views(machine)?;
        let batches = views
            .iter()
            .map(|pair| KvBatch::sequences(slice::from_ref(pair)));
        let batches: Vec<_> = batches.collect::<Result<_, _>>()?;
        let (q, options, plan, output) = (&q, options, &plan, &output);
        let decode = move |at: usize| decode_into(q, &batches[at], options, plan, output);
        let mut round = graph(machine, layers, decode)?;
        sides.add(name, move || {
            let _owned = (&caches, &views);
            round()
        });
    }
    outcome.measure(sides, &machine.settings, 20)
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
    let (q, k, v) = (queries(machine, sequences)?, new(KV_HEADS)?, new(KV_HEADS)?);
    let angles = Tensor::randn(0f32, 1.0, (2048, HEAD_DIM / 2), device)?;
    let rotary = Rotary::new(&angles.cos()?, &angles.sin()?)?;
    let at = Tensor::full(1023u32, sequences, device)?;
    let write = |_| write(&q, &k, &v, Some((&rotary, &at)), &kv, Slots::Last).map(drop);
    let mut sides = Sides::default();
    let launches = machine.sized([LAUNCHES, 2]);
    sides.add("write, 64", graph(machine, launches, write)?);
    // What Candle has: the rotations alone, in two launches.
    let turned = |angles: Tensor| angles.to_dtype(DTYPE)?.unsqueeze(1);
    let angles = angles.narrow(0, 0, sequences)?;
    let (cos, sin) = (turned(angles.cos()?)?, turned(angles.sin()?)?);
    let (q, k) = (q.unsqueeze(2)?, k.unsqueeze(2)?);
    let rope = move |_| {
        rope(&q, &cos, &sin)?;
        rope(&k, &cos, &sin).map(drop)
    };
    sides.add("rope of Q and of K", graph(machine, launches, rope)?);
    outcome.measure(sides, &machine.settings, 20)
}
