//! Decode steps, writes and prompts that do not fit.

use super::super::{has_attention, numbers};
use super::{candle, index, refused, refused_by_candle, zeros};
use crate::common::open;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::attention::{
    DecodePlan, GqaOptions, KvBatch, Mask, PromptSpan, Rotary, Slots, decode, prompt, write,
};
use candle_cuda_vmm::cuda_vmm::DriverKind;
use candle_cuda_vmm::{BlockError, VmmError, cuda_vmm};

#[test]
fn decode_steps_that_do_not_fit() {
    let test = open();
    if !has_attention(&test) {
        return;
    }
    let f32 = |shape: &[usize]| zeros(&test, shape, DType::F32);
    let kv = f32(&[2, 2, 8, 16]);
    let kv = KvBatch::rows(&kv, &kv).unwrap();
    let plan = DecodePlan::new(&test.device, 2, 4).unwrap();
    let options = GqaOptions::new(1.);
    let run = |q: &Tensor| decode(q, &kv, &options, &plan);
    let q = f32(&[2, 4, 16]);
    run(&q).unwrap();

    refused_by_candle(
        run(&zeros(&test, &[2, 4, 16], DType::F64)),
        "unsupported dtype F64 for op decode",
    );
    refused_by_candle(
        run(&zeros(&test, &[2, 4, 16], DType::F16)),
        "dtype mismatch in decode, lhs: F16, rhs: F32",
    );
    refused_by_candle(run(&f32(&[2, 4, 1, 16])), "unexpected rank, expected");
    refused_by_candle(run(&f32(&[2, 0, 16])), "empty tensor for");
    for shape in [[1, 4, 16], [3, 4, 16], [2, 3, 16], [2, 1, 16], [2, 4, 8]] {
        refused_by_candle(
            run(&f32(&shape)),
            &format!("shape mismatch in decode, lhs: {shape:?}, rhs: [2, 2, 8, 16]"),
        );
    }
    // F8E4M3 goes with F16 and BF16.
    let stored = zeros(&test, &[2, 2, 8, 16], DType::F8E4M3);
    let stored = KvBatch::rows(&stored, &stored).unwrap();
    refused_by_candle(
        decode(&q, &stored, &options, &plan),
        "dtype mismatch in decode, lhs: F32, rhs: F8E4M3",
    );
    refused(
        decode(&q, &kv, &options.mask(Mask::Window(0)), &plan),
        &VmmError::InvalidAttention {
            option: "window",
            value: 0.,
        },
    );
    refused(
        run(&f32(&[2, 6, 16])),
        &VmmError::BeyondPlan {
            heads: 12,
            heads_max: 8,
        },
    );
    // A plan for more heads of fewer sequences has enough memory.
    let other = DecodePlan::new(&test.device, 1, 8).unwrap();
    decode(&q, &kv, &options, &other).unwrap();
    if test.kind == DriverKind::Real {
        let on_cpu = DecodePlan::new(&Device::Cpu, 2, 4).unwrap();
        refused(
            decode(&q, &kv, &options, &on_cpu),
            &VmmError::PlanOnAnotherDevice,
        );
        refused_by_candle(
            run(&q.to_device(&Device::Cpu).unwrap()),
            "device mismatch in",
        );
        for (dim, value_dim) in [(18, 16), (16, 18), (272, 16), (16, 272)] {
            let (k, v) = (f32(&[2, 2, 8, dim]), f32(&[2, 2, 8, value_dim]));
            let kv = KvBatch::rows(&k, &v).unwrap();
            refused(
                decode(&f32(&[2, 4, dim]), &kv, &options, &plan),
                &VmmError::UnsupportedHead {
                    dim,
                    value_dim,
                    dtype: DType::F32,
                },
            );
        }
    }
    candle(DecodePlan::new(&test.device, 0, 4), "empty tensor for");
    candle(DecodePlan::new(&test.device, 4, 0), "empty tensor for");

    let tables = zeros(&test, &[2, 1], DType::U32);
    let blocks = f32(&[1, 16, 2, 16]);
    let paged = KvBatch::blocks(&blocks, &blocks, &tables).unwrap();
    refused(
        decode(&q, &paged, &options, &plan),
        &VmmError::MissingLengths,
    );
    // What the CPU always finds, and a GPU in builds that check.
    if test.kind == DriverKind::Real && !cfg!(debug_assertions) {
        return;
    }
    let lengths = |lengths: &[u32]| {
        let kv = kv.clone().lengths(&index(&test, lengths)).unwrap();
        decode(&q, &kv, &options, &plan)
    };
    let beyond = VmmError::LengthBeyondCapacity {
        sequence: 0,
        length: 9,
        capacity: 8,
    };
    refused(lengths(&[9, 1]), &beyond);
}

