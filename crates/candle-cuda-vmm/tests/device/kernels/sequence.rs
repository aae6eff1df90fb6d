//! Sequences: the caches of all layers grow, shrink and are refused together, in ranges of their
//! own and in one range.

use crate::common::layouts::Layout;
use crate::common::{UnderTest, open, page};
use crate::refused;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::attention::gqa;
use candle_cuda_vmm::cuda_vmm::VmmError as Core;
use candle_cuda_vmm::kv_cache::{KvCache, KvCacheFactory, Sequence, SequenceCache};
use candle_cuda_vmm::{EngineOptions, TensorPool, TensorPoolOptions, VmmError};
use std::future::Future;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

const LAYERS: usize = 3;

fn pool(test: &UnderTest, limit_pages: usize) -> TensorPool {
    let engine = EngineOptions::new()
        .limit_bytes(limit_pages * page())
        .chunk_bytes_max(0);
    let options = TensorPoolOptions::new()
        .page_bytes(page())
        .engine(engine)
        .reservation_bytes(64 * page());
    TensorPool::with_options(&test.device, options).unwrap()
}

/// Tokens `[1, 2, count, page / 32]`: four in a page.
fn tokens(test: &UnderTest, count: usize, value: f32) -> Tensor {
    let shape = (1, 2, count, page() / 32);
    let tokens = Tensor::full(value, shape, &Device::Cpu).unwrap();
    let tokens = tokens.force_contiguous().unwrap();
    tokens.to_device(&test.device).unwrap()
}

fn layers(sequence: &Sequence) -> Vec<SequenceCache> {
    (0..LAYERS)
        .map(|layer| sequence.layer(layer, 2, 64).unwrap())
        .collect()
}

fn sequence(layout: Layout, pool: &TensorPool) -> (Sequence, Vec<SequenceCache>) {
    let token = (1, 2, page() / 32);
    let sequence = layout.sequence(pool, LAYERS, [token; 2], DType::F32);
    let sequence = sequence.unwrap();
    let layers = layers(&sequence);
    (sequence, layers)
}

fn append(test: &UnderTest, layers: &mut [SequenceCache], count: usize, value: f32) {
    for layer in layers {
        let (k, v) = (tokens(test, count, value), tokens(test, count, -value));
        layer.append(&k, &v).unwrap();
    }
}

/// The first element of each token of the keys and the values of a layer.
fn firsts(layer: &SequenceCache) -> Vec<f32> {
    let cache = layer.lock().unwrap();
    let both = [cache.k().unwrap().unwrap(), cache.v().unwrap().unwrap()];
    both.iter()
        .flat_map(|tensor| {
            // On the CPU, because a GPU takes a kernel for it.
            let tensor = tensor.to_device(&Device::Cpu).unwrap();
            let first = tensor.narrow(3, 0, 1).unwrap().narrow(1, 0, 1).unwrap();
            first.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        })
        .collect()
}

#[test]
fn memory_for_a_step_is_there_in_all_layers_before_it() {
    let test = open();
    for layout in Layout::BOTH {
        step_with_memory(&test, layout);
    }
}

fn step_with_memory(test: &UnderTest, layout: Layout) {
    let pool = pool(test, 100);
    let (sequence, mut layers) = sequence(layout, &pool);
    assert_eq!((sequence.len(), sequence.bytes()), (0, 0));
    sequence.reserve(8).unwrap();
    assert_eq!(sequence.bytes(), layout.pages(LAYERS, 8) * page());
    let refusals = || pool.engine().counters().ranges;
    let allocations = refusals().allocations;
    append(test, &mut layers, 5, 1.0);
    append(test, &mut layers, 3, 2.0);
    assert_eq!(refusals().allocations, allocations, "nothing was allocated");
    assert_eq!((sequence.len(), sequence.is_empty()), (8, false));
    for layer in &layers {
        let k = [1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0];
        assert_eq!(firsts(layer), [k, k.map(|value| -value)].concat());
    }
    sequence.truncate(4).unwrap();
    assert!(layers.iter().all(|layer| layer.current_seq_len() == 4));
    refused!(sequence.truncate(5), VmmError::CandleError(_));
    sequence.reset();
    assert_eq!((sequence.len(), sequence.bytes()), (0, 0));
    append(test, &mut layers, 1, 3.0);
    assert_eq!(sequence.bytes(), layout.pages(LAYERS, 1) * page());
}

