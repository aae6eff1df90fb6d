//! Compares caches behind the trait, as a model uses them, with a plain list of tokens.
//!
//! To test another kind of cache, add a line to [`every_kind`].

use crate::common::layouts::Layout;
use crate::common::open;
use candle_core::{DType, Device, Error, Tensor};
use candle_cuda_vmm::kv_cache::{ConcatCaches, KvCache, KvCacheFactory, PreallocatedCaches};
use candle_cuda_vmm::{Sequence, TensorPool, TensorPoolOptions, VmmError};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const HEADS: usize = 2;
const HEAD_DIM: usize = 4;
/// Fewer than the tests append.
const MAX_SEQ_LEN: usize = 8;

/// Makes a sequence of four layers.
fn sequence(layout: Layout, device: &Device) -> Sequence {
    let pool = TensorPool::new(device).unwrap();
    let token = (1, HEADS, HEAD_DIM);
    layout.sequence(&pool, 4, [token; 2], DType::F32).unwrap()
}

/// Calls a generic function with a factory of each kind.
macro_rules! every_kind {
    ($check:ident, $device:expr) => {
        $check(&PreallocatedCaches, $device);
        $check(&ConcatCaches, $device);
        $check(&TensorPool::new($device).unwrap(), $device);
        $check(&sequence(Layout::Apart, $device), $device);
        $check(&sequence(Layout::OneRange, $device), $device);
        let contiguous = TensorPoolOptions::new().contiguous_output(true);
        $check(
            &TensorPool::with_options($device, contiguous).unwrap(),
            $device,
        );
    };
}

/// Makes tokens `[1, HEADS, tokens, HEAD_DIM]` of these numbers, which differ by head. With
/// `token_major` they are a transposed view, as in models.
fn tokens(numbers: &[u32], token_major: bool, device: &Device) -> Tensor {
    let elements = |number: u32, head: usize| [(number * 10) as f32 + head as f32; HEAD_DIM];
    let (shape, elements): (_, Vec<f32>) = match token_major {
        true => (
            (1, numbers.len(), HEADS, HEAD_DIM),
            numbers
                .iter()
                .flat_map(|&number| (0..HEADS).flat_map(move |head| elements(number, head)))
                .collect(),
        ),
        false => (
            (1, HEADS, numbers.len(), HEAD_DIM),
            (0..HEADS)
                .flat_map(|head| {
                    numbers
                        .iter()
                        .flat_map(move |&number| elements(number, head))
                })
                .collect(),
        ),
    };
    let tensor = Tensor::from_vec(elements, shape, device).unwrap();
    match token_major {
        true => tensor.transpose(1, 2).unwrap(),
        false => tensor,
    }
}

#[track_caller]
fn expect_tokens(tensor: &Tensor, numbers: &[u32], device: &Device) {
    let expected = tokens(numbers, false, device);
    assert_eq!(tensor.dims(), expected.dims());
    let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(flat(tensor), flat(&expected));
}

/// Makes the values for keys of these numbers.
fn values(keys: &[u32]) -> Vec<u32> {
    keys.iter().map(|number| number + 1_000).collect()
}

#[test]
fn a_cache_holds_what_a_list_of_tokens_holds() {
    fn check<F: KvCacheFactory>(factory: &F, device: &Device) {
        let mut random = StdRng::seed_from_u64(5);
        let mut cache = factory.layer(0, 2, MAX_SEQ_LEN).unwrap();
        let (mut list, mut next, mut released) = (Vec::<u32>::new(), 0, 0);
        for _ in 0..300 {
            match random.random_range(0..12) {
                0 => {
                    cache.reset();
                    list.clear();
                    released = 0;
                }
                1 | 2 => {
                    let len = random.random_range(0..=list.len());
                    cache.truncate(len).unwrap();
                    list.truncate(len);
                }
                3 => {
                    let len = random.random_range(0..=list.len());
                    cache.truncate_to_position(released + len).unwrap();
                    list.truncate(len);
                }
                4 | 5 => {
                    let front = random.random_range(0..=list.len().min(4));
                    cache.release_front(front).unwrap();
                    list.drain(..front);
                    released += front;
                }
                _ => {
                    let new: Vec<u32> = (next..next + random.random_range(1..=5)).collect();
                    next += 5;
                    list.extend(&new);
                    let token_major = random.random();
                    let (k, v) = cache
                        .append(
                            &tokens(&new, token_major, device),
                            &tokens(&values(&new), token_major, device),
                        )
                        .unwrap();
                    expect_tokens(&k, &list, device);
                    expect_tokens(&v, &values(&list), device);
                }
            }
            assert_eq!(cache.current_seq_len(), list.len());
            assert_eq!(cache.position(), released + list.len());
        }
    }
    let test = open();
    every_kind!(check, &test.device);
}

