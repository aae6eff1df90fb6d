//! What the models use of the rest of candle-transformers.

use candle::{DType, Device, Module, Result, Tensor};
use candle_nn::VarBuilder;

#[derive(Debug, Clone)]
pub struct Linear(candle_nn::Linear);

impl Linear {
    pub fn from_weights(weights: Tensor, bias: Option<Tensor>) -> Self {
        Self(candle_nn::Linear::new(weights, bias))
    }
}

impl Module for Linear {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.0.forward(xs)
    }
}

pub fn linear_b(inputs: usize, outputs: usize, bias: bool, vb: VarBuilder) -> Result<Linear> {
    candle_nn::linear_b(inputs, outputs, bias, vb).map(Linear)
}

pub fn linear_no_bias(inputs: usize, outputs: usize, vb: VarBuilder) -> Result<Linear> {
    linear_b(inputs, outputs, false, vb)
}

#[derive(Debug, Clone)]
pub struct RmsNorm(candle_nn::RmsNorm);

impl RmsNorm {
    pub fn new(size: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        candle_nn::rms_norm(size, eps, vb).map(Self)
    }
}

impl Module for RmsNorm {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.0.forward(xs)
    }
}

/// Repeats each head of K or V.
pub fn repeat_kv(kv: Tensor, times: usize) -> Result<Tensor> {
    let (batch, heads, tokens, dim) = kv.dims4()?;
    match times {
        1 => Ok(kv),
        _ => Tensor::cat(&vec![&kv; times], 2)?.reshape((batch, heads * times, tokens, dim)),
    }
}

/// Makes a mask `[1, 1, queries, earlier + queries]` to add to scores. A query sees its own key and
/// those before it, at most `window` of them.
pub fn build_additive_causal_mask(
    queries: usize,
    earlier: usize,
    window: Option<usize>,
    device: &Device,
    dtype: DType,
) -> Result<Tensor> {
    let keys = earlier + queries;
    let mask = (earlier..keys).flat_map(|own| {
        (0..keys).map(move |key| {
            let is_seen = key <= own && window.is_none_or(|window| own - key <= window);
            if is_seen { 0. } else { f32::NEG_INFINITY }
        })
    });
    Tensor::from_vec(mask.collect::<Vec<f32>>(), (1, 1, queries, keys), device)?.to_dtype(dtype)
}
