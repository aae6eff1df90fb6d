//! Decode steps of the whole decoder that are captured once, over blocks that come and go.

use super::decoder::{LARGE, SMALL};
use super::graph::read_rate;
use crate::batch::BatchDecoder;
use crate::config::Config;
use crate::machine::Machine;
use crate::paged::{BLOCK_SIZE, PagedCache, StepInputs};
use crate::weights::{Source, Weights};
use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::device::cuda_with_own_stream;
use candle_cuda_vmm::graph::{DecodeGraph, DecodeGraphOptions};
use candle_cuda_vmm::sampling::{SampleParameters, sample};
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
/// A step is compared with so many before it and behind it.
const AROUND: usize = 16;
/// Steps between two times at which unused memory is given back: fewer than one in a hundred steps
/// comes after one.
const TRIM: usize = 128;
/// For how long memory may go back before growth is measured.
const SETTLE: Duration = Duration::from_secs(10);
const SEED: u64 = 0;

/// A model with a paged cache whose sequences all generate, token by token.
struct Subject {
    decoder: Rc<BatchDecoder>,
    cache: PagedCache,
    graph: DecodeGraph<'static>,
    greedy: SampleParameters,
    /// The token of each sequence that comes next.
    tokens: Vec<u32>,
}

/// What a step took of the host's time.
#[derive(Clone, Copy)]
struct Step {
    /// Finding room for the tokens, and writing what the step reads.
    extend: Duration,
    replay: Duration,
    /// Until the tokens are there.
    wait: Duration,
}

impl Step {
    fn ns(&self) -> f64 {
        (self.extend + self.replay + self.wait).as_nanos() as f64
    }
}

/// A step that took the longest beside the median of those around it.
struct Worst {
    step: Step,
    median_ns: f64,
}

impl Worst {
    fn of(steps: &[Step]) -> Result<Self> {
        let around = steps.windows(2 * AROUND + 1).map(|around| {
            let took: Vec<_> = around.iter().map(Step::ns).collect();
            Self {
                step: around[AROUND],
                median_ns: quantile(&took, 500),
            }
        });
        around
            .max_by(|one, other| one.ratio().total_cmp(&other.ratio()))
            .context("too few steps")
    }

    fn ratio(&self) -> f64 {
        self.step.ns() / self.median_ns
    }
}

/// A model, and where its caches get their memory.
struct Stage {
    pool: TensorPool,
    config: Config,
    decoder: Rc<BatchDecoder>,
}

impl Stage {
    /// Waits until the memory of earlier sequences is the driver's again.
    fn settle(&self) -> Result<()> {
        let started = Instant::now();
        self.pool.trim()?;
        while self.pool.committed_bytes() > 0 {
            ensure!(
                started.elapsed() < SETTLE,
                "memory of earlier sequences stays"
            );
            std::thread::sleep(Duration::from_millis(1));
            self.pool.trim()?;
        }
        Ok(())
    }

    /// Makes sequences of these lengths. What they hold is undefined: no time depends on it.
    fn subject(&self, lengths: &[usize], length_max: usize) -> Result<Subject> {
        let Self {
            pool,
            config,
            decoder,
        } = self;
        let (device, batch) = (pool.device(), lengths.len());
        let mut cache = PagedCache::new(pool, config, DType::BF16, batch, length_max)?;
        let tokens = vec![1; lengths.iter().copied().max().unwrap_or_default()];
        lengths.iter().for_each(|_| cache.begin());
        let new: Vec<_> = lengths.iter().map(|length| &tokens[..*length]).collect();
        cache.extend(&new)?;
        let (model, inputs) = (decoder.clone(), cache.inputs().clone());
        let greedy = greedy(device, batch)?;
        let of_step = greedy.clone();
        let options = DecodeGraphOptions::of([batch]);
        // There is one bucket.
        let step = move |_| next(&model, &inputs, &of_step);
        let mut graph = DecodeGraph::new(device, options, step)?;
        graph.capture_all(cache.named(), |_| {})?;
        Ok(Subject {
            decoder: decoder.clone(),
            cache,
            graph,
            greedy,
            tokens: vec![1; batch],
        })
    }
}

impl Subject {
    fn extend(&mut self) -> Result<()> {
        let new: Vec<_> = self.tokens.chunks(1).collect();
        Ok(self.cache.extend(&new)?)
    }

    /// Generates a token of each sequence, by the captured step, and waits for them.
    fn replay(&mut self) -> Result<Step> {
        let ((), extend) = time(|| self.extend())?;
        Ok(Step {
            extend,
            ..self.replay_again()?
        })
    }

