//! Appends that a KV cache refuses, and its state afterwards. The sequence is the first dimension
//! with more than one element, and no dtype is converted. So Candle makes plain copies, because
//! simulated devices launch no kernels.

use crate::common::{UnderTest, open, page};
use candle_core::{DType, Device, Error, Tensor};
use candle_cuda_vmm::cuda_vmm::{EngineOptions, VmmError as Core};
use candle_cuda_vmm::kv_cache::{ConcatCaches, KvCache, KvCacheFactory, PreallocatedCaches};
use candle_cuda_vmm::{TensorPool, TensorPoolOptions, VmmError};

/// The dimension of the sequence.
const DIM: usize = 1;
const SHAPE: [usize; 4] = [1, 3, 2, 4];

fn zeros(test: &UnderTest, shape: [usize; 4]) -> Tensor {
    Tensor::zeros(&shape, DType::F32, &test.device).unwrap()
}

/// Makes tokens `[1, count, heads, 4]`. Candle cannot allocate a tensor without elements on a GPU,
/// so that is a part of another.
fn tokens(test: &UnderTest, count: usize, heads: usize) -> Tensor {
    let some = zeros(test, [1, count.max(1), heads, 4]);
    some.narrow(DIM, 0, count).unwrap()
}

fn numbers(test: &UnderTest, shape: [usize; 4]) -> Tensor {
    let count = shape.iter().product::<usize>() as u32;
    let numbers: Vec<f32> = (0..count).map(|number| number as f32).collect();
    let numbers = Tensor::from_vec(numbers, &shape, &Device::Cpu).unwrap();
    numbers.to_device(&test.device).unwrap()
}

fn elements(tensor: &Tensor) -> Vec<f32> {
    let there = tensor.to_device(&Device::Cpu).unwrap();
    there.flatten_all().unwrap().to_vec1().unwrap()
}

/// Fails unless appending these is refused and leaves keys and values unchanged.
fn refuses<C: KvCache>(
    test: &UnderTest,
    cache: &mut C,
    k: &Tensor,
    v: &Tensor,
    expected: fn(&Error) -> bool,
) {
    let len = cache.current_seq_len();
    match cache.append(k, v) {
        Err(VmmError::CandleError(error)) => assert!(expected(&error), "{error:?}"),
        outcome => panic!("{outcome:?}"),
    }
    assert_eq!(cache.current_seq_len(), len);
    if len > 0 {
        let nothing = tokens(test, 0, 2);
        let (k, v) = cache.append(&nothing, &nothing).unwrap();
        assert_eq!((k.dims(), v.dims()), (&[1, len, 2, 4][..], k.dims()));
        let expected: Vec<f32> = (0..2 * len as u32 * 4)
            .map(|number| number as f32)
            .collect();
        assert_eq!(elements(&k), expected);
        assert_eq!(elements(&v), expected);
    }
}

fn refuses_what_does_not_belong_together<F: KvCacheFactory>(test: &UnderTest, factory: &F) {
    let mut cache = factory.layer(0, DIM, 16).unwrap();
    let like = zeros(test, SHAPE);
    for _ in 0..2 {
        let is_shape = |error: &Error| matches!(error, Error::ShapeMismatchBinaryOp { .. });
        let others = [
            zeros(test, [1, 2, 2, 4]),
            zeros(test, [2, 3, 2, 4]),
            zeros(test, [1, 3, 3, 4]),
            tokens(test, 0, 2),
        ];
        for other in others {
            refuses(test, &mut cache, &like, &other, is_shape);
            refuses(test, &mut cache, &other, &like, is_shape);
        }
        let flat = like.squeeze(0).unwrap();
        refuses(test, &mut cache, &like, &flat, is_shape);
        let double = Tensor::zeros(&SHAPE, DType::F64, &test.device).unwrap();
        refuses(test, &mut cache, &like, &double, |error| {
            matches!(error, Error::DTypeMismatchBinaryOp { .. })
        });
        let row = zeros(test, SHAPE).flatten_all().unwrap();
        refuses(test, &mut cache, &row, &row, |error| {
            matches!(error, Error::DimOutOfRange { .. })
        });
        // Then again with tokens in the cache.
        if cache.current_seq_len() == 0 {
            let tokens = numbers(test, SHAPE);
            cache.append(&tokens, &tokens).unwrap();
        }
    }
    // The values differ from those in the cache, the keys do not.
    let wide = zeros(test, [1, 3, 2, 5]);
    refuses(test, &mut cache, &like, &wide, |_| true);
    refuses(test, &mut cache, &wide, &like, |_| true);
}

