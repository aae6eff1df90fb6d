//! Decode steps of the whole decoder that are captured once, over blocks that come and go.

use super::decoder::{LARGE, SMALL};
use super::graph::read_rate;
use crate::batch::BatchDecoder;
use crate::config::Config;
use crate::machine::Machine;
use crate::paged::{BLOCK_SIZE, PagedCache, StepInputs};
use crate::weights::{Source, Weights};
use anyhow::{Result, ensure};
use candle_core::{D, DType, Device, Tensor};
use candle_cuda_vmm::device::cuda_with_own_stream;
use candle_cuda_vmm::graph::{DecodeGraph, DecodeGraphOptions};
use candle_cuda_vmm::{TensorPool, TensorPoolOptions};
use cuda_vmm_benches::{Outcome, Sides, quantile, time};
use std::rc::Rc;
use std::time::{Duration, Instant};

const CONTEXT: [usize; 2] = [8192, 24];
const GENERATED: [usize; 2] = [16, 2];
const ROUNDS: [usize; 2] = [25, 2];
/// Sequences that grow together, and for how many steps.
const GROWING: [usize; 2] = [64, 4];
const STEPS: [usize; 2] = [2048, 40];
/// Sequences of each of two models.
const SHARED: [usize; 2] = [8, 2];
const SEED: u64 = 0;

/// A model with a paged cache whose sequences all generate, token by token.
struct Subject {
    decoder: Rc<BatchDecoder>,
    cache: PagedCache,
    graph: DecodeGraph<'static>,
    /// The token of each sequence that comes next.
    tokens: Vec<u32>,
}

impl Subject {
    /// Makes a model with this many sequences of this length. What they hold is undefined: no time
    /// depends on it.
    fn new(
        pool: &TensorPool,
        config: &Config,
        batch: usize,
        length: usize,
        length_max: usize,
    ) -> Result<Self> {
        let device = pool.device();
        let weights = Weights::new(Source::Random(SEED), DType::BF16, device);
        let decoder = Rc::new(BatchDecoder::new(config, weights, batch, device)?);
        let mut cache = PagedCache::new(pool, config, DType::BF16, batch, length_max)?;
        let tokens = vec![1; length];
        (0..batch).for_each(|_| cache.begin());
        cache.extend(&vec![tokens.as_slice(); batch])?;
        let (model, inputs) = (decoder.clone(), cache.inputs().clone());
        let options = DecodeGraphOptions::of([batch]);
        let step = move |batch| next(&model, &inputs, batch);
        let mut graph = DecodeGraph::new(device, options, step)?;
        graph.capture_all(|_| {})?;
        Ok(Self {
            decoder,
            cache,
            graph,
            tokens: vec![1; batch],
        })
    }

    fn extend(&mut self) -> Result<()> {
        let new: Vec<_> = self.tokens.chunks(1).collect();
        Ok(self.cache.extend(&new)?)
    }

    /// Generates a token of each sequence, by the captured step, and waits for them. Returns the
    /// host's time of the replay.
    fn replay(&mut self) -> Result<Duration> {
        self.extend()?;
        let started = Instant::now();
        let next = self.graph.replay(self.tokens.len(), self.cache.named())?;
        let host = started.elapsed();
        self.tokens = next.to_vec1()?;
        Ok(host)
    }

    /// The same, launched kernel by kernel.
    fn one_by_one(&mut self) -> Result<()> {
        self.extend()?;
        let next = next(&self.decoder, self.cache.inputs(), self.tokens.len())?;
        self.tokens = next.to_vec1()?;
        Ok(())
    }

    /// Ends a sequence, and begins another of this length.
    fn replace(&mut self, sequence: usize, length: usize) -> Result<()> {
        self.cache.end(sequence)?;
        self.cache.begin();
        let tokens = vec![1; length];
        let last = self.tokens.len() - 1;
        let mut new = vec![&[][..]; last];
        new.push(&tokens);
        Ok(self.cache.extend(&new)?)
    }
}

/// Computes the most likely next tokens: U32 `[batch]`.
fn next(decoder: &BatchDecoder, inputs: &StepInputs, batch: usize) -> candle_core::Result<Tensor> {
    let (tokens, positions) = (inputs.tokens(batch)?, inputs.positions(batch)?);
    let logits = decoder.decode(&tokens, &positions, &inputs.kv(batch)?)?;
    logits.to_dtype(DType::F32)?.argmax(D::Minus1)
}

/// The bytes that a step reads at least: the weights, and K and V.
fn read_bytes(config: &Config, batch: usize, length: usize) -> usize {
    let (hidden, kv) = (config.hidden_size, config.kv_heads() * config.head_dim());
    let heads = config.num_attention_heads * config.head_dim();
    let layer = hidden * (2 * heads + 2 * kv + 3 * config.intermediate_size);
    let weights = config.num_hidden_layers * layer + config.vocab_size * hidden;
    let cached = batch * length * config.num_hidden_layers * 2 * kv;
    (weights + cached) * DType::BF16.size_in_bytes()
}

