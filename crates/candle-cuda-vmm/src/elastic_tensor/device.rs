//! Rows in a range of addresses of their own, with memory for the rows in use.
//!
//! # Safety
//! One launch writes to rows. Their memory was allocated just before, as
//! [`Append`](crate::append::Append) requires.

#![allow(unsafe_code)]

use super::addresses::Addresses;
use super::columns::Columns;
use super::extent::{Extent, Growth, Live};
use super::layout::RowLayout;
use super::space::Space;
use crate::append::{AppendOutcome, Side};
use crate::error::Result;
use crate::lease;
use crate::tensor_pool::DeviceMemory;
use candle_core::Tensor;
use cuda_vmm::VirtualMemoryPool;
use std::iter;
use std::ops::Range;
use std::sync::Arc;

/// Rows of one layout, contiguous in a range of addresses.
#[derive(Debug)]
pub(super) struct DeviceRows {
    memory: Arc<DeviceMemory>,
    addresses: Addresses,
    layout: RowLayout,
    space: Option<Space>,
    columns: Columns,
}

impl DeviceRows {
    pub(super) fn new(memory: &Arc<DeviceMemory>, addresses: Addresses, layout: RowLayout) -> Self {
        Self {
            memory: memory.clone(),
            addresses,
            columns: Columns::new(layout.columns()),
            layout,
            space: None,
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

    fn bytes(&self, rows: &Range<usize>) -> Range<usize> {
        let offset = |row: usize| row.saturating_mul(self.layout.row_bytes);
        offset(rows.start)..offset(rows.end)
    }

    /// Makes room for `more` rows in each of these columns, in place. Returns `false` if the rows
    /// must move.
    fn extend(&mut self, columns: impl IntoIterator<Item = usize>, more: usize) -> Result<bool> {
        let Some(end) = self.end_in_place(columns, more)? else {
            return Ok(false);
        };
        let Some(space) = &mut self.space else {
            return Ok(false);
        };
        match space.extent.allocate(space.extent.missing(end)) {
            // The page was freed while a view shows it.
            Err(cuda_vmm::VmmError::Leased { .. }) => Ok(false),
            extended => Ok(extended.map(|()| true)?),
        }
    }

    /// Returns the end in bytes of the rows with `more` rows in each of these columns; `None` if
    /// there are no addresses, or if a view shows what would be written.
    fn end_in_place(
        &mut self,
        columns: impl IntoIterator<Item = usize>,
        more: usize,
    ) -> Result<Option<usize>> {
        let mut end = 0;
        for column in columns {
            let next = self.columns.next(column);
            let bytes = self.bytes(&(next..next.saturating_add(more)));
            let Some(space) = &mut self.space else {
                return Ok(None);
            };
            if !space.extent.has_addresses(bytes.end)
                || space.is_in_use(column, &bytes, self.memory.common.stream())?
                || !space.make_private(&bytes)?
            {
                return Ok(None);
            }
            end = end.max(bytes.end);
        }
        Ok(Some(end))
    }

    /// Reserves addresses that the rows move to, or their first ones, with room for `more` rows in
    /// each of these columns. Returns the bytes that the rows then take, too.
    fn new_extent(
        &self,
        columns: impl IntoIterator<Item = usize>,
        more: usize,
    ) -> Result<(Extent, usize)> {
        let rows = self.columns.len_with(columns, more);
        let need = self.addresses.need(rows, self.layout.row_bytes)?;
        let is_first = self.space.is_none();
        let extent = Extent::new(&self.memory.common, &self.addresses, need, is_first)?;
        Ok((extent, need))
    }

    /// Copies the rows to a new range, with room for `more` rows in each of these columns.
    fn copy_to_new_space(
        &self,
        columns: impl IntoIterator<Item = usize>,
        more: usize,
    ) -> Result<Space> {
        let (mut extent, need) = self.new_extent(columns, more)?;
        extent.allocate(extent.missing(need))?;
        self.copy_to(&extent)?;
        Ok(Space::over(extent, self.layout.columns()))
    }

    /// Replaces the range. Memory of the old one that views show is held until they are dropped.
    fn replace_space(&mut self, fresh: Space) {
        self.space = Some(fresh);
        self.columns.moved();
    }

    /// Adds `count` rows to a column, which `write` writes from an offset of a range on. After an
    /// error rows and memory are as before.
    fn add(
        &mut self,
        column: usize,
        count: usize,
        write: impl FnOnce(&VirtualMemoryPool, usize) -> Result<()>,
    ) -> Result<()> {
        let live = self.live_bytes();
        let (row_bytes, start) = (self.layout.row_bytes, self.layout.start_bytes(column));
        let offset = |next: usize| next * row_bytes + start;
        let next = self.columns.next(column);
        if self.extend([column], count)? {
            let space = self.space.as_ref();
            let written = space.map_or(Ok(()), |space| write(space.extent.range(), offset(next)));
            if let Err(error) = written {
                self.free_behind(live);
                return Err(error);
            }
        } else {
            let fresh = self.copy_to_new_space([column], count)?;
            let next = next - self.columns.span().start;
            write(fresh.extent.range(), offset(next))?;
            self.replace_space(fresh);
        }
        self.columns.add(column, count);
        Ok(())
    }

    /// Returns the range of live bytes.
    fn live_bytes(&self) -> Range<usize> {
        self.space
            .as_ref()
            .map_or(0..0, |space| space.extent.live())
    }

    /// Frees the bytes that were allocated behind `live`, the bytes that were live before.
    fn free_behind(&mut self, live: Range<usize>) {
        if let Some(space) = &mut self.space {
            space.free(live.end..space.extent.live().end);
        }
    }

    pub(super) fn append(&mut self, column: usize, rows: &Tensor) -> Result<()> {
        let (memory, row_bytes) = (self.memory.clone(), self.layout.row_bytes);
        self.add(column, rows.dim(0)?, |range, offset| {
            memory.leases.write_rows(range, offset, row_bytes, rows)
        })
    }

    /// Makes room for `count` more rows in each of these columns. The rows may move.
    fn reserve(&mut self, columns: &[usize], count: usize) -> Result<()> {
        if !self.extend(columns.iter().copied(), count)? {
            let fresh = self.copy_to_new_space(columns.iter().copied(), count)?;
            self.replace_space(fresh);
        }
        Ok(())
    }

    /// A column's side of an append of tokens, for which there is room.
    fn side<'a>(&self, column: usize, tokens: &'a Tensor) -> Side<'a> {
        let first = match self.columns.rows(column) {
            rows if rows.is_empty() => self.columns.next(column),
            rows => rows.start,
        };
        self.side_at(column, first, tokens)
    }