#[test]
fn keys_and_values_that_do_not_belong_together_are_refused() {
    let test = open();
    let options = TensorPoolOptions::new().page_bytes(page());
    let pool = TensorPool::with_options(&test.device, options).unwrap();
    refuses_what_does_not_belong_together(&test, &pool);
    // On a GPU these launch Candle's kernels.
    if test.device.is_cpu() {
        refuses_what_does_not_belong_together(&test, &ConcatCaches);
        refuses_what_does_not_belong_together(&test, &PreallocatedCaches);
    }
}

#[test]
fn heads_of_keys_and_values_may_differ_in_size() {
    let test = open();
    let pool = TensorPool::new(&test.device).unwrap();
    let mut cache = pool.kv_cache(DIM, 16);
    let (k, v) = (zeros(&test, [1, 3, 2, 6]), zeros(&test, SHAPE));
    let (k, v) = cache.append(&k, &v).unwrap();
    assert_eq!((k.dims(), v.dims()), (&[1, 3, 2, 6][..], &SHAPE[..]));
}

#[test]
fn a_cache_that_is_uneven_already_stays_as_it_is() {
    let test = open();
    let pool = TensorPool::new(&test.device).unwrap();
    let mut cache = pool.kv_cache(DIM, 16);
    let tokens = |heads, count| tokens(&test, count, heads);
    cache.append(&tokens(2, 2), &tokens(2, 2)).unwrap();
    cache.v_cache_mut().append(&tokens(2, 8)).unwrap();
    let lens = |cache: &candle_cuda_vmm::ElasticKvCache| {
        let [k, v] = [cache.k_cache(), cache.v_cache()];
        (k.current_seq_len(), v.current_seq_len())
    };
    cache.append(&tokens(2, 1), &tokens(3, 1)).unwrap_err();
    cache.append(&tokens(3, 1), &tokens(3, 1)).unwrap_err();
    assert_eq!(lens(&cache), (2, 10));
    cache.truncate(5).unwrap_err();
    cache.k_cache_mut().append(&tokens(2, 10)).unwrap();
    cache.truncate(11).unwrap_err();
    cache.release_front(11).unwrap_err();
    assert_eq!(lens(&cache), (12, 10));
}

#[test]
fn out_of_memory_keeps_its_numbers_through_the_trait_and_through_a_model() {
    let test = open();
    let engine = EngineOptions::new().limit_bytes(2 * page());
    let options = TensorPoolOptions::new().engine(engine).page_bytes(page());
    let pool = TensorPool::with_options(&test.device, options).unwrap();
    let mut cache = pool.layer(0, DIM, 16).unwrap();
    // The keys fit, and then the values do not.
    let many = tokens(&test, page() / 16, 2);
    let error = KvCache::append(&mut cache, &many, &many).unwrap_err();
    let VmmError::Vmm(Core::OutOfPhysicalMemory { limit_bytes, .. }) = error else {
        panic!("{error:?}");
    };
    assert_eq!(limit_bytes, 2 * page());
    let [k, v] = [cache.k_cache(), cache.v_cache()].map(|cache| cache.current_seq_len());
    assert_eq!((k, v), (0, 0));
    let model = |cache: &mut candle_cuda_vmm::ElasticKvCache| -> candle_core::Result<()> {
        let forward = KvCache::append(cache, &many, &many).map_err(Error::from);
        forward.map_err(|error| error.bt().context("layer 0"))?;
        Ok(())
    };
    let error = model(&mut cache).unwrap_err();
    let shortage = VmmError::find(&error).and_then(VmmError::shortage).unwrap();
    assert_eq!(shortage.limit_bytes, Some(2 * page()));
    // The same with Candle's own signature.
    let error = cache.append(&many, &many).unwrap_err();
    assert!(VmmError::find(&error).unwrap().is_out_of_memory());
}

#[test]
fn a_clone_that_failed_says_why() {
    let test = open();
    let engine = EngineOptions::new().limit_bytes(2 * page());
    let options = TensorPoolOptions::new().engine(engine).page_bytes(page());
    let pool = TensorPool::with_options(&test.device, options).unwrap();
    let mut cache = pool.kv_cache(DIM, 16);
    let tokens = tokens(&test, page() / 32, 2);
    cache.append(&tokens, &tokens).unwrap();
    let mut clone = cache.clone();
    let error = clone.k().unwrap_err();
    assert!(VmmError::find(&error).unwrap().is_out_of_memory());
    let error = KvCache::append(&mut clone, &tokens, &tokens).unwrap_err();
    assert!(error.is_out_of_memory(), "{error:?}");
}