#[test]
fn a_refusal_leaves_all_layers_as_they_were() {
    let test = open();
    for layout in Layout::BOTH {
        refusal(&test, layout);
    }
}

fn refusal(test: &UnderTest, layout: Layout) {
    // A page less than five tokens take. Of ranges of its own, the last layer would be refused.
    let (four, five) = (layout.pages(LAYERS, 4), layout.pages(LAYERS, 5));
    let pool = pool(test, five - 1);
    let (sequence, mut layers) = sequence(layout, &pool);
    sequence.reserve(4).unwrap();
    append(test, &mut layers, 3, 1.0);
    let before = (pool.committed_bytes(), sequence.bytes());
    match sequence.reserve(2) {
        Err(VmmError::Vmm(Core::OutOfPhysicalMemory {
            asked_bytes,
            free_bytes,
            ..
        })) => assert_eq!(
            (asked_bytes, free_bytes),
            ((five - four) * page(), (five - 1 - four) * page())
        ),
        other => panic!("{other:?}"),
    }
    let error = sequence.try_reserve(40).unwrap_err();
    assert!(error.is_permanent(), "{error}");
    let timeout = Duration::from_millis(3);
    refused!(
        sequence.reserve_timeout(2, timeout),
        VmmError::Vmm(Core::OutOfPhysicalMemory { .. })
    );
    assert_eq!((pool.committed_bytes(), sequence.bytes()), before);
    assert_eq!(sequence.len(), 3);
    // The last token that there is memory for.
    append(test, &mut layers, 1, 2.0);
    pool.engine().set_limit_bytes(five * page()).unwrap();
    sequence.reserve(1).unwrap();
    append(test, &mut layers, 1, 3.0);
    for layer in &layers {
        assert_eq!(
            firsts(layer),
            [1.0, 1.0, 1.0, 2.0, 3.0, -1.0, -1.0, -1.0, -2.0, -3.0]
        );
    }
}

#[test]
fn rows_that_a_view_shows_move_all_or_none() {
    let test = open();
    for layout in Layout::BOTH {
        rows_under_views(&test, layout);
    }
}

fn rows_under_views(test: &UnderTest, layout: Layout) {
    let pool = pool(test, 100);
    let (sequence, mut layers) = sequence(layout, &pool);
    append(test, &mut layers, 6, 1.0);
    let view = layers[1].lock().unwrap().k().unwrap().unwrap();
    sequence.truncate(3).unwrap();
    // On a GPU the keys of one layer have to move, since the view shows what would be overwritten.
    sequence.reserve(4).unwrap();
    append(test, &mut layers, 4, 2.0);
    for layer in &layers {
        let k = [1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0];
        assert_eq!(firsts(layer), [k, k.map(|value| -value)].concat());
    }
    let view = view
        .force_contiguous()
        .unwrap()
        .to_device(&Device::Cpu)
        .unwrap();
    let seen = view.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(
        seen.iter().all(|value| *value == 1.0),
        "the view has not changed"
    );
    // Without memory for the move nothing changes.
    let view = layers[0].lock().unwrap().v().unwrap().unwrap();
    sequence.truncate(1).unwrap();
    test.device.synchronize().unwrap();
    pool.trim().unwrap();
    let before = sequence.bytes();
    pool.engine()
        .set_limit_bytes(pool.committed_bytes())
        .unwrap();
    refused!(
        sequence.reserve(30),
        VmmError::Vmm(Core::OutOfPhysicalMemory { .. })
    );
    assert_eq!((sequence.bytes(), sequence.len()), (before, 1));
    assert!(layers.iter().all(|layer| firsts(layer) == [1.0, -1.0]));
    drop(view);
}

