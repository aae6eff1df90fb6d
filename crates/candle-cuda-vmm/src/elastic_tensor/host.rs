//! Rows in a plain tensor on the CPU, which moves when it grows.
//!
//! Beside it the rows have the memory that they would have on a GPU, in a range on the simulated
//! device. Nothing is written there.

use super::addresses::Addresses;
use super::columns::Columns;
use super::extent::{Extent, Growth, Live};
use super::layout::RowLayout;
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

/// The rows of a column: a part of a buffer's rows.
#[derive(Debug)]
struct Contents {
    row: Vec<usize>,
    buffer: Option<Buffer>,
    /// The current rows, counted from the start of the buffer.
    rows: Range<usize>,
    /// No view shows the buffer's rows from this one on, so they may be written.
    viewed_end: AtomicUsize,
}

impl Contents {
    fn new(row: &[usize]) -> Self {
        Self {
            row: row.to_vec(),
            buffer: None,
            rows: 0..0,
            viewed_end: AtomicUsize::new(0),
        }
    }

    /// Makes room for `more` rows after the last. No view shows that room. The rows may move.
    fn make_room(&mut self, more: usize, dtype: DType) -> Result<()> {
        let (len, viewed_end) = (self.rows.len(), *self.viewed_end.get_mut());
        let has_room =
            |buffer: &Buffer| more <= buffer.rows - self.rows.end && viewed_end <= self.rows.end;
        let buffer = match self.buffer.take_if(|buffer| has_room(buffer)) {
            Some(buffer) => buffer,
            None => {
                // Twice the length, so that growth row by row copies each row only a few times.
                let new = |rows| Buffer::new(rows, &self.row, dtype);
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

    /// The same rows, in the same buffer until either of the two appends. Neither writes to them
    /// meanwhile.
    fn fork(&self) -> Self {
        let end = self.rows.end;
        self.viewed_end.fetch_max(end, Ordering::Relaxed);
        let buffer = self.buffer.as_ref().map(|buffer| Buffer {
            data: buffer.data.clone(),
            // What is behind them is the source's.
            rows: end,
            ..*buffer
        });
        Self {
            row: self.row.clone(),
            buffer,
            rows: self.rows.clone(),
            viewed_end: AtomicUsize::new(end),
        }
    }

    /// Moves the rows if a view has shown rows from row `at` on.
    fn make_writable(&mut self, at: usize, dtype: DType) -> Result<()> {
        let len = self.rows.len();
        if let Some(buffer) = &self.buffer
            && *self.viewed_end.get_mut() > self.rows.start + at
        {
            let mut fresh = Buffer::new(len, &self.row, dtype)?;
            fresh.write(0, &buffer.data.narrow(0, self.rows.start, len)?)?;
            (self.buffer, self.rows) = (Some(fresh), 0..len);
            *self.viewed_end.get_mut() = 0;
        }
        Ok(())
    }

    fn clear(&mut self) {
        (self.buffer, self.rows) = (None, 0..0);
        *self.viewed_end.get_mut() = 0;
    }
}

/// Rows of one layout. The contents of each column have a buffer of their own.
#[derive(Debug)]
pub(super) struct HostRows {
    extent: Option<Extent>,
    memory: Arc<PoolMemory>,
    addresses: Addresses,
    layout: RowLayout,
    /// The rows in the extent.
    columns: Columns,
    contents: Vec<Contents>,
}

impl HostRows {
    pub(super) fn new(memory: &Arc<PoolMemory>, addresses: Addresses, layout: RowLayout) -> Self {
        let columns = Columns::new(layout.columns());
        let contents = columns.all().map(|at| Contents::new(layout.dims(at)));
        Self {
            extent: None,
            memory: memory.clone(),
            addresses,
            contents: contents.collect(),
            columns,
            layout,
        }
    }

    pub(super) fn len(&self, column: usize) -> usize {
        self.columns.rows(column).len()
    }

    pub(super) fn dims(&self, column: usize) -> &[usize] {
        self.layout.dims(column)
    }

    /// Reserves addresses for at least this many rows from now on.
    pub(super) fn expect(&mut self, rows: usize) {
        self.addresses.expect(rows, self.layout.row_bytes);
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

    /// What `more` rows in each of these columns need.
    fn growth(&mut self, columns: Range<usize>, more: usize) -> Result<Growth> {
        let row_bytes = self.layout.row_bytes;
        let need = self
            .addresses
            .need(self.columns.len_with(columns.clone(), more), row_bytes)?;
        let end = need.saturating_add(self.columns.span().start * row_bytes);
        let next = columns.map(|column| self.columns.next(column)).min();
        let start = next.map_or(end, |next| next * row_bytes);
        if let Some(extent) = self.extent.as_mut().filter(|it| it.has_addresses(end))
            && extent.make_private(&(start..end), || ())?
        {
            let (bytes, moved) = (extent.missing(end), None);
            return Ok(Growth { bytes, moved });
        }
        let is_first = self.extent.is_none();
        let moved = Extent::new(&self.memory, &self.addresses, need, is_first)?;
        let bytes = moved.missing(need);
        let moved = Some(moved);
        Ok(Growth { bytes, moved })
    }

    /// Adds `count` rows to a column, which `write` writes from a row of its buffer on. After an
    /// error rows and memory are as before.
    fn add(
        &mut self,
        column: usize,
        count: usize,
        write: impl FnOnce(&mut Buffer, usize) -> Result<()>,
    ) -> Result<()> {
        let live = self.live_bytes();
        let Growth { bytes, mut moved } = self.growth(column..column + 1, count)?;
        if let Some(extent) = moved.as_mut().or(self.extent.as_mut()) {
            extent.allocate(bytes)?;
        }
        let contents = &mut self.contents[column];
        let made = contents.make_room(count, self.layout.dtype);
        let written = made.and_then(|()| match &mut contents.buffer {
            Some(buffer) => write(buffer, contents.rows.end),
            None => Ok(()),
        });
        if let Err(error) = written {
            self.free(|extent| live.end..extent.live().end);
            return Err(error);
        }
        contents.rows.end += count;
        self.finish(Growth { bytes: None, moved });
        self.columns.add(column, count);
        Ok(())
    }

    pub(super) fn append(&mut self, column: usize, rows: &Tensor) -> Result<()> {
        self.add(column, rows.dim(0)?, |buffer, at| buffer.write(at, rows))
    }

    pub(super) fn grow(&mut self, column: usize, count: usize) -> Result<()> {
        self.add(column, count, |buffer, at| buffer.zero(at..at + count))
    }

    /// Moves the rows of a column to a new buffer if a view has shown some of these, or later ones.
    pub(super) fn make_writable(&mut self, column: usize, rows: Range<usize>) -> Result<()> {
        self.contents[column].make_writable(rows.start, self.layout.dtype)
    }

    /// Writes over rows of a column from row `at` on, which are writable.
    pub(super) fn overwrite(&mut self, column: usize, at: usize, rows: &Tensor) -> Result<()> {
        let contents = &mut self.contents[column];
        match &mut contents.buffer {
            Some(buffer) => buffer.write(contents.rows.start + at, rows),
            None => Ok(()),
        }
    }

    /// Copies all rows of a column to a buffer of its own, which the pool does not count.
    pub(super) fn to_owned(&self, column: usize) -> Result<Tensor> {
        let rows = self.view(column, 0..self.len(column))?;
        let copy = zeros(rows.dims(), self.layout.dtype)?;
        copy.slice_set(&rows, 0, 0)?;
        Ok(copy)
    }

    /// Frees what no row needs, behind the row `end` if it is given.
    fn free_unneeded(&mut self, end: Option<usize>) {
        let (row_bytes, start) = (self.layout.row_bytes, self.columns.span().start);
        if let Some(end) = end {
            self.free(|extent| extent.behind_spare(end * row_bytes));
        }
        self.free(|extent| extent.before(start * row_bytes));
    }

    pub(super) fn truncate(&mut self, column: usize, len: usize) {
        let contents = &mut self.contents[column];
        contents.rows.end = contents.rows.start + len;
        if len == 0 {
            contents.clear();
        }
        let end = self.columns.keep(column, len);
        self.free_unneeded(end);
    }

    /// Drops the rows of a column from `len` on, and frees what was allocated for them since `live`
    /// was live.
    pub(super) fn undo(&mut self, column: usize, len: usize, live: &Live) {
        let contents = &mut self.contents[column];
        contents.rows.end = contents.rows.start + len;
        let _ = self.columns.keep(column, len);
        let end = self.columns.span().end * self.layout.row_bytes;
        self.free(|extent| extent.newer(live, end));
    }

    pub(super) fn release_front(&mut self, column: usize, count: usize) {
        let contents = &mut self.contents[column];
        contents.rows.start += count;
        if contents.rows.is_empty() {
            contents.clear();
        }
        let end = self.columns.release_front(column, count);
        self.free_unneeded(end);
    }

    /// Makes rows like these in other addresses.
    pub(super) fn fork(&self, extent: Option<Extent>) -> Self {
        Self {
            extent,
            memory: self.memory.clone(),
            addresses: self.addresses,
            layout: self.layout.clone(),
            columns: self.columns.clone(),
            contents: self.contents.iter().map(Contents::fork).collect(),
        }
    }

    /// Returns the bytes from the first row of any column to the last.
    pub(super) fn bytes_of_span(&self) -> Range<usize> {
        let (rows, row_bytes) = (self.columns.span(), self.layout.row_bytes);
        rows.start * row_bytes..rows.end * row_bytes
    }

    /// Returns all columns.
    pub(super) fn columns(&self) -> Range<usize> {
        self.columns.all()
    }

    pub(super) fn extent(&self) -> Option<&Extent> {
        self.extent.as_ref()
    }

    /// What `more` rows in each column need.
    pub(super) fn plan(&mut self, more: usize) -> Result<Growth> {
        self.growth(self.columns.all(), more)
    }

    /// Notes that what was planned is allocated.
    pub(super) fn finish(&mut self, growth: Growth) {
        if let Some(moved) = growth.moved {
            self.extent = Some(moved);
            self.columns.moved();
        }
        if let (Some(extent), Some(bytes)) = (&mut self.extent, growth.bytes) {
            extent.extended(bytes);
        }
    }

    /// Returns a view of some rows of a column, counted from its first.
    pub(super) fn view(&self, column: usize, rows: Range<usize>) -> Result<Tensor> {
        let contents = &self.contents[column];
        let Some(buffer) = &contents.buffer else {
            let shape = shape_of_rows(0, &contents.row);
            return Ok(Tensor::zeros(shape, self.layout.dtype, &Device::Cpu)?);
        };
        let start = contents.rows.start;
        let (start, end) = (start + rows.start, start + rows.end);
        contents.viewed_end.fetch_max(end, Ordering::Relaxed);
        Ok(buffer.data.narrow(0, start, rows.len())?)
    }
}
