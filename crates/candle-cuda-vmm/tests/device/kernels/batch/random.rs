//! Random K, V and queries of a batch.

use super::layouts::{Layout, Stored};
use super::reference::attend;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::attention::{DecodePlan, GqaOptions, KvBatch, Mask, decode};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::ops::Range;

/// The sizes and types of a batch.
#[derive(Clone, Debug)]
pub struct Case {
    pub layout: Layout,
    /// The dtype of queries.
    pub dtype: DType,
    /// The dtype of K and V.
    pub stored: DType,
    pub query_heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub value_dim: usize,
    pub lengths: Vec<usize>,
    pub mask: Mask,
    pub soft_cap: Option<f32>,
    /// The scales of F8E4M3.
    pub scales: [f32; 2],
}

impl Case {
    /// A small batch in F32.
    pub fn new(layout: Layout, lengths: &[usize]) -> Self {
        Self {
            layout,
            dtype: DType::F32,
            stored: DType::F32,
            query_heads: 4,
            kv_heads: 2,
            dim: 64,
            value_dim: 64,
            lengths: lengths.to_vec(),
            mask: Mask::Causal,
            soft_cap: None,
            scales: [1.; 2],
        }
    }

    pub fn options(&self) -> GqaOptions {
        let mut options = GqaOptions::new(1. / (self.dim as f32).sqrt()).mask(self.mask);
        options.soft_cap = self.soft_cap;
        options
    }

    /// Returns the tokens that the last query of a sequence sees.
    pub fn seen(&self, sequence: usize) -> Range<usize> {
        let length = self.lengths[sequence];
        match self.mask {
            Mask::Window(window) => length.saturating_sub(window)..length,
            _ => 0..length,
        }
    }

    /// Makes random queries, keys and values, as they are stored.
    pub fn random(&self, seed: u64) -> Random {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut all = |count: usize, dtype: DType| {
            let numbers = (0..count).map(|_| rng.random_range(-1.7f32..1.7)).collect();
            rounded(numbers, dtype)
        };
        let q = all(self.lengths.len() * self.query_heads * self.dim, self.dtype);
        let mut rows = |dim: usize| {
            let lengths = self.lengths.iter();
            lengths
                .map(|length| all(length * self.kv_heads * dim, self.stored))
                .collect()
        };
        let (k, v) = (rows(self.dim), rows(self.value_dim));
        Random {
            case: self.clone(),
            q,
            k,
            v,
        }
    }
}

/// Rounds numbers to a dtype.
pub fn rounded(numbers: Vec<f32>, dtype: DType) -> Vec<f32> {
    let tensor = Tensor::new(numbers, &Device::Cpu).unwrap();
    super::numbers(&tensor.to_dtype(dtype).unwrap())
}

/// The numbers of a batch.
#[derive(Clone)]
pub struct Random {
    pub case: Case,
    /// `[batch, query_heads, dim]`
    pub q: Vec<f32>,
    /// `[length, kv_heads, dim]` of each sequence, before the scale.
    pub k: Vec<Vec<f32>>,
    pub v: Vec<Vec<f32>>,
}

impl Random {
    /// Stores K and V on a device. Rows that no query sees are NaN, and so is all other memory.
    pub fn store(&self, seed: u64, device: &Device) -> Stored {
        Stored::new(self, seed, device)
    }

    /// Returns the queries of a decode step.
    pub fn queries(&self, device: &Device) -> Tensor {
        let Case {
            dtype,
            query_heads,
            dim,
            ..
        } = self.case;
        let shape = (self.case.lengths.len(), query_heads, dim);
        let q = Tensor::from_vec(self.q.clone(), shape, &Device::Cpu).unwrap();
        q.to_dtype(dtype).unwrap().to_device(device).unwrap()
    }

    /// Runs the decode step over a batch, and returns the numbers.
    pub fn decoded(&self, kv: &KvBatch, device: &Device) -> Vec<f32> {
        let case = &self.case;
        let plan = DecodePlan::new(device, case.lengths.len(), case.query_heads).unwrap();
        let result = decode(&self.queries(device), kv, &case.options(), &plan).unwrap();
        let shape = [case.lengths.len(), case.query_heads, case.value_dim];
        assert_eq!((result.dims(), result.dtype()), (&shape[..], case.dtype));
        assert!(result.is_contiguous());
        super::numbers(&result)
    }

    /// Returns what the decode step gives in double precision.
    pub fn expected(&self) -> Vec<f64> {
        let sequences = 0..self.case.lengths.len();
        sequences
            .flat_map(|sequence| attend(self, sequence))
            .collect()
    }

    /// Fails unless the device under test gives what double precision gives, and nearly what the
    /// CPU gives.
    #[track_caller]
    pub fn check(&self, seed: u64, device: &Device) {
        let case = format!("{:?}", self.case);
        let ours = self.decoded(&self.store(seed, device).kv, device);
        let allowed = super::allowed(self.case.dtype);
        super::assert_close(&ours, &self.expected(), allowed, &case);
        if !device.is_cpu() {
            let on_cpu = self.decoded(&self.store(seed, &Device::Cpu).kv, &Device::Cpu);
            let on_cpu: Vec<_> = on_cpu.into_iter().map(f64::from).collect();
            super::assert_close(&ours, &on_cpu, allowed, &case);
        }
    }
}