#[test]
fn a_layer_without_tokens_needs_their_shape() {
    let test = open();
    let pool = pool(&test, 100);
    let sequence = pool.sequence();
    let mut layers = layers(&sequence);
    refused!(sequence.reserve(1), VmmError::UnknownShape { layer: 0 });
    append(&test, &mut layers[..2], 1, 1.0);
    refused!(sequence.reserve(1), VmmError::UnknownShape { layer: 2 });
    // Each layer has one cache, whichever call asks for it.
    let again = sequence.layer(1, 2, 64).unwrap();
    assert_eq!(again.current_seq_len(), 1);
    assert_eq!(sequence.len(), 0, "the last layer has none");
    append(&test, &mut layers[2..], 1, 1.0);
    sequence.reserve(1).unwrap();
    assert_eq!(sequence.len(), 1);
    refused!(
        pool.sequence().rows((1, 0), (1, 2), DType::F32),
        VmmError::Vmm(Core::ZeroSize { what: "row" })
    );
    let in_one_range = |layers, k: (usize, usize)| {
        let sequence = pool.sequence();
        sequence.rows_in_one_range(layers, k, (1, 2), DType::F32)
    };
    refused!(
        in_one_range(3, (1, 0)),
        VmmError::Vmm(Core::ZeroSize { what: "row" })
    );
    refused!(
        in_one_range(0, (1, 2)),
        VmmError::Vmm(Core::ZeroSize { what: "layers" })
    );
    refused!(
        in_one_range(2, (usize::MAX / 8, 1)),
        VmmError::InvalidOffset { .. }
    );
    let sequence = in_one_range(3, (1, 2)).unwrap();
    refused!(
        sequence.layer(3, 2, 64),
        VmmError::UnknownLayer {
            layer: 3,
            layers: 3
        }
    );
    sequence.reserve(1).unwrap();
    assert_eq!(sequence.bytes(), 0, "it has no layers yet");
    let none = pool.sequence();
    none.reserve(100).unwrap();
    assert_eq!((none.len(), none.bytes()), (0, 0));
}

#[test]
fn what_was_reserved_survives_an_append_that_fails() {
    let test = open();
    for layout in Layout::BOTH {
        failed_append(&test, layout);
    }
}

fn failed_append(test: &UnderTest, layout: Layout) {
    let pool = pool(test, 100);
    let (sequence, mut layers) = sequence(layout, &pool);
    sequence.reserve(9).unwrap();
    append(test, &mut layers, 1, 1.0);
    let before = sequence.bytes();
    let (k, v) = (tokens(test, 1, 1.0), tokens(test, 2, 1.0));
    refused!(layers[0].append(&k, &v), VmmError::CandleError(_));
    let wrong = k.to_dtype(DType::F64).unwrap();
    refused!(layers[0].append(&wrong, &wrong), VmmError::CandleError(_));
    assert_eq!((sequence.bytes(), sequence.len()), (before, 1));
}

#[test]
fn a_sequence_that_waits_for_memory_is_not_locked() {
    let test = open();
    for layout in Layout::BOTH {
        waiting(&test, layout);
    }
}

