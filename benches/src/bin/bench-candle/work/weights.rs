//! Weights of files in the page cache, loaded into memory of a pool, and models that sleep.

use crate::machine::Machine;
use anyhow::{Context, Result};
use candle_core::safetensors::{MmapedSafetensors, save};
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::device::cuda_with_own_stream;
use candle_cuda_vmm::{
    ElasticModel, ElasticWeights, HostStore, Keep, TensorPool, WakeOptions, WeightsOptions,
    keep_candle_memory,
};
use candle_nn::VarBuilder;
use cuda_vmm_benches::{Outcome, Sides, time};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;
use tempfile::TempDir;

/// Files, and the tensors of each.
const FILES: usize = 8;
const TENSORS: usize = 16;
/// Rows and columns of a tensor in 16 bits: 128 MiB, so that all are 16 GiB.
const ROWS: [usize; 2] = [8192, 32];
/// How often each side loads all, and how often models change places.
const ROUNDS: usize = 3;
const SWITCHES: [usize; 2] = [8, 2];
/// A step of the neighbour reads 4 GiB of weights, 128 MiB at a time.
const NEIGHBOUR_ROWS: [usize; 2] = [8192, 16];
const NEIGHBOUR_LAYERS: usize = 32;

fn name(file: usize, tensor: usize) -> String {
    format!("layers.{}.weight", file * TENSORS + tensor)
}

/// Files with the weights of a model.
struct Files {
    paths: Vec<PathBuf>,
    rows: usize,
    _folder: TempDir,
}

impl Files {
    fn write(machine: &Machine) -> Result<Self> {
        let rows = machine.sized(ROWS);
        let folder = tempfile::tempdir()?;
        let mut paths: Vec<PathBuf> = Vec::new();
        for file in 0..FILES {
            let tensor = |tensor| {
                let made = Tensor::ones((rows, rows), DType::F16, &Device::Cpu)?;
                Ok((name(file, tensor), made))
            };
            let tensors = (0..TENSORS).map(tensor);
            let tensors: candle_core::Result<_> = tensors.collect();
            paths.push(folder.path().join(format!("{file}.safetensors")));
            save(&tensors?, &paths[file])?;
        }
        Ok(Self {
            paths,
            rows,
            _folder: folder,
        })
    }

    fn bytes(&self) -> usize {
        FILES * TENSORS * self.rows * self.rows * DType::F16.size_in_bytes()
    }
}

