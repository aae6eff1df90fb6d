//! The steps between a layer's products, compared with plain loops in double precision.

use super::batch::numbers;
use super::batch::refusals::refused_by_candle;
use crate::common::open;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::cuda_vmm::DriverKind;
use candle_cuda_vmm::fused::{add_rms_norm, silu_mul};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Sizes of rows: multiples of 16 bytes, others, those of models, and more than the threads of a
/// block keep in registers.
const SIZES: [usize; 14] = [
    1, 2, 7, 8, 15, 64, 100, 255, 1024, 2047, 4096, 8200, 16384, 16391,
];

const EPS: f32 = 1e-5;

/// The most that a number may be off, relative to it: a rounding to the dtype, and 1e-5.
fn allowed(dtype: DType) -> f64 {
    1e-5 + match dtype {
        DType::F32 => 2f64.powi(-24),
        DType::F16 => 2f64.powi(-11),
        _ => 2f64.powi(-8),
    }
}

#[track_caller]
fn assert_near(ours: &Tensor, expected: &[f64], roundings: f64, what: &str) {
    let near = roundings * allowed(ours.dtype());
    let ours = numbers(ours);
    assert_eq!(ours.len(), expected.len(), "{what}");
    for (ours, expected) in ours.iter().map(|ours| f64::from(*ours)).zip(expected) {
        // F16 has multiples of 2^-24 only.
        let is_near = (ours - expected).abs() <= near * expected.abs() + 2f64.powi(-24);
        assert!(is_near, "{ours} instead of {expected}: {what}");
    }
}

/// How the rows of an input lie in memory.
#[derive(Clone, Copy, Debug)]
enum Rows {
    Contiguous,
    /// Every other row.
    Apart,
    /// Parts of wider rows, from this element on.
    Parts(usize),
}

const ROWS: [Rows; 4] = [
    Rows::Contiguous,
    Rows::Apart,
    Rows::Parts(16),
    Rows::Parts(3),
];

/// Returns random numbers around `scale`, NaN between the rows, and the rows as they are rounded to
/// the dtype.
fn random(
    random: &mut StdRng,
    (count, size): (usize, usize),
    rows: Rows,
    dtype: DType,
    device: &Device,
) -> (Tensor, Vec<Vec<f32>>) {
    let (every, first) = match rows {
        Rows::Contiguous => (1, 0),
        Rows::Apart => (2, 0),
        Rows::Parts(first) => (1, first),
    };
    let width = first + size + first;
    let mut all = vec![f32::NAN; count * every * width];
    for row in all.chunks_exact_mut(every * width) {
        row[first..][..size].fill_with(|| random.random_range(-3f32..3.));
    }
    let all = Tensor::from_vec(all, (count, every, width), &Device::Cpu).unwrap();
    let all = all.to_dtype(dtype).unwrap().to_device(device).unwrap();
    let tensor = all.narrow(1, 0, 1).unwrap().squeeze(1).unwrap();
    let tensor = tensor.narrow(1, first, size).unwrap();
    let rounded = numbers(&tensor.force_contiguous().unwrap());
    let rows = rounded.chunks_exact(size).map(<[f32]>::to_vec).collect();
    (tensor, rows)
}

