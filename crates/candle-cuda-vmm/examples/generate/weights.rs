//! The model's weights: from safetensors files, or random.

use candle_core::{DType, Device, Error, Result, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// The source of the weights.
pub enum Source {
    /// Tensors from files, by name.
    Files(HashMap<String, Tensor>),
    /// Random weights. Each depends on this seed and its name, but not on the order of the calls.
    Random(u64),
}

/// Weights of one dtype on one device.
pub struct Weights {
    source: Source,
    dtype: DType,
    device: Device,
}

impl Weights {
    pub fn new(source: Source, dtype: DType, device: &Device) -> Self {
        Self {
            source,
            dtype,
            device: device.clone(),
        }
    }

    /// Returns a matrix `[out, in]`. A random matrix preserves the scale of its input.
    pub fn matrix(&mut self, name: &str, outputs: usize, inputs: usize) -> Result<Tensor> {
        self.get(name, &[outputs, inputs], |random| {
            let largest = (3. / inputs as f32).sqrt();
            random.random_range(-largest..largest)
        })
    }

    /// Returns matrices `[out, in]`, one below the other: the matrix of one product for all of them.
    pub fn joined(&mut self, parts: &[(&str, usize)], inputs: usize) -> Result<Tensor> {
        let parts = parts.iter();
        let parts = parts.map(|(name, outputs)| self.matrix(name, *outputs, inputs));
        Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)
    }

    /// Returns the factors of a norm. Random factors are near 1.
    pub fn norm(&mut self, name: &str, size: usize) -> Result<Tensor> {
        self.get(name, &[size], |random| random.random_range(0.9..1.1))
    }

    fn get(
        &mut self,
        name: &str,
        shape: &[usize],
        mut element: impl FnMut(&mut StdRng) -> f32,
    ) -> Result<Tensor> {
        let tensor = match &mut self.source {
            Source::Files(tensors) => {
                let tensor = tensors.remove(name).ok_or_else(|| {
                    let path = name.to_owned();
                    Error::CannotFindTensor { path }
                })?;
                if tensor.dims() != shape {
                    return Err(Error::UnexpectedShape {
                        msg: name.to_owned(),
                        expected: shape.into(),
                        got: tensor.shape().clone(),
                    });
                }
                tensor
            }
            Source::Random(seed) => {
                let mut random = StdRng::seed_from_u64(*seed ^ hash(name));
                let count = shape.iter().product();
                let elements = (0..count).map(|_| element(&mut random)).collect();
                Tensor::from_vec::<_, f32>(elements, shape, &Device::Cpu)?
            }
        };
        // Converted first, so that less is copied to the device.
        tensor.to_dtype(self.dtype)?.to_device(&self.device)
    }
}

/// Reads files, and all `.safetensors` files of folders.
pub fn read(paths: &[PathBuf]) -> Result<HashMap<String, Tensor>> {
    let mut tensors = HashMap::new();
    for path in paths {
        for file in files(path)? {
            tensors.extend(candle_core::safetensors::load(file, &Device::Cpu)?);
        }
    }
    Ok(tensors)
}

fn files(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in path.read_dir()? {
        let file = entry?.path();
        if file.extension().is_some_and(|end| end == "safetensors") {
            files.push(file);
        }
    }
    files.sort();
    Ok(files)
}

/// FNV-1a, which returns the same value on all systems.
fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}
