//! Products of rows with weights, compared with plain loops in double precision.

use super::batch::numbers;
use super::batch::refusals::refused_by_candle;
use crate::common::open;
use candle_core::{DType, Device, Result, Tensor};
use candle_cuda_vmm::fused::{RmsNorm, gated_linear, linear};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const EPS: f32 = 1e-5;

/// Rows' and outputs' sizes: what a warp and a block take, less and more, and what is no multiple
/// of 16 bytes.
const SIZES: [(usize, usize); 9] = [
    (8, 1),
    (16, 9),
    (64, 8),
    (1000, 33),
    (1024, 40),
    (1037, 5),
    (2056, 64),
    (4096, 17),
    (8192, 3),
];

/// CPUs multiply F32 and F16 only.
fn dtypes(device: &Device) -> &'static [DType] {
    const ALL: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
    if device.is_cuda() { &ALL } else { &ALL[..2] }
}

struct Inputs {
    x: Tensor,
    weight: Tensor,
    factors: Tensor,
    added: Tensor,
}

impl Inputs {
    /// Random numbers. With an offset, all begin in the middle of something larger.
    fn new(
        seeded: &mut StdRng,
        (rows, size, outputs): (usize, usize, usize),
        first: usize,
        dtype: DType,
        device: &Device,
    ) -> Self {
        let mut random = |rows: usize, size: usize| {
            let count = rows * (size + first);
            let all = (0..count).map(|_| seeded.random_range(-1f32..1.));
            let all = Tensor::from_iter(all, &Device::Cpu).unwrap();
            let all = all.reshape((rows, size + first)).unwrap();
            let all = all.to_dtype(dtype).unwrap().to_device(device).unwrap();
            all.narrow(1, first, size).unwrap()
        };
        Self {
            x: random(rows, size),
            weight: random(outputs, size),
            factors: random(1, size).squeeze(0).unwrap(),
            added: random(rows, outputs),
        }
    }

    fn norm(&self) -> RmsNorm<'_> {
        RmsNorm {
            weight: &self.factors,
            eps: EPS,
        }
    }

    /// The products, in double precision, of rows that are normalized and rounded first.
    fn products(&self, is_normed: bool) -> Vec<Vec<f64>> {
        let size = self.x.dims()[1];
        let plain = |tensor: &Tensor| numbers(&tensor.force_contiguous().unwrap());
        let (x, weight, factors) = (plain(&self.x), plain(&self.weight), plain(&self.factors));
        let rows = x.chunks_exact(size).map(|row| {
            let squares: f64 = row.iter().map(|number| f64::from(*number).powi(2)).sum();
            let scale = 1. / (squares / size as f64 + f64::from(EPS)).sqrt();
            let numbers = row.iter().zip(&factors).map(|(number, factor)| {
                let normed = f64::from(*number) * scale * f64::from(*factor);
                let number = if is_normed { normed as f32 } else { *number };
                rounded(number, self.x.dtype())
            });
            numbers.collect::<Vec<_>>()
        });
        let product = |row: Vec<f64>| {
            let dots = weight.chunks_exact(size).map(|weights| {
                let both = row.iter().zip(weights);
                both.map(|(x, weight)| x * f64::from(*weight)).sum()
            });
            dots.collect()
        };
        rows.map(product).collect()
    }

    fn numbers_added(&self) -> Vec<f64> {
        let added = numbers(&self.added.force_contiguous().unwrap());
        added.into_iter().map(f64::from).collect()
    }
}

fn rounded(number: f32, dtype: DType) -> f64 {
    match dtype {
        DType::F16 => half::f16::from_f32(number).to_f64(),
        DType::BF16 => half::bf16::from_f32(number).to_f64(),
        _ => f64::from(number),
    }
}

/// Sums of up to 8192 products are rounded on the way, norms may be rounded up instead of down, and
/// results are rounded up to three times. What a result is made of may be off by so much more than
/// it is large.
#[track_caller]
fn assert_near(ours: &Tensor, expected: &[f64], more: f64, what: &str) {
    let unit = match ours.dtype() {
        DType::F32 => 2f64.powi(-18),
        DType::F16 => 2f64.powi(-9),
        _ => 2f64.powi(-6),
    };
    let scale = expected
        .iter()
        .fold(1f64, |most, number| most.max(number.abs()));
    let ours = numbers(ours);
    assert_eq!(ours.len(), expected.len(), "{what}");
    for (ours, expected) in ours.iter().zip(expected) {
        let off = (f64::from(*ours) - expected).abs();
        assert!(
            off <= unit * scale + more,
            "{ours} instead of {expected}: {what}"
        );
    }
}

