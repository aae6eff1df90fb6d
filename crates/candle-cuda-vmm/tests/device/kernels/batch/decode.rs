//! Decode steps in double precision and by `decode`.

use super::layouts::Layout;
use super::random::Case;
use crate::common::open;
use candle_core::{DType, Device, Error, Tensor};
use candle_cuda_vmm::VmmError;
use candle_cuda_vmm::attention::{DecodePlan, Mask, decode, decode_into};
use candle_cuda_vmm::cuda_vmm::DriverKind;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

/// The dtypes of queries, and of K and V.
const DTYPES: [(DType, DType); 5] = [
    (DType::F32, DType::F32),
    (DType::F16, DType::F16),
    (DType::BF16, DType::BF16),
    (DType::F16, DType::F8E4M3),
    (DType::BF16, DType::F8E4M3),
];

/// Query heads, and heads of K and V: each its own, groups, one for all.
const HEADS: [(usize, usize); 5] = [(4, 4), (8, 2), (6, 2), (7, 1), (8, 1)];

/// The elements of heads of K and of V.
const DIMS: [(usize, usize); 8] = [
    (64, 64),
    (80, 80),
    (96, 96),
    (128, 128),
    (192, 128),
    (256, 256),
    (16, 32),
    (112, 64),
];

#[test]
fn every_layout_dtype_and_head_gives_what_double_precision_gives() {
    let test = open();
    if !super::has_attention(&test) {
        return;
    }
    let mut turn = 0;
    for layout in Layout::ALL {
        for (dtype, stored) in DTYPES {
            for _ in 0..2 {
                let (query_heads, kv_heads) = HEADS[turn % HEADS.len()];
                let (dim, value_dim) = DIMS[turn % DIMS.len()];
                let case = Case {
                    dtype,
                    stored,
                    query_heads,
                    kv_heads,
                    dim,
                    value_dim,
                    scales: match stored {
                        DType::F8E4M3 => [0.5, 0.3],
                        _ => [1.; 2],
                    },
                    ..Case::new(layout, &[33, 1, 70])
                };
                case.random(turn as u64).check(turn as u64, &test.device);
                turn += 1;
            }
        }
    }
}

#[test]
fn every_length_at_the_edge_of_a_block_or_a_tile() {
    let test = open();
    if !super::has_attention(&test) {
        return;
    }
    let mut lengths: Vec<usize> = [16, 32, 48, 64, 128, 256]
        .into_iter()
        .flat_map(|edge| [edge - 1, edge, edge + 1])
        .collect();
    lengths.extend([1, 2, 3, 400]);
    for (turn, layout) in Layout::ALL.into_iter().enumerate() {
        let dtype = [DType::F32, DType::F16][turn % 2];
        let case = Case {
            dtype,
            stored: dtype,
            query_heads: 2,
            kv_heads: 1,
            dim: 16,
            value_dim: 16,
            ..Case::new(layout, &lengths)
        };
        case.random(1).check(1, &test.device);
    }
}

/// One sequence and a few are joined from many thread blocks; many sequences are whole, or not.
#[test]
fn long_and_many_sequences_are_split_over_a_gpu() {
    let test = open();
    if !super::has_attention(&test) {
        return;
    }
    let uneven: Vec<_> = (0..140).map(|at| 1 + at * 37 % 150).collect();
    let all = [vec![5000], vec![2500, 20, 1700], vec![48; 140], uneven];
    for (turn, lengths) in all.iter().enumerate() {
        let (dtype, stored) = DTYPES[turn + 1];
        let case = Case {
            dtype,
            stored,
            ..Case::new(Layout::ALL[turn], lengths)
        };
        case.random(turn as u64).check(6, &test.device);
    }
}

#[test]
fn windows_and_soft_caps_see_what_they_should() {
    let test = open();
    if !super::has_attention(&test) {
        return;
    }
    let windows = [1, 2, 15, 16, 17, 63, 64, 65, 100, usize::MAX];
    let masks = windows.map(Mask::Window);
    for (number, layout) in Layout::ALL.into_iter().enumerate() {
        for (turn, mask) in masks.into_iter().chain([Mask::None]).enumerate() {
            let case = Case {
                mask,
                soft_cap: [None, Some(0.7), Some(30.)][(number + turn) % 3],
                dim: 16,
                value_dim: 32,
                ..Case::new(layout, &[100, 1, 64, 65, 16])
            };
            case.random(turn as u64).check(2, &test.device);
        }
    }
}

