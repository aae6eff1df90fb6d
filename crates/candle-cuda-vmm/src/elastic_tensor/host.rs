//! Rows in a plain tensor on the CPU, which moves when it grows.
//!
//! Beside it the rows have the memory that they would have on a GPU, in a range on the simulated
//! device. Nothing is written there.

use super::addresses::Addresses;
use super::extent::{Extent, Live};
use super::growth::Growth;
use crate::error::Result;
use crate::tensor_pool::PoolMemory;
use crate::zeros::zeros;
use candle_core::{DType, Device, Tensor};
use std::iter;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A buffer of rows.
#[derive(Debug)]
struct Buffer {
    /// `[rows, row…]`.
    data: Tensor,
    rows: usize,
    /// Rows from this one on were never written, so they are zeros.
    written_end: usize,
    row_bytes: usize,
}

impl Buffer {
    /// The size of each copy if rows cannot be copied directly.
    const PIECE_BYTES: usize = 1 << 20;

    fn new(rows: usize, row: &[usize], dtype: DType) -> Result<Self> {
        Ok(Self {
            data: zeros(&shape_of_rows(rows, row), dtype)?,
            rows,
            written_end: 0,
            row_bytes: row.iter().product::<usize>() * dtype.size_in_bytes(),
        })
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
        let step = (Self::PIECE_BYTES / self.row_bytes).max(1);
        let end = rows.end;
        rows.step_by(step)
            .map(move |start| start..end.min(start + step))
    }
}

/// Returns the shape of `rows` rows.
fn shape_of_rows(rows: usize, row: &[usize]) -> Vec<usize> {
    iter::once(rows).chain(row.iter().copied()).collect()
}

/// Rows of one shape, a part of a buffer's rows.
#[derive(Debug)]
pub(super) struct HostRows {
    extent: Option<Extent>,
    memory: Arc<PoolMemory>,
    addresses: Addresses,
    row: Vec<usize>,
    dtype: DType,
    row_bytes: usize,
    /// The place of the first row in the extent, counted in rows.
    place: usize,
    buffer: Option<Buffer>,
    /// The current rows, counted from the start of the buffer.
    rows: Range<usize>,
    /// No view shows the buffer's rows from this one on, so they may be written.
    viewed_end: AtomicUsize,
}

