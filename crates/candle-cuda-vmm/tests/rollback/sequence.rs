//! A sequence whose memory is refused, or for which a driver call fails: all layers are as before.

use crate::bench::Bench;
use crate::common::GRANULE;
use crate::common::layouts::Layout;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::cuda_vmm::sim::{Books, Fault};
use candle_cuda_vmm::cuda_vmm::{EngineOptions, EngineStats, WorkerMode, sys};
use candle_cuda_vmm::kv_cache::{KvCache, KvCacheFactory, Sequence, SequenceCache};
use candle_cuda_vmm::{TensorPool, TensorPoolOptions};

const LAYERS: usize = 3;
/// Four tokens in a page.
const ROW: usize = GRANULE / 4;

struct Made {
    pool: TensorPool,
    sequence: Sequence,
    layers: Vec<SequenceCache>,
}

impl Made {
    /// Three layers with three tokens each. The window of one layer, or of all in one range, has
    /// reached the end of its addresses.
    fn new(layout: Layout, limit_pages: usize) -> Self {
        let engine = EngineOptions::new()
            .limit_bytes(limit_pages * GRANULE)
            .chunk_bytes_max(0)
            .worker(WorkerMode::Manual);
        let options = TensorPoolOptions::new()
            .engine(engine)
            .reservation_bytes(4 * GRANULE);
        let pool = TensorPool::with_options(&Device::Cpu, options).unwrap();
        let sequence = layout.sequence(&pool, LAYERS, [ROW; 2], DType::U8).unwrap();
        let mut layers: Vec<_> = (0..LAYERS)
            .map(|layer| sequence.layer(layer, 0, 16).unwrap())
            .collect();
        for layer in &mut layers {
            layer.append(&rows(3), &rows(3)).unwrap();
        }
        let windows = match layout {
            Layout::Apart => 1,
            Layout::OneRange => LAYERS,
        };
        for window in &mut layers[..windows] {
            window.append(&rows(13), &rows(13)).unwrap();
        }
        for window in &mut layers[..windows] {
            window.lock().unwrap().release_front(13).unwrap();
        }
        while pool.engine().stats().parts.retiring_bytes > 0 {
            pool.engine().step();
        }
        Self {
            pool,
            sequence,
            layers,
        }
    }

    fn seen(&self) -> (Vec<(usize, usize, Vec<u8>)>, EngineStats) {
        let layers = self.layers.iter().map(|layer| {
            let cache = layer.lock().unwrap();
            let k = cache.k().unwrap().unwrap();
            let bytes = k.narrow(1, 0, 1).unwrap().flatten_all().unwrap();
            let bytes = bytes.to_vec1().unwrap();
            (cache.current_seq_len(), cache.allocated_bytes(), bytes)
        });
        let layers = layers.collect();
        for _ in 0..3 {
            self.pool.engine().step();
        }
        (layers, self.pool.engine().stats())
    }
}

fn rows(count: usize) -> Tensor {
    Tensor::ones((count, ROW), DType::U8, &Device::Cpu).unwrap()
}

#[test]
fn each_driver_call_of_a_reservation_fails_in_turn() {
    let bench = Bench::new();
    for layout in Layout::BOTH {
        fail_each_call_of_a_reservation(&bench, layout);
    }
}