#[test]
fn scores_that_grow_and_shrink_by_thousands_do_not_overflow() {
    let test = open();
    if !super::has_attention(&test) {
        return;
    }
    for (turn, (dtype, stored)) in DTYPES.into_iter().enumerate() {
        for slope in [-3., -0.1, 0.1, 3.] {
            let case = Case {
                dtype,
                stored,
                ..Case::new(Layout::ALL[turn + 3], &[150, 90])
            };
            let mut random = case.random(turn as u64);
            for keys in &mut random.k {
                let row = case.kv_heads * case.dim;
                for (token, keys) in keys.chunks_exact_mut(row).enumerate() {
                    keys.iter_mut().for_each(|key| *key += slope * token as f32);
                }
                *keys = super::random::rounded(keys.clone(), stored);
            }
            random.q.iter_mut().for_each(|q| *q = q.abs().ceil());
            random.check(3, &test.device);
        }
    }
}

#[test]
fn random_cases_give_what_double_precision_gives() {
    let test = open();
    if !super::has_attention(&test) {
        return;
    }
    for seed in 0..24 {
        let mut rng = StdRng::seed_from_u64(seed);
        let (dtype, stored) = *DTYPES.choose(&mut rng).unwrap();
        let (query_heads, kv_heads) = *HEADS.choose(&mut rng).unwrap();
        let (dim, value_dim) = *DIMS.choose(&mut rng).unwrap();
        let batch = rng.random_range(1..6);
        let lengths: Vec<_> = (0..batch).map(|_| rng.random_range(1..200)).collect();
        let case = Case {
            layout: *Layout::ALL.choose(&mut rng).unwrap(),
            dtype,
            stored,
            query_heads,
            kv_heads,
            dim,
            value_dim,
            lengths,
            mask: match rng.random_range(0..3) {
                0 => Mask::Window(rng.random_range(1..200)),
                1 => Mask::None,
                _ => Mask::Causal,
            },
            soft_cap: rng.random_bool(0.3).then(|| rng.random_range(0.5..50.)),
            scales: match stored {
                DType::F8E4M3 => [rng.random_range(0.1..2.), rng.random_range(0.1..2.)],
                _ => [1.; 2],
            },
        };
        case.random(seed).check(seed, &test.device);
    }
}

#[test]
fn the_same_bits_at_every_call_and_with_any_number_of_threads() {
    let test = open();
    if !super::has_attention(&test) {
        return;
    }
    for layout in [Layout::TokenMajor, Layout::Blocks(48)] {
        let case = Case::new(layout, &[300, 5, 77, 200]);
        let random = case.random(4);
        let bits = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let pool = pool.build().unwrap();
            let stored = random.store(5, &test.device);
            // The device under test may not be used on another thread, except the CPU.
            let decoded = match test.device {
                Device::Cpu => pool.install(|| random.decoded(&stored.kv, &Device::Cpu)),
                _ => random.decoded(&stored.kv, &test.device),
            };
            decoded.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        let expected = bits(1);
        for threads in [1, 2, 3, 8] {
            assert_eq!(bits(threads), expected, "{threads} threads, {layout:?}");
        }
    }
}

