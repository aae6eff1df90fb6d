//! Steps that are captured once, over caches that grow. On a CPU device each replay runs the step.

use super::batch::{has_attention, numbers};
use crate::common::{UnderTest, open};
use crate::refused;
use candle_core::{DType, Device, Result, Tensor};
use candle_cuda_vmm::attention::{DecodePlan, GqaOptions, KvBatch, Slots, decode, write};
use candle_cuda_vmm::cuda_vmm::{DriverKind, VmmError as CoreError};
#[cfg(feature = "cuda")]
use candle_cuda_vmm::device::core_device;
use candle_cuda_vmm::device::cuda_with_own_stream;
use candle_cuda_vmm::graph::{DecodeGraph, DecodeGraphOptions, GraphError, StepBlocks, StepMemory};
use candle_cuda_vmm::kv_cache::KvCacheFactory;
use candle_cuda_vmm::{BlockError, ElasticBlocks, RowsWatch, TensorPool, VmmError};
use std::cell::Cell;

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 64;
const VOCABULARY: usize = 32;
const BLOCK: usize = 16;
const BLOCKS_MAX: usize = 8;
const BATCH_MAX: usize = 4;

/// A device whose steps can be captured. The memory that Candle and the driver keep for such steps
/// is no leak.
pub fn device(test: &mut UnderTest) -> Device {
    match test.kind {
        DriverKind::Simulated => Device::Cpu,
        DriverKind::Real => {
            let ordinal = test.ordinal().try_into().unwrap();
            let device = cuda_with_own_stream(ordinal).unwrap();
            // A first step, for what is kept as long as the thread lives.
            let first = Step::new(&device);
            let mut named = first.one_token_each();
            drop(first.graph(&mut named));
            drop(first);
            device.synchronize().unwrap();
            test.begin_again();
            device
        }
    }
}

/// Gives back what the driver keeps for graphs.
pub fn end(device: Device) {
    device.synchronize().unwrap();
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        let core = core_device(&device).unwrap();
        core.trim_graph_memory().unwrap();
        assert_eq!(core.graph_memory().unwrap().reserved_bytes, 0);
    }
}

/// A device, a step whose sequences have a token each, and the blocks that it names.
fn first_step(test: &mut UnderTest) -> (Device, Step, StepBlocks) {
    let device = device(test);
    let step = Step::new(&device);
    let named = step.one_token_each();
    (device, step, named)
}

/// A layer with its weights, and the inputs of a batch over a paged cache.
struct Step {
    embedding: Tensor,
    weights: [Tensor; 4],
    plan: DecodePlan,
    kv: [Tensor; 2],
    /// U32 `[BATCH_MAX, BLOCKS_MAX]`.
    tables: Tensor,
    /// U32 `[BATCH_MAX]`.
    lengths: Tensor,
    tokens: Tensor,
    blocks: ElasticBlocks,
}

