//! Caches and sequences that begin with the tokens of others, in the same memory.

use crate::common::layouts::Layout;
use crate::common::{UnderTest, open, page};
use crate::fork::{expect, expect_rows, held, pool_with, rows, settle};
use candle_core::DType;
use candle_cuda_vmm::kv_cache::{KvCache, KvCacheFactory, Sequence};

const LAYERS: usize = 3;

/// Tokens with these numbers in all layers, with keys and values of `row` bytes each.
fn append(test: &UnderTest, sequence: &Sequence, numbers: &[u64], row: usize) {
    for layer in 0..LAYERS {
        let mut cache = sequence.layer(layer, 0, 32).unwrap();
        let of_layer = |half| -> Vec<u64> {
            let number = |it: &u64| it * 100 + (2 * layer + half) as u64;
            numbers.iter().map(number).collect()
        };
        let (k, v) = (of_layer(0), of_layer(1));
        let (k, v) = (rows(&test.device, &k, row), rows(&test.device, &v, row));
        cache.append(&k, &v).unwrap();
    }
}

#[track_caller]
fn expect_tokens(sequence: &Sequence, numbers: &[u64]) {
    assert_eq!(sequence.len(), numbers.len());
    for layer in 0..LAYERS {
        let cache = sequence.layer(layer, 0, 32).unwrap();
        let cache = cache.lock().unwrap();
        for (half, found) in [cache.k(), cache.v()].into_iter().enumerate() {
            let number = |it: &u64| it * 100 + (2 * layer + half) as u64;
            let expected: Vec<u64> = numbers.iter().map(number).collect();
            expect(&found.unwrap().unwrap(), &expected);
        }
    }
}

#[test]
fn a_sequence_is_forked_in_all_layers() {
    let test = open();
    for layout in Layout::BOTH {
        let pool = pool_with(&test, 256);
        let row = page() / 4;
        let sequence = layout.sequence(&pool, LAYERS, [row; 2], DType::U8).unwrap();
        let numbers: Vec<u64> = (0..9).collect();
        append(&test, &sequence, &numbers, row);
        let pages = layout.pages(LAYERS, 9);
        let forks = [(); 2].map(|()| sequence.fork().unwrap());
        let (shared, own) = held(&pool);
        let whole = match layout {
            Layout::Apart => 2 * LAYERS * 2,
            Layout::OneRange => 2 * LAYERS * 9 / 4,
        };
        assert_eq!((shared, own), (whole, 3 * (pages - whole)), "{layout:?}");
        let mut expected = Vec::new();
        for (at, fork) in [&sequence].into_iter().chain(&forks).enumerate() {
            let more: Vec<u64> = (0..4).map(|token| 50 + 10 * at as u64 + token).collect();
            fork.reserve(4).unwrap();
            append(&test, fork, &more, row);
            expected.push([&numbers[..], &more[..]].concat());
        }
        for (fork, expected) in [&sequence].into_iter().chain(&forks).zip(&expected) {
            expect_tokens(fork, expected);
        }
        drop(sequence);
        let [first, second] = forks;
        first.truncate(3).unwrap();
        append(&test, &first, &[7, 8], row);
        expect_tokens(&first, &[0, 1, 2, 7, 8]);
        expect_tokens(&second, &expected[2]);
        drop(first);
        settle(&pool);
        assert_eq!(held(&pool).0, 0, "{layout:?}");
        expect_tokens(&second, &expected[2]);
        drop(second);
        settle(&pool);
        assert_eq!(held(&pool), (0, 0), "{layout:?}");
    }
}

#[test]
fn a_cache_and_one_tensor_of_it_are_forked_alone() {
    let test = open();
    for layout in Layout::BOTH {
        let pool = pool_with(&test, 256);
        let row = page() / 4;
        let sequence = layout.sequence(&pool, LAYERS, [row; 2], DType::U8).unwrap();
        append(&test, &sequence, &[7, 8, 0, 1, 2, 3, 4], row);
        let mut layer = sequence.layer(1, 0, 32).unwrap();
        layer.release_front(2).unwrap();
        let mut fork = layer.lock().unwrap().fork().unwrap();
        let keys = layer.lock().unwrap().k_cache().rows().unwrap().fork();
        assert_eq!((fork.position(), layer.position()), (7, 7));
        drop((layer, sequence));
        let (k, v) = (
            rows(&test.device, &[900], row),
            rows(&test.device, &[901], row),
        );
        let (all_k, all_v) = fork.append(&k, &v).unwrap();
        let [k, v] = [all_k, all_v].map(|it| it.force_contiguous().unwrap());
        expect(&k, &[2, 102, 202, 302, 402, 900]);
        expect(&v, &[3, 103, 203, 303, 403, 901]);
        expect_rows(&keys.unwrap(), &[2, 102, 202, 302, 402]);
        drop((fork, k, v));
        settle(&pool);
        assert_eq!(held(&pool), (0, 0), "{layout:?}");
    }
}

#[test]
fn layers_that_a_model_has_not_made_yet_are_made_in_the_fork() {
    let test = open();
    for layout in Layout::BOTH {
        let pool = pool_with(&test, 256);
        let row = page() / 4;
        let sequence = layout.sequence(&pool, LAYERS, [row; 2], DType::U8).unwrap();
        let empty = sequence.fork().unwrap();
        append(&test, &empty, &[5, 6], row);
        append(&test, &sequence, &[1], row);
        expect_tokens(&empty, &[5, 6]);
        expect_tokens(&sequence, &[1]);
    }
}
