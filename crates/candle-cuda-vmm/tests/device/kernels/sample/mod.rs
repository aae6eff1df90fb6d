//! Tokens that are drawn from logits. A GPU is compared with the CPU too, which returns the same
//! tokens.

mod distribution;
mod refusals;
mod requests;

use super::batch::{has_attention, numbers, refusals::refused};
use crate::common::open;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::VmmError;
use candle_cuda_vmm::sampling::{SampleParameters, sample};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// What a row is drawn with.
#[derive(Clone, Copy, Debug)]
struct Row {
    temperature: f32,
    top_p: f32,
    seed: u64,
    position: u32,
}

fn row(temperature: f32, top_p: f32, seed: u64) -> Row {
    Row {
        temperature,
        top_p,
        seed,
        position: 5,
    }
}

fn parameters(rows: &[Row], device: &Device) -> SampleParameters {
    let f32 = |number: fn(&Row) -> f32| Tensor::from_iter(rows.iter().map(number), device).unwrap();
    let seeds = rows
        .iter()
        .flat_map(|row| [row.seed as u32, (row.seed >> 32) as u32]);
    let seeds = Tensor::from_iter(seeds, device).unwrap();
    let positions = Tensor::from_iter(rows.iter().map(|row| row.position), device).unwrap();
    let seeds = seeds.reshape((rows.len(), 2)).unwrap();
    SampleParameters::new(
        &f32(|row| row.temperature),
        &f32(|row| row.top_p),
        &seeds,
        &positions,
    )
    .unwrap()
}

fn draw(logits: &Tensor, rows: &[Row]) -> Vec<u32> {
    let tokens = sample(logits, &parameters(rows, logits.device())).unwrap();
    assert_eq!(
        (tokens.dtype(), tokens.dims()),
        (DType::U32, &[rows.len()][..])
    );
    assert!(tokens.is_contiguous());
    tokens.to_vec1().unwrap()
}

/// The parts of wider rows from element `first` on. What is around them would be drawn.
fn within(rows: &[Vec<f32>], first: usize, dtype: DType, device: &Device) -> Tensor {
    let size = rows[0].len();
    let padded = rows.iter().flat_map(|row| {
        let around = || vec![6e4f32; first];
        [around(), row.clone(), around()].concat()
    });
    let all = Tensor::from_iter(padded, &Device::Cpu).unwrap();
    let all = all.reshape((rows.len(), first + size + first)).unwrap();
    let all = all.to_dtype(dtype).unwrap().to_device(device).unwrap();
    all.narrow(1, first, size).unwrap()
}

fn random(seeded: &mut StdRng, size: usize, spread: f32) -> Vec<f32> {
    // About normal.
    let normal = |seeded: &mut StdRng| (0..4).map(|_| seeded.random_range(-1f32..1.)).sum::<f32>();
    (0..size).map(|_| spread * normal(seeded)).collect()
}

#[test]
fn greedy_rows_get_the_first_of_the_largest_logits() {
    let test = open();
    if !has_attention(&test) {
        let logits = Tensor::zeros((1, 8), DType::F32, &test.device).unwrap();
        let parameters = parameters(&[row(0., 1., 0)], &test.device);
        refused(sample(&logits, &parameters), &VmmError::NoAttentionKernels);
        return;
    }
    let mut seeded = StdRng::seed_from_u64(1);
    for dtype in DTYPES {
        for size in [1, 2, 7, 8, 64, 100, 1000, 8200, 50257] {
            for first in [0, 16, 3] {
                let rows: Vec<_> = (0..3).map(|_| random(&mut seeded, size, 3.)).collect();
                let logits = within(&rows, first, dtype, &test.device);
                let rounded = numbers(&logits.force_contiguous().unwrap());
                let expected = rounded.chunks_exact(size).map(|row| {
                    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    row.iter().position(|logit| *logit == largest).unwrap() as u32
                });
                let drawn = [0., -1., f32::NAN].map(|temperature| row(temperature, 0.9, 7));
                let expected: Vec<_> = expected.collect();
                assert_eq!(draw(&logits, &drawn), expected, "{dtype:?} {size} {first}");
            }
        }
    }
}
