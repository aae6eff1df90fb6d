//! Files of weights, read without mapping them: one that is cut off meanwhile is an error, and no
//! signal.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use crate::error::WeightsError;
use candle_core::DType;
use safetensors::tensor::{Dtype, Metadata};
use std::fs::{File, Metadata as FileMetadata};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A header of more bytes is refused, as by the crate `safetensors`.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// A tensor in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) name: String,
    pub(super) dtype: DType,
    pub(super) shape: Vec<usize>,
    /// Where its bytes begin in the file.
    pub(super) begin: u64,
}

/// A file, and how it was when it was first read.
#[derive(Debug)]
pub(super) struct WeightsFile {
    pub(super) path: PathBuf,
    file: File,
    bytes: u64,
    changed_at: Option<SystemTime>,
}

impl WeightsFile {
    /// Opens a file, and lists its tensors.
    pub(super) fn open(path: &Path) -> Result<(Self, Vec<Stored>), WeightsError> {
        let failed = |error| WeightsError::File {
            path: path.to_owned(),
            error,
        };
        let file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let opened = Self {
            path: path.to_owned(),
            file,
            bytes: metadata.len(),
            changed_at: metadata.modified().ok(),
        };
        let stored = opened.header()?;
        Ok((opened, stored))
    }

    /// Opens the file again, which must be as it was.
    pub(super) fn open_again(&self) -> Result<Self, WeightsError> {
        let failed = |error| WeightsError::File {
            path: self.path.clone(),
            error,
        };
        let file = File::open(&self.path).map_err(failed)?;
        let again = Self {
            path: self.path.clone(),
            bytes: self.bytes,
            changed_at: self.changed_at,
            file,
        };
        again.check_unchanged()?;
        Ok(again)
    }

    /// Fails if the file has changed since it was first read.
    pub(super) fn check_unchanged(&self) -> Result<(), WeightsError> {
        let metadata = self.file.metadata().map_err(|error| self.failed(error))?;
        let found = |metadata: &FileMetadata| (metadata.len(), metadata.modified().ok());
        match found(&metadata) == (self.bytes, self.changed_at) {
            true => Ok(()),
            false => Err(WeightsError::Changed {
                path: self.path.clone(),
            }),
        }
    }

    fn failed(&self, error: std::io::Error) -> WeightsError {
        WeightsError::File {
            path: self.path.clone(),
            error,
        }
    }

    /// Reads bytes from this place on.
    pub(super) fn read(&self, begin: u64, target: &mut [u8]) -> Result<(), WeightsError> {
        let read = self.file.read_exact_at(target, begin);
        read.map_err(|error| self.failed(error))
    }

    fn header(&self) -> Result<Vec<Stored>, WeightsError> {
        let wrong = |what: String| WeightsError::Format {
            path: self.path.clone(),
            what,
        };
        let mut length = [0; 8];
        if self.bytes < length.len() as u64 {
            return Err(wrong(format!(
                "{} bytes are too few for a header",
                self.bytes
            )));
        }
        self.read(0, &mut length)?;
        let header_bytes = u64::from_le_bytes(length);
        let data = header_bytes.saturating_add(8);
        if header_bytes > HEADER_BYTES_MAX || data > self.bytes {
            return Err(wrong(format!(
                "a header of {header_bytes} bytes in a file of {}",
                self.bytes
            )));
        }
        let mut header = vec![0; header_bytes as usize];
        self.read(8, &mut header)?;
        let header: Metadata =
            serde_json::from_slice(&header).map_err(|error| wrong(error.to_string()))?;
        let tensors = header.tensors().into_iter().map(|(name, info)| {
            let found = format!(
                "{name} is of {:?}, of which there are no tensors",
                info.dtype
            );
            let dtype = dtype_of(info.dtype).ok_or_else(|| wrong(found))?;
            let shape = info.shape.clone();
            let elements = (shape.iter()).try_fold(1usize, |all, dim| all.checked_mul(*dim));
            let bytes = elements.and_then(|all| all.checked_mul(dtype.size_in_bytes()));
            let (begin, end) = info.data_offsets;
            let is_there = begin <= end && data.saturating_add(end as u64) <= self.bytes;
            if !is_there || bytes != Some(end - begin) {
                return Err(wrong(format!(
                    "{name} of {dtype:?} {shape:?} is said to be in bytes {begin} to {end}"
                )));
            }
            Ok(Stored {
                name,
                dtype,
                shape,
                begin: data + begin as u64,
            })
        });
        tensors.collect()
    }
}

/// The type of Candle's for numbers of a file. Candle's own conversion is for one version of the
/// crate `safetensors`.
fn dtype_of(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::U8 => Some(DType::U8),
        Dtype::U32 => Some(DType::U32),
        Dtype::I16 => Some(DType::I16),
        Dtype::I32 => Some(DType::I32),
        Dtype::I64 => Some(DType::I64),
        Dtype::F8_E4M3 => Some(DType::F8E4M3),
        Dtype::BF16 => Some(DType::BF16),
        Dtype::F16 => Some(DType::F16),
        Dtype::F32 => Some(DType::F32),
        Dtype::F64 => Some(DType::F64),
        _ => None,
    }
}

/// The files of the weights of a model in a folder: `model.safetensors`, or those that
/// `model.safetensors.index.json` names.
///
/// # Errors
/// [`WeightsError::File`], [`WeightsError::Format`] if the index is wrong.
pub fn weights_in(folder: impl AsRef<Path>) -> Result<Vec<PathBuf>, WeightsError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, PathBuf>,
    }

    let folder = folder.as_ref();
    let path = folder.join("model.safetensors.index.json");
    let index = match std::fs::read(&path) {
        Ok(index) => index,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok(vec![folder.join("model.safetensors")]);
        }
        Err(error) => return Err(WeightsError::File { path, error }),
    };
    let index: Index = serde_json::from_slice(&index).map_err(|error| WeightsError::Format {
        path,
        what: error.to_string(),
    })?;
    let mut files: Vec<_> = index.weight_map.into_values().collect();
    files.sort_unstable();
    files.dedup();
    Ok(files.into_iter().map(|file| folder.join(file)).collect())
}