    /// A column's side of a write that counts rows from `first` on. That is counted from the start
    /// of the range.
    fn side_at<'a>(&self, column: usize, first: usize, tokens: &'a Tensor) -> Side<'a> {
        let base = (self.space.as_ref()).map_or(0, |space| space.extent.range().base_address());
        let offset = first * self.layout.row_bytes + self.layout.start_bytes(column);
        Side {
            tokens,
            rows: base + offset as u64,
            row_bytes: self.layout.row_bytes,
        }
    }

    /// Appends keys and values by one launch, and returns all of them contiguous if `contiguous` is
    /// set.
    ///
    /// Both have one shape and dtype, the same number of rows, and their sequence in dimension
    /// `dim`. Returns [`AppendOutcome::Unsupported`] if one launch cannot do it. In that case, and
    /// after an error, memory may have been allocated; [`undo`](Self::undo) frees it.
    pub(super) fn append_both(
        mut pair: Pair<'_>,
        [keys, values]: [&Tensor; 2],
        dim: usize,
        contiguous: bool,
    ) -> Result<AppendOutcome> {
        let (count, old);
        let (memory, sides) = match &mut pair {
            Pair::Apart([k, v]) => {
                (count, old) = (keys.dim(dim)?, k.len(0));
                k.reserve(&[0], count)?;
                v.reserve(&[0], count)?;
                (k.memory.clone(), [k.side(0, keys), v.side(0, values)])
            }
            Pair::Together(rows, [k, v]) => {
                (count, old) = (keys.dim(dim)?, rows.len(*k));
                rows.reserve(&[*k, *v], count)?;
                let sides = [rows.side(*k, keys), rows.side(*v, values)];
                (rows.memory.clone(), sides)
            }
        };
        // SAFETY: `reserve` made all rows live, including the new ones, which no view shows.
        let queued = unsafe { memory.append.queue(sides, dim, old, contiguous) }?;
        if !matches!(queued, AppendOutcome::Unsupported) {
            match pair {
                Pair::Apart(both) => both.map(|rows| rows.columns.add(0, count)),
                Pair::Together(rows, both) => both.map(|column| rows.columns.add(column, count)),
            };
        }
        Ok(queued)
    }

    /// Moves all rows to a new range if a view shows some of these rows of a column.
    pub(super) fn make_writable(&mut self, column: usize, rows: Range<usize>) -> Result<()> {
        let start = self.columns.rows(column).start;
        let bytes = self.bytes(&(start + rows.start..start + rows.end));
        if let Some(space) = &mut self.space
            && !bytes.is_empty()
            && space.is_in_use(column, &bytes, self.memory.common.stream())?
        {
            let fresh = self.copy_to_new_space([], 0)?;
            self.replace_space(fresh);
        }
        Ok(())
    }

    /// Writes over rows of a column from row `at` on, which are writable.
    pub(super) fn overwrite(&mut self, column: usize, at: usize, rows: &Tensor) -> Result<()> {
        let row_bytes = self.layout.row_bytes;
        let first = self.columns.rows(column).start + at;
        let offset = first * row_bytes + self.layout.start_bytes(column);
        match &self.space {
            Some(space) if rows.elem_count() > 0 => {
                let range = space.extent.range();
                (self.memory.leases).write_rows(range, offset, row_bytes, rows)
            }
            _ => Ok(()),
        }
    }

    /// Writes keys and values over rows from row `at` on, which are writable, by one launch. Both
    /// have a range of their own, one shape and dtype, and their sequence in dimension `dim`.
    pub(super) fn overwrite_both(
        pair: [(&Self, &Tensor); 2],
        at: usize,
        dim: usize,
    ) -> Result<AppendOutcome> {
        if pair.iter().any(|(rows, _)| rows.space.is_none()) {
            return Ok(AppendOutcome::Unsupported);
        }
        let sides =
            pair.map(|(rows, tokens)| rows.side_at(0, rows.columns.rows(0).start + at, tokens));
        // SAFETY: the rows are live. After `make_writable` no view showed them. A view that was
        // made since is the caller's own, and is to show what is written.
        unsafe { pair[0].0.memory.append.queue(sides, dim, 0, false) }
    }

    pub(super) fn grow(&mut self, column: usize, count: usize) -> Result<()> {
        let (memory, row_bytes) = (self.memory.clone(), self.layout.row_bytes);
        let part_bytes = self.layout.part_bytes(column);
        self.add(column, count, |range, offset| {
            let (pieces, bytes) = match part_bytes == row_bytes {
                true => (1, count * row_bytes),
                false => (count, part_bytes),
            };
            (0..pieces).try_for_each(|piece| {
                let offset = offset + piece * row_bytes;
                lease::zero(memory.common.stream(), range, offset, bytes)
            })
        })
    }

    /// Frees what no row needs, behind the row `end` if it is given.
    fn free_unneeded(&mut self, end: Option<usize>) {
        let (row_bytes, span) = (self.layout.row_bytes, self.columns.span());
        if let Some(space) = &mut self.space {
            if let Some(end) = end {
                space.free(space.extent.behind_spare(end * row_bytes));
            }
            space.free(space.extent.before(span.start * row_bytes));
        }
    }

    pub(super) fn truncate(&mut self, column: usize, len: usize) {
        let end = self.columns.keep(column, len);
        self.free_unneeded(end);
    }

    /// Drops the rows of a column from `len` on, and frees what was allocated for them since `live`
    /// was live.
    pub(super) fn undo(&mut self, column: usize, len: usize, live: &Live) {
        let _ = self.columns.keep(column, len);
        let end = self.columns.span().end * self.layout.row_bytes;
        if let Some(space) = &mut self.space {
            space.free(space.extent.newer(live, end));
        }
    }

    pub(super) fn release_front(&mut self, column: usize, count: usize) {
        let end = self.columns.release_front(column, count);
        self.free_unneeded(end);
    }

    /// Makes rows like these in other addresses.
    pub(super) fn fork(&self, extent: Option<Extent>) -> Self {
        let columns = self.layout.columns();
        Self {
            memory: self.memory.clone(),
            addresses: self.addresses,
            layout: self.layout.clone(),
            space: extent.map(|extent| Space::over(extent, columns)),
            columns: self.columns.clone(),
        }
    }

    /// Queues a copy of live bytes to live bytes of another range at the same offsets.
    pub(super) fn copy_bytes(&self, to: &VirtualMemoryPool, bytes: Range<usize>) -> Result<()> {
        let stream = self.memory.common.stream();
        match &self.space {
            Some(space) => lease::copy(stream, space.extent.range(), to, bytes),
            None => Ok(()),
        }
    }

    /// Returns the bytes from the first row of any column to the last.
    pub(super) fn bytes_of_span(&self) -> Range<usize> {
        self.bytes(&self.columns.span())
    }

    /// Returns all columns.
    pub(super) fn columns(&self) -> Range<usize> {
        self.columns.all()
    }

    pub(super) fn extent(&self) -> Option<&Extent> {
        self.space.as_ref().map(|space| &space.extent)
    }

    /// What `more` rows in each column need. They move if a view shows memory that they need.
    pub(super) fn plan(&mut self, more: usize) -> Result<Growth> {
        if let Some(end) = self.end_in_place(self.columns.all(), more)?
            && let Some(space) = &self.space
        {
            let (missing, range) = (space.extent.missing(end), space.extent.range());
            let is_leased = (missing.as_ref())
                .is_some_and(|missing| range.is_leased(missing.start, missing.len()));
            if !is_leased {
                let (bytes, moved) = (missing, None);
                return Ok(Growth { bytes, moved });
            }
        }
        let (moved, need) = self.new_extent(self.columns.all(), more)?;
        let bytes = moved.missing(need);
        let moved = Some(moved);
        Ok(Growth { bytes, moved })
    }

    /// Copies the rows to new addresses, whose memory is allocated.
    pub(super) fn copy_to(&self, moved: &Extent) -> Result<()> {
        let span = self.columns.span();
        match &self.space {
            Some(space) if !span.is_empty() => {
                let rows = self.whole_rows(space, span)?;
                self.memory.leases.write(moved.range(), 0, &rows)
            }
            _ => Ok(()),
        }
    }

    /// Notes that what was planned is allocated, and the rows are copied if they move.
    pub(super) fn finish(&mut self, growth: Growth) {
        if let Some(extent) = growth.moved {
            self.replace_space(Space::over(extent, self.layout.columns()));
        }
        if let (Some(space), Some(bytes)) = (&mut self.space, growth.bytes) {
            space.extent.extended(bytes);
        }
    }

    /// Returns a view of some rows of a column, counted from its first.
    pub(super) fn view(&self, column: usize, rows: Range<usize>) -> Result<Tensor> {
        let all = self.columns.rows(column);
        match &self.space {
            Some(space) if !rows.is_empty() => {
                let rows = all.start + rows.start..all.start + rows.end;
                let end = rows.end * self.layout.row_bytes;
                space.note_view(column, end);
                let whole = match rows == all {
                    true => self.whole_rows(space, rows),
                    false => self.lease(space, rows),
                };
                Ok(self.layout.column(&whole?, column)?)
            }
            _ => {
                let shape = iter::once(rows.len()).chain(self.layout.dims(column).iter().copied());
                let shape: Vec<_> = shape.collect();
                self.memory.leases.empty(&shape, self.layout.dtype)
            }
        }
    }

    /// Copies all rows of a column to Candle's own memory.
    pub(super) fn to_owned(&self, column: usize) -> Result<Tensor> {
        // Not `copy`: its result would hold the lease.
        Ok(self.view(column, 0..self.len(column))?.force_contiguous()?)
    }

    /// Makes a tensor with a lease of its own over some whole rows, counted from the start of the
    /// range.
    fn lease(&self, space: &Space, rows: Range<usize>) -> Result<Tensor> {
        let (layout, offset) = (&self.layout, rows.start * self.layout.row_bytes);
        let (range, shape) = (space.extent.range(), layout.shape(rows.len()));
        (self.memory.leases).tensor(range, offset, &shape, layout.dtype)
    }

    /// Returns a part of the base over some whole rows, counted from the start of the range. Makes
    /// a new base if the pages around the rows have changed.
    fn whole_rows(&self, space: &Space, rows: Range<usize>) -> Result<Tensor> {
        // In a forked process the lock may never be released.
        let engine = self.memory.common.account().engine();
        engine.device().driver().check_process()?;
        space.part_of_base(rows, self.layout.row_bytes, |rows| self.lease(space, rows))
    }
}

/// The rows of keys and of values.
pub(super) enum Pair<'a> {
    /// Each has a range of its own.
    Apart([&'a mut DeviceRows; 2]),
    /// They are columns of one range.
    Together(&'a mut DeviceRows, [usize; 2]),
}