#[test]
fn sums_are_candles_and_norms_are_those_of_the_sums() {
    let test = open();
    let device = &test.device;
    let mut seeded = StdRng::seed_from_u64(1);
    for (turn, size) in SIZES.into_iter().enumerate() {
        for (dtype, rows) in DTYPES
            .into_iter()
            .flat_map(|it| ROWS.map(|rows| (it, rows)))
        {
            let mut input = |count, rows| random(&mut seeded, (count, size), rows, dtype, device);
            let count = 1 + turn % 3;
            let (x, x_rows) = input(count, rows);
            // The other one is contiguous, or apart too.
            let delta_rows = ROWS[turn % 2];
            let (delta, _) = input(count, delta_rows);
            let (weight, factors) = input(1, Rows::Contiguous);
            let weight = weight.squeeze(0).unwrap();
            for delta in [None, Some(&delta)] {
                let what = format!("{dtype:?} [{count}, {size}], {rows:?}, {delta_rows:?}");
                let (sum, normed) = add_rms_norm(&x, delta, &weight, EPS).unwrap();
                assert_eq!((sum.dims(), normed.dims()), (x.dims(), x.dims()), "{what}");
                assert_eq!((sum.dtype(), normed.dtype()), (dtype, dtype), "{what}");
                assert!(normed.is_contiguous(), "{what}");
                let sums = match delta {
                    Some(delta) => {
                        assert!(sum.is_contiguous(), "{what}");
                        numbers(&(&x + delta).unwrap())
                    }
                    None => x_rows.concat(),
                };
                assert_eq!(numbers(&sum.force_contiguous().unwrap()), sums, "{what}");
                let expected = sums.chunks_exact(size).flat_map(|row| {
                    let squares = row.iter().map(|number| f64::from(*number).powi(2));
                    let mean = squares.sum::<f64>() / size as f64;
                    let scale = 1. / (mean + f64::from(EPS)).sqrt();
                    let numbers = row.iter().zip(&factors[0]);
                    numbers.map(move |(number, factor)| {
                        f64::from(*number) * scale * f64::from(*factor)
                    })
                });
                let expected: Vec<_> = expected.collect();
                assert_near(&normed, &expected, 1., &what);
            }
        }
    }
}

#[test]
fn gates_are_multiplied_with_what_is_behind_them() {
    let test = open();
    // Candle's operations round the gate first.
    let is_rounded_once = test.kind == DriverKind::Simulated || cfg!(feature = "attention");
    let roundings = if is_rounded_once { 1. } else { 2. };
    let mut seeded = StdRng::seed_from_u64(2);
    for (turn, size) in SIZES.into_iter().enumerate() {
        for (dtype, rows) in DTYPES
            .into_iter()
            .flat_map(|it| ROWS.map(|rows| (it, rows)))
        {
            let shape = (1 + turn % 3, 2 * size);
            let (gate_up, all) = random(&mut seeded, shape, rows, dtype, &test.device);
            let result = silu_mul(&gate_up).unwrap();
            let what = format!("{dtype:?} {shape:?}, {rows:?}");
            assert_eq!(
                (result.dims(), result.dtype()),
                (&[shape.0, size][..], dtype)
            );
            assert!(result.is_contiguous(), "{what}");
            let expected = all.iter().flat_map(|row| {
                let (gate, up) = row.split_at(size);
                gate.iter().zip(up).map(|(gate, up)| {
                    let (gate, up) = (f64::from(*gate), f64::from(*up));
                    gate / (1. + (-gate).exp()) * up
                })
            });
            let expected: Vec<_> = expected.collect();
            assert_near(&result, &expected, roundings, &what);
        }
    }
}

#[test]
fn a_rows_result_does_not_depend_on_other_rows() {
    let test = open();
    let mut seeded = StdRng::seed_from_u64(3);
    for dtype in DTYPES {
        let mut input = |shape, rows| random(&mut seeded, shape, rows, dtype, &test.device).0;
        let (x, delta) = (
            input((5, 4096), Rows::Contiguous),
            input((5, 4096), Rows::Parts(32)),
        );
        let weight = input((1, 4096), Rows::Contiguous).squeeze(0).unwrap();
        let (_, all) = add_rms_norm(&x, Some(&delta), &weight, EPS).unwrap();
        let gated = silu_mul(&x).unwrap();
        for row in 0..5 {
            let one = |tensor: &Tensor| tensor.narrow(0, row, 1).unwrap();
            let (_, alone) = add_rms_norm(&one(&x), Some(&one(&delta)), &weight, EPS).unwrap();
            assert_eq!(numbers(&alone), numbers(&one(&all)), "{dtype:?}");
            let alone = silu_mul(&one(&x)).unwrap();
            assert_eq!(numbers(&alone), numbers(&one(&gated)), "{dtype:?}");
        }
    }
}