impl Step {
    fn new(device: &Device) -> Self {
        let pool = TensorPool::new(device).unwrap();
        let shape = (BLOCK, KV_HEADS, DIM);
        let entries = ["k", "v"].map(|name| (name, shape, DType::F32));
        let blocks = pool.blocks(BATCH_MAX * BLOCKS_MAX, entries).unwrap();
        // SAFETY: tables name backed blocks only, and nothing reads a whole tensor.
        #[allow(unsafe_code)]
        let kv = unsafe { blocks.reserved_tensors() }.unwrap();
        let random = |shape: (usize, usize)| {
            let tensor = Tensor::rand(-0.5f32, 0.5, shape, &Device::Cpu).unwrap();
            tensor.to_device(device).unwrap()
        };
        let hidden = HEADS * DIM;
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::U32, device).unwrap();
        Self {
            embedding: random((VOCABULARY, hidden)),
            weights: [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM, VOCABULARY]
                .map(|outputs| random((hidden, outputs))),
            plan: DecodePlan::new(device, BATCH_MAX, HEADS).unwrap(),
            kv: [kv[0].clone(), kv[1].clone()],
            tables: zeros(&[BATCH_MAX, BLOCKS_MAX]),
            lengths: zeros(&[BATCH_MAX]),
            tokens: zeros(&[BATCH_MAX]),
            blocks,
        }
    }

    fn device(&self) -> &Device {
        self.tables.device()
    }

    /// Computes a step of the first `batch` sequences.
    fn run(&self, batch: usize) -> Result<Tensor> {
        let first = |tensor: &Tensor| tensor.narrow(0, 0, batch);
        let kv = KvBatch::blocks(&self.kv[0], &self.kv[1], &first(&self.tables)?)?;
        let kv = kv.lengths(&first(&self.lengths)?)?;
        let hidden = self.embedding.index_select(&first(&self.tokens)?, 0)?;
        let [q, k, v] = [0, 1, 2].map(|at| {
            let made = hidden.matmul(&self.weights[at])?;
            made.reshape((batch, (), DIM))
        });
        let q = write(&q?, &k?, &v?, None, &kv, Slots::Last)?;
        let options = GqaOptions::new(1. / (DIM as f32).sqrt());
        let mixed = decode(&q, &kv, &options, &self.plan)?;
        mixed.flatten_from(1)?.matmul(&self.weights[3])
    }

    fn graph(&self, memory: &mut dyn StepMemory) -> DecodeGraph<'_> {
        let options = DecodeGraphOptions::up_to(BATCH_MAX);
        let step = |batch| self.run(batch);
        let mut graph = DecodeGraph::new(self.device(), options, step).unwrap();
        graph.capture_all(memory, |_| {}).unwrap();
        graph
    }

    /// Sets the inputs of the next step.
    fn set(&self, tokens: &[u32], lengths: &[u32], tables: &[u32]) {
        for (to, from) in [(&self.tokens, tokens), (&self.lengths, lengths)] {
            let from = Tensor::new(from, self.device()).unwrap();
            to.slice_set(&from, 0, 0).unwrap();
        }
        let shape = self.tables.shape();
        let tables = Tensor::from_slice(tables, shape, self.device()).unwrap();
        self.tables.slice_set(&tables, 0, 0).unwrap();
    }

    /// Backs a block for each sequence, in which each has one token.
    fn one_token_each(&self) -> StepBlocks {
        self.blocks.back(0..BATCH_MAX).unwrap();
        let rows = (0..BATCH_MAX as u32).flat_map(|row| [row; BLOCKS_MAX]);
        self.set(&[1; BATCH_MAX], &[1; BATCH_MAX], &rows.collect::<Vec<_>>());
        let mut named = StepBlocks::new(&self.blocks);
        named.name(0..BATCH_MAX).unwrap();
        named
    }
}

#[test]
fn a_captured_step_has_the_bits_of_the_same_step_launched_one_by_one() {
    let mut test = open();
    if !has_attention(&test) {
        return;
    }
    let (device, step, mut named) = first_step(&mut test);
    let mut graph = step.graph(&mut named);
    assert_eq!(graph.counts().captures, 3);
    // Sequence `s` has the blocks `s`, `s + BATCH_MAX`, and so on, as it grows.
    let mut backed = 1;
    for length in 1..=BLOCK * BLOCKS_MAX {
        let blocks = length.div_ceil(BLOCK);
        if blocks > backed {
            let new = backed * BATCH_MAX..blocks * BATCH_MAX;
            step.blocks.back(new.clone()).unwrap();
            named.name(new).unwrap();
            backed = blocks;
        }
        let batch = 1 + length % BATCH_MAX;
        let tokens = (0..BATCH_MAX).map(|at| ((length * 7 + at * 5) % VOCABULARY) as u32);
        let lengths = (0..BATCH_MAX).map(|at| length.saturating_sub(at).max(1) as u32);
        let tables = (0..BATCH_MAX).flat_map(|row| {
            let block = move |at: usize| (at.min(backed - 1) * BATCH_MAX + row) as u32;
            (0..BLOCKS_MAX).map(block)
        });
        step.set(
            &tokens.collect::<Vec<_>>(),
            &lengths.collect::<Vec<_>>(),
            &tables.collect::<Vec<_>>(),
        );
        let replayed = numbers(&graph.replay(batch, &mut named).unwrap());
        let bucket = graph.options().bucket(batch).unwrap();
        let eager = step.run(bucket).unwrap().narrow(0, 0, batch).unwrap();
        assert_eq!(replayed, numbers(&eager), "{length} tokens, batch {batch}");
    }
    let counts = graph.counts();
    assert_eq!(
        (counts.captures, counts.replays),
        (3, (BLOCK * BLOCKS_MAX) as u64)
    );
    drop((graph, named));
    drop(step);
    end(device);
}

