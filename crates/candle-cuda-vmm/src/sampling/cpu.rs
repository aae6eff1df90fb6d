//! The same on the CPU: plain loops, a task for each row.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::random::random_bits;
use super::weights::{Weights, number_of, ordered, target};
use super::{NAME, SampleParameters};
use crate::attention::element::Element;
use crate::fused::cpu::Rows;
use candle_core::{DType, Device, Error, Result, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

/// Returns the tokens. The inputs are checked.
pub fn sample(logits: &Tensor, parameters: &SampleParameters) -> Result<Tensor> {
    match logits.dtype() {
        DType::F32 => sample_typed::<f32>(logits, parameters),
        DType::F16 => sample_typed::<f16>(logits, parameters),
        DType::BF16 => sample_typed::<bf16>(logits, parameters),
        other => Err(Error::UnsupportedDTypeForOp(other, NAME)),
    }
}

fn sample_typed<T: Element>(logits: &Tensor, parameters: &SampleParameters) -> Result<Tensor> {
    let (batch, vocabulary) = logits.dims2()?;
    let temperatures = parameters.temperature.to_vec1::<f32>()?;
    let top_p = parameters.top_p.to_vec1::<f32>()?;
    let seeds = parameters.seed.to_vec2::<u32>()?;
    let positions = parameters.position.to_vec1::<u32>()?;
    let memory = logits.storage_and_layout();
    let rows = Rows::<T>::new(&memory)?;
    let draw = |row: usize| {
        let mut numbers = vec![0.; vocabulary];
        T::widen_all(rows.row(row), &mut numbers);
        let bits = random_bits([seeds[row][0], seeds[row][1]], positions[row]);
        draw(&numbers, temperatures[row], top_p[row], bits)
    };
    let tokens: Vec<u32> = (0..batch).into_par_iter().map(draw).collect();
    Tensor::from_vec(tokens, batch, &Device::Cpu)
}

/// Draws a token of a row by random bits.
fn draw(logits: &[f32], temperature: f32, p: f32, bits: u64) -> u32 {
    let (mut first, mut largest) = (0, f32::NEG_INFINITY);
    for (token, logit) in logits.iter().enumerate() {
        if *logit > largest {
            (first, largest) = (token, *logit);
        }
    }
    let is_greedy = temperature.is_nan() || temperature <= 0.;
    if is_greedy || largest.is_infinite() {
        return first as u32;
    }
    let weights = Weights::new(largest, temperature);
    let all = logits.iter().map(|logit| weights.weight(*logit));
    let mut tokens: Vec<_> = (0u32..).zip(logits.iter().copied().zip(all)).collect();
    tokens.retain(|(_, (_, weight))| *weight > 0);
    let mass_from = |least: f32| -> u64 {
        let kept = tokens.iter().filter(|(_, (logit, _))| *logit >= least);
        kept.map(|(_, (_, weight))| weight).sum()
    };
    let mut least = f32::NEG_INFINITY;
    if p < 1. {
        // The largest logit from which on the mass is enough, by bisection.
        let wanted = target(p, mass_from(least));
        let (mut enough, mut short_of) = (ordered(weights.bottom()), ordered(largest) + 1);
        while short_of - enough > 1 {
            let middle = enough + (short_of - enough) / 2;
            match mass_from(number_of(middle)) >= wanted {
                true => enough = middle,
                false => short_of = middle,
            }
        }
        least = number_of(enough);
    }
    let drawn = (u128::from(bits) * u128::from(mass_from(least))) >> 64;
    let mut so_far = 0;
    for (token, (logit, weight)) in &tokens {
        if *logit >= least {
            so_far += u128::from(*weight);
            if so_far > drawn {
                return *token;
            }
        }
    }
    first as u32
}
