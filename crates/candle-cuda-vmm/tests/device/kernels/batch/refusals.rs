//! What does not fit is refused by name, and changes nothing.

use super::has_attention;
use crate::common::{UnderTest, open};
use candle_core::{DType, Device, Error, Result, Tensor};
use candle_cuda_vmm::attention::{
    DecodePlan, GqaOptions, KvBatch, Mask, PromptSpan, Rotary, Slots, decode, prompt, write,
};
use candle_cuda_vmm::cuda_vmm::DriverKind;
use candle_cuda_vmm::{BlockError, TensorPool, VmmError, cuda_vmm};

fn zeros(test: &UnderTest, shape: &[usize], dtype: DType) -> Tensor {
    Tensor::zeros(shape, dtype, &test.device).unwrap()
}

fn index(test: &UnderTest, numbers: &[u32]) -> Tensor {
    Tensor::new(numbers, &test.device).unwrap()
}

/// Fails unless the result is exactly this error, with these numbers.
#[track_caller]
fn refused<T>(result: Result<T>, expected: &VmmError) {
    match result.map(|_| ()) {
        Err(error) => {
            let found = VmmError::find(&error).unwrap_or_else(|| panic!("{error}"));
            assert_eq!(format!("{found:?}"), format!("{expected:?}"));
        }
        Ok(()) => panic!("expected {expected:?}, got success"),
    }
}

/// Fails unless the result is an error of Candle whose text begins with this. The text has all
/// values.
#[track_caller]
fn refused_by_candle<T>(result: Result<T>, expected: &str) {
    let error = match result.map(|_| ()) {
        Err(Error::WithBacktrace { inner, .. }) => *inner,
        Err(error) => error,
        Ok(()) => panic!("expected {expected}, got success"),
    };
    let found = error.to_string();
    assert!(found.starts_with(expected), "{found} instead of {expected}");
}

/// The same, for a function that returns this crate's result.
#[track_caller]
fn candle<T>(result: candle_cuda_vmm::Result<T>, expected: &str) {
    match result.map(|_| ()) {
        Err(VmmError::CandleError(error)) => refused_by_candle::<()>(Err(error), expected),
        other => panic!("expected {expected}, got {other:?}"),
    }
}

#[track_caller]
fn ours<T>(result: candle_cuda_vmm::Result<T>, expected: &VmmError) {
    refused(result.map_err(Error::from), expected);
}

#[test]
fn tensors_that_are_no_batch() {
    let test = open();
    let f32 = |shape: &[usize]| zeros(&test, shape, DType::F32);
    let kv = f32(&[2, 2, 8, 16]);
    let whole = zeros(&test, &[2, 2, 8, 16], DType::F64);
    candle(
        KvBatch::rows(&whole, &whole),
        "unsupported dtype F64 for op",
    );
    let half = zeros(&test, &[2, 2, 8, 16], DType::F16);
    candle(KvBatch::rows(&kv, &half), "dtype mismatch in");
    let flat = f32(&[2, 8, 16]);
    candle(KvBatch::rows(&flat, &kv), "unexpected rank, expected");
    candle(KvBatch::rows(&kv, &flat), "unexpected rank, expected");
    for other in [[1, 2, 8, 16], [2, 1, 8, 16], [2, 2, 7, 16]] {
        candle(KvBatch::rows(&kv, &f32(&other)), "shape mismatch in");
    }
    for shape in [[0, 2, 8, 16], [2, 0, 8, 16], [2, 2, 0, 16], [2, 2, 8, 0]] {
        let empty = f32(&shape);
        candle(KvBatch::rows(&empty, &empty), "empty tensor for");
    }
    let across = f32(&[2, 2, 16, 8]).transpose(2, 3).unwrap();
    candle(
        KvBatch::rows(&across, &kv),
        "kv_batch only supports contiguous",
    );
    candle(
        KvBatch::rows(&kv, &across),
        "kv_batch only supports contiguous",
    );
    if test.kind == DriverKind::Real {
        let on_cpu = kv.to_device(&Device::Cpu).unwrap();
        candle(KvBatch::rows(&kv, &on_cpu), "device mismatch in");
    }
}

#[test]
fn caches_that_do_not_go_together() {
    let test = open();
    let token_major = |capacity: usize, heads: usize, dim: usize| {
        let tensor = zeros(&test, &[1, capacity, heads, dim], DType::F32);
        tensor.transpose(1, 2).unwrap()
    };
    candle(KvBatch::sequences(&[]), "empty tensor for");
    let pair = |tensor: &Tensor| (tensor.clone(), tensor.clone());
    let first = pair(&token_major(8, 2, 16));
    for other in [token_major(8, 1, 16), token_major(8, 2, 32)] {
        let pairs = [first.clone(), pair(&other)];
        candle(KvBatch::sequences(&pairs), "shape mismatch in");
    }
    let other = (first.0.clone(), token_major(8, 2, 32));
    candle(
        KvBatch::sequences(&[first.clone(), other]),
        "shape mismatch in",
    );
    let two = pair(&zeros(&test, &[2, 2, 8, 16], DType::F32));
    candle(KvBatch::sequences(&[two.clone(), two]), "shape mismatch in");
    let half = pair(&zeros(&test, &[1, 2, 8, 16], DType::F16));
    candle(
        KvBatch::sequences(&[first.clone(), half]),
        "dtype mismatch in",
    );
    let head_major = pair(&zeros(&test, &[1, 2, 8, 16], DType::F32));
    ours(
        KvBatch::sequences(&[first.clone(), first.clone(), head_major]),
        &VmmError::DifferentStrides {
            sequence: 2,
            strides: vec![128, 16, 128, 16],
            expected: vec![16, 32, 16, 32],
        },
    );
    // A stride between things of which there is one may be any.
    let one_token = pair(&zeros(&test, &[1, 2, 1, 16], DType::F32));
    let kv = KvBatch::sequences(&[one_token, first]).unwrap();
    assert_eq!((kv.batch(), kv.capacity()), (2, 8));
}

