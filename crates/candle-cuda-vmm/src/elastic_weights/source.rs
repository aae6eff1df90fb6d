//! Where the contents of weights come from: files, or a function.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::file::WeightsFile;
use crate::error::WeightsError;
use candle_core::{Shape, Tensor};
use std::fmt;
use std::sync::Arc;

/// Makes the tensor of a name and a shape.
pub(super) type Make = dyn Fn(&str, &Shape) -> candle_core::Result<Tensor> + Send + Sync;

/// What is read once when weights are made, and again by a wake if nothing was kept.
pub(super) enum Source {
    Files(Vec<WeightsFile>),
    Made(Arc<Make>),
}

impl Source {
    /// The same source once more. Files must be as they were.
    pub(super) fn open_again(&self) -> Result<Self, WeightsError> {
        match self {
            Self::Files(files) => {
                let again = files.iter().map(WeightsFile::open_again);
                Ok(Self::Files(again.collect::<Result<_, _>>()?))
            }
            Self::Made(make) => Ok(Self::Made(make.clone())),
        }
    }

    /// Fails if a file has changed since it was first read.
    pub(super) fn check_unchanged(&self) -> Result<(), WeightsError> {
        match self {
            Self::Files(files) => files.iter().try_for_each(WeightsFile::check_unchanged),
            Self::Made(_) => Ok(()),
        }
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Files(files) => formatter.debug_tuple("Files").field(files).finish(),
            Self::Made(_) => formatter.write_str("Made"),
        }
    }
}