#[test]
fn what_is_refused_changes_nothing() {
    fn check<F: KvCacheFactory>(factory: &F, device: &Device) {
        let mut cache = factory.layer(3, 2, MAX_SEQ_LEN).unwrap();
        cache.truncate(0).unwrap();
        assert!(cache.truncate(1).is_err());
        let three = tokens(&[1, 2, 3], false, device);
        cache.append(&three, &three).unwrap();
        assert!(cache.truncate(4).is_err());
        assert!(cache.truncate(usize::MAX).is_err());
        assert!(cache.release_front(4).is_err());
        assert!(cache.truncate_to_position(4).is_err());
        assert_eq!((cache.current_seq_len(), cache.position()), (3, 3));
        let other = three.to_dtype(DType::F16).unwrap();
        assert!(cache.append(&other, &other).is_err());
        let other = three.narrow(1, 0, 1).unwrap();
        assert!(cache.append(&other, &other).is_err());
        assert_eq!(cache.current_seq_len(), 3);
        let four = tokens(&[4], false, device);
        let (k, v) = cache.append(&four, &four).unwrap();
        expect_tokens(&k, &[1, 2, 3, 4], device);
        expect_tokens(&v, &[1, 2, 3, 4], device);
    }
    let test = open();
    every_kind!(check, &test.device);
}

#[test]
fn caches_say_how_many_tokens_there_are_to_truncate() {
    fn check<F: KvCacheFactory>(factory: &F, device: &Device) {
        let mut cache = factory.layer(0, 2, MAX_SEQ_LEN).unwrap();
        let two = tokens(&[1, 2], false, device);
        cache.append(&two, &two).unwrap();
        match cache.truncate(3).unwrap_err() {
            VmmError::CandleError(Error::NarrowInvalidArgs { shape, len, .. }) => {
                assert_eq!((shape.dims(), len), (&[2][..], 3));
            }
            other => panic!("{other}"),
        }
        match cache.release_front(5).unwrap_err() {
            VmmError::CandleError(Error::NarrowInvalidArgs { shape, len, .. }) => {
                assert_eq!((shape.dims(), len), (&[2][..], 5));
            }
            other => panic!("{other}"),
        }
        cache.release_front(1).unwrap();
        for position in [0, 3, usize::MAX] {
            match cache.truncate_to_position(position).unwrap_err() {
                VmmError::CandleError(Error::NarrowInvalidArgs {
                    shape, start, len, ..
                }) => assert_eq!((shape.dims(), start, len), (&[2][..], 1, position)),
                other => panic!("{other}"),
            }
        }
        assert_eq!((cache.current_seq_len(), cache.position()), (1, 2));
    }
    let test = open();
    every_kind!(check, &test.device);
}

#[test]
fn each_layer_has_its_own_cache() {
    fn check<F: KvCacheFactory>(factory: &F, device: &Device) {
        let mut caches: Vec<F::Cache> = (0..3)
            .map(|layer| factory.layer(layer, 2, MAX_SEQ_LEN).unwrap())
            .collect();
        for (layer, cache) in caches.iter_mut().enumerate() {
            let token = tokens(&[layer as u32], false, device);
            let (k, _) = cache.append(&token, &token).unwrap();
            expect_tokens(&k, &[layer as u32], device);
        }
    }
    let test = open();
    every_kind!(check, &test.device);
}

#[test]
fn errors_go_to_candle_and_back_whole() {
    let refused = Error::UnsupportedDTypeForOp(DType::U8, "test");
    let there: Error = VmmError::CandleError(refused).into();
    assert!(matches!(
        there,
        Error::UnsupportedDTypeForOp(DType::U8, "test")
    ));
    let there: Error = VmmError::InvalidPageSize(3).into();
    let text = VmmError::InvalidPageSize(3).to_string();
    assert!(there.to_string().contains(&text), "{there}");
    let found = VmmError::find(&there);
    assert!(matches!(found, Some(VmmError::InvalidPageSize(3))));
}