/// Against Candle's own loading, which copies from mapped files.
pub fn load(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let files = Files::write(machine)?;
    let pool = TensorPool::with_options(&machine.candle, machine.pool_options(false))?;
    let store = HostStore::new(&machine.device, 1 << 30)?;
    let bytes = files.bytes() as f64;
    let mut sides = Sides::default();
    sides.add_rate("ours", bytes, || {
        let load = || ElasticWeights::load(&pool, &store, &files.paths, WeightsOptions::new());
        let (weights, elapsed) = time(load)?;
        drop(weights);
        Ok(elapsed)
    });
    sides.add_rate("Candle, mapped files", bytes, || {
        let (tensors, elapsed) = time(|| {
            // SAFETY: nobody else knows the files.
            let mapped = unsafe { MmapedSafetensors::multi(&files.paths) }?;
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

/// Layers that multiply a vector, one after the other.
struct Layers(Vec<Tensor>);

impl Layers {
    fn new(builder: VarBuilder<'static>, rows: usize) -> candle_core::Result<Self> {
        let names = (0..FILES * TENSORS).map(|layer| format!("layers.{layer}.weight"));
        let layers = names.map(|name| builder.get((rows, rows), &name));
        Ok(Self(layers.collect::<candle_core::Result<_>>()?))
    }

    fn run(&self) -> candle_core::Result<()> {
        let (device, rows) = (self.0[0].device(), self.0[0].dim(0)?);
        let mut hidden = Tensor::zeros((1, rows), DType::F16, device)?;
        for layer in &self.0 {
            hidden = hidden.matmul(&layer.t()?)?;
        }
        device.synchronize()
    }
}

/// Two models that take turns on a device that has room for one, and a neighbour that goes on.
pub fn switch(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let files = Files::write(machine)?;
    let (bytes, rows) = (files.bytes(), files.rows);
    let options = machine.pool_options(false);
    // As a server does. Otherwise the neighbour's tensors have their memory from the driver anew in
    // each step, and wait for the driver's other work on memory.
    keep(machine, u64::MAX)?;
    let limit_bytes = bytes + (64 << 20);
    let options = options.engine(options.engine.limit_bytes(limit_bytes));
    let pool = TensorPool::with_options(&machine.candle, options)?;
    let store = HostStore::new(&machine.device, 2 * (bytes + (64 << 20)) + (1 << 30))?;
    let model = || -> Result<ElasticModel<Layers>> {
        let weights = ElasticWeights::load(&pool, &store, &files.paths, WeightsOptions::new())?;
        let build = move |builder| Layers::new(builder, rows);
        let mut model = ElasticModel::new(weights, DType::F16, build)?;
        model.get()?.run()?;
        model.sleep(Keep::Constant(&store))?;
        Ok(model)
    };
    let mut models = [model()?, model()?];
    models[0].wake(&WakeOptions::new())?;
    models[0].get()?.run()?;
    let mut switch = |round: usize, options: &WakeOptions, runs: bool| -> Result<f64> {
        let (first, second) = models.split_at_mut(1);
        let (from, to) = match round % 2 {
            0 => (&mut first[0], &mut second[0]),
            _ => (&mut second[0], &mut first[0]),
        };
        let ((), elapsed) = time(|| -> Result<()> {
            from.sleep(Keep::Constant(&store))?;
            to.wake(options)?;
            match runs {
                true => Ok(to.get()?.run()?),
                false => Ok(()),
            }
        })?;
        Ok(elapsed.as_nanos() as f64)
    };
    let rounds = machine.sized(SWITCHES);
    let fast = WakeOptions::new();
    let times = (0..rounds).map(|round| switch(round, &fast, true));
    outcome.times("switch", times.collect::<Result<_>>()?);
    outcome.note("switch", format!("{bytes} bytes each, under {limit_bytes}"));

    let slow = WakeOptions::new().bytes_per_second(20_000_000_000);
    outcome.times(
        "neighbour, alone",
        neighbour(machine, || {
            thread::sleep(machine.settings.patience / 5);
            Ok(())
        })?,
    );
    for (side, options) in [
        ("neighbour of a wake", &fast),
        ("neighbour of a slow wake", &slow),
    ] {
        let steps = neighbour(machine, || {
            // Without a step of the model that wakes, which the neighbour shares the device with.
            (0..rounds).try_for_each(|round| switch(round, options, false).map(drop))
        })?;
        outcome.times(side, steps);
    }
    outcome.note("neighbour of a slow wake", "20 GB/s at most");
    keep(machine, 0)
}

/// Has the device's pool keep what Candle frees.
fn keep(machine: &Machine, bytes: u64) -> Result<()> {
    match machine.candle.is_cuda() {
        true => Ok(keep_candle_memory(&machine.candle, bytes)?),
        false => Ok(()),
    }
}

/// The times of a neighbour's steps while something is done: products with a matrix, and the wait for
/// them.
fn neighbour(machine: &Machine, act: impl FnOnce() -> Result<()>) -> Result<Vec<f64>> {
    let device = match machine.candle.is_cuda() {
        true => cuda_with_own_stream(machine.device.ordinal())?,
        false => Device::Cpu,
    };
    let rows = machine.sized(NEIGHBOUR_ROWS);
    let weight = Tensor::zeros((rows, rows), DType::F16, &device)?;
    let input = Tensor::zeros((1, rows), DType::F16, &device)?;
    let step = || -> candle_core::Result<f64> {
        let started = Instant::now();
        for _ in 0..NEIGHBOUR_LAYERS {
            input.matmul(&weight)?;
        }
        device.synchronize()?;
        Ok(started.elapsed().as_nanos() as f64)
    };
    // Kernels are loaded.
    step()?;
    let is_done = AtomicBool::new(false);
    thread::scope(|scope| {
        let stepping = scope.spawn(|| {
            let mut times = Vec::new();
            while !is_done.load(Ordering::Relaxed) {
                times.push(step()?);
            }
            candle_core::Result::Ok(times)
        });
        let acted = act();
        is_done.store(true, Ordering::Relaxed);
        let times = stepping.join().ok().context("the neighbour panicked")?;
        acted?;
        Ok(times?)
    })
}