#[test]
fn products_are_those_of_plain_loops() {
    let test = open();
    let mut seeded = StdRng::seed_from_u64(11);
    for (size, outputs) in SIZES {
        for (&dtype, (rows, first)) in dtypes(&test.device)
            .iter()
            .flat_map(|dtype| [(1, 0), (1, 8), (1, 3), (3, 0)].map(|rows| (dtype, rows)))
        {
            let sizes = (rows, size, 2 * outputs);
            let inputs = Inputs::new(&mut seeded, sizes, first, dtype, &test.device);
            for is_normed in [false, true] {
                let what = format!("{dtype:?} {sizes:?} from {first}, norm: {is_normed}");
                let norm = is_normed.then(|| inputs.norm());
                let products = inputs.products(is_normed);
                let result = linear(&inputs.x, &inputs.weight, norm, None).unwrap();
                assert_eq!(
                    (result.dims(), result.dtype()),
                    (&[rows, 2 * outputs][..], dtype)
                );
                assert!(result.is_contiguous(), "{what}");
                assert_near(&result, &products.concat(), 0., &what);

                let sums = products.concat();
                let sums = sums.iter().zip(inputs.numbers_added());
                let sums: Vec<_> = sums.map(|(product, added)| product + added).collect();
                let result = linear(&inputs.x, &inputs.weight, norm, Some(&inputs.added)).unwrap();
                assert_near(&result, &sums, 0., &what);

                let result = gated_linear(&inputs.x, &inputs.weight, norm).unwrap();
                assert_eq!(
                    (result.dims(), result.dtype()),
                    (&[rows, outputs][..], dtype)
                );
                let gated = products.iter().flat_map(|row| {
                    let (gate, up) = row.split_at(outputs);
                    let both = gate.iter().zip(up);
                    both.map(|(gate, up)| gate / (1. + (-gate).exp()) * up)
                });
                // A gate that is off by a little is so times the other factor.
                let most = products.iter().flatten();
                let most = most.fold(1f64, |most, product| most.max(product.abs()));
                let more = 2f64.powi(-21) * most * most;
                assert_near(&result, &gated.collect::<Vec<_>>(), more, &what);
            }
        }
    }
}

#[test]
fn equal_inputs_give_equal_bits() {
    let test = open();
    let mut seeded = StdRng::seed_from_u64(12);
    for &dtype in dtypes(&test.device) {
        let inputs = Inputs::new(&mut seeded, (1, 4096, 64), 0, dtype, &test.device);
        let once = || {
            let norm = Some(inputs.norm());
            let sum = linear(&inputs.x, &inputs.weight, norm, Some(&inputs.added));
            let gated = gated_linear(&inputs.x, &inputs.weight, norm);
            [sum, gated].map(|result| numbers(&result.unwrap()))
        };
        assert_eq!(once(), once(), "{dtype:?}");
    }
}

#[test]
fn nothing_times_something_is_zeros() {
    let test = open();
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &test.device).unwrap();
    let ones = Tensor::ones((1, 4), DType::F32, &test.device).unwrap();
    for (rows, size, outputs) in [(0, 8, 4), (1, 0, 4), (1, 8, 0)] {
        let (x, weight) = (zeros(&[rows, size]), zeros(&[outputs, size]));
        let result = linear(&x, &weight, None, None).unwrap();
        assert_eq!(result.dims(), [rows, outputs]);
        let gated = gated_linear(&x, &weight, None).unwrap();
        assert_eq!(gated.dims(), [rows, outputs / 2]);
    }
    let sum = linear(&zeros(&[1, 0]), &zeros(&[4, 0]), None, Some(&ones)).unwrap();
    assert_eq!(numbers(&sum), [1.; 4]);
}

#[test]
fn inputs_that_do_not_fit_are_refused() {
    let test = open();
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &test.device).unwrap();
    let f32 = |shape: &[usize]| zeros(shape, DType::F32);
    let (x, weight) = (f32(&[1, 8]), f32(&[6, 8]));
    type Call = fn(&Tensor, &Tensor, Option<RmsNorm<'_>>) -> Result<Tensor>;
    let calls: [(&str, Call); 2] = [
        ("linear", |x, weight, norm| linear(x, weight, norm, None)),
        ("gated_linear", gated_linear),
    ];
    for (name, call) in calls {
        call(&x, &weight, None).unwrap();
        let f64 = zeros(&[1, 8], DType::F64);
        let unsupported = format!("unsupported dtype F64 for op {name}");
        refused_by_candle(call(&f64, &weight, None).map(drop), &unsupported);
        let mismatch = format!("dtype mismatch in {name}, lhs: F32, rhs: F16");
        let other = zeros(&[6, 8], DType::F16);
        refused_by_candle(call(&x, &other, None).map(drop), &mismatch);
        let factors = zeros(&[8], DType::F16);
        let norm = |weight| Some(RmsNorm { weight, eps: EPS });
        refused_by_candle(call(&x, &weight, norm(&factors)).map(drop), &mismatch);
        let shapes = format!("shape mismatch in {name}, lhs: [1, 8], rhs: [6, 7]");
        refused_by_candle(call(&x, &f32(&[6, 7]), None).map(drop), &shapes);
        let shapes = format!("shape mismatch in {name}, lhs: [1, 8], rhs: [7]");
        refused_by_candle(call(&x, &weight, norm(&f32(&[7]))).map(drop), &shapes);
        for other in [&[8][..], &[1, 8, 1]] {
            let rank = "unexpected rank, expected: 2";
            refused_by_candle(call(&f32(other), &weight, None).map(drop), rank);
            refused_by_candle(call(&x, &f32(other), None).map(drop), rank);
        }
        let contiguous = format!("{name} only supports contiguous tensors");
        let columns = f32(&[8, 6]).t().unwrap();
        refused_by_candle(call(&x, &columns, None).map(drop), &contiguous);
        let columns = f32(&[8, 2]).t().unwrap();
        refused_by_candle(call(&columns, &weight, None).map(drop), &contiguous);
    }
    refused_by_candle(
        gated_linear(&x, &f32(&[5, 8]), None).map(drop),
        "gated_linear takes as much of up as of the gate, expected: [6, 8], got: [5, 8]",
    );
    for added in [[1, 5], [2, 6]] {
        let shapes = format!("shape mismatch in linear, lhs: [6, 8], rhs: {added:?}");
        refused_by_candle(
            linear(&x, &weight, None, Some(&f32(&added))).map(drop),
            &shapes,
        );
    }
}
