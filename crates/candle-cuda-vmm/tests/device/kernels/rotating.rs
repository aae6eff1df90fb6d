//! The rotating cache beside Candle's, by random operations, and what only ours does.

use crate::common::{UnderTest, open, page};
use crate::refused;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::cuda_vmm::VmmError as Core;
use candle_cuda_vmm::kv_cache::KvCache;
use candle_cuda_vmm::{
    ElasticRotatingKvCache, EngineOptions, TensorPool, TensorPoolOptions, VmmError,
};
use candle_nn::kv_cache::RotatingKvCache;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
fn expect_same(ours: &Tensor, theirs: &Tensor) {
    assert_eq!(ours.dims(), theirs.dims());
    assert_eq!(numbers(ours), numbers(theirs));
}

/// Makes tokens whose numbers nothing else has, in either order of memory.
fn tokens(random: &mut StdRng, dim: usize, shape: [usize; 4], device: &Device) -> Tensor {
    let mut shape = shape;
    let is_token_major = random.random();
    if is_token_major {
        shape.swap(1, 2);
    }
    let count = shape.iter().product();
    let first = random.random_range(0..1_000_000);
    let numbers: Vec<f32> = (0..count).map(|number| (first + number) as f32).collect();
    let tensor = Tensor::from_vec(numbers, &shape, device).unwrap();
    let tensor = match is_token_major {
        true => tensor.transpose(1, 2).unwrap(),
        false => tensor,
    };
    match dim {
        2 => tensor,
        _ => tensor.transpose(1, 2).unwrap(),
    }
}

fn expect_same_masks(
    ours: &ElasticRotatingKvCache,
    theirs: &RotatingKvCache,
    count: usize,
    device: &Device,
) {
    assert_eq!(ours.positions(count), theirs.positions(count), "{count}");
    let [ours, theirs] = [
        ours.attn_mask(count, device),
        theirs.attn_mask(count, device),
    ]
    .map(|mask| {
        mask.unwrap()
            .map(|mask| (mask.dims().to_vec(), mask.to_vec2::<u8>().unwrap()))
    });
    assert_eq!(ours, theirs, "{count}");
}

#[test]
fn it_returns_what_candles_rotating_cache_returns() {
    let test = open();
    let device = &test.device;
    let mut random = StdRng::seed_from_u64(7);
    let options = TensorPoolOptions::new();
    let pools = [false, true].map(|contiguous| {
        TensorPool::with_options(device, options.contiguous_output(contiguous)).unwrap()
    });
    for (case, window) in [1, 2, 3, 5, 8, 13].into_iter().enumerate() {
        let (dim, batch, pool) = (2 - case % 2, 1 + case % 3, &pools[case % 2]);
        let mut ours = pool.rotating_kv_cache(dim, window).unwrap();
        let mut theirs = RotatingKvCache::new(dim, window);
        assert!(ours.k().unwrap().is_none() && ours.v().unwrap().is_none());
        assert_eq!((ours.dim(), ours.max_seq_len()), (dim, window));
        // Views that are held make the tokens move.
        let mut held: Vec<(Tensor, Vec<f32>)> = Vec::new();
        for _ in 0..150 {
            if random.random_range(0..40) == 0 {
                ours.reset();
                theirs.reset();
            }
            for count in [1, 2, window - 1, window, window + 1, 2 * window + 1] {
                // Candle's has no numbers for a cache of one token and no new ones.
                if count > 0 {
                    expect_same_masks(&ours, &theirs, count, device);
                }
            }
            let count = match random.random_range(0..3) {
                0 => 1,
                1 => random.random_range(1..=window),
                _ => random.random_range(1..=2 * window + 1),
            };
            // Heads of keys and values may differ in size.
            let k = tokens(&mut random, dim, [batch, 2, count, 4], device);
            let v = tokens(
                &mut random,
                dim,
                [batch, 2, count, 4 + 4 * (case / 3)],
                device,
            );
            let (our_k, our_v) = ours.append(&k, &v).unwrap();
            let (their_k, their_v) = theirs.append(&k, &v).unwrap();
            expect_same(&our_k, &their_k);
            expect_same(&our_v, &their_v);
            let current = [ours.k(), ours.v(), theirs.k(), theirs.v()];
            let [k, v, their_k, their_v] = current.map(|all| all.unwrap().unwrap());
            expect_same(&k, &their_k);
            expect_same(&v, &their_v);
            assert_eq!(
                (ours.offset(), ours.current_seq_len()),
                (theirs.offset(), theirs.current_seq_len())
            );
            if random.random_range(0..4) == 0 {
                held.push((our_k.clone(), numbers(&our_k)));
            }
            if held.len() > 3 {
                held.remove(random.random_range(0..4));
            }
            assert!(held.iter().all(|(view, then)| numbers(view) == *then));
        }
    }
}

