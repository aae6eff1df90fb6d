//! Checks of lengths, tables and rows, on the host.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::kv_batch::KvBatch;
use super::kv_memory::{KvMemory, Side};
use super::options::Mask;
use super::slots::Slots;
use super::stream::is_capturing;
use crate::error::{Result, VmmError};
use candle_core::{Device, Tensor};
use cuda_vmm::pool::blocks::BlockError;
use std::ops::Range;

/// The most elements of a head that kernels support.
#[cfg(feature = "attention")]
const HEAD_DIM_MAX: usize = 256;
/// The bytes of a head are a multiple of this for kernels.
#[cfg(feature = "attention")]
const HEAD_BYTES_STEP: usize = 16;

/// The block tables of a paged cache, on the host. Empty for other layouts.
#[derive(Debug, Default)]
pub struct HostTables(pub Vec<Vec<u32>>);

/// The row of a sequence that a new token goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    pub token: usize,
    pub sequence: usize,
    pub row: usize,
}

impl KvBatch {
    /// Checks lengths and tables. It copies both to the host, so it waits for a GPU.
    ///
    /// [`decode`](super::decode), [`write`](super::write) and [`prompt`](super::prompt) check what
    /// they are about to use, and fail with the same errors: on a CPU device always, on a CUDA
    /// device in builds with `debug_assertions`, except during a stream capture. `decode` and
    /// `prompt` with a window check the blocks that the window needs.
    ///
    /// # Errors
    /// - [`MissingLengths`](VmmError::MissingLengths) if a paged cache has no lengths.
    /// - [`LengthBeyondCapacity`](VmmError::LengthBeyondCapacity).
    /// - [`Vmm`](VmmError::Vmm) with `Block` around [`BlockError::Invalid`] if a table entry that
    ///   the length needs names no block, or around [`BlockError::NotBacked`] if that block is not
    ///   backed and the batch is [`checked_by`](Self::checked_by) its blocks.
    /// - [`CandleError`](VmmError::CandleError) if a copy fails.
    pub fn check(&self) -> Result<()> {
        self.check_seen(Mask::None).map(drop)
    }

    /// As `check`, but only for the blocks that the last query sees. Returns lengths and tables.
    pub(super) fn check_seen(&self, mask: Mask) -> Result<(Vec<usize>, HostTables)> {
        let (lengths, tables) = (self.lengths_on_host()?, self.tables_on_host()?);
        for (sequence, length) in lengths.iter().copied().enumerate() {
            self.check_length(sequence, length)?;
            let first = match mask {
                Mask::Window(window) => length.saturating_sub(window),
                _ => 0,
            };
            self.check_blocks(&tables, sequence, first..length)?;
        }
        Ok((lengths, tables))
    }

    /// Checks the rows of new tokens, and returns them with the tables.
    pub(super) fn check_slots(&self, slots: Slots<'_>) -> Result<(Vec<Row>, HostTables)> {
        let rows = match slots {
            Slots::Last => self.last_rows()?,
            Slots::At { sequences, rows } => self.named_rows(sequences, rows)?,
        };
        let tables = self.tables_on_host()?;
        for Row { sequence, row, .. } in rows.iter().copied() {
            self.check_blocks(&tables, sequence, row..row + 1)?;
        }
        Ok((rows, tables))
    }

    fn last_rows(&self) -> Result<Vec<Row>> {
        let lengths = self.lengths_on_host()?.into_iter().enumerate();
        let row = |(sequence, length): (usize, usize)| {
            let row = Row {
                token: sequence,
                sequence,
                row: length.checked_sub(1)?,
            };
            Some(self.check_length(sequence, length).map(|()| row))
        };
        lengths.filter_map(row).collect()
    }