/// Against the same step launched kernel by kernel, and reading weights, K and V once.
pub fn measure(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let device = match machine.candle.is_cuda() {
        true => cuda_with_own_stream(0)?,
        false => Device::Cpu,
    };
    let config = Config::parse(if machine.is_real() { LARGE } else { SMALL })?;
    let pool = TensorPool::with_options(&device, TensorPoolOptions::new())?;
    let rate = read_rate(machine, machine.sized([1 << 30, 1 << 16]), outcome)?;
    let (context, generated) = (machine.sized(CONTEXT), machine.sized(GENERATED));
    let rounds = machine.sized(ROUNDS);
    for batch in machine.sized([[1, 32], [1, 2]]) {
        let name = if batch == 1 { "1" } else { "32" };
        let longest = context + 2 * (rounds + 1) * generated + BLOCK_SIZE;
        let subject = Subject::new(&pool, &config, batch, context, longest)?;
        let subject = &std::cell::RefCell::new(subject);
        let hosts = &std::cell::RefCell::new(Vec::new());
        let done = (batch * generated) as f64;
        let mut sides = Sides::default();
        sides.add_rate(&format!("captured, {name}"), done, || {
            let mut subject = subject.borrow_mut();
            let all = (0..generated).map(|_| subject.replay());
            let (mut took, elapsed) = time(|| all.collect::<Result<Vec<_>>>())?;
            hosts.borrow_mut().append(&mut took);
            Ok(elapsed)
        });
        sides.add_rate(&format!("one by one, {name}"), done, || {
            let mut subject = subject.borrow_mut();
            Ok(time(|| (0..generated).try_for_each(|_| subject.one_by_one()))?.1)
        });
        outcome.measure(sides, &machine.settings.patient(u32::MAX), rounds)?;
        let hosts = hosts
            .borrow()
            .iter()
            .map(|took| took.as_nanos() as f64)
            .collect();
        outcome.times(&format!("host of a replay, {name}"), hosts);
        let bytes = read_bytes(&config, batch, context);
        let floor = format!("floor, {name}");
        outcome.rates(&floor, batch as f64, vec![bytes as f64 / rate * 1e9]);
        let subject = subject.borrow();
        ensure!(subject.graph.counts().captures == 1, "captured again");
        outcome.note(&format!("captured, {name}"), nodes(&subject.graph, batch));
    }
    growing(machine, &pool, &config, outcome)?;
    sharing(machine, &pool, &config, outcome)
}

fn nodes(graph: &DecodeGraph<'_>, _batch: usize) -> String {
    #[cfg(feature = "attention")]
    if let Some(nodes) = graph.nodes(_batch) {
        let (kernels, copies, allocations) = (nodes.kernels, nodes.copies, nodes.allocations);
        return format!("{kernels} kernels, {copies} copies, {allocations} allocations");
    }
    let _ = graph;
    "no graph".to_owned()
}

/// Sequences that grow together, block by block and page by page.
fn growing(
    machine: &Machine,
    pool: &TensorPool,
    config: &Config,
    outcome: &mut Outcome,
) -> Result<()> {
    let (batch, steps) = (machine.sized(GROWING), machine.sized(STEPS));
    let mut subject = Subject::new(pool, config, batch, 1, steps + BLOCK_SIZE)?;
    // Some steps come before the first that counts.
    (0..8).try_for_each(|_| subject.replay().map(drop))?;
    let before = pool.engine().counters().ranges.late_prefetches;
    let mut took = Vec::with_capacity(steps);
    for _ in 8..steps {
        let (_, elapsed) = time(|| subject.replay())?;
        took.push(elapsed.as_nanos() as f64);
    }
    let late = pool.engine().counters().ranges.late_prefetches - before;
    let captures = subject.graph.counts().captures;
    outcome.count("captures and late allocations", (captures + late) as f64);
    outcome.times("worst step while growing", vec![quantile(&took, 1000)]);
    outcome.times("median step while growing", vec![quantile(&took, 500)]);
    let [p99, p999] = [990, 999].map(|per_mille| quantile(&took, per_mille) / 1e3);
    let held = pool.committed_bytes() >> 20;
    let note = format!("{steps} steps, to {held} MiB; p99 {p99:.0} µs, p99.9 {p999:.0} µs");
    outcome.note("worst step while growing", note);
    Ok(())
}

/// Two models in turns, whose sequences come and go, beside one of them alone.
fn sharing(
    machine: &Machine,
    pool: &TensorPool,
    config: &Config,
    outcome: &mut Outcome,
) -> Result<()> {
    let (batch, steps) = (machine.sized(SHARED), machine.sized([1024, 12]));
    let length = machine.sized([1024, 8]);
    let longest = length + steps + BLOCK_SIZE;
    let mut models = [(); 2].map(|()| Subject::new(pool, config, batch, length, longest));
    let mut alone = Vec::with_capacity(steps);
    if let Ok(model) = &mut models[0] {
        for _ in 0..steps / 2 {
            alone.push(time(|| model.replay())?.1.as_nanos() as f64);
        }
    }
    let [first, second] = models;
    let mut models = [first?, second?];
    let mut together = Vec::with_capacity(steps);
    for step in 0..steps {
        let model = &mut models[step % 2];
        together.push(time(|| model.replay())?.1.as_nanos() as f64);
        if step % 8 == 7 {
            model.replace(step / 8 % batch, length)?;
        }
        if step % 64 == 63 {
            // Memory goes back, and the worker makes it anew.
            pool.trim()?;
        }
    }
    outcome.times("a step of two models", together);
    outcome.times("a step alone", alone);
    Ok(())
}
