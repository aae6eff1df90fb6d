//! The addresses that tensors and caches reserve, by the simulator's books.

use crate::bench::Bench;
use crate::common::GRANULE;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::cuda_vmm::sim::Books;
use candle_cuda_vmm::kv_cache::{KvCache, KvCacheFactory};
use candle_cuda_vmm::{EngineOptions, TensorPool, TensorPoolOptions, VmmError};

/// Four tokens in a page.
const ROW: usize = GRANULE / 4;
/// What a tensor may reserve, in pages.
const PAGES_MAX: usize = 20;

fn pool(limit_pages: usize) -> TensorPool {
    let engine = EngineOptions::new()
        .limit_bytes(limit_pages * GRANULE)
        .chunk_bytes_max(0);
    let options = TensorPoolOptions::new()
        .engine(engine)
        .reservation_bytes(PAGES_MAX * GRANULE);
    TensorPool::with_options(&Device::Cpu, options).unwrap()
}

fn tokens(count: usize) -> Tensor {
    Tensor::ones((count, ROW), DType::U8, &Device::Cpu).unwrap()
}

#[test]
fn a_cache_reserves_addresses_for_the_tokens_that_it_expects() {
    let bench = Bench::new();
    let nothing = bench.books().reserved_bytes;
    let reserved_pages = || (bench.books().reserved_bytes - nothing) / GRANULE;
    for (max_seq_len, first, pages) in [
        (16, 1, 4),
        (17, 1, 5),
        (17, 17, 5),
        // More than expected: room for twice as many.
        (16, 17, 9),
        (0, 1, 1),
        (0, 4, 2),
        (79, 1, PAGES_MAX),
        (1000, 1, PAGES_MAX),
        (usize::MAX, 80, PAGES_MAX),
        (0, 41, PAGES_MAX),
    ] {
        let pool = pool(1000);
        let mut cache = pool.kv_cache(0, max_seq_len);
        assert_eq!(reserved_pages(), 0);
        cache.append(&tokens(first), &tokens(first)).unwrap();
        let what = format!("{first} of {max_seq_len} tokens");
        assert_eq!(reserved_pages(), 2 * pages, "{what}");
        let clone = cache.try_clone().unwrap();
        assert_eq!(reserved_pages(), 4 * pages, "a clone of {what}");
        drop((cache, clone));
    }
    let mut tensor = pool(1000).tensor(ROW, DType::U8).unwrap();
    tensor.grow(1).unwrap();
    assert_eq!(reserved_pages(), PAGES_MAX, "a tensor expects nothing");
}

#[test]
fn a_cache_of_more_tokens_moves_to_twice_their_size_up_to_the_most() {
    let bench = Bench::new();
    let nothing = bench.books().reserved_bytes;
    let reserved_pages = || (bench.books().reserved_bytes - nothing) / GRANULE;
    // Keys and values exist twice while they move.
    let pool = pool(4 * PAGES_MAX);
    let mut cache = pool.kv_cache(0, 8);
    let mut seen = Vec::new();
    for _ in 0..4 * PAGES_MAX {
        cache.append(&tokens(1), &tokens(1)).unwrap();
        if seen.last() != Some(&reserved_pages()) {
            seen.push(reserved_pages());
        }
    }
    // For 8, 2 * 9 and 2 * 21 tokens, and then for all that there may be.
    assert_eq!(seen, [2 * 2, 2 * 5, 2 * 11, 2 * PAGES_MAX]);
    let error = cache.append(&tokens(1), &tokens(1)).unwrap_err();
    assert!(
        matches!(
            VmmError::from(error),
            VmmError::InvalidOffset { offset, size: ROW, capacity }
                if offset == 4 * PAGES_MAX * ROW && capacity == PAGES_MAX * GRANULE
        ),
        "there is no more"
    );
    assert_eq!(cache.current_seq_len(), 4 * PAGES_MAX);
}

