//! KV caches that grow in place. Tokens are token-major, as models have them after a transposition,
//! so that plain copies append them without a kernel.

use crate::common::{UnderTest, open, page};
use candle_core::{DType, Device, Error, Tensor};
use candle_cuda_vmm::cuda_vmm::EngineOptions;
use candle_cuda_vmm::{ElasticKvCache, TensorPool, TensorPoolOptions};

const HEADS: usize = 2;
const DIM: usize = 4;

/// Makes tokens `[1, HEADS, count, DIM]` whose elements all are the token's number.
fn tokens(test: &UnderTest, numbers: impl Iterator<Item = usize>) -> Tensor {
    let elements: Vec<f32> = numbers
        .flat_map(|number| [number as f32; HEADS * DIM])
        .collect();
    let count = elements.len() / (HEADS * DIM);
    let tokens = Tensor::from_vec(elements, (1, count, HEADS, DIM), &Device::Cpu).unwrap();
    tokens
        .to_device(&test.device)
        .unwrap()
        .transpose(1, 2)
        .unwrap()
}

#[track_caller]
fn expect(tokens: &Tensor, numbers: &[usize]) {
    assert_eq!(tokens.dims(), [1, HEADS, numbers.len(), DIM]);
    let there = tokens.to_device(&Device::Cpu).unwrap();
    let one = there
        .narrow(1, 1, 1)
        .unwrap()
        .narrow(3, DIM - 1, 1)
        .unwrap();
    let found = one.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let expected: Vec<f32> = numbers.iter().map(|number| *number as f32).collect();
    assert_eq!(found, expected);
}

fn append(
    test: &UnderTest,
    cache: &mut ElasticKvCache,
    numbers: std::ops::Range<usize>,
) -> (Tensor, Tensor) {
    let values = numbers.clone().map(|number| number + 1_000_000);
    cache
        .append(&tokens(test, numbers), &tokens(test, values))
        .unwrap()
}

fn pool(test: &UnderTest) -> TensorPool {
    let options = TensorPoolOptions::new().page_bytes(page());
    TensorPool::with_options(&test.device, options).unwrap()
}

#[test]
fn it_answers_the_shapes_of_candles_cache_over_token_major_memory() {
    let test = open();
    let pool = pool(&test);
    // More tokens than the hint.
    let mut cache = ElasticKvCache::new(&pool, 2, 4);
    assert_eq!(
        (cache.k_cache().dim(), cache.k_cache().max_seq_len()),
        (2, 4)
    );
    assert!(cache.k().unwrap().is_none() && cache.v().unwrap().is_none());
    for len in 0..9 {
        let (k, v) = append(&test, &mut cache, len..len + 1);
        let all: Vec<_> = (0..=len).collect();
        let values: Vec<_> = all.iter().map(|number| number + 1_000_000).collect();
        expect(&k, &all);
        expect(&v, &values);
        let strides = [(len + 1) * HEADS * DIM, DIM, HEADS * DIM, 1];
        assert_eq!(
            k.stride()[1..],
            strides[1..],
            "a token's heads follow one another"
        );
        assert_eq!(cache.current_seq_len(), len + 1);
    }
    expect(&cache.k().unwrap().unwrap(), &(0..9).collect::<Vec<_>>());
    // Candle's device cannot allocate 0 bytes, but a tensor can have a part without tokens.
    let none = tokens(&test, 0..1).narrow(2, 0, 0).unwrap();
    assert_eq!(
        cache.append(&none, &none).unwrap().0.dims(),
        [1, HEADS, 9, DIM]
    );
    cache.reset();
    assert_eq!(
        cache.append(&none, &none).unwrap().0.dims(),
        [1, HEADS, 0, DIM]
    );
}

#[test]
fn a_length_that_goes_to_and_fro_takes_nothing_from_the_driver() {
    let test = open();
    let pool = pool(&test);
    let mut cache = pool.kv_cache(2, 64);
    // Three more each time, less than a page in all.
    let mut numbers: Vec<usize> = Vec::new();
    let eight = 10_000 / if test.device.is_cuda() { 1 } else { 50 };
    drop(append(&test, &mut cache, 0..8));
    cache.truncate(3).unwrap();
    numbers.extend(0..3);
    let before = pool.engine().stats();
    for round in 1..eight {
        drop(append(&test, &mut cache, 8 * round..8 * round + 8));
        cache.truncate(3 * round + 3).unwrap();
        numbers.extend(8 * round..8 * round + 3);
    }
    assert!(3 * eight * HEADS * DIM * 4 < page());
    assert_eq!(pool.engine().stats(), before);
    expect(&cache.k().unwrap().unwrap(), &numbers);
}

