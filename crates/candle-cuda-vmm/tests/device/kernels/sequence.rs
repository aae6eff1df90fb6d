//! Sequences: the caches of all layers grow, shrink and are refused together.

use crate::common::{UnderTest, open, page};
use crate::refused;
use candle_core::{DType, Device, Tensor};
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

fn sequence(pool: &TensorPool) -> (Sequence, Vec<SequenceCache>) {
    let token = (1, 2, page() / 32);
    let sequence = pool.sequence().rows(token, token, DType::F32).unwrap();
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
    let pool = pool(&test, 100);
    let (sequence, mut layers) = sequence(&pool);
    assert_eq!((sequence.len(), sequence.bytes()), (0, 0));
    sequence.reserve(5).unwrap();
    assert_eq!(sequence.bytes(), 2 * LAYERS * 2 * page());
    let refusals = || pool.engine().counters().ranges;
    let allocations = refusals().allocations;
    append(&test, &mut layers, 5, 1.0);
    append(&test, &mut layers, 3, 2.0);
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
    append(&test, &mut layers, 1, 3.0);
    assert_eq!(sequence.bytes(), 2 * LAYERS * page());
}

#[test]
fn a_refusal_leaves_all_layers_as_they_were() {
    let test = open();
    // The first tokens take twelve pages, and the last layer would be the one refused.
    let pool = pool(&test, 2 * LAYERS * 2 - 1);
    let (sequence, mut layers) = sequence(&pool);
    sequence.reserve(4).unwrap();
    append(&test, &mut layers, 3, 1.0);
    let before = (pool.committed_bytes(), sequence.bytes());
    match sequence.reserve(2) {
        Err(VmmError::Vmm(Core::OutOfPhysicalMemory {
            asked_bytes,
            free_bytes,
            ..
        })) => assert_eq!(
            (asked_bytes, free_bytes),
            (2 * LAYERS * page(), (2 * LAYERS - 1) * page())
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
    append(&test, &mut layers, 1, 2.0);
    pool.engine()
        .set_limit_bytes(2 * LAYERS * 2 * page())
        .unwrap();
    sequence.reserve(1).unwrap();
    append(&test, &mut layers, 1, 3.0);
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
    let pool = pool(&test, 100);
    let (sequence, mut layers) = sequence(&pool);
    append(&test, &mut layers, 6, 1.0);
    let view = layers[1].lock().unwrap().k().unwrap().unwrap();
    sequence.truncate(3).unwrap();
    // On a GPU the keys of one layer have to move, since the view shows what would be overwritten.
    sequence.reserve(4).unwrap();
    append(&test, &mut layers, 4, 2.0);
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
    let none = pool.sequence();
    none.reserve(100).unwrap();
    assert_eq!((none.len(), none.bytes()), (0, 0));
}

#[test]
fn what_was_reserved_survives_an_append_that_fails() {
    let test = open();
    let pool = pool(&test, 100);
    let (sequence, mut layers) = sequence(&pool);
    sequence.reserve(9).unwrap();
    append(&test, &mut layers, 1, 1.0);
    let before = sequence.bytes();
    let (k, v) = (tokens(&test, 1, 1.0), tokens(&test, 2, 1.0));
    refused!(layers[0].append(&k, &v), VmmError::CandleError(_));
    let wrong = k.to_dtype(DType::F64).unwrap();
    refused!(layers[0].append(&wrong, &wrong), VmmError::CandleError(_));
    assert_eq!((sequence.bytes(), sequence.len()), (before, 1));
}

#[test]
fn a_sequence_that_waits_for_memory_is_not_locked() {
    let test = open();
    let pool = pool(&test, 2 * LAYERS * 3);
    let ((held, mut held_layers), (waits, _layers)) = (sequence(&pool), sequence(&pool));
    held.reserve(8).unwrap();
    append(&test, &mut held_layers, 8, 1.0);
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
    assert_eq!(waits.bytes(), 2 * LAYERS * 2 * page());
}

#[test]
fn a_reservation_that_is_dropped_wants_nothing() {
    let test = open();
    let pool = pool(&test, 2 * LAYERS);
    let ((held, _), (waits, _layers)) = (sequence(&pool), sequence(&pool));
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
