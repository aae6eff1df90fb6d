//! Attention with a sliding window, a soft cap, and heads of K and V that differ in size.

use super::attention::{Case, KvLayout, case, difference, reference};
use crate::common::layouts::Layout;
use crate::common::open;
use candle_core::{DType, Device, Error, Tensor};
use candle_cuda_vmm::attention::{GqaOptions, Mask, gqa_with};
use candle_cuda_vmm::kv_cache::{KvCache, KvCacheFactory};
use candle_cuda_vmm::{TensorPool, VmmError};

/// Decode steps, prompts, prompts after other tokens; one sequence and several.
const CASES: [Case; 8] = [
    case(1, (8, 2), (1, 33), 64),
    case(1, (4, 4), (1, 1), 16),
    case(1, (8, 2), (17, 17), 64),
    case(3, (8, 2), (1, 20), 32),
    case(3, (4, 1), (5, 40), 16),
    case(2, (6, 3), (9, 12), 32),
    // More queries than a part has if there is a window.
    case(1, (2, 1), (300, 310), 8),
    // Few long rows, for which a GPU uses another softmax.
    case(1, (4, 2), (1, 4100), 8),
];

fn random(shape: (usize, usize, usize, usize), device: &Device) -> Tensor {
    Tensor::randn(0f32, 1., shape, device).unwrap()
}

#[test]
fn every_option_is_what_the_steps_of_models_give() {
    let test = open();
    let device = &test.device;
    for (dtype, allowed) in [(DType::F32, 2e-5), (DType::F16, 4e-3), (DType::BF16, 3e-2)] {
        for (number, case) in CASES.into_iter().enumerate() {
            // Smaller heads of V, then larger ones.
            let value_dim = [case.dim / 2, case.dim, case.dim + 8][number % 3];
            let layout = KvLayout::ALL[number % 4];
            let q = random(
                (case.batch, case.query_heads, case.queries, case.dim),
                device,
            );
            let q = q.to_dtype(dtype).unwrap();
            let k = layout.random(case, dtype, device).unwrap();
            let values = Case {
                dim: value_dim,
                ..case
            };
            let v = layout.random(values, dtype, device).unwrap();
            let windows = [1, 2, case.queries, 16, case.keys - 1, case.keys, usize::MAX];
            let windows = windows.into_iter().filter(|window| *window > 0);
            let masks = windows.map(Mask::Window).chain([Mask::None, Mask::Causal]);
            for (turn, mask) in masks.enumerate() {
                let mut options = GqaOptions::new(1. / (case.dim as f32).sqrt()).mask(mask);
                options.soft_cap = [None, Some(0.7), Some(30.)][(number + turn) % 3];
                let ours = gqa_with(&q, &k, &v, &options).unwrap();
                let shape = [case.batch, case.query_heads, case.queries, value_dim];
                assert_eq!((ours.dims(), ours.dtype()), (&shape[..], dtype));
                let windowed = match mask {
                    // What the reference adds must not overflow.
                    Mask::Window(window) => Mask::Window(window.min(case.keys)),
                    mask => mask,
                };
                let expected = reference(&q, &k, &v, &options.mask(windowed)).unwrap();
                let off = difference(&ours, &expected).unwrap();
                assert!(
                    off <= allowed,
                    "{off} off: {dtype:?} {case:?} {layout:?} {options:?}"
                );
            }
        }
    }
}