#[test]
fn writes_that_do_not_fit_change_nothing() {
    let test = open();
    if !has_attention(&test) {
        return;
    }
    let f32 = |shape: &[usize]| zeros(&test, shape, DType::F32);
    let memory = Tensor::randn(0f32, 1., (2, 2, 8, 16), &test.device).unwrap();
    let values = memory.copy().unwrap();
    let before = numbers(&memory);
    let kv = KvBatch::rows(&memory, &values).unwrap();
    let kv = kv.lengths(&index(&test, &[3, 8])).unwrap();
    let (q, new) = (f32(&[2, 4, 16]), f32(&[2, 2, 16]));
    let run = |q: &Tensor, k: &Tensor, v: &Tensor| write(q, k, v, None, &kv, Slots::Last);

    let half = zeros(&test, &[2, 2, 16], DType::F16);
    refused_by_candle(run(&q, &half, &new), "dtype mismatch in");
    refused_by_candle(run(&q, &new, &half), "dtype mismatch in");
    refused_by_candle(run(&f32(&[2, 4, 8]), &new, &new), "shape mismatch in");
    for shape in [[1, 2, 16], [2, 1, 16], [2, 2, 8]] {
        let other = f32(&shape);
        refused_by_candle(run(&q, &other, &new), "shape mismatch in");
        refused_by_candle(run(&q, &new, &other), "shape mismatch in");
    }
    refused_by_candle(run(&f32(&[4, 16]), &new, &new), "unexpected rank, expected");
    let (more_q, more) = (f32(&[3, 4, 16]), f32(&[3, 2, 16]));
    refused_by_candle(run(&more_q, &more, &more), "shape mismatch in");
    let without = KvBatch::rows(&memory, &values).unwrap();
    refused(
        write(&q, &new, &new, None, &without, Slots::Last),
        &VmmError::MissingLengths,
    );
    let expanded = memory.narrow(0, 0, 1).unwrap();
    let expanded = expanded.expand((2, 2, 8, 16)).unwrap();
    let broadcast = KvBatch::rows(&values, &expanded).unwrap();
    let broadcast = broadcast.lengths(&index(&test, &[3, 8])).unwrap();
    refused_by_candle(
        write(&q, &new, &new, None, &broadcast, Slots::Last),
        "write only supports contiguous",
    );

    // Rotary tables.
    let table = |dim: usize| Rotary::new(&f32(&[5, dim / 2]), &f32(&[5, dim / 2])).unwrap();
    let positions = index(&test, &[0, 4]);
    let with = |rotary: &Rotary, positions: &Tensor| {
        write(&q, &new, &new, Some((rotary, positions)), &kv, Slots::Last)
    };
    refused_by_candle(with(&table(18), &positions), "shape mismatch in");
    refused_by_candle(with(&table(16), &index(&test, &[0])), "shape mismatch in");
    refused_by_candle(
        with(&table(16), &zeros(&test, &[2], DType::I64)),
        "unsupported dtype I64 for op",
    );
    candle(
        Rotary::new(&f32(&[5, 4]), &f32(&[5, 3])),
        "shape mismatch in",
    );
    candle(
        Rotary::new(&f32(&[0, 4]), &f32(&[0, 4])),
        "empty tensor for",
    );
    let half = zeros(&test, &[5, 4], DType::F16);
    candle(Rotary::new(&half, &half), "unsupported dtype F16 for op");
    let across = f32(&[4, 5]).t().unwrap();
    candle(
        Rotary::new(&across, &across),
        "rotary only supports contiguous",
    );
    candle(
        Rotary::new(&f32(&[5]), &f32(&[5])),
        "unexpected rank, expected",
    );

    // Slots.
    let at = |sequences: &[u32], rows: &[u32]| {
        let (sequences, rows) = (index(&test, sequences), index(&test, rows));
        let slots = Slots::At {
            sequences: &sequences,
            rows: &rows,
        };
        write(&q, &new, &new, None, &kv, slots)
    };
    refused_by_candle(at(&[0], &[0, 1]), "shape mismatch in");
    refused_by_candle(at(&[0, 1], &[0]), "shape mismatch in");
    if test.kind == DriverKind::Simulated || cfg!(debug_assertions) {
        refused(
            with(&table(16), &index(&test, &[4, 5])),
            &VmmError::UnknownPosition {
                token: 1,
                position: 5,
                positions_max: 5,
            },
        );
        let unknown = VmmError::UnknownSequence {
            sequence: 2,
            batch: 2,
        };
        refused(at(&[0, 2], &[0, 0]), &unknown);
        let beyond = VmmError::RowBeyondCapacity {
            token: 1,
            sequence: 0,
            row: 8,
            capacity: 8,
        };
        refused(at(&[1, 0], &[7, 8]), &beyond);
        let lengths = |lengths: &[u32]| {
            let kv = kv.clone().lengths(&index(&test, lengths)).unwrap();
            write(&q, &new, &new, None, &kv, Slots::Last)
        };
        let beyond = VmmError::LengthBeyondCapacity {
            sequence: 1,
            length: 9,
            capacity: 8,
        };
        refused(lengths(&[1, 9]), &beyond);
        let blocks = f32(&[2, 16, 2, 16]);
        let tables = Tensor::new(&[[0u32], [2]], &test.device).unwrap();
        let paged = KvBatch::blocks(&blocks, &blocks, &tables).unwrap();
        let paged = paged.lengths(&index(&test, &[1, 1])).unwrap();
        let invalid = BlockError::Invalid {
            block: 2,
            blocks: 2,
        };
        refused(
            write(&q, &new, &new, None, &paged, Slots::Last),
            &VmmError::Vmm(cuda_vmm::VmmError::Block(invalid)),
        );
    }
    assert_eq!(numbers(&memory), before);
    assert_eq!(numbers(&values), before);
    run(&q, &new, &new).unwrap();
    assert_ne!(numbers(&memory), before);
}