/// Tokens `[1, 1, count, 2]` with their positions as numbers.
fn positioned(first: usize, count: usize, device: &Device) -> Tensor {
    let numbers: Vec<f32> = (first..first + count)
        .flat_map(|at| [at as f32; 2])
        .collect();
    Tensor::from_vec(numbers, (1, 1, count, 2), device).unwrap()
}

#[test]
fn it_is_a_list_of_the_last_tokens_by_the_trait() {
    let test = open();
    let device = &test.device;
    let pool = TensorPool::new(device).unwrap();
    let mut random = StdRng::seed_from_u64(11);
    for window in [1, 4, 7] {
        let mut cache = pool.rotating_kv_cache(2, window).unwrap();
        // The positions in the cache, in order.
        let (mut list, mut next) = (Vec::<usize>::new(), 0);
        for _ in 0..300 {
            match random.random_range(0..10) {
                0 => {
                    KvCache::reset(&mut cache);
                    (list, next) = (Vec::new(), 0);
                }
                1 => {
                    let len = random.random_range(0..=list.len());
                    cache.truncate(len).unwrap();
                    next -= list.len() - len;
                    list.truncate(len);
                }
                2 => {
                    let front = random.random_range(0..=list.len());
                    cache.release_front(front).unwrap();
                    list.drain(..front);
                }
                3 => {
                    let clone = match random.random() {
                        true => cache.try_clone().unwrap(),
                        false => cache.clone(),
                    };
                    cache = clone;
                }
                _ => {
                    let count = random.random_range(1..=window + 1);
                    let expected = cache.positions(count);
                    let k = positioned(next, count, device);
                    let (k, v) = KvCache::append(&mut cache, &k, &k).unwrap();
                    list.extend(next..next + count);
                    list.drain(..list.len().saturating_sub(window));
                    next += count;
                    expect_same(&k, &v);
                    let found: Vec<_> = numbers(&k)
                        .iter()
                        .step_by(2)
                        .map(|&at| at as usize)
                        .collect();
                    if count != window {
                        assert_eq!(found, expected);
                    }
                }
            }
            assert_eq!(
                (KvCache::current_seq_len(&cache), cache.position()),
                (list.len(), next)
            );
            let rows = cache.k().unwrap().map(|k| numbers(&k)).unwrap_or_default();
            let mut rows: Vec<_> = rows.iter().step_by(2).map(|&at| at as usize).collect();
            rows.sort_unstable();
            assert_eq!(rows, list);
        }
    }
}

fn small_pool(test: &UnderTest, limit_pages: usize) -> TensorPool {
    let engine = EngineOptions::new()
        .limit_bytes(limit_pages * page())
        .chunk_bytes_max(0);
    let options = TensorPoolOptions::new().page_bytes(page()).engine(engine);
    TensorPool::with_options(&test.device, options).unwrap()
}

/// Tokens `[1, 2, count, page / 32]`: four in a page.
fn quarters(test: &UnderTest, count: usize, value: f32) -> Tensor {
    let tokens = Tensor::full(value, (1, 2, count, page() / 32), &Device::Cpu).unwrap();
    tokens
        .force_contiguous()
        .unwrap()
        .to_device(&test.device)
        .unwrap()
}

