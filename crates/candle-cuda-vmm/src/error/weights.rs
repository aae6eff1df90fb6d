//! Why weights could not be loaded, or neither sleep nor wake.

use candle_core::DType;
use std::path::PathBuf;
use thiserror::Error;

/// Why [`ElasticWeights`](crate::ElasticWeights) could not do what was asked. All is as it was.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// A file cannot be opened or read.
    #[error("{}: {error}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        error: std::io::Error,
    },

    /// A file is no safetensors file, or its header does not fit what is in it.
    #[error("{}: {what}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },

    /// Two files have a tensor of the same name.
    #[error("{name} is in {} and in {}", first.display(), second.display())]
    Duplicate {
        /// The tensor.
        name: String,
        /// One file.
        first: PathBuf,
        /// The other one.
        second: PathBuf,
    },

    /// There is no conversion between these types.
    #[error("{name} is of {from:?}, which is not converted to {to:?}")]
    Conversion {
        /// The tensor.
        name: String,
        /// Its type in the file.
        from: DType,
        /// The type that was asked for.
        to: DType,
    },

    /// A name stands for two tensors, or for a tensor and a [join](crate::WeightsOptions::join).
    #[error("the name {name} is taken")]
    NameTaken {
        /// The name.
        name: String,
    },

    /// A join has no parts.
    #[error("{name} is joined of no parts")]
    NoParts {
        /// The join.
        name: String,
    },

    /// A part of a join is not there, or is a part of a join before.
    #[error("{name} has no part {part} to join: it is missing, or joined already")]
    PartMissing {
        /// The join.
        name: String,
        /// The part.
        part: String,
    },

    /// A part of a join has no rows, or another type or other inner dimensions than the first one.
    #[error(
        "{part} of {dtype:?} {shape:?} does not join {first_dtype:?} {first_shape:?} to {name}"
    )]
    PartDiffers {
        /// The join.
        name: String,
        /// The part.
        part: String,
        /// Its type in memory.
        dtype: DType,
        /// Its shape.
        shape: Vec<usize>,
        /// The type of the first part.
        first_dtype: DType,
        /// The shape of the first part.
        first_shape: Vec<usize>,
    },

    /// No file has a tensor.
    #[error("there are no weights in {files} files")]
    Empty {
        /// How many files there are.
        files: usize,
    },

    /// A file is another one than when it was first read: its size or its time has changed.
    #[error("{}: it was changed since it was first read", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },

    /// Builders made by [`var_builder`](crate::ElasticWeights::var_builder) are left.
    #[error("{builders} builders of the weights are left")]
    InUse {
        /// How many, clones and parts counted once.
        builders: usize,
    },

    /// The weights are asleep.
    #[error("the weights are asleep")]
    Asleep,

    /// The weights are awake.
    #[error("the weights are awake")]
    Awake,
}