#[test]
fn chunks_over_a_cache_that_releases_its_front_give_what_the_prompt_gives() {
    const TOKENS: usize = 50;
    let test = open();
    let device = &test.device;
    for (window, batch) in [(1, 1), (7, 3), (16, 1), (64, 3)] {
        let (q, k) = (
            random((batch, 4, TOKENS, 8), device),
            random((batch, 2, TOKENS, 8), device),
        );
        let v = random((batch, 2, TOKENS, 4), device);
        let options = GqaOptions::new(0.4).mask(Mask::Window(window)).soft_cap(5.);
        let whole = gqa_with(&q, &k, &v, &options).unwrap();
        let pool = TensorPool::new(device).unwrap();
        let token = [(batch, 2, 8), (batch, 2, 4)];
        let one_range = Layout::OneRange.sequence(&pool, 2, token, DType::F32);
        let one_range = one_range.unwrap();
        for (chunk, layer) in [
            (1, None),
            (3, None),
            (20, None),
            (1, Some(0)),
            (20, Some(1)),
        ] {
            let mut cache: Box<dyn KvCache> = match layer {
                None => Box::new(pool.kv_cache(2, TOKENS)),
                Some(layer) => Box::new(one_range.layer(layer, 2, TOKENS).unwrap()),
            };
            let mut parts = Vec::new();
            while cache.position() < TOKENS {
                let first = cache.position();
                let count = chunk.min(TOKENS - first);
                let [q, k, v] = [&q, &k, &v].map(|all| all.narrow(2, first, count).unwrap());
                let (k, v) = cache.append(&k, &v).unwrap();
                parts.push(gqa_with(&q, &k, &v, &options).unwrap());
                // The next query sees its own key and these.
                let kept = cache.current_seq_len().min(window - 1);
                cache.release_front(cache.current_seq_len() - kept).unwrap();
            }
            let parts = Tensor::cat(&parts, 2).unwrap();
            assert!(
                difference(&parts, &whole).unwrap() < 1e-5,
                "{window} {chunk} {layer:?}"
            );
        }
    }
}

#[test]
fn a_window_reads_no_key_that_no_query_sees() {
    let test = open();
    let device = &test.device;
    let (q, kv) = (random((1, 2, 3, 4), device), random((1, 2, 20, 4), device));
    // Keys 13 to 19 are seen. What is not a number would spread to every sum.
    let poison = Tensor::full(f32::NAN, (1, 2, 13, 4), device).unwrap();
    let poisoned = Tensor::cat(&[&poison, &kv.narrow(2, 13, 7).unwrap()], 2).unwrap();
    let options = GqaOptions::new(0.5).mask(Mask::Window(5));
    let expected = gqa_with(&q, &kv, &kv, &options).unwrap();
    let ours = gqa_with(&q, &poisoned, &poisoned, &options).unwrap();
    assert_eq!(difference(&ours, &expected).unwrap(), 0.);
}

#[test]
fn options_that_are_not_valid_are_refused_by_name() {
    let test = open();
    let q = Tensor::zeros((1, 4, 2, 8), DType::F32, &test.device).unwrap();
    let kv = |shape: (usize, usize, usize, usize)| {
        Tensor::zeros(shape, DType::F32, &test.device).unwrap()
    };
    let (k, v) = (kv((1, 2, 3, 8)), kv((1, 2, 3, 5)));
    let error = |options: GqaOptions| gqa_with(&q, &k, &v, &options).unwrap_err();
    let options = GqaOptions::new(1.);
    match VmmError::find(&error(options.mask(Mask::Window(0)))) {
        Some(VmmError::InvalidAttention { option, value }) => {
            assert_eq!((*option, *value), ("window", 0.));
        }
        other => panic!("{other:?}"),
    }
    for cap in [0., -0., -3., f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let error = error(options.soft_cap(cap));
        match VmmError::find(&error) {
            Some(VmmError::InvalidAttention { option, value }) => {
                assert_eq!((*option, value.to_bits()), ("soft cap", cap.to_bits()));
            }
            other => panic!("{other:?}"),
        }
        assert!(error.to_string().contains("soft cap"), "{error}");
    }
    // Sizes of V that do not fit K, and none.
    for shape in [(1, 2, 4, 5), (1, 4, 3, 5), (2, 2, 3, 5)] {
        match gqa_with(&q, &k, &kv(shape), &options).unwrap_err() {
            Error::ShapeMismatchBinaryOp {
                lhs,
                rhs,
                op: "gqa",
            } => {
                assert_eq!((&lhs, rhs), (k.shape(), shape.into()));
            }
            other => panic!("{other}"),
        }
    }
    let none = kv((1, 2, 3, 0));
    assert!(matches!(
        gqa_with(&q, &k, &none, &options).unwrap_err(),
        Error::EmptyTensor { op: "gqa" }
    ));
    // More queries than keys have no positions.
    let one = kv((1, 2, 1, 8));
    assert!(matches!(
        gqa_with(&q, &one, &one, &options.mask(Mask::Window(2))).unwrap_err(),
        Error::ShapeMismatchBinaryOp { op: "gqa", .. }
    ));
}