#[test]
fn it_holds_memory_for_the_window_however_many_tokens_come() {
    let test = open();
    let pool = small_pool(&test, 4);
    // Six tokens are a page and a half, so two pages for keys and two for values.
    let mut cache = pool.rotating_kv_cache(2, 6).unwrap();
    let mut allocations = None;
    for step in 0..30 {
        let token = quarters(&test, 1, step as f32);
        let (k, _) = cache.append(&token, &token).unwrap();
        assert_eq!(k.dims()[2], 6.min(step + 1));
        drop(k);
        if step >= 6 {
            let now = pool.engine().counters().ranges.allocations;
            assert_eq!(*allocations.get_or_insert(now), now);
        }
    }
    assert_eq!(cache.allocated_bytes(), 4 * page());
    // Longer than the window: its last tokens take the same place.
    let prompt = quarters(&test, 9, 1.);
    assert_eq!(cache.append(&prompt, &prompt).unwrap().0.dims()[2], 9);
    assert_eq!((cache.allocated_bytes(), cache.offset()), (4 * page(), 0));
    cache.reset();
    assert_eq!(cache.allocated_bytes(), 0);
}

#[test]
fn what_is_refused_changes_nothing() {
    let test = open();
    let device = &test.device;
    let pool = TensorPool::new(device).unwrap();
    refused!(
        pool.rotating_kv_cache(2, 0),
        VmmError::Vmm(Core::ZeroSize {
            what: "max_seq_len"
        })
    );
    let mut cache = pool.rotating_kv_cache(2, 3).unwrap();
    let five = positioned(0, 5, device);
    cache.append(&five, &five).unwrap();
    cache
        .append(&positioned(5, 1, device), &positioned(5, 1, device))
        .unwrap();
    let before = numbers(&cache.k().unwrap().unwrap());
    for count in [1, 2, 3, 9] {
        let good = positioned(6, count, device);
        let half = good.to_dtype(DType::F16).unwrap();
        let wide = Tensor::zeros((1, 1, count, 3), DType::F32, device).unwrap();
        let tall = Tensor::zeros((1, 2, count, 2), DType::F32, device).unwrap();
        for (k, v) in [
            (&good, &half),
            (&half, &half),
            (&good, &wide),
            (&wide, &good),
            (&tall, &tall),
        ] {
            refused!(KvCache::append(&mut cache, k, v), VmmError::CandleError(_));
        }
    }
    refused!(cache.truncate(4), VmmError::CandleError(_));
    refused!(cache.release_front(4), VmmError::CandleError(_));
    refused!(cache.truncate_to_position(2), VmmError::CandleError(_));
    assert_eq!((cache.position(), cache.offset()), (6, 1));
    assert_eq!(numbers(&cache.k().unwrap().unwrap()), before);
    assert_eq!(numbers(&cache.v().unwrap().unwrap()), before);
}

#[test]
fn a_refusal_of_memory_leaves_the_tokens() {
    let test = open();
    let pool = small_pool(&test, 3);
    let mut cache = pool.rotating_kv_cache(2, 6).unwrap();
    let three = quarters(&test, 3, 1.);
    cache.append(&three, &three).unwrap();
    // A clone needs two pages.
    assert!(cache.try_clone().unwrap_err().is_out_of_memory());
    let mut clone = cache.clone();
    let error = clone.append(&three, &three).unwrap_err();
    assert!(error.to_string().contains("could not be cloned"), "{error}");
    assert!(clone.k().is_err() && clone.truncate(1).is_err());
    clone.reset();
    assert_eq!((clone.current_seq_len(), clone.allocated_bytes()), (0, 0));
    for count in [2, 4, 6, 8] {
        // Keys or values need a second page, and there is one left for both.
        let more = quarters(&test, count, 2.);
        let error = cache.append(&more, &more).unwrap_err();
        assert!(
            VmmError::find(&error).unwrap().is_out_of_memory(),
            "{error}"
        );
        assert_eq!((cache.current_seq_len(), cache.offset()), (3, 3));
        assert_eq!(cache.allocated_bytes(), 2 * page());
        let rows = cache.k().unwrap().unwrap();
        let first = rows.narrow(3, 0, 1).unwrap().narrow(1, 0, 1).unwrap();
        assert_eq!(numbers(&first.to_device(&Device::Cpu).unwrap()), [1.; 3]);
    }
}
