//! Rows of K or V on the CPU, in place.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::kv_batch::KvBatch;
use super::kv_check::HostTables;
use super::kv_memory::{KvMemory, KvStrides, Side};
use candle_core::{CpuStorage, Error, Layout, Result, Storage, WithDType};

/// Finds rows of K or V by sequence, head and token.
pub struct RowIndex<'a> {
    strides: KvStrides,
    /// Elements of a row.
    dim: usize,
    /// The block tables and the size of a block, in tokens.
    blocks: Option<(&'a HostTables, usize)>,
}

impl<'a> RowIndex<'a> {
    pub fn new(kv: &KvBatch, side: Side, tables: &'a HostTables) -> Self {
        let (strides, dim) = match side {
            Side::K => (kv.strides[0], kv.dim()),
            Side::V => (kv.strides[1], kv.value_dim()),
        };
        let blocks = match &kv.memory {
            KvMemory::Blocks { block_size, .. } => Some((tables, *block_size)),
            _ => None,
        };
        Self {
            strides,
            dim,
            blocks,
        }
    }

    /// Returns the number of elements of a row.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Returns the first element of a row, behind the first element of its tensor.
    pub fn offset(&self, sequence: usize, head: usize, token: usize) -> usize {
        let KvStrides {
            outer: outer_stride,
            head: head_stride,
            token: token_stride,
        } = self.strides;
        let (outer, token) = match self.blocks {
            Some((tables, size)) => (tables.0[sequence][token / size] as usize, token % size),
            None => (sequence, token),
        };
        outer * outer_stride + head * head_stride + token * token_stride
    }
}

/// The rows of K or V, to read.
pub struct Rows<'a, T> {
    /// The elements of each tensor, from its first on.
    tensors: Vec<&'a [T]>,
    index: RowIndex<'a>,
}

impl<'a, T: WithDType> Rows<'a, T> {
    /// Borrows rows from the storages and layouts of their tensors.
    pub fn new(
        index: RowIndex<'a>,
        tensors: impl Iterator<Item = (&'a Storage, &'a Layout)>,
    ) -> Result<Self> {
        let elements = |(storage, layout): (&'a Storage, &Layout)| {
            let elements = T::cpu_storage_as_slice(cpu(storage)?)?;
            Ok(&elements[layout.start_offset()..])
        };
        let tensors = tensors.map(elements).collect::<Result<_>>()?;
        Ok(Self { tensors, index })
    }

    pub fn row(&self, sequence: usize, head: usize, token: usize) -> &'a [T] {
        let tensor = match self.tensors.len() {
            1 => self.tensors[0],
            _ => self.tensors[sequence],
        };
        &tensor[self.index.offset(sequence, head, token)..][..self.index.dim]
    }
}

/// Returns the storage of a tensor on the CPU.
pub fn cpu(storage: &Storage) -> Result<&CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => Err(Error::Msg("the tensor is not on the CPU".to_owned())),
    }
}