#[test]
fn a_reset_leaves_what_was_answered_alone() {
    let test = open();
    let pool = pool(&test);
    let mut cache = pool.kv_cache(2, 64);
    let (k, v) = append(&test, &mut cache, 0..20);
    cache.reset();
    assert_eq!(cache.current_seq_len(), 0);
    let (fresh, _) = append(&test, &mut cache, 100..110);
    expect(&k, &(0..20).collect::<Vec<_>>());
    expect(&v, &(1_000_000..1_000_020).collect::<Vec<_>>());
    expect(&fresh, &(100..110).collect::<Vec<_>>());
    // An empty cache accepts another shape and dtype.
    cache.reset();
    let other = Tensor::ones((2, 3, 1, 5), DType::F32, &Device::Cpu).unwrap();
    let other = other
        .to_dtype(DType::F16)
        .unwrap()
        .to_device(&test.device)
        .unwrap();
    let (k, _) = cache.append(&other, &other).unwrap();
    assert_eq!((k.dims(), k.dtype()), (&[2, 3, 1, 5][..], DType::F16));
}

#[test]
fn a_clone_has_tokens_of_its_own_and_says_so_if_it_could_not() {
    let test = open();
    let limit = EngineOptions::new().limit_bytes(6 * page());
    let options = TensorPoolOptions::new().page_bytes(page()).engine(limit);
    let pool = TensorPool::with_options(&test.device, options).unwrap();
    let mut cache = pool.kv_cache(2, 64);
    append(&test, &mut cache, 0..5);
    let mut clone = cache.clone();
    append(&test, &mut cache, 5..6);
    append(&test, &mut clone, 50..51);
    expect(&cache.k().unwrap().unwrap(), &[0, 1, 2, 3, 4, 5]);
    expect(&clone.k().unwrap().unwrap(), &[0, 1, 2, 3, 4, 50]);
    drop(clone);
    // Keys and values take two each. A second such pair exceeds the limit.
    let count = 2 * page() / (HEADS * DIM * 4);
    append(&test, &mut cache, 6..count);
    let mut clone = cache.clone();
    let error = clone
        .append(&tokens(&test, 0..1), &tokens(&test, 0..1))
        .unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("could not be cloned") && text.contains("out of physical memory"),
        "{text}"
    );
    assert!(clone.k().is_err() && clone.truncate(0).is_err());
    assert!(cache.try_clone().is_err());
    clone.reset();
    assert_eq!(
        (clone.current_seq_len(), cache.current_seq_len()),
        (0, count)
    );
}

#[test]
fn a_failed_append_leaves_keys_and_values_as_they_were() {
    let test = open();
    let pool = pool(&test);
    let mut cache = pool.kv_cache(2, 64);
    append(&test, &mut cache, 0..5);
    let good = tokens(&test, 5..6);
    let halves = Tensor::ones((1, HEADS, 1, DIM), DType::F16, &Device::Cpu).unwrap();
    let halves = halves.to_device(&test.device).unwrap();
    let error = cache.append(&good, &halves).unwrap_err();
    assert!(
        matches!(
            error,
            Error::DTypeMismatchBinaryOp {
                lhs: DType::F32,
                rhs: DType::F16,
                op: "elastic-append"
            }
        ),
        "{error}"
    );
    let flat = Tensor::zeros(3, DType::F32, &test.device).unwrap();
    let error = cache.append(&flat, &flat).unwrap_err();
    assert!(
        matches!(
            error,
            Error::DimOutOfRange {
                dim: 2,
                op: "elastic-append",
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(
        (cache.current_seq_len(), cache.v_cache().current_seq_len()),
        (5, 5)
    );
    let (k, v) = append(&test, &mut cache, 5..6);
    expect(&k, &[0, 1, 2, 3, 4, 5]);
    assert_eq!(v.dim(2).unwrap(), 6);
}

#[test]
fn a_sliding_window_answers_the_window() {
    let test = open();
    let pool = pool(&test);
    let mut cache = pool.kv_cache(2, 64);
    for number in 0..50 {
        append(&test, &mut cache, number..number + 1);
        if cache.current_seq_len() > 8 {
            cache.release_front(1).unwrap();
        }
    }
    expect(&cache.k().unwrap().unwrap(), &(42..50).collect::<Vec<_>>());
    assert!(cache.release_front(9).is_err());
    assert_eq!(cache.v_cache().current_seq_len(), 8);
}

#[test]
fn tokens_of_another_device_are_refused() {
    let test = open();
    let pool = pool(&test);
    let mut cache = pool.kv_cache(2, 64);
    append(&test, &mut cache, 0..1);
    let here = test.device.location();
    // Another GPU, or the CPU.
    let mut others = test.all();
    others.push(Device::Cpu);
    for other in others.iter().filter(|other| other.location() != here) {
        let token = Tensor::zeros((1, HEADS, 1, DIM), DType::F32, other).unwrap();
        let error = cache.append(&token, &token).unwrap_err();
        assert!(
            matches!(error, Error::DeviceMismatchBinaryOp { lhs, rhs, .. } if lhs == here && rhs == other.location()),
            "{error}"
        );
    }
    assert_eq!(cache.current_seq_len(), 1);
}
