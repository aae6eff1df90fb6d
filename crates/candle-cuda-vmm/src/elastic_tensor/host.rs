//! Rows in a plain tensor on the CPU, which moves when it grows.

use crate::error::Result;
use crate::tensor_pool::HostBudget;
use crate::zeros::zeros;
use candle_core::{DType, Device, Tensor};
use std::iter;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A buffer of rows, charged to a budget.
#[derive(Debug)]
struct Buffer {
    budget: Arc<HostBudget>,
    /// `[rows, row…]`.
    data: Tensor,
    rows: usize,
    /// Rows from this one on were never written, so they are zeros.
    written_end: usize,
    bytes: usize,
}

impl Buffer {
    /// The size of each copy if rows cannot be copied directly.
    const PIECE_BYTES: usize = 1 << 20;

    fn new(budget: &Arc<HostBudget>, rows: usize, row: &[usize], dtype: DType) -> Result<Self> {
        let row_bytes = row.iter().product::<usize>() * dtype.size_in_bytes();
        let bytes = rows.saturating_mul(row_bytes);
        budget.charge(bytes)?;
        match zeros(&shape_of_rows(rows, row), dtype) {
            Ok(Some(data)) => Ok(Self {
                budget: budget.clone(),
                data,
                rows,
                written_end: 0,
                bytes,
            }),
            Ok(None) => {
                budget.refund(bytes);
                Err(budget.shortage(bytes, 0))
            }
            Err(error) => {
                budget.refund(bytes);
                Err(error.into())
            }
        }
    }

    fn shares_storage(&self, other: &Tensor) -> bool {
        let address = |tensor: &Tensor| {
            let (storage, _) = tensor.storage_and_layout();
            std::ptr::from_ref(&*storage).addr()
        };
        address(&self.data) == address(other)
    }

    /// Writes rows from row `at` on.
    ///
    /// Candle copies neither rows of this buffer nor rows that are not contiguous. Those are copied
    /// piece by piece, because a copy of all of them might not fit in memory.
    fn write(&mut self, at: usize, rows: &Tensor) -> Result<()> {
        let count = rows.dim(0)?;
        self.written_end = self.written_end.max(at + count);
        if rows.is_contiguous() && !self.shares_storage(rows) {
            return Ok(self.data.slice_set(rows, 0, at)?);
        }
        for piece in self.pieces(0..count) {
            let rows = rows.narrow(0, piece.start, piece.len())?;
            let rows = rows.force_contiguous()?;
            self.data.slice_set(&rows, 0, at + piece.start)?;
        }
        Ok(())
    }

    /// Writes zeros to rows that may have been written before.
    fn zero(&mut self, rows: Range<usize>) -> Result<()> {
        let dirty = rows.start..rows.end.min(self.written_end);
        let mut all = None;
        for piece in self.pieces(dirty) {
            let zeros = match &all {
                Some(zeros) => zeros,
                None => all.insert(self.data.narrow(0, 0, piece.len())?.zeros_like()?),
            };
            self.data
                .slice_set(&zeros.narrow(0, 0, piece.len())?, 0, piece.start)?;
        }
        Ok(())
    }

    /// Splits rows into pieces; the first is the longest.
    fn pieces(&self, rows: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        let step = (Self::PIECE_BYTES / (self.bytes / self.rows)).max(1);
        let end = rows.end;
        rows.step_by(step)
            .map(move |start| start..end.min(start + step))
    }
}

/// Returns the shape of `rows` rows.
fn shape_of_rows(rows: usize, row: &[usize]) -> Vec<usize> {
    iter::once(rows).chain(row.iter().copied()).collect()
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.budget.refund(self.bytes);
    }
}

/// Rows of one shape, a part of a buffer's rows.
#[derive(Debug)]
pub(super) struct HostRows {
    budget: Arc<HostBudget>,
    row: Vec<usize>,
    dtype: DType,
    buffer: Option<Buffer>,
    rows: Range<usize>,
    /// No view shows the buffer's rows from this one on, so they may be written.
    viewed_end: AtomicUsize,
}

impl HostRows {
    pub(super) fn new(budget: &Arc<HostBudget>, row: Vec<usize>, dtype: DType) -> Self {
        Self {
            budget: budget.clone(),
            row,
            dtype,
            buffer: None,
            rows: 0..0,
            viewed_end: AtomicUsize::new(0),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    /// Makes room for `more` rows after the last. No view shows that room. The rows may move.
    fn make_room(&mut self, more: usize) -> Result<()> {
        let (len, viewed_end) = (self.rows.len(), *self.viewed_end.get_mut());
        let has_room =
            |buffer: &Buffer| more <= buffer.rows - self.rows.end && viewed_end <= self.rows.end;
        let buffer = match self.buffer.take_if(|buffer| has_room(buffer)) {
            Some(buffer) => buffer,
            None => {
                // Twice the length, so that growth row by row copies each row only a few times.
                let new = |rows| Buffer::new(&self.budget, rows, &self.row, self.dtype);
                let mut fresh = new((len + more).max(2 * len)).or_else(|_| new(len + more))?;
                if let Some(old) = self.buffer.as_ref().filter(|_| len > 0) {
                    fresh.write(0, &old.data.narrow(0, self.rows.start, len)?)?;
                }
                self.rows = 0..len;
                *self.viewed_end.get_mut() = len;
                fresh
            }
        };
        self.buffer = Some(buffer);
        Ok(())
    }

    pub(super) fn append(&mut self, rows: &Tensor) -> Result<()> {
        let count = rows.dim(0)?;
        self.make_room(count)?;
        if let Some(buffer) = &mut self.buffer {
            buffer.write(self.rows.end, rows)?;
        }
        self.rows.end += count;
        Ok(())
    }

    pub(super) fn grow(&mut self, count: usize) -> Result<()> {
        self.make_room(count)?;
        if let Some(buffer) = &mut self.buffer {
            buffer.zero(self.rows.end..self.rows.end + count)?;
        }
        self.rows.end += count;
        Ok(())
    }

    /// Copies all rows to a buffer of its own, which is not charged to the budget.
    pub(super) fn to_owned(&self) -> Result<Tensor> {
        let rows = self.view(0..self.len())?;
        match zeros(rows.dims(), self.dtype)? {
            Some(copy) => {
                copy.slice_set(&rows, 0, 0)?;
                Ok(copy)
            }
            None => {
                let bytes = rows.elem_count() * self.dtype.size_in_bytes();
                Err(self.budget.shortage(bytes, 0))
            }
        }
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
        *self.viewed_end.get_mut() = 0;
    }

    /// Returns a view of some rows, counted from the first.
    pub(super) fn view(&self, rows: Range<usize>) -> Result<Tensor> {
        let Some(buffer) = &self.buffer else {
            return Ok(Tensor::zeros(
                shape_of_rows(0, &self.row),
                self.dtype,
                &Device::Cpu,
            )?);
        };
        let (start, end) = (self.rows.start + rows.start, self.rows.start + rows.end);
        self.viewed_end.fetch_max(end, Ordering::Relaxed);
        Ok(buffer.data.narrow(0, start, rows.len())?)
    }
}