#[test]
fn a_tensor_that_was_made_before_gets_the_same_bits() {
    let test = open();
    if !super::has_attention(&test) {
        return;
    }
    let case = Case::new(Layout::Blocks(32), &[40, 90]);
    let random = case.random(8);
    let stored = random.store(9, &test.device);
    let plan = DecodePlan::new(&test.device, 2, case.query_heads).unwrap();
    let (q, options) = (random.queries(&test.device), case.options());
    // A part of a longer one, of which the rest stays.
    let shape = (3, case.query_heads, case.value_dim);
    let all = Tensor::ones(shape, DType::F32, &test.device).unwrap();
    let output = all.narrow(0, 1, 2).unwrap();
    decode_into(&q, &stored.kv, &options, &plan, &output).unwrap();
    let made = super::numbers(&output);
    assert_eq!(made, random.decoded(&stored.kv, &test.device));
    assert_eq!(super::numbers(&all.narrow(0, 0, 1).unwrap()), [1.; 4 * 64]);
    // What does not fit is refused, and nothing is written.
    let wrong = [
        all.clone(),
        output.to_dtype(DType::F16).unwrap(),
        output.transpose(1, 2).unwrap(),
        all.transpose(0, 1).unwrap().narrow(1, 1, 2).unwrap(),
        Tensor::ones((2, 4, 64), DType::F32, &test.device)
            .unwrap()
            .transpose(0, 1)
            .unwrap()
            .contiguous()
            .unwrap()
            .transpose(0, 1)
            .unwrap(),
    ];
    let refused = wrong.map(|wrong| {
        let error = decode_into(&q, &stored.kv, &options, &plan, &wrong).unwrap_err();
        match error {
            Error::ShapeMismatchBinaryOp { .. } => "shape",
            Error::DTypeMismatchBinaryOp { .. } => "dtype",
            Error::RequiresContiguous { .. } => "contiguous",
            other => panic!("{other}"),
        }
    });
    assert_eq!(refused, ["shape", "dtype", "shape", "shape", "contiguous"]);
    assert_eq!(super::numbers(&output), made);
    if test.kind == DriverKind::Real {
        let longer = Tensor::ones(output.elem_count() + 1, DType::F32, &test.device).unwrap();
        let unaligned = longer.narrow(0, 1, output.elem_count()).unwrap();
        let unaligned = unaligned.reshape(output.shape()).unwrap();
        let error = decode_into(&q, &stored.kv, &options, &plan, &unaligned).unwrap_err();
        assert!(matches!(
            VmmError::find(&error),
            Some(VmmError::InvalidAlignment {
                actual,
                required: 16
            }) if actual % 16 == 4
        ));
        assert_eq!(super::numbers(&longer), vec![1.; longer.elem_count()]);
    }
}

#[test]
fn queries_may_begin_anywhere_in_their_memory() {
    let test = open();
    if !super::has_attention(&test) {
        return;
    }
    for dtype in [DType::F32, DType::F16] {
        let case = Case {
            dtype,
            stored: dtype,
            ..Case::new(Layout::TokenMajor, &[40, 9])
        };
        let random = case.random(10);
        let kv = random.store(11, &test.device).kv;
        let plan = DecodePlan::new(&test.device, 2, case.query_heads).unwrap();
        let q = random.queries(&test.device);
        let flat = q.flatten_all().unwrap();
        let before = flat.narrow(0, 0, 1).unwrap();
        let behind = Tensor::cat(&[&before, &flat], 0).unwrap();
        let behind = behind.narrow(0, 1, flat.elem_count()).unwrap();
        let behind = behind.reshape(q.dims()).unwrap();
        assert!(behind.is_contiguous());
        let result = decode(&behind, &kv, &case.options(), &plan).unwrap();
        let expected = random.decoded(&kv, &test.device);
        assert_eq!(super::numbers(&result), expected);
    }
}

#[test]
fn lengths_count_that_are_in_the_tensor_when_the_step_runs() {
    let test = open();
    if !super::has_attention(&test) {
        return;
    }
    let case = Case::new(Layout::Blocks(16), &[40, 17]);
    let random = case.random(6);
    let stored = random.store(7, &test.device);
    let lengths = Tensor::new(&[40u32, 17], &test.device).unwrap();
    let kv = stored.kv.clone().lengths(&lengths).unwrap();
    let shorter = Tensor::new(&[25u32, 1], &test.device).unwrap();
    lengths.slice_set(&shorter, 0, 0).unwrap();
    let mut expected = random.clone();
    expected.case.lengths = vec![25, 1];
    let ours = random.decoded(&kv, &test.device);
    super::assert_close(
        &ours,
        &expected.expected(),
        super::allowed(DType::F32),
        "25, 1",
    );
}

#[test]
fn without_lengths_caches_count_to_their_capacity() {
    let test = open();
    if !super::has_attention(&test) {
        return;
    }
    let case = Case::new(Layout::Sequences, &[20]);
    let random = case.random(8);
    let kv = random.store(9, &test.device);
    let pair = kv
        .memory
        .iter()
        .map(|tensor| tensor.transpose(1, 2).unwrap());
    let pair: Vec<_> = pair.collect();
    let whole = [
        candle_cuda_vmm::attention::KvBatch::sequences(&[(pair[0].clone(), pair[1].clone())]),
        candle_cuda_vmm::attention::KvBatch::rows(&pair[0], &pair[1]),
    ];
    for kv in whole {
        let ours = random.decoded(&kv.unwrap(), &test.device);
        super::assert_close(
            &ours,
            &random.expected(),
            super::allowed(DType::F32),
            "whole",
        );
    }
}
