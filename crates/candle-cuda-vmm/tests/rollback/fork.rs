//! A fork for which a driver call fails, or memory is refused: the source is as before.

use crate::bench::Bench;
use crate::common::GRANULE;
use crate::common::layouts::Layout;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::cuda_vmm::sim::{Books, Fault};
use candle_cuda_vmm::cuda_vmm::{EngineOptions, WorkerMode, sys};
use candle_cuda_vmm::kv_cache::{KvCache, KvCacheFactory, Sequence};
use candle_cuda_vmm::{AccountStats, TensorPool, TensorPoolOptions, VmmError};

const LAYERS: usize = 1;
/// Four keys or values in a page.
const ROW: usize = GRANULE / 4;
const TOKENS: u8 = 7;

/// Pages with nothing but tokens, which are shared.
fn whole_pages(layout: Layout) -> usize {
    match layout {
        Layout::Apart => 2 * LAYERS * (usize::from(TOKENS) / 4),
        Layout::OneRange => 2 * LAYERS * usize::from(TOKENS) / 4,
    }
}

fn pool(limit_pages: usize) -> TensorPool {
    let engine = EngineOptions::new()
        .limit_bytes(limit_pages * GRANULE)
        .chunk_bytes_max(0)
        .worker(WorkerMode::Manual);
    TensorPool::with_options(&Device::Cpu, TensorPoolOptions::new().engine(engine)).unwrap()
}

/// A sequence whose last page is not full.
fn sequence(pool: &TensorPool, layout: Layout) -> Sequence {
    let sequence = layout.sequence(pool, LAYERS, [ROW; 2], DType::U8).unwrap();
    for layer in 0..LAYERS {
        append(&sequence, layer, 0..TOKENS).unwrap();
    }
    sequence
}

fn append(
    sequence: &Sequence,
    layer: usize,
    tokens: std::ops::Range<u8>,
) -> candle_cuda_vmm::Result<()> {
    let rows: Vec<u8> = tokens.clone().flat_map(|token| vec![token; ROW]).collect();
    let rows = Tensor::from_vec(rows, (tokens.len(), ROW), &Device::Cpu).unwrap();
    let mut cache = sequence.layer(layer, 0, 16)?;
    cache.append(&rows, &rows).map(drop)
}

fn tokens(sequence: &Sequence) -> Vec<Vec<u8>> {
    let of_layer = |layer: usize| {
        let cache = sequence.layer(layer, 0, 16).unwrap();
        let keys = cache.lock().unwrap().k().unwrap().unwrap();
        let firsts = keys.narrow(1, 0, 1).unwrap().flatten_all().unwrap();
        firsts.to_vec1().unwrap()
    };
    (0..LAYERS).map(of_layer).collect()
}

fn settled(pool: &TensorPool) -> AccountStats {
    pool.engine().device().synchronize().unwrap();
    for _ in 0..4 {
        pool.engine().step();
    }
    pool.account().stats()
}

/// Lets each driver call of `act` fail in turn; afterwards all is as `seen` saw it before, or else
/// the act is done.
fn fail_each_call(
    bench: &Bench,
    make: impl Fn() -> (TensorPool, Vec<Sequence>),
    act: impl Fn(&mut Vec<Sequence>) -> candle_cuda_vmm::Result<()>,
) -> usize {
    bench.device.retry_quarantine();
    let nothing = bench.books();
    let (pool, mut all) = make();
    bench.simulator().start_trace();
    act(&mut all).unwrap();
    let calls = bench.simulator().take_trace().len();
    drop((all, pool));
    for code in [sys::CUDA_ERROR_UNKNOWN, sys::CUDA_ERROR_OUT_OF_MEMORY] {
        for call in 1..=calls {
            let what = format!("call {call} of {calls} fails with {code}");
            let (pool, mut all) = make();
            let seen = |all: &[Sequence]| -> Vec<_> { all.iter().map(tokens).collect() };
            let before = (seen(&all), settled(&pool));
            bench.simulator().inject(Fault::nth_call(call as u64, code));
            let outcome = act(&mut all);
            bench.simulator().clear_faults();
            if let Err(error) = outcome {
                assert_eq!(error.driver_code(), Some(code), "{what}: {error}");
                let (tokens, stats) = (seen(&all), settled(&pool));
                assert_eq!(tokens, before.0, "{what}");
                // Some chunks may have become private.
                let parts = stats.parts;
                assert_eq!(parts.quarantined_bytes, 0, "{what}");
                assert_eq!(parts.total_bytes(), stats.committed_bytes, "{what}");
                assert_eq!(stats.live_bytes, before.1.live_bytes, "{what}");
                act(&mut all).unwrap();
            }
            drop((all, pool));
            bench.device.retry_quarantine();
            // An event that the driver would not destroy is its own.
            let events = bench.books().events;
            let nothing = Books { events, ..nothing };
            assert_eq!(bench.books(), nothing, "{what}");
        }
    }
    calls
}

#[test]
fn each_driver_call_of_a_fork_fails_in_turn() {
    let bench = Bench::new();
    for layout in Layout::BOTH {
        let make = || {
            let pool = pool(100);
            let sequence = sequence(&pool, layout);
            (pool, vec![sequence])
        };
        let calls = fail_each_call(&bench, make, |all| {
            let fork = all[0].fork()?;
            all.push(fork);
            Ok(())
        });
        // Two calls for each page that is shared.
        assert!(calls > 2 * whole_pages(layout), "{calls}");
    }
}

#[test]
fn each_driver_call_of_an_append_to_shared_memory_fails_in_turn() {
    let bench = Bench::new();
    for layout in Layout::BOTH {
        let make = || {
            let pool = pool(100);
            let source = sequence(&pool, layout);
            let fork = source.fork().unwrap();
            fork.truncate(3).unwrap();
            (pool, vec![source, fork])
        };
        fail_each_call(&bench, make, |all| append(&all[1], 0, 20..22));
    }
}

#[test]
fn a_fork_that_has_no_room_for_its_edges_is_refused() {
    let bench = Bench::new();
    let nothing = bench.books();
    for layout in Layout::BOTH {
        let pages = layout.pages(LAYERS, usize::from(TOKENS));
        let pool = pool(pages);
        let source = sequence(&pool, layout);
        let before = (settled(&pool), bench.books().mappings);
        let error = source.fork().map(drop).unwrap_err();
        let VmmError::Vmm(error) = error else {
            panic!("{error}");
        };
        let edges = pages - whole_pages(layout);
        assert_eq!(error.shortfall_bytes(), edges * GRANULE, "{error}");
        assert_eq!((settled(&pool), bench.books().mappings), before);
    }
    assert_eq!(bench.books(), nothing);
}
