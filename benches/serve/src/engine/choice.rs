//! How the tokens of a sequence are chosen.

use candle_core::{Device, Tensor};
use candle_cuda_vmm::Result;
use candle_cuda_vmm::sampling::SampleParameters;

/// How the tokens of a sequence are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// 0 takes the likeliest token; more is more even.
    pub temperature: f32,
    /// Only the likeliest tokens that have this probability together.
    pub top_p: f32,
    /// The same seed gives the same choices.
    pub seed: u64,
}

impl Choice {
    /// The likeliest token each time.
    pub const GREEDY: Self = Self {
        temperature: 0.,
        top_p: 1.,
        seed: 0,
    };

    /// The seed as two numbers, the lower half first.
    pub(super) fn seed_halves(&self) -> [u32; 2] {
        [self.seed as u32, (self.seed >> 32) as u32]
    }
}

/// Makes the parameters of these rows on the device: how each chooses, and the position of its last
/// token.
pub(super) fn parameters(rows: &[(Choice, u32)], device: &Device) -> Result<SampleParameters> {
    let numbers = |number: fn(&Choice) -> f32| {
        let all: Vec<_> = rows.iter().map(|(choice, _)| number(choice)).collect();
        Tensor::new(all, device)
    };
    let seeds: Vec<_> = rows
        .iter()
        .flat_map(|(choice, _)| choice.seed_halves())
        .collect();
    let positions: Vec<_> = rows.iter().map(|(_, position)| *position).collect();
    Ok(SampleParameters::new(
        &numbers(|choice| choice.temperature)?,
        &numbers(|choice| choice.top_p)?,
        &Tensor::from_vec(seeds, (rows.len(), 2), device)?,
        &Tensor::new(positions, device)?,
    )?)
}
