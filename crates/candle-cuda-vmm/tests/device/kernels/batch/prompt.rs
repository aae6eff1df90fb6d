//! Chunks of prompts, compared with `gqa` on contiguous copies.

use super::layouts::Layout;
use super::numbers;
use super::random::{Case, Random};
use crate::common::open;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::attention::{DecodePlan, Mask, PromptSpan, decode, gqa_with, prompt};

/// Chunks: a whole prompt, one after cached tokens, one token, a sequence again, and none of
/// sequence 1.
const SPANS: [PromptSpan; 5] = [
    PromptSpan::new(2, 64, 64),
    PromptSpan::new(0, 9, 33),
    PromptSpan::new(3, 1, 17),
    PromptSpan::new(0, 16, 16),
    PromptSpan::new(3, 3, 10),
];

/// Runs a prompt of spans in all of the cases' layouts, and compares it with contiguous copies.
fn check(case: &Case, spans: &[PromptSpan], seed: u64, device: &Device) {
    // All rows are stored, as chunks see other rows than a decode step.
    let stored = Case {
        mask: Mask::Causal,
        ..case.clone()
    };
    let random = stored.random(seed);
    let stored = random.store(seed, device);
    let queries: usize = spans.iter().map(|span| span.queries).sum();
    let shape = (queries, case.query_heads, case.dim);
    let q = Tensor::randn(0f32, 1., shape, device)
        .unwrap()
        .to_dtype(case.dtype)
        .unwrap();
    let ours = prompt(&q, &stored.kv, spans, &case.options()).unwrap();
    let shape = [queries, case.query_heads, case.value_dim];
    assert_eq!((ours.dims(), ours.dtype()), (&shape[..], case.dtype));
    assert!(ours.is_contiguous());
    let expected = expected(&random, case, &q, spans);
    let name = format!("{case:?}");
    super::assert_close(
        &numbers(&ours),
        &expected,
        super::allowed(case.dtype),
        &name,
    );
}

/// Computes each span by `gqa_with` in F32 on the CPU.
fn expected(random: &Random, case: &Case, q: &Tensor, spans: &[PromptSpan]) -> Vec<f64> {
    let q = q
        .to_device(&Device::Cpu)
        .unwrap()
        .to_dtype(DType::F32)
        .unwrap();
    let mut first = 0;
    let mut all = Vec::new();
    for span in spans {
        let q = q.narrow(0, first, span.queries).unwrap();
        first += span.queries;
        let copy = |numbers: &[Vec<f32>], dim: usize, scale: f32| {
            let numbers = &numbers[span.sequence][..span.keys * case.kv_heads * dim];
            let numbers = numbers.iter().map(|number| number * scale);
            let copy = Tensor::from_iter(numbers, &Device::Cpu).unwrap();
            let copy = copy.reshape((1, span.keys, case.kv_heads, dim)).unwrap();
            copy.transpose(1, 2).unwrap().contiguous().unwrap()
        };
        let k = copy(&random.k, case.dim, case.scales[0]);
        let v = copy(&random.v, case.value_dim, case.scales[1]);
        let q = q.transpose(0, 1).unwrap().unsqueeze(0).unwrap();
        let result = gqa_with(&q, &k, &v, &case.options()).unwrap();
        let result = result.squeeze(0).unwrap().transpose(0, 1).unwrap();
        all.extend(
            numbers(&result.contiguous().unwrap())
                .into_iter()
                .map(f64::from),
        );
    }
    all
}

#[test]
fn chunks_of_several_sequences_see_what_is_cached_and_themselves() {
    let test = open();
    let dtypes = [
        (DType::F32, DType::F32),
        (DType::F16, DType::F16),
        (DType::BF16, DType::BF16),
        (DType::F16, DType::F8E4M3),
        (DType::BF16, DType::F8E4M3),
    ];
    let masks = [
        Mask::Causal,
        Mask::Window(1),
        Mask::Window(7),
        Mask::Window(20),
        Mask::Window(1000),
        Mask::None,
    ];
    for (number, layout) in Layout::ALL.into_iter().enumerate() {
        for (turn, mask) in masks.into_iter().enumerate() {
            let (dtype, stored) = dtypes[(number + turn) % dtypes.len()];
            let case = Case {
                dtype,
                stored,
                dim: 32,
                value_dim: [32, 16][turn % 2],
                mask,
                soft_cap: [None, Some(2.)][number % 2],
                scales: match stored {
                    DType::F8E4M3 => [0.5, 0.25],
                    _ => [1.; 2],
                },
                ..Case::new(layout, &[33, 1, 64, 17])
            };
            check(&case, &SPANS, turn as u64, &test.device);
        }
    }
}

#[test]
fn a_long_chunk_with_a_window_gathers_few_blocks_at_a_time() {
    let test = open();
    let case = Case {
        query_heads: 2,
        kv_heads: 1,
        dim: 8,
        value_dim: 8,
        mask: Mask::Window(20),
        ..Case::new(Layout::Blocks(16), &[700])
    };
    let spans = [PromptSpan::new(0, 600, 690)];
    check(&case, &spans, 1, &test.device);
}

#[test]
fn a_chunk_of_one_query_is_a_decode_step() {
    let test = open();
    if !super::has_attention(&test) {
        return;
    }
    for (turn, layout) in Layout::ALL.into_iter().enumerate() {
        let case = Case {
            mask: [Mask::Causal, Mask::Window(30)][turn % 2],
            ..Case::new(layout, &[40, 1, 65])
        };
        let random = case.random(turn as u64);
        // The rows before the window are NaN, and their blocks are not in the table.
        let stored = random.store(1, &test.device);
        let q = random.queries(&test.device);
        let plan = DecodePlan::new(&test.device, 3, 4).unwrap();
        let decoded = decode(&q, &stored.kv, &case.options(), &plan).unwrap();
        let lengths = case.lengths.iter().enumerate();
        let spans: Vec<_> = lengths
            .map(|(sequence, length)| PromptSpan::new(sequence, 1, *length))
            .collect();
        let prompted = prompt(&q, &stored.kv, &spans, &case.options()).unwrap();
        let expected: Vec<_> = numbers(&decoded).into_iter().map(f64::from).collect();
        super::assert_close(&numbers(&prompted), &expected, 2e-5, &format!("{case:?}"));
    }
}

#[test]
fn no_spans_give_nothing() {
    let test = open();
    let case = Case::new(Layout::Blocks(16), &[5]);
    let stored = case.random(1).store(1, &test.device);
    let q = Tensor::zeros((0, 4, case.dim), DType::F32, &test.device).unwrap();
    let out = prompt(&q, &stored.kv, &[], &case.options()).unwrap();
    assert_eq!(out.dims(), [0, 4, case.value_dim]);
}