#[test]
fn a_batch_without_a_bucket_is_refused() {
    let mut test = open();
    if !has_attention(&test) {
        return;
    }
    let (device, step, mut named) = first_step(&mut test);
    let mut graph = step.graph(&mut named);
    for batch in [0, BATCH_MAX + 1] {
        refused!(
            graph.replay(batch, &mut named),
            VmmError::Graph(GraphError::NoBucket { batch: asked, batch_max: BATCH_MAX })
                if asked == batch
        );
    }
    let none = DecodeGraphOptions::of([0]);
    let mut without = DecodeGraph::new(&device, none, |batch| step.run(batch)).unwrap();
    refused!(
        without.capture(1, &mut ()),
        VmmError::Graph(GraphError::NoBucket {
            batch: 1,
            batch_max: 0
        })
    );
    drop((graph, without, named));
    drop(step);
    end(device);
}

#[test]
fn a_replay_over_blocks_that_were_given_up_is_refused_and_launches_nothing() {
    let mut test = open();
    if !has_attention(&test) {
        return;
    }
    let (device, step, mut named) = first_step(&mut test);
    let mut graph = step.graph(&mut named);
    let before = numbers(&graph.replay(BATCH_MAX, &mut named).unwrap());
    let not_backed = |graph: &mut DecodeGraph<'_>, named: &mut StepBlocks, missing| {
        let result = graph.replay(BATCH_MAX, named);
        refused!(
            result,
            VmmError::Vmm(CoreError::Block(BlockError::NotBacked { block })) if block == missing
        );
        assert_eq!(graph.counts().replays, 1);
    };
    // Given up by number.
    step.blocks.unback([2]).unwrap();
    not_backed(&mut graph, &mut named, 2);
    not_backed(&mut graph, &mut named, 2);
    // By a plan, and their memory is given back.
    let plan = step.blocks.reclaim_candidates(usize::MAX, |_| Some(0.));
    step.blocks.commit(&plan).unwrap();
    device.synchronize().unwrap();
    step.blocks.engine().trim().unwrap();
    not_backed(&mut graph, &mut named, 0);
    // Never backed, and named between two replays.
    step.blocks.back(0..BATCH_MAX).unwrap();
    named.name([9]).unwrap();
    not_backed(&mut graph, &mut named, 9);
    named.forget([9]);
    assert_eq!(
        numbers(&graph.replay(BATCH_MAX, &mut named).unwrap()),
        before
    );
    named.name([10]).unwrap();
    let result = graph.replay(BATCH_MAX, &mut named);
    refused!(
        result,
        VmmError::Vmm(CoreError::Block(BlockError::NotBacked { block: 10 }))
    );
    refused!(
        named.name([1, BATCH_MAX * BLOCKS_MAX]),
        VmmError::Vmm(CoreError::Block(BlockError::Invalid { .. }))
    );
    drop((graph, named));
    drop(step);
    end(device);
}