#[test]
fn prompts_that_do_not_fit() {
    let test = open();
    let f32 = |shape: &[usize]| zeros(&test, shape, DType::F32);
    let kv = f32(&[2, 2, 8, 16]);
    let kv = KvBatch::rows(&kv, &kv).unwrap();
    let options = GqaOptions::new(1.).mask(Mask::Causal);
    let q = f32(&[3, 4, 16]);
    let run = |spans: &[PromptSpan]| prompt(&q, &kv, spans, &options);
    run(&[PromptSpan::new(0, 3, 8)]).unwrap();

    for (span, queries, keys) in [(0, 0, 3), (1, 4, 3), (1, 0, 0)] {
        let mut spans = [PromptSpan::new(0, 3, 3), PromptSpan::new(1, 1, 1)];
        spans[span] = PromptSpan::new(1, queries, keys);
        refused(
            run(&spans),
            &VmmError::InvalidSpan {
                span,
                queries,
                keys,
            },
        );
    }
    let unknown = VmmError::UnknownSequence {
        sequence: 2,
        batch: 2,
    };
    refused(run(&[PromptSpan::new(2, 3, 3)]), &unknown);
    let beyond = VmmError::LengthBeyondCapacity {
        sequence: 1,
        length: 9,
        capacity: 8,
    };
    refused(run(&[PromptSpan::new(1, 3, 9)]), &beyond);
    for spans in [&[][..], &[PromptSpan::new(0, 2, 2)]] {
        let queries: usize = spans.iter().map(|span| span.queries).sum();
        refused_by_candle(
            run(spans),
            &format!("shape mismatch in prompt, lhs: [3, 4, 16], rhs: [{queries}, 4, 16]"),
        );
    }
    refused(
        prompt(&q, &kv, &[PromptSpan::new(0, 3, 3)], &options.soft_cap(0.)),
        &VmmError::InvalidAttention {
            option: "soft cap",
            value: 0.,
        },
    );
    let spans = [PromptSpan::new(0, 3, 3)];
    for shape in [[3, 3, 16], [3, 4, 8]] {
        refused_by_candle(
            prompt(&f32(&shape), &kv, &spans, &options),
            "shape mismatch in",
        );
    }
    refused_by_candle(
        prompt(&f32(&[3, 0, 16]), &kv, &spans, &options),
        "empty tensor for",
    );
    refused_by_candle(
        prompt(
            &zeros(&test, &[3, 4, 16], DType::F16),
            &kv,
            &spans,
            &options,
        ),
        "dtype mismatch in",
    );

    // With a window only the blocks that queries see must exist.
    if test.kind == DriverKind::Real && !cfg!(debug_assertions) {
        return;
    }
    let blocks = f32(&[2, 16, 2, 16]);
    let tables = Tensor::new(&[[9u32, 1, 0]], &test.device).unwrap();
    let paged = KvBatch::blocks(&blocks, &blocks, &tables).unwrap();
    let spans = [PromptSpan::new(0, 3, 48)];
    let invalid = BlockError::Invalid {
        block: 9,
        blocks: 2,
    };
    refused(
        prompt(&q, &paged, &spans, &options),
        &VmmError::Vmm(cuda_vmm::VmmError::Block(invalid)),
    );
    let window = options.mask(Mask::Window(30));
    prompt(&q, &paged, &spans, &window).unwrap();
}