fn waiting(test: &UnderTest, layout: Layout) {
    let pool = pool(test, 2 * LAYERS * 3);
    let ((held, mut held_layers), (waits, _layers)) =
        (sequence(layout, &pool), sequence(layout, &pool));
    held.reserve(8).unwrap();
    append(test, &mut held_layers, 8, 1.0);
    waits.reserve(4).unwrap();
    let timeout = Duration::from_millis(5);
    refused!(
        waits.reserve_timeout(8, timeout),
        VmmError::Vmm(Core::OutOfPhysicalMemory { .. })
    );
    std::thread::scope(|scope| {
        let served = scope.spawn(|| waits.reserve_timeout(8, Duration::from_secs(60)));
        // Others use both meanwhile.
        for _ in 0..50 {
            assert_eq!(waits.len(), 0);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(!served.is_finished());
        held.reset();
        test.device.synchronize().unwrap();
        served.join().unwrap().unwrap();
    });
    assert_eq!(waits.bytes(), layout.pages(LAYERS, 8) * page());
}

#[test]
fn a_reservation_that_is_dropped_wants_nothing() {
    let test = open();
    for layout in Layout::BOTH {
        dropped_reservation(&test, layout);
    }
}

fn dropped_reservation(test: &UnderTest, layout: Layout) {
    let pool = pool(test, 2 * LAYERS);
    let ((held, _), (waits, _layers)) = (sequence(layout, &pool), sequence(layout, &pool));
    held.reserve(4).unwrap();
    let mut context = Context::from_waker(Waker::noop());
    let mut reservation = Box::pin(waits.reserve_async(4));
    assert!(reservation.as_mut().poll(&mut context).is_pending());
    let calls = pool.engine().counters().device_calls;
    assert!(reservation.as_mut().poll(&mut context).is_pending());
    let after = pool.engine().counters().device_calls;
    assert_eq!(after, calls, "it has its addresses by then");
    drop(reservation);
    held.reset();
    test.device.synchronize().unwrap();
    let mut reservation = Box::pin(held.reserve_async(4));
    while reservation.as_mut().poll(&mut context).is_pending() {
        pool.engine().step();
    }
    let error = match Box::pin(waits.reserve_async(400))
        .as_mut()
        .poll(&mut context)
    {
        Poll::Ready(Err(error)) => error,
        other => panic!("{other:?}"),
    };
    assert!(error.is_permanent(), "{error}");
    assert_eq!((held.bytes(), waits.bytes()), (2 * LAYERS * page(), 0));
}

/// A token of 32 layers takes 128 KiB. In ranges of their own it takes 64 pages.
#[test]
fn a_short_sequence_in_one_range_takes_few_pages() {
    const DEEP: usize = 32;
    let test = open();
    let options = TensorPoolOptions::new().page_bytes(page());
    for (prompt, then) in [(0, 1), (1, 0), (999, 1), (1000, 0)] {
        let pool = TensorPool::with_options(&test.device, options).unwrap();
        let token = (1, 8, 128);
        let sequence = Layout::OneRange.sequence(&pool, DEEP, [token; 2], DType::F16);
        let sequence = sequence.unwrap();
        for count in [prompt, then].into_iter().filter(|count| *count > 0) {
            let shape = (1, 8, count, 128);
            let tokens = Tensor::zeros(shape, DType::F16, &test.device).unwrap();
            for layer in 0..DEEP {
                let mut layer = sequence.layer(layer, 2, 8192).unwrap();
                layer.append(&tokens, &tokens).unwrap();
            }
        }
        let live_bytes = (prompt + then) * DEEP * 2 * 8 * 128 * 2;
        assert_eq!(sequence.len(), prompt + then);
        let committed_bytes = pool.committed_bytes();
        let most = 2 * page() + live_bytes + live_bytes / 8;
        let what = format!("{committed_bytes} bytes for {live_bytes}");
        assert!((live_bytes..=most).contains(&committed_bytes), "{what}");
    }
}

#[test]
fn attention_reads_layers_in_one_range_in_place() {
    let test = open();
    let pool = TensorPool::new(&test.device).unwrap();
    for (dtype, batch, tokens) in [
        (DType::F32, 1, 40),
        (DType::F16, 2, 33),
        (DType::BF16, 1, 1),
    ] {
        let token = (batch, 4, 16);
        let sequence = Layout::OneRange.sequence(&pool, LAYERS, [token; 2], dtype);
        let sequence = sequence.unwrap();
        let random = |heads: usize, count: usize| {
            let shape = (batch, heads, count, 16);
            let random = Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap();
            let random = random.to_dtype(dtype).unwrap();
            random.to_device(&test.device).unwrap()
        };
        let mut views = Vec::new();
        for layer in 0..LAYERS {
            let mut layer = sequence.layer(layer, 2, 64).unwrap();
            let (k, v) = (random(4, tokens), random(4, tokens));
            let seen = layer.append(&k, &v).unwrap();
            views.push(([k, v], seen));
        }
        for ([k, v], (seen_k, seen_v)) in &views {
            if test.device.is_cuda() {
                let row = 2 * LAYERS * batch * 4 * 16;
                assert_eq!(seen_k.stride()[1..], [16, row, 1], "it is no copy");
            }
            for queries in [1, tokens] {
                let q = random(8, queries);
                let found = gqa(&q, seen_k, seen_v, 0.25, true).unwrap();
                let expected = gqa(&q, k, v, 0.25, true).unwrap();
                let apart = (found - expected).unwrap().abs().unwrap();
                let apart = apart.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
                let apart = apart.max(0).unwrap().to_scalar::<f32>().unwrap();
                assert!(apart < 0.02, "{dtype:?}, {queries} queries: {apart}");
            }
        }
    }
}