/// The first replay of a bucket runs the step before it captures it.
#[test]
fn a_first_replay_over_blocks_that_were_given_up_runs_nothing() {
    let mut test = open();
    if !has_attention(&test) {
        return;
    }
    let (device, step, mut named) = first_step(&mut test);
    step.blocks.unback([1]).unwrap();
    let runs = Cell::new(0);
    let counted = |batch: usize| {
        runs.set(runs.get() + 1);
        step.run(batch)
    };
    let options = DecodeGraphOptions::up_to(BATCH_MAX);
    let mut graph = DecodeGraph::new(&device, options, counted).unwrap();
    for refused in [
        graph.replay(BATCH_MAX, &mut named).map(drop),
        graph.capture(BATCH_MAX, &mut named),
        graph.capture_all(&mut named, |_| {}),
    ] {
        refused!(
            refused,
            VmmError::Vmm(CoreError::Block(BlockError::NotBacked { block: 1 }))
        );
    }
    assert_eq!((runs.get(), graph.counts().captures), (0, 0));
    step.blocks.back([1]).unwrap();
    graph.replay(BATCH_MAX, &mut named).unwrap();
    assert_eq!((runs.get(), graph.counts().captures), (2, 1));
    drop((graph, named));
    drop(step);
    end(device);
}

/// A result of any strides is copied in order.
#[test]
fn a_result_that_is_not_contiguous_is_captured() {
    let mut test = open();
    if !has_attention(&test) {
        return;
    }
    let device = device(&mut test);
    let input = Tensor::arange(0f32, 24., &device).unwrap();
    let input = input.reshape((4, 6)).unwrap();
    let step = |batch: usize| (input.narrow(0, 0, batch)? + 1.)?.narrow(1, 1, 4)?.t();
    let options = DecodeGraphOptions::up_to(4);
    let mut graph = DecodeGraph::new(&device, options, step).unwrap();
    for _ in 0..3 {
        let output = graph.replay(4, &mut ()).unwrap();
        assert_eq!(output.dims(), [4, 4]);
        let expected = (0..16).map(|at| (at % 4 * 6 + at / 4 + 2) as f32);
        assert_eq!(numbers(&output), expected.collect::<Vec<_>>());
    }
    drop(graph);
    drop(input);
    end(device);
}

/// Calls that give up blocks wait for a launch, and go on after it.
#[test]
fn blocks_are_not_given_up_during_a_launch() {
    let test = open();
    let pool = TensorPool::new(&test.device).unwrap();
    let blocks = pool.blocks(8, [("k", (1 << 20,), DType::U8)]).unwrap();
    blocks.back(0..8).unwrap();
    let mut named = StepBlocks::new(&blocks);
    named.name(0..8).unwrap();
    let held = Cell::new(false);
    std::thread::scope(|scope| {
        let mut other = None;
        named
            .while_held(&mut || {
                let blocks = blocks.clone();
                let thread = scope.spawn(move || blocks.unback([3]));
                std::thread::sleep(std::time::Duration::from_millis(30));
                held.set(!thread.is_finished());
                other = Some(thread);
                Ok(())
            })
            .unwrap();
        other.unwrap().join().unwrap().unwrap();
    });
    assert!(held.get() && !blocks.is_backed(3));
}