#[test]
fn a_move_that_is_refused_memory_leaves_tokens_and_memory() {
    let bench = Bench::new();
    let pool = pool(7);
    let mut cache = pool.kv_cache(0, 8);
    cache.append(&tokens(8), &tokens(8)).unwrap();
    let before = (bench.books(), pool.engine().stats());
    // The keys have room to move, and then the values have not.
    let error = cache.append(&tokens(1), &tokens(1)).unwrap_err();
    assert!(VmmError::from(error).is_out_of_memory());
    while pool.engine().stats() != before.1 {
        pool.engine().step();
    }
    // The keys stay where they have moved to. Addresses cost nothing.
    let reserved_bytes = bench.books().reserved_bytes;
    let expected = Books {
        reserved_bytes,
        ..before.0
    };
    assert_eq!((bench.books(), cache.current_seq_len()), (expected, 8));
    pool.engine().set_limit_bytes(10 * GRANULE).unwrap();
    let (k, _) = cache.append(&tokens(1), &tokens(1)).unwrap();
    assert_eq!(k.dims(), [9, ROW]);
}

/// Each has addresses for 8,192 tokens of 130 KiB, and a page.
#[test]
fn ten_thousand_sequences_of_32_layers_are_alive_at_once() {
    const SEQUENCES: usize = 10_000;
    const LAYERS: usize = 32;
    let bench = Bench::new();
    let nothing = bench.books();
    let pool = TensorPool::new(&Device::Cpu).unwrap();
    let token = (1, 8, 128);
    let tokens = Tensor::ones((1, 8, 1, 128), DType::F16, &Device::Cpu).unwrap();
    let mut sequences = Vec::new();
    for _ in 0..SEQUENCES {
        let sequence = pool.sequence();
        let sequence = sequence.rows_in_one_range(LAYERS, token, token, DType::F16);
        let sequence = sequence.unwrap();
        let layers = (0..LAYERS).map(|layer| sequence.layer(layer, 2, 8192).unwrap());
        let mut layers: Vec<_> = layers.collect();
        sequence.reserve(1).unwrap();
        // The contents of all layers would take gigabytes of the host.
        layers[LAYERS - 1].append(&tokens, &tokens).unwrap();
        sequences.push((sequence, layers));
    }
    let books = bench.books();
    let addresses = books.reserved_bytes - nothing.reserved_bytes;
    assert_eq!(addresses, SEQUENCES * 8192 * (130 << 10));
    assert_eq!(pool.committed_bytes(), SEQUENCES * GRANULE);
    for (sequence, layers) in &mut sequences {
        // The memory of a token of all layers is there.
        assert_eq!(sequence.bytes(), GRANULE);
        assert_eq!(layers[LAYERS - 1].current_seq_len(), 1);
    }
    let (sequence, layers) = &mut sequences[SEQUENCES / 2];
    for layer in &mut layers[..LAYERS - 1] {
        layer.append(&tokens, &tokens).unwrap();
    }
    assert_eq!(sequence.len(), 1);
    assert_eq!(pool.committed_bytes(), SEQUENCES * GRANULE);
    drop((sequences, pool));
    bench.await_books(nothing);
}

/// The padding of their rows takes nothing from what layers in one range may have.
#[test]
fn padded_rows_are_as_many_as_a_range_of_its_own_has() {
    const LAYERS: usize = 16;
    let _bench = Bench::new();
    let options = TensorPoolOptions::new().reservation_bytes(GRANULE);
    let pool = TensorPool::with_options(&Device::Cpu, options).unwrap();
    let token = (1, 8, 128);
    let rows_max = GRANULE / (8 * 128 * 2);
    let sequence = pool.sequence();
    let sequence = sequence.rows_in_one_range(LAYERS, token, token, DType::F16);
    let sequence = sequence.unwrap();
    let layers: Vec<_> = (0..LAYERS)
        .map(|layer| sequence.layer(layer, 2, rows_max).unwrap())
        .collect();
    sequence.reserve(rows_max).unwrap();
    // 64 KiB and 2 KiB of padding.
    assert_eq!(
        sequence.bytes(),
        (rows_max * (66 << 10)).next_multiple_of(GRANULE)
    );
    let error = sequence.reserve(rows_max + 1).unwrap_err();
    assert!(matches!(error, VmmError::InvalidOffset { .. }), "{error}");
    drop(layers);
}
