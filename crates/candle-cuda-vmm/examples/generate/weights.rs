//! The model's weights: from safetensors files, random, or in memory of a pool.

use candle_core::{DType, Device, Error, Result, Shape, Tensor};
use candle_nn::VarBuilder;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// The source of the weights.
pub enum Source {
    /// Tensors from files, by name.
    Files(HashMap<String, Tensor>),
    /// Random weights. Each depends on this seed and its name, but not on the order of the calls.
    Random(u64),
    /// Tensors that a builder has, with those that are [joined] under their names. None is copied.
    Built(VarBuilder<'static>),
    /// None. Notes which are wanted.
    Wanted(Rc<RefCell<Wanted>>),
}

/// The weights that a model asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Their names and shapes.
    pub tensors: Vec<(String, Vec<usize>)>,
    /// The names of those that are one matrix.
    pub joins: Vec<Vec<String>>,
}

/// The name of several matrices as one.
pub fn joined<N: AsRef<str>>(names: &[N]) -> String {
    let names: Vec<_> = names.iter().map(AsRef::as_ref).collect();
    names.join("+")
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

    /// Returns a matrix `[out, in]`.
    pub fn matrix(&mut self, name: &str, outputs: usize, inputs: usize) -> Result<Tensor> {
        self.get(name, &[outputs, inputs])
    }

    /// Returns matrices `[out, in]`, one below the other: the matrix of one product for all of them.
    pub fn joined(&mut self, parts: &[(&str, usize)], inputs: usize) -> Result<Tensor> {
        let names: Vec<_> = parts.iter().map(|(name, _)| *name).collect();
        match &self.source {
            Source::Built(builder) => {
                let outputs: usize = parts.iter().map(|(_, outputs)| outputs).sum();
                builder.get((outputs, inputs), &joined(&names))
            }
            Source::Wanted(wanted) => {
                let names = names.into_iter().map(str::to_owned);
                wanted.borrow_mut().joins.push(names.collect());
                let parts = parts.iter();
                let mut parts = parts.map(|(name, outputs)| self.matrix(name, *outputs, inputs));
                parts.try_fold(absent(&[0, inputs])?, |_, part| part)
            }
            Source::Files(_) | Source::Random(_) => {
                let parts = parts.iter();
                let parts = parts.map(|(name, outputs)| self.matrix(name, *outputs, inputs));
                Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)
            }
        }
    }

    /// Returns the factors of a norm.
    pub fn norm(&mut self, name: &str, size: usize) -> Result<Tensor> {
        self.get(name, &[size])
    }

    fn get(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
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
            Source::Random(seed) => random(*seed, name, &shape.into())?,
            Source::Built(builder) => return builder.get(shape, name),
            Source::Wanted(wanted) => {
                let tensor = (name.to_owned(), shape.to_vec());
                wanted.borrow_mut().tensors.push(tensor);
                return absent(shape);
            }
        };
        // Converted first, so that less is copied to the device.
        tensor.to_dtype(self.dtype)?.to_device(&self.device)
    }
}

/// Random weights on the CPU, in F32. A matrix `[out, in]` preserves the scale of its input, and the
/// factors of a norm are near 1.
pub fn random(seed: u64, name: &str, shape: &Shape) -> Result<Tensor> {
    let mut random = StdRng::seed_from_u64(seed ^ hash(name));
    let range = match shape.dims() {
        [.., _, inputs] => {
            let largest = (3. / *inputs as f32).sqrt();
            -largest..largest
        }
        _ => 0.9..1.1,
    };
    let elements = (0..shape.elem_count()).map(|_| random.random_range(range.clone()));
    Tensor::from_vec::<_, f32>(elements.collect(), shape, &Device::Cpu)
}

/// A tensor of this shape that takes no memory.
fn absent(shape: &[usize]) -> Result<Tensor> {
    Tensor::zeros(1, DType::F32, &Device::Cpu)?.broadcast_as(shape)
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

/// The `.safetensors` files of a folder, or the one file.
pub fn files(path: &Path) -> Result<Vec<PathBuf>> {
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