#[test]
fn a_replay_over_rows_that_have_left_their_addresses_is_refused() {
    let test = open();
    let pool = TensorPool::new(&test.device).unwrap();
    let token = || Tensor::ones((1, 2, 1, 1 << 18), DType::F32, &test.device).unwrap();
    let refuse = |watch: &mut RowsWatch, why: &str| {
        let mut launched = false;
        let result = watch.while_held(&mut || {
            launched = true;
            Ok(())
        });
        refused!(result, VmmError::Graph(GraphError::RowsMoved));
        assert!(!launched && !watch.is_current(), "{why}");
    };
    let mut cache = pool.kv_cache(2, 64);
    refused!(cache.watch(), VmmError::UnknownShape { layer: 0 });
    cache.append(&token(), &token()).unwrap();
    let mut watch = cache.watch().unwrap();
    for _ in 0..8 {
        cache.append(&token(), &token()).unwrap();
    }
    cache.truncate(3).unwrap();
    pool.trim().unwrap();
    watch.while_held(&mut || Ok(())).unwrap();
    cache.reset();
    refuse(&mut watch, "reset");
    cache.append(&token(), &token()).unwrap();
    refuse(&mut watch, "reset, though there are rows again");
    // A view shows what is written over, so the rows move.
    let mut watch = cache.watch().unwrap();
    cache.append(&token(), &token()).unwrap();
    let shown = cache.k().unwrap();
    cache.truncate(1).unwrap();
    cache.append(&token(), &token()).unwrap();
    if test.kind == DriverKind::Real {
        refuse(&mut watch, "moved under a view");
    }
    drop(shown);
    let mut watch = cache.watch().unwrap();
    let fork = cache.fork().unwrap();
    refuse(&mut watch, "forked");
    refused!(fork.watch(), VmmError::Graph(GraphError::RowsMoved));
    refused!(cache.watch(), VmmError::Graph(GraphError::RowsMoved));
    drop(fork);
    let mut last = pool.kv_cache(2, 64);
    last.append(&token(), &token()).unwrap();
    let mut watch = last.watch().unwrap();
    drop(last);
    refuse(&mut watch, "dropped");
    // More tokens than it was made for.
    let mut short = pool.kv_cache(2, 2);
    short.append(&token(), &token()).unwrap();
    let mut watch = short.watch().unwrap();
    for _ in 0..8 {
        short.append(&token(), &token()).unwrap();
    }
    refuse(&mut watch, "grown beyond its addresses");
    // All layers of a sequence, in one range.
    let row = (1, 2, 1 << 18);
    let sequence = pool.sequence().rows_in_one_range(2, row, row, DType::F32);
    let sequence = sequence.unwrap();
    let mut layers = [0, 1].map(|layer| sequence.layer(layer, 2, 64).unwrap());
    let appended = |layer: &mut candle_cuda_vmm::SequenceCache| {
        use candle_cuda_vmm::kv_cache::KvCache;
        layer.append(&token(), &token()).unwrap();
    };
    layers.iter_mut().for_each(appended);
    let mut watch = sequence.watch().unwrap();
    watch.while_held(&mut || Ok(())).unwrap();
    layers[1].lock().unwrap().reset();
    refuse(&mut watch, "one layer reset");
    let mut watch = sequence.watch().unwrap();
    sequence.reset();
    refuse(&mut watch, "all layers reset");
}

#[test]
fn a_step_that_fails_or_changes_its_result_is_refused_and_can_be_captured_later() {
    let mut test = open();
    if !has_attention(&test) {
        return;
    }
    let device = device(&mut test);
    let input = Tensor::ones((4, 2), DType::F32, &device).unwrap();
    let (calls, fails_at) = (Cell::new(0), Cell::new(1));
    let step = |batch: usize| {
        calls.set(calls.get() + 1);
        match calls.get() == fails_at.get() {
            true => candle_core::bail!("not now"),
            false => input.narrow(0, 0, batch)? + 1.,
        }
    };
    let options = || DecodeGraphOptions::up_to(4);
    let mut graph = DecodeGraph::new(&device, options(), step).unwrap();
    refused!(
        graph.capture(3, &mut ()),
        VmmError::Graph(GraphError::Warmup { batch: 4, .. })
    );
    if device.is_cuda() {
        calls.set(0);
        fails_at.set(2);
        refused!(
            graph.capture(3, &mut ()),
            VmmError::Graph(GraphError::Capture { batch: 4, .. })
        );
    }
    fails_at.set(0);
    let output = graph.replay(3, &mut ()).unwrap();
    assert_eq!(numbers(&output), [2.; 6]);
    // The result of the second run has another shape.
    let run = Cell::new(0);
    let changing = |batch: usize| {
        run.set(run.get() + 1);
        input.narrow(0, 0, batch)?.narrow(1, 0, run.get().min(2))? + 1.
    };
    let mut changing = DecodeGraph::new(&device, options(), changing).unwrap();
    refused!(
        changing.replay(2, &mut ()),
        VmmError::Graph(GraphError::Output { batch: 2, .. })
    );
    // No dimensions.
    let scalar = |_| input.sum_all();
    let mut scalar = DecodeGraph::new(&device, options(), scalar).unwrap();
    refused!(
        scalar.capture(1, &mut ()),
        VmmError::Graph(GraphError::Output { batch: 1, .. })
    );
    drop((graph, changing, scalar));
    drop(input);
    end(device);
}
