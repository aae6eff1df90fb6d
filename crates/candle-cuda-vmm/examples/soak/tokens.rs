//! Rows of a tensor whose elements are all one number, which the test knows.

use candle_core::{D, Device, Result, Tensor};
use rand::Rng;
use rand::rngs::SmallRng;

/// What the rows of a tensor must be, from the first to the last.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tokens(Vec<f32>);

impl Tokens {
    /// New tokens: each of another number than most others.
    pub fn random(count: usize, random: &mut SmallRng) -> Self {
        let number = |_| random.random_range(1..1 << 24) as f32;
        Self((0..count).map(number).collect())
    }

    pub fn zeros(count: usize) -> Self {
        Self(vec![0.0; count])
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn append(&mut self, more: &Self) {
        self.0.extend(&more.0);
    }

    pub fn truncate(&mut self, len: usize) {
        self.0.truncate(len);
    }

    pub fn release_front(&mut self, count: usize) {
        self.0.drain(..count);
    }

    /// The tokens as a strided tensor of this shape, which has them in dimension `dim`, times
    /// `factor`.
    pub fn tensor(
        &self,
        dim: usize,
        shape: &[usize],
        factor: f64,
        device: &Device,
    ) -> Result<Tensor> {
        let mut dims = vec![1; shape.len()];
        dims[dim] = self.len();
        let tokens = Tensor::from_slice(&self.0, dims, device)?;
        (tokens * factor)?.broadcast_as(shape)
    }

    /// Fails unless the tensor has these tokens in dimension `dim`, times `factor`.
    pub fn check(&self, tensor: &Tensor, dim: usize, factor: f32, what: &str) -> Result<()> {
        let seen = match tensor.dims()[dim] {
            0 => [Vec::new(), Vec::new()],
            _ => {
                let rows = tensor.transpose(0, dim)?.flatten_from(1)?;
                let (most, least) = (rows.max(D::Minus1)?, rows.min(D::Minus1)?);
                [most.to_vec1()?, least.to_vec1()?]
            }
        };
        let expected: Vec<f32> = self.0.iter().map(|token| token * factor).collect();
        match seen.iter().find(|seen| **seen != expected) {
            None => Ok(()),
            Some(seen) => {
                let differs = |at: &usize| seen.get(*at) != expected.get(*at);
                let at = (0..seen.len().max(expected.len()))
                    .find(differs)
                    .unwrap_or(0);
                let (got, expected) = (seen.get(at), expected.get(at));
                candle_core::bail!("{what}: token {at} is {got:?} instead of {expected:?}")
            }
        }
    }
}
