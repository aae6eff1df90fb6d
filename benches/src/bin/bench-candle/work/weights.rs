//! Weights of files in the page cache, loaded into memory of a pool.

use crate::machine::Machine;
use anyhow::Result;
use candle_core::safetensors::{MmapedSafetensors, save};
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::{ElasticWeights, HostStore, TensorPool, WeightsOptions};
use cuda_vmm_benches::{Outcome, Sides, time};
use std::path::PathBuf;

/// Files, and the tensors of each.
const FILES: usize = 8;
const TENSORS: usize = 16;
/// Rows and columns of a tensor in 16 bits: 128 MiB, so that all are 16 GiB.
const ROWS: [usize; 2] = [8192, 32];
/// How often each side loads all.
const ROUNDS: usize = 3;

fn name(file: usize, tensor: usize) -> String {
    format!("layers.{}.weight", file * TENSORS + tensor)
}

/// Against Candle's own loading, which copies from mapped files.
pub fn measure(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let rows = machine.sized(ROWS);
    let folder = tempfile::tempdir()?;
    let mut files: Vec<PathBuf> = Vec::new();
    for file in 0..FILES {
        let tensor = |tensor| {
            let made = Tensor::full(1f32 / (1 + tensor) as f32, (rows, rows), &Device::Cpu)?;
            Ok((name(file, tensor), made.to_dtype(DType::F16)?))
        };
        let tensors = (0..TENSORS).map(tensor);
        let tensors: candle_core::Result<_> = tensors.collect();
        files.push(folder.path().join(format!("{file}.safetensors")));
        save(&tensors?, &files[file])?;
    }
    let bytes = FILES * TENSORS * rows * rows * DType::F16.size_in_bytes();
    let pool = TensorPool::with_options(&machine.candle, machine.pool_options(false))?;
    let store = HostStore::new(&machine.device, 1 << 30)?;
    let mut sides = Sides::default();
    sides.add_rate("ours", bytes as f64, || {
        let load = || ElasticWeights::load(&pool, &store, &files, WeightsOptions::new());
        let (weights, elapsed) = time(load)?;
        drop(weights);
        Ok(elapsed)
    });
    sides.add_rate("Candle, mapped files", bytes as f64, || {
        let (tensors, elapsed) = time(|| {
            // SAFETY: nobody else knows the files.
            let mapped = unsafe { MmapedSafetensors::multi(&files) }?;
            let names = (0..FILES).flat_map(|file| (0..TENSORS).map(move |at| name(file, at)));
            let tensors = names.map(|name| mapped.load(&name, &machine.candle));
            let tensors = tensors.collect::<candle_core::Result<Vec<_>>>()?;
            machine.candle.synchronize()?;
            candle_core::Result::Ok(tensors)
        })?;
        drop(tensors);
        Ok(elapsed)
    });
    outcome.note("ours", format!("{bytes} bytes in {FILES} files"));
    outcome.measure(sides, &machine.settings, ROUNDS)
}