    /// The same for the tokens of the last step, which writes to the same rows.
    fn replay_again(&mut self) -> Result<Step> {
        let started = Instant::now();
        let next = self.graph.replay(self.tokens.len(), self.cache.named())?;
        let replay = started.elapsed();
        self.tokens = next.to_vec1()?;
        Ok(Step {
            extend: Duration::ZERO,
            replay,
            wait: started.elapsed() - replay,
        })
    }

    /// Fails unless the captured step gives the tokens of the same step launched kernel by kernel.
    fn compare(&mut self) -> Result<()> {
        self.replay()?;
        let again = next(&self.decoder, self.cache.inputs(), &self.greedy)?;
        let again: Vec<u32> = again.to_vec1()?;
        ensure!(
            again == self.tokens,
            "{again:?} one by one, {:?}",
            self.tokens
        );
        Ok(())
    }

    /// The same, launched kernel by kernel.
    fn one_by_one(&mut self) -> Result<()> {
        self.extend()?;
        let next = next(&self.decoder, self.cache.inputs(), &self.greedy)?;
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

/// Computes the likeliest next tokens: U32 `[batch]`.
fn next(
    decoder: &BatchDecoder,
    inputs: &StepInputs,
    greedy: &SampleParameters,
) -> candle_core::Result<Tensor> {
    let batch = greedy.batch();
    let (tokens, positions) = (inputs.tokens(batch)?, inputs.positions(batch)?);
    let logits = decoder.decode(&tokens, &positions, &inputs.kv(batch)?)?;
    sample(&logits, greedy)
}

/// Takes the likeliest token of each row.
fn greedy(device: &Device, batch: usize) -> Result<SampleParameters> {
    let numbers = Tensor::zeros(batch, DType::F32, device)?;
    let seeds = Tensor::zeros((batch, 2), DType::U32, device)?;
    let positions = Tensor::zeros(batch, DType::U32, device)?;
    Ok(SampleParameters::new(
        &numbers, &numbers, &seeds, &positions,
    )?)
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
    let weights = Weights::new(Source::Random(SEED), DType::BF16, &device);
    let most = machine.sized(GROWING);
    let decoder = BatchDecoder::new(&config, weights, most, &device)?;
    let stage = Stage {
        pool: TensorPool::with_options(&device, TensorPoolOptions::new())?,
        decoder: Rc::new(decoder),
        config,
    };
    let rate = read_rate(machine, machine.sized([1 << 30, 1 << 16]), outcome)?;
    let (context, generated) = (machine.sized(CONTEXT), machine.sized(GENERATED));
    let rounds = machine.sized(ROUNDS);
    for batch in machine.sized([[1, 32], [1, 2]]) {
        let name = if batch == 1 { "1" } else { "32" };
        let longest = context + 2 * (rounds + 1) * generated + BLOCK_SIZE;
        let mut subject = stage.subject(&vec![context; batch], longest)?;
        subject.compare()?;
        let subject = &std::cell::RefCell::new(subject);
        let hosts = &std::cell::RefCell::new(Vec::new());
        let done = (batch * generated) as f64;
        let mut sides = Sides::default();
        sides.add_rate(&format!("captured, {name}"), done, || {
            let mut subject = subject.borrow_mut();
            let all = (0..generated).map(|_| subject.replay());
            let (took, elapsed) = time(|| all.collect::<Result<Vec<_>>>())?;
            let replays = took.into_iter().map(|step| step.replay.as_nanos() as f64);
            hosts.borrow_mut().extend(replays);
            Ok(elapsed)
        });
        sides.add_rate(&format!("one by one, {name}"), done, || {
            let mut subject = subject.borrow_mut();
            Ok(time(|| (0..generated).try_for_each(|_| subject.one_by_one()))?.1)
        });
        outcome.measure(sides, &machine.settings.patient(u32::MAX), rounds)?;
        outcome.times(&format!("host of a replay, {name}"), hosts.take());
        let bytes = read_bytes(&stage.config, batch, context);
        let floor = format!("floor, {name}");
        outcome.rates(&floor, batch as f64, vec![bytes as f64 / rate * 1e9]);
        let subject = subject.borrow();
        ensure!(subject.graph.counts().captures == 1, "captured again");
        outcome.note(&format!("captured, {name}"), nodes(&subject.graph, batch));
    }
    serving(machine, &stage, rate, outcome)?;
    growing(machine, &stage, outcome)?;
    sharing(machine, &stage, outcome)
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

/// As many steps as a server's requests take after their prompts, of whole batches.
fn serving(machine: &Machine, stage: &Stage, rate: f64, outcome: &mut Outcome) -> Result<()> {
    let (prompt, steps) = (machine.sized([256, 8]), machine.sized([256, 4]));
    for batch in machine.sized([[32, 64], [2, 3]]) {
        let name = if batch == machine.sized([32, 2]) {
            "32"
        } else {
            "64"
        };
        let mut rates = Vec::new();
        for _ in 0..machine.sized([5, 1]) {
            let mut subject = stage.subject(&vec![prompt; batch], prompt + steps + BLOCK_SIZE)?;
            let all = || (0..steps).try_for_each(|_| subject.replay().map(drop));
            rates.push(time(all)?.1.as_nanos() as f64);
        }
        let side = format!("captured, {name}, 256 to 512");
        outcome.rates(&side, (batch * steps) as f64, rates);
        let bytes = read_bytes(&stage.config, batch, prompt + steps / 2);
        let side = format!("floor, {name}, 256 to 512");
        outcome.rates(&side, batch as f64, vec![bytes as f64 / rate * 1e9]);
    }
    Ok(())
}

/// Sequences that grow together, block by block and page by page. They begin at different lengths,
/// so that some of them need a block in each step.
fn growing(machine: &Machine, stage: &Stage, outcome: &mut Outcome) -> Result<()> {
    const WARM: usize = 8;
    let (batch, steps) = (machine.sized(GROWING), machine.sized(STEPS));
    stage.settle()?;
    let lengths: Vec<_> = (1..=batch).collect();
    let mut subject = stage.subject(&lengths, batch + steps + WARM)?;
    (0..WARM).try_for_each(|_| subject.replay().map(drop))?;
    let counters = || stage.pool.engine().counters();
    let before = counters();
    let grown = (0..steps).map(|_| subject.replay());
    let grown = grown.collect::<Result<Vec<_>>>()?;
    let (captures, after) = (subject.graph.counts().captures, counters());
    let late = after.ranges.late_prefetches - before.ranges.late_prefetches;
    let (calls, waits) = (captures + late, after.waits - before.waits);
    outcome.count("captures and late allocations", calls as f64);
    // What the machine does without any growth.
    let still = (0..steps).map(|_| subject.replay_again());
    let still = Worst::of(&still.collect::<Result<Vec<_>>>()?)?;
    // A step reads all that is cached, so it takes longer as the sequences grow. Each is compared
    // with those around it.
    let worst = Worst::of(&grown)?;
    outcome.times("worst step while growing", vec![worst.step.ns()]);
    outcome.times("median of the steps around it", vec![worst.median_ns]);
    let [first, last] = [grown[AROUND], grown[steps - AROUND]].map(|step| step.ns() / 1e3);
    let Step {
        extend,
        replay,
        wait,
    } = worst.step;
    let held = stage.pool.committed_bytes() >> 20;
    let note = format!(
        "{steps} steps of {first:.0} to {last:.0} µs, to {held} MiB; the worst: {extend:.0?} for \
         room, {replay:.0?} to replay, {wait:.0?} to wait; {waits} waits for memory; without \
         growth the worst is {:.3} × those around it",
        still.ratio()
    );
    outcome.note("worst step while growing", note);
    Ok(())
}

/// Two models in turns, whose sequences come and go, beside one of them alone.
fn sharing(machine: &Machine, stage: &Stage, outcome: &mut Outcome) -> Result<()> {
    let (batch, steps) = (machine.sized(SHARED), machine.sized([2048, 16]));
    let length = machine.sized([1024, 8]);
    let longest = length + steps + BLOCK_SIZE;
    let model = || stage.subject(&vec![length; batch], longest);
    let mut models = [model()?, model()?];
    let timed =
        |model: &mut Subject| -> Result<f64> { Ok(time(|| model.replay())?.1.as_nanos() as f64) };
    let alone = (0..steps / 2).map(|_| timed(&mut models[0]));
    outcome.times("a step alone", alone.collect::<Result<_>>()?);
    for step in 0..steps / 2 {
        // Both are as long as the one that was alone.
        models[1].replay()?;
        if step % 8 == 7 {
            models[0].replace(step / 8 % batch, length)?;
        }
    }
    let mut together = Vec::with_capacity(steps);
    for step in 0..steps {
        together.push(timed(&mut models[step % 2])?);
        if step % 8 == 7 {
            models[step / 8 % 2].replace(step / 16 % batch, length)?;
        }
        if step % TRIM == TRIM - 1 {
            // Memory goes back, and the worker makes it anew.
            stage.pool.trim()?;
        }
    }
    outcome.times("a step of two models", together);
    Ok(())
}
