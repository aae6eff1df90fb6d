//! The same on the CPU: loops over rows in place, with arithmetic in F32.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use crate::attention::element::{Element, dot};
use crate::error::VmmError;
use candle_core::{DType, Device, Error, Layout, Result, Storage, Tensor};
use half::{bf16, f16};
use std::ops::Deref;

/// Returns the sum and its norm. The inputs are checked.
pub fn add_rms_norm(
    x: &Tensor,
    delta: Option<&Tensor>,
    weight: &Tensor,
    eps: f32,
) -> Result<(Tensor, Tensor)> {
    match x.dtype() {
        DType::F32 => add_rms_norm_typed::<f32>(x, delta, weight, eps),
        DType::F16 => add_rms_norm_typed::<f16>(x, delta, weight, eps),
        DType::BF16 => add_rms_norm_typed::<bf16>(x, delta, weight, eps),
        other => Err(Error::UnsupportedDTypeForOp(other, "add_rms_norm")),
    }
}

fn add_rms_norm_typed<T: Element>(
    x: &Tensor,
    delta: Option<&Tensor>,
    weight: &Tensor,
    eps: f32,
) -> Result<(Tensor, Tensor)> {
    let (tokens, size) = x.dims2()?;
    let mut factors = vec![0.; size];
    T::widen_all(&weight.to_vec1::<T>()?, &mut factors);
    let (x_memory, delta_memory) = (
        x.storage_and_layout(),
        delta.map(Tensor::storage_and_layout),
    );
    let x_rows = Rows::<T>::new(&x_memory)?;
    let delta_rows = delta_memory.as_ref().map(Rows::<T>::new).transpose()?;
    let (mut sums, mut normed) = (Vec::new(), Vec::with_capacity(tokens * size));
    let (mut sum, mut more) = (vec![0.; size], vec![0.; size]);
    for token in 0..tokens {
        T::widen_all(x_rows.row(token), &mut sum);
        if let Some(delta) = &delta_rows {
            T::widen_all(delta.row(token), &mut more);
            for (sum, more) in sum.iter_mut().zip(&more) {
                // Rounded: the norm is that of what is stored.
                let rounded = T::narrow(*sum + more);
                sums.push(rounded);
                *sum = rounded.widen();
            }
        }
        let scale = 1. / (dot(&sum, &sum) / size as f32 + eps).sqrt();
        let numbers = sum.iter().zip(&factors);
        normed.extend(numbers.map(|(number, factor)| T::narrow(number * scale * factor)));
    }
    let tensor = |elements| Tensor::from_vec(elements, (tokens, size), &Device::Cpu);
    let sum = match delta {
        Some(_) => tensor(sums)?,
        None => x.clone(),
    };
    Ok((sum, tensor(normed)?))
}

/// Returns the product of up and the gate's silu. The input is checked.
pub fn silu_mul(gate_up: &Tensor) -> Result<Tensor> {
    match gate_up.dtype() {
        DType::F32 => silu_mul_typed::<f32>(gate_up),
        DType::F16 => silu_mul_typed::<f16>(gate_up),
        DType::BF16 => silu_mul_typed::<bf16>(gate_up),
        other => Err(Error::UnsupportedDTypeForOp(other, "silu_mul")),
    }
}

fn silu_mul_typed<T: Element>(gate_up: &Tensor) -> Result<Tensor> {
    let (tokens, both) = gate_up.dims2()?;
    let memory = gate_up.storage_and_layout();
    let rows = Rows::<T>::new(&memory)?;
    let mut result = Vec::with_capacity(tokens * both / 2);
    for token in 0..tokens {
        let (gate, up) = rows.row(token).split_at(both / 2);
        result.extend(gate.iter().zip(up).map(|(gate, up)| {
            let gate = gate.widen();
            T::narrow(gate / (1. + (-gate).exp()) * up.widen())
        }));
    }
    Tensor::from_vec(result, (tokens, both / 2), &Device::Cpu)
}

/// The rows of a tensor `[rows, size]`, in memory of any stride between rows.
pub struct Rows<'a, T> {
    elements: &'a [T],
    start: usize,
    stride: usize,
    size: usize,
}

impl<'a, T: Element> Rows<'a, T> {
    pub fn new((storage, layout): &'a (impl Deref<Target = Storage>, &Layout)) -> Result<Self> {
        let Storage::Cpu(storage) = &**storage else {
            return Err(VmmError::UnsupportedDevice.into());
        };
        Ok(Self {
            elements: T::cpu_storage_as_slice(storage)?,
            start: layout.start_offset(),
            stride: layout.stride()[0],
            size: layout.dims()[1],
        })
    }

    pub fn row(&self, at: usize) -> &'a [T] {
        &self.elements[self.start + at * self.stride..][..self.size]
    }
}