    fn named_rows(&self, sequences: &Tensor, rows: &Tensor) -> Result<Vec<Row>> {
        let [sequences, rows] = [sequences.to_vec1::<u32>()?, rows.to_vec1()?];
        let row = |(token, (sequence, row)): (usize, (&u32, &u32))| {
            let (sequence, row) = (*sequence as usize, *row as usize);
            let batch = self.batch();
            if sequence >= batch {
                return Err(VmmError::UnknownSequence { sequence, batch });
            }
            let capacity = self.capacity_of(sequence);
            match row < capacity {
                true => Ok(Row {
                    token,
                    sequence,
                    row,
                }),
                false => Err(VmmError::RowBeyondCapacity {
                    token,
                    sequence,
                    row,
                    capacity,
                }),
            }
        };
        sequences.iter().zip(&rows).enumerate().map(row).collect()
    }

    /// Returns whether rows share memory.
    pub(super) fn is_broadcast(&self) -> bool {
        let tensors = [Side::K, Side::V].map(|side| self.memory.tensors(side));
        tensors.iter().flatten().any(|tensor| {
            let mut steps = tensor.dims().iter().zip(tensor.stride());
            steps.any(|(size, stride)| *size > 1 && *stride == 0)
        })
    }

    /// Returns whether calls check what they use.
    pub(super) fn is_checked(&self) -> bool {
        match self.device() {
            Device::Cpu => true,
            device => cfg!(debug_assertions) && !is_capturing(device),
        }
    }

    /// Returns the length of each sequence.
    pub(super) fn lengths_on_host(&self) -> Result<Vec<usize>> {
        match (&self.lengths, &self.memory) {
            (Some(lengths), _) => {
                let lengths = lengths.to_vec1::<u32>()?;
                Ok(lengths.into_iter().map(|length| length as usize).collect())
            }
            (None, KvMemory::Blocks { .. }) => Err(VmmError::MissingLengths),
            (None, _) => {
                let sequences = 0..self.sizes.batch;
                Ok(sequences
                    .map(|sequence| self.capacity_of(sequence))
                    .collect())
            }
        }
    }

    pub(super) fn tables_on_host(&self) -> Result<HostTables> {
        match &self.memory {
            KvMemory::Blocks { tables, .. } => Ok(HostTables(tables.to_vec2()?)),
            _ => Ok(HostTables::default()),
        }
    }

    /// Returns the most tokens that this sequence can have.
    pub(super) fn capacity_of(&self, sequence: usize) -> usize {
        match &self.memory {
            KvMemory::Sequences { capacities, .. } => capacities[sequence],
            _ => self.sizes.capacity,
        }
    }

    pub(super) fn check_length(&self, sequence: usize, length: usize) -> Result<()> {
        let capacity = self.capacity_of(sequence);
        match length > capacity {
            true => Err(VmmError::LengthBeyondCapacity {
                sequence,
                length,
                capacity,
            }),
            false => Ok(()),
        }
    }

    /// Fails unless the kernels support the heads.
    #[cfg(feature = "attention")]
    pub(super) fn check_head(&self) -> Result<()> {
        let (dim, value_dim, dtype) = (self.dim(), self.value_dim(), self.dtype);
        let is_supported = |dim: usize| {
            dim <= HEAD_DIM_MAX && (dim * dtype.size_in_bytes()).is_multiple_of(HEAD_BYTES_STEP)
        };
        match is_supported(dim) && is_supported(value_dim) {
            true => Ok(()),
            false => Err(VmmError::UnsupportedHead {
                dim,
                value_dim,
                dtype,
            }),
        }
    }

    /// Checks the blocks of these rows of a sequence, which are within its capacity.
    pub(super) fn check_blocks(
        &self,
        tables: &HostTables,
        sequence: usize,
        rows: Range<usize>,
    ) -> Result<()> {
        let KvMemory::Blocks { k, block_size, .. } = &self.memory else {
            return Ok(());
        };
        let blocks = k.dims()[0];
        let entries = rows.start / block_size..rows.end.div_ceil(*block_size);
        for block in tables.0[sequence][entries].iter().copied() {
            let block = block as usize;
            let is_backed = |blocks: &crate::ElasticBlocks| blocks.is_backed(block);
            let error = match block < blocks {
                true if self.backing.as_ref().is_none_or(is_backed) => continue,
                true => BlockError::NotBacked { block },
                false => BlockError::Invalid { block, blocks },
            };
            return Err(cuda_vmm::VmmError::Block(error).into());
        }
        Ok(())
    }
}