#[test]
fn blocks_tables_lengths_and_scales_that_do_not_fit() {
    let test = open();
    let blocks = |size: usize| zeros(&test, &[4, size, 2, 16], DType::F32);
    let tables = zeros(&test, &[2, 3], DType::U32);
    for size in [1, 8, 15, 24, 100, 272] {
        let blocks = blocks(size);
        ours(
            KvBatch::blocks(&blocks, &blocks, &tables),
            &VmmError::UnsupportedBlockSize { size },
        );
    }
    let blocks = blocks(16);
    let with = |tables: &Tensor| KvBatch::blocks(&blocks, &blocks, tables);
    candle(
        with(&zeros(&test, &[2, 3], DType::I64)),
        "unsupported dtype I64 for op",
    );
    candle(
        with(&zeros(&test, &[3], DType::U32)),
        "unexpected rank, expected",
    );
    candle(
        with(&tables.t().unwrap()),
        "kv_batch only supports contiguous",
    );
    candle(with(&zeros(&test, &[0, 3], DType::U32)), "empty tensor for");
    candle(with(&zeros(&test, &[2, 0], DType::U32)), "empty tensor for");

    let kv = with(&tables).unwrap();
    let lengths = |lengths: &Tensor| kv.clone().lengths(lengths);
    candle(
        lengths(&zeros(&test, &[2], DType::I64)),
        "unsupported dtype I64 for op",
    );
    candle(lengths(&index(&test, &[1, 1, 1])), "shape mismatch in");
    candle(
        lengths(&zeros(&test, &[2, 1], DType::U32)),
        "unexpected rank, expected",
    );
    candle(kv.clone().scales(1., 1.), "unsupported dtype F32 for op");
    let stored = zeros(&test, &[4, 16, 2, 16], DType::F8E4M3);
    let stored = KvBatch::blocks(&stored, &stored, &tables).unwrap();
    for (k_scale, v_scale, option, value) in [
        (0., 1., "scale of K", 0.),
        (1., -1., "scale of V", -1.),
        (1., f32::INFINITY, "scale of V", f32::INFINITY),
        (f32::NAN, 1., "scale of K", f32::NAN),
    ] {
        ours(
            stored.clone().scales(k_scale, v_scale),
            &VmmError::InvalidAttention { option, value },
        );
    }
    assert_eq!(
        (kv.batch(), kv.kv_heads(), kv.dim(), kv.value_dim()),
        (2, 2, 16, 16)
    );
    assert_eq!((kv.capacity(), kv.dtype()), (48, DType::F32));
    assert_eq!(kv.device().location(), test.device.location());
}

#[test]
fn lengths_and_tables_that_a_check_finds() {
    let test = open();
    let rows = zeros(&test, &[3, 2, 8, 16], DType::F32);
    let rows = KvBatch::rows(&rows, &rows).unwrap();
    rows.check().unwrap();
    let check = |lengths: &[u32]| {
        let kv = rows.clone().lengths(&index(&test, lengths)).unwrap();
        kv.check()
    };
    check(&[1, 8, 5]).unwrap();
    ours(check(&[1, 8, 0]), &VmmError::EmptySequence { sequence: 2 });
    let beyond = VmmError::LengthBeyondCapacity {
        sequence: 1,
        length: 9,
        capacity: 8,
    };
    ours(check(&[1, 9, 0]), &beyond);

    let pool = TensorPool::new(&test.device).unwrap();
    let entries = ["k", "v"].map(|name| (name, (16, 2, 16), DType::F32));
    let blocks = pool.blocks(8, entries).unwrap();
    blocks.back(0..4).unwrap();
    blocks.unback([2]).unwrap();
    // SAFETY: no operation reads the tensors.
    #[allow(unsafe_code)]
    let tensors = unsafe { blocks.reserved_tensors() }.unwrap();
    let check = |tables: [[u32; 2]; 2], lengths: &[u32]| {
        let tables = Tensor::new(&tables, &test.device).unwrap();
        let kv = KvBatch::blocks(&tensors[0], &tensors[1], &tables).unwrap();
        let kv = kv.lengths(&index(&test, lengths)).unwrap();
        kv.checked_by(&blocks).check()
    };
    check([[0, 1], [3, 99]], &[32, 16]).unwrap();
    let block = |error| VmmError::Vmm(cuda_vmm::VmmError::Block(error));
    let invalid = block(BlockError::Invalid {
        block: 99,
        blocks: 8,
    });
    ours(check([[0, 1], [3, 99]], &[32, 17]), &invalid);
    let bare = block(BlockError::NotBacked { block: 2 });
    ours(check([[0, 2], [3, 1]], &[17, 17]), &bare);
    check([[0, 2], [3, 1]], &[16, 17]).unwrap();
    let tables = Tensor::new(&[[0u32, 1], [3, 3]], &test.device).unwrap();
    let kv = KvBatch::blocks(&tensors[0], &tensors[1], &tables).unwrap();
    ours(kv.check(), &VmmError::MissingLengths);
    test.device.synchronize().unwrap();
}

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
    refused(lengths(&[3, 0]), &VmmError::EmptySequence { sequence: 1 });
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
    let before = super::numbers(&memory);
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
        refused(lengths(&[1, 0]), &VmmError::EmptySequence { sequence: 1 });
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
    assert_eq!(super::numbers(&memory), before);
    assert_eq!(super::numbers(&values), before);
    run(&q, &new, &new).unwrap();
    assert_ne!(super::numbers(&memory), before);
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
