//! Rows in a plain tensor on the CPU, which moves when it grows.

use crate::error::Result;
use crate::tensor_pool::HostBudget;
use candle_core::{DType, Device, Tensor};
use std::iter;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A buffer, counted against a budget.
#[derive(Debug)]
struct Buffer {
    budget: Arc<HostBudget>,
    /// `[rows, row…]`.
    data: Tensor,
    rows: usize,
    bytes: usize,
}

impl Buffer {
    fn new(budget: &Arc<HostBudget>, rows: usize, row: &[usize], dtype: DType) -> Result<Self> {
        let shape: Vec<_> = iter::once(rows).chain(row.iter().copied()).collect();
        let bytes = shape.iter().product::<usize>() * dtype.size_in_bytes();
        budget.take(bytes)?;
        let data =
            Tensor::zeros(shape, dtype, &Device::Cpu).inspect_err(|_| budget.give_back(bytes))?;
        Ok(Self {
            budget: budget.clone(),
            data,
            rows,
            bytes,
        })
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.budget.give_back(self.bytes);
    }
}

/// Rows of one shape, `rows` of the buffer's.
#[derive(Debug)]
pub(super) struct HostRows {
    budget: Arc<HostBudget>,
    row: Vec<usize>,
    dtype: DType,
    buffer: Option<Buffer>,
    rows: Range<usize>,
    /// Where the buffer's rows begin that no view was made of, and that may be written.
    unseen: AtomicUsize,
}

impl HostRows {
    pub(super) fn new(budget: &Arc<HostBudget>, row: Vec<usize>, dtype: DType) -> Self {
        Self {
            budget: budget.clone(),
            row,
            dtype,
            buffer: None,
            rows: 0..0,
            unseen: AtomicUsize::new(0),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    /// Makes room for so many rows more behind the last, which are in no view; the rows may move.
    fn make_room(&mut self, more: usize) -> Result<()> {
        let (len, unseen) = (self.rows.len(), *self.unseen.get_mut());
        let has_room =
            |buffer: &Buffer| self.rows.end + more <= buffer.rows && unseen <= self.rows.end;
        let buffer = match self.buffer.take_if(|buffer| has_room(buffer)) {
            Some(buffer) => buffer,
            None => {
                // Twice as much as is needed at once, so that growing row by row copies each row a few times only.
                let new = |rows| Buffer::new(&self.budget, rows, &self.row, self.dtype);
                let fresh = new((len + more).max(2 * len)).or_else(|_| new(len + more))?;
                if let Some(old) = self.buffer.as_ref().filter(|_| len > 0) {
                    let rows = old.data.narrow(0, self.rows.start, len)?;
                    fresh.data.slice_set(&rows, 0, 0)?;
                }
                self.rows = 0..len;
                *self.unseen.get_mut() = len;
                fresh
            }
        };
        self.buffer = Some(buffer);
        Ok(())
    }

    pub(super) fn append(&mut self, rows: &Tensor) -> Result<()> {
        let count = rows.dim(0)?;
        let rows = rows.contiguous()?;
        self.make_room(count)?;
        if let Some(buffer) = &self.buffer {
            buffer.data.slice_set(&rows, 0, self.rows.end)?;
        }
        self.rows.end += count;
        Ok(())
    }

    pub(super) fn grow(&mut self, count: usize) -> Result<()> {
        // One row of zeros in memory, for all of them.
        let zeros = Tensor::zeros(self.row.as_slice(), self.dtype, &Device::Cpu)?;
        self.append(&zeros.broadcast_left(count)?)
    }

    pub(super) fn truncate(&mut self, len: usize) {
        self.rows.end = self.rows.start + len;
        if len == 0 {
            self.clear();
        }
    }

    pub(super) fn release_front(&mut self, count: usize) {
        self.rows.start += count;
        if self.rows.is_empty() {
            self.clear();
        }
    }

    pub(super) fn clear(&mut self) {
        (self.buffer, self.rows) = (None, 0..0);
        *self.unseen.get_mut() = 0;
    }

    /// A view of some of the rows, counted from the first.
    pub(super) fn view(&self, rows: Range<usize>) -> Result<Tensor> {
        let Some(buffer) = &self.buffer else {
            let shape: Vec<_> = iter::once(0).chain(self.row.iter().copied()).collect();
            return Ok(Tensor::zeros(shape, self.dtype, &Device::Cpu)?);
        };
        let (start, end) = (self.rows.start + rows.start, self.rows.start + rows.end);
        self.unseen.fetch_max(end, Ordering::Relaxed);
        Ok(buffer.data.narrow(0, start, rows.len())?)
    }
}