impl HostRows {
    pub(super) fn new(
        memory: &Arc<PoolMemory>,
        addresses: Addresses,
        row: Vec<usize>,
        dtype: DType,
        row_bytes: usize,
    ) -> Self {
        Self {
            extent: None,
            memory: memory.clone(),
            addresses,
            row,
            dtype,
            row_bytes,
            place: 0,
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
                let new = |rows| Buffer::new(rows, &self.row, self.dtype);
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

    /// Returns the end of the rows in the extent, in bytes, with `more` rows after them.
    fn end_bytes(&self, more: usize) -> usize {
        // Cannot overflow: `ElasticTensor` has checked the number of rows.
        (self.place + self.rows.len() + more) * self.row_bytes
    }

    /// Returns the live bytes of the extent.
    fn live_bytes(&self) -> Range<usize> {
        self.extent.as_ref().map_or(0..0, Extent::live)
    }

    /// Frees live bytes at the start or the end of the extent.
    fn free(&mut self, part: impl FnOnce(&Extent) -> Range<usize>) {
        if let Some(extent) = &mut self.extent {
            extent.free(part(extent));
        }
    }

    /// Reserves addresses for rows that take this many bytes.
    fn reserve_addresses(&self, need: usize) -> Result<Extent> {
        let bytes = match &self.extent {
            None => self.addresses.first(need),
            Some(_) => self.addresses.again(need),
        };
        Extent::new(&self.memory, bytes)
    }

    /// Allocates memory for `more` rows after the last, in place. Returns a new extent for all rows
    /// if there are no addresses.
    fn extend(&mut self, more: usize) -> Result<Option<Extent>> {
        let end = self.end_bytes(more);
        match &mut self.extent {
            Some(extent) if extent.has_addresses(end) => {
                extent.extend(end)?;
                Ok(None)
            }
            _ => {
                let need = (self.rows.len() + more) * self.row_bytes;
                let mut fresh = self.reserve_addresses(need)?;
                fresh.extend(need)?;
                Ok(Some(fresh))
            }
        }
    }

    /// Adds `count` rows, which `write` writes from a row of the buffer on. After an error rows and
    /// memory are as before.
    fn add(
        &mut self,
        count: usize,
        write: impl FnOnce(&mut Buffer, usize) -> Result<()>,
    ) -> Result<()> {
        let live = self.live_bytes();
        let moved = self.extend(count)?;
        let made = self.make_room(count);
        let written = made.and_then(|()| match &mut self.buffer {
            Some(buffer) => write(buffer, self.rows.end),
            None => Ok(()),
        });
        match (written, moved) {
            (Err(error), _) => {
                self.free(|extent| live.end..extent.live().end);
                return Err(error);
            }
            (Ok(()), Some(fresh)) => (self.extent, self.place) = (Some(fresh), 0),
            (Ok(()), None) => {}
        }
        self.rows.end += count;
        Ok(())
    }

    pub(super) fn append(&mut self, rows: &Tensor) -> Result<()> {
        self.add(rows.dim(0)?, |buffer, at| buffer.write(at, rows))
    }

    pub(super) fn grow(&mut self, count: usize) -> Result<()> {
        self.add(count, |buffer, at| buffer.zero(at..at + count))
    }

    /// Copies all rows to a buffer of its own, which the pool does not count.
    pub(super) fn to_owned(&self) -> Result<Tensor> {
        let rows = self.view(0..self.len())?;
        let copy = zeros(rows.dims(), self.dtype)?;
        copy.slice_set(&rows, 0, 0)?;
        Ok(copy)
    }

    pub(super) fn truncate(&mut self, len: usize) {
        self.rows.end = self.rows.start + len;
        if len == 0 {
            return self.clear();
        }
        let end = self.end_bytes(0);
        self.free(|extent| extent.behind_spare(end));
    }

    /// Drops the rows from `len` on, and frees what was allocated for them since `live` was live.
    pub(super) fn undo(&mut self, len: usize, live: &Live) {
        self.rows.end = self.rows.start + len;
        let end = self.end_bytes(0);
        self.free(|extent| extent.newer(live, end));
    }

    pub(super) fn extent(&self) -> Option<&Extent> {
        self.extent.as_ref()
    }

    /// What `more` rows after the last need.
    pub(super) fn plan(&mut self, more: usize) -> Result<Growth> {
        let end = self.end_bytes(more);
        if let Some(extent) = self.extent.as_ref().filter(|it| it.has_addresses(end)) {
            let (bytes, moved) = (extent.missing(end), None);
            return Ok(Growth { bytes, moved });
        }
        let need = (self.rows.len() + more) * self.row_bytes;
        let moved = self.reserve_addresses(need)?;
        let bytes = moved.missing(need);
        let moved = Some(moved);
        Ok(Growth { bytes, moved })
    }

    /// Notes that what was planned is allocated.
    pub(super) fn finish(&mut self, growth: Growth) {
        if let Some(moved) = growth.moved {
            (self.extent, self.place) = (Some(moved), 0);
        }
        if let (Some(extent), Some(bytes)) = (&mut self.extent, growth.bytes) {
            extent.extended(bytes);
        }
    }

    pub(super) fn release_front(&mut self, count: usize) {
        self.rows.start += count;
        self.place += count;
        if self.rows.is_empty() {
            return self.clear();
        }
        let start = self.place * self.row_bytes;
        self.free(|extent| extent.before(start));
    }

    pub(super) fn clear(&mut self) {
        self.free(Extent::live);
        (self.buffer, self.rows, self.place) = (None, 0..0, 0);
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