fn fail_each_call_of_a_reservation(bench: &Bench, layout: Layout) {
    bench.device.retry_quarantine();
    let nothing = bench.books();
    let made = Made::new(layout, 100);
    bench.simulator().start_trace();
    made.sequence.reserve(6).unwrap();
    let calls = bench.simulator().take_trace().len();
    assert!(calls > 2 * LAYERS * 3, "{calls}");
    drop(made);
    for code in [sys::CUDA_ERROR_UNKNOWN, sys::CUDA_ERROR_OUT_OF_MEMORY] {
        for call in 1..=calls {
            let what = format!("call {call} of {calls} fails with {code}");
            let mut made = Made::new(layout, 100);
            let before = made.seen();
            let fault = Fault::nth_call(call as u64, code);
            bench.simulator().inject(fault);
            let outcome = made.sequence.reserve(6);
            bench.simulator().clear_faults();
            if let Err(error) = outcome {
                assert_eq!(error.driver_code(), Some(code), "{what}: {error}");
                assert_eq!(made.seen(), before, "{what}");
                made.sequence.reserve(6).unwrap();
            }
            // No layer needs memory in the step.
            let allocations = made.pool.engine().counters().ranges.allocations;
            for layer in &mut made.layers {
                layer.append(&rows(6), &rows(6)).unwrap();
            }
            let after = made.pool.engine().counters().ranges.allocations;
            assert_eq!((after, made.sequence.len()), (allocations, 9), "{what}");
            drop(made);
            bench.device.retry_quarantine();
            // An event that the driver would not destroy is its own.
            let events = bench.books().events;
            let nothing = Books { events, ..nothing };
            assert_eq!(bench.books(), nothing, "{what}");
        }
    }
}

#[test]
fn a_refusal_for_want_of_memory_makes_no_calls_that_take_any() {
    let bench = Bench::new();
    for layout in Layout::BOTH {
        refuse_for_want_of_memory(&bench, layout);
    }
}

fn refuse_for_want_of_memory(bench: &Bench, layout: Layout) {
    let nothing = bench.books();
    let made = Made::new(layout, 24);
    made.pool.engine().set_limit_bytes(12 * GRANULE).unwrap();
    let before = made.seen();
    bench.simulator().start_trace();
    // Two pages more in each cache are more than there is.
    made.sequence.reserve(9).unwrap_err();
    let trace = bench.simulator().take_trace();
    let creates = trace
        .iter()
        .filter(|call| **call == sys::DriverFunction::cuMemCreate);
    assert_eq!(creates.count(), 0, "{trace:?}");
    assert_eq!(made.seen(), before);
    drop(made);
    assert_eq!(bench.books(), nothing);
}

#[test]
fn first_tokens_of_another_shape_that_fail_leave_what_is_reserved() {
    let bench = Bench::new();
    for layout in Layout::BOTH {
        fail_first_tokens_of_another_shape(&bench, layout);
    }
}

fn fail_first_tokens_of_another_shape(bench: &Bench, layout: Layout) {
    let nothing = bench.books();
    let engine = EngineOptions::new().worker(WorkerMode::Manual);
    let options = TensorPoolOptions::new().engine(engine.chunk_bytes_max(0));
    let wide = Tensor::ones((6, 2 * ROW), DType::U8, &Device::Cpu).unwrap();
    let mut failures = 0;
    for call in 1.. {
        let pool = TensorPool::with_options(&Device::Cpu, options).unwrap();
        let sequence = layout.sequence(&pool, 1, [ROW; 2], DType::U8).unwrap();
        let mut layer = sequence.layer(0, 0, 16).unwrap();
        sequence.reserve(6).unwrap();
        let reserved = pool.engine().stats().parts.live_page_bytes;
        assert_eq!(reserved, layout.pages(1, 6) * GRANULE);
        bench
            .simulator()
            .inject(Fault::nth_call(call, sys::CUDA_ERROR_UNKNOWN));
        let outcome = layer.append(&wide, &wide);
        bench.simulator().clear_faults();
        let is_over = outcome.is_ok();
        if let Err(error) = outcome {
            failures += 1;
            assert_eq!(error.driver_code(), Some(sys::CUDA_ERROR_UNKNOWN));
            let allocations = pool.engine().counters().ranges.allocations;
            layer.append(&rows(6), &rows(6)).unwrap();
            let after = pool.engine().counters().ranges.allocations;
            assert_eq!((after, layer.current_seq_len()), (allocations, 6));
            assert_eq!(pool.engine().stats().parts.live_page_bytes, reserved);
        }
        drop((layer, sequence, pool));
        bench.device.retry_quarantine();
        let events = bench.books().events;
        let nothing = Books { events, ..nothing };
        assert_eq!(bench.books(), nothing, "call {call}");
        if is_over {
            break;
        }
    }
    assert!(
        failures >= 8,
        "addresses and memory on both sides: {failures}"
    );
}