#[test]
fn extreme_numbers_have_the_limits_of_the_functions() {
    let test = open();
    let inputs = [-3e38f32, -100., -88., 100., 3e38, f32::NAN];
    let ups = [2f32, 1., 1., 2., 1., 1.];
    let gate_up = Tensor::new(&[inputs, ups].concat()[..], &test.device).unwrap();
    let found = numbers(&silu_mul(&gate_up.unsqueeze(0).unwrap()).unwrap());
    assert!(found[5].is_nan());
    assert_eq!((found[0], found[3], found[4]), (0., 200., 3e38));
    assert!(found[1].abs() < 1e-38 && found[2].abs() < 1e-36);

    let x = Tensor::new(&[[0f32, 0., 0.], [1., f32::NAN, 1.]], &test.device).unwrap();
    let weight = Tensor::new(&[1f32, 2., 3.], &test.device).unwrap();
    let (_, normed) = add_rms_norm(&x, None, &weight, EPS).unwrap();
    let normed = numbers(&normed);
    assert_eq!(normed[..3], [0.; 3]);
    assert!(normed[3..].iter().all(|number| number.is_nan()));
}

#[test]
fn no_rows_and_no_elements_have_empty_results() {
    let test = open();
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &test.device).unwrap();
    for (count, size) in [(0, 8), (3, 0)] {
        let x = zeros(&[count, size]);
        let (sum, normed) = add_rms_norm(&x, Some(&x), &zeros(&[size]), EPS).unwrap();
        assert_eq!((sum.dims(), normed.dims()), (x.dims(), x.dims()));
        let gated = silu_mul(&zeros(&[count, 2 * size])).unwrap();
        assert_eq!(gated.dims(), [count, size]);
    }
}

#[test]
fn inputs_that_do_not_fit_are_refused() {
    let test = open();
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &test.device).unwrap();
    let f32 = |shape: &[usize]| zeros(shape, DType::F32);
    let (x, weight) = (f32(&[2, 8]), f32(&[8]));
    let norm = |x: &Tensor, delta: &Tensor, weight: &Tensor| {
        add_rms_norm(x, Some(delta), weight, EPS).map(drop)
    };
    norm(&x, &x, &weight).unwrap();
    let f64 = zeros(&[2, 8], DType::F64);
    refused_by_candle(
        norm(&f64, &f64, &weight),
        "unsupported dtype F64 for op add_rms_norm",
    );
    let f16 = zeros(&[2, 8], DType::F16);
    let mismatch = "dtype mismatch in add_rms_norm, lhs: F32, rhs: F16";
    refused_by_candle(norm(&x, &f16, &weight), mismatch);
    refused_by_candle(norm(&x, &x, &zeros(&[8], DType::F16)), mismatch);
    for other in [&[8][..], &[2, 8, 1]] {
        let other = f32(other);
        refused_by_candle(norm(&other, &x, &weight), "unexpected rank, expected: 2");
        refused_by_candle(norm(&x, &other, &weight), "unexpected rank, expected: 2");
    }
    refused_by_candle(norm(&x, &x, &x), "unexpected rank, expected: 1");
    for shape in [[1, 8], [2, 7]] {
        refused_by_candle(
            norm(&x, &f32(&shape), &weight),
            &format!("shape mismatch in add_rms_norm, lhs: [2, 8], rhs: {shape:?}"),
        );
    }
    refused_by_candle(
        norm(&x, &x, &f32(&[1])),
        "shape mismatch in add_rms_norm, lhs: [2, 8], rhs: [1]",
    );
    let columns = f32(&[8, 2]).t().unwrap();
    let every_other = f32(&[8, 2]).narrow(1, 0, 1).unwrap().squeeze(1).unwrap();
    let contiguous = "add_rms_norm only supports contiguous tensors";
    refused_by_candle(norm(&columns, &x, &weight), contiguous);
    refused_by_candle(norm(&x, &columns, &weight), contiguous);
    refused_by_candle(norm(&x, &x, &every_other), contiguous);

    silu_mul(&x).unwrap();
    refused_by_candle(silu_mul(&f64), "unsupported dtype F64 for op silu_mul");
    refused_by_candle(silu_mul(&weight), "unexpected rank, expected: 2");
    refused_by_candle(
        silu_mul(&f32(&[2, 7])),
        "silu_mul takes as much of up as of the gate, expected: [2, 8], got: [2, 7]",
    );
    refused_by_candle(
        silu_mul(&columns),
        "silu_mul only supports contiguous tensors",
    );
    if test.kind == DriverKind::Real {
        let on_cpu = x.to_device(&Device::Cpu).unwrap();
        let mismatch = "device mismatch in add_rms_norm";
        refused_by_candle(norm(&x, &on_cpu, &weight), mismatch);
        refused_by_candle(norm(&on_cpu, &on_cpu, &weight), mismatch);
    }
}
