//! Rows in a range of addresses of their own, with memory for the rows in use.
//!
//! # Safety
//! One launch writes to rows. Their memory was allocated just before, as
//! [`Append`](crate::append::Append) requires.

#![allow(unsafe_code)]

use super::addresses::Addresses;
use super::extent::{Extent, Live};
use super::growth::Growth;
use crate::append::{AppendOutcome, Side};
use crate::error::{Result, VmmError};
use crate::lease;
use crate::tensor_pool::DeviceMemory;
use candle_core::{DType, Tensor};
use cuda_vmm::{Stream, VirtualMemoryPool};
use std::iter;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A tensor over all rows that fit in the base_rows pages around the current rows, under one lease.
///
/// A view of all rows is a part of it, so making or dropping a view takes no lease and calls no
/// driver. It holds no page that a tensor of exactly the rows would not hold. While it lives its
/// lease cannot end, so it is dropped before leases are inspected.
#[derive(Debug)]
struct Base {
    tensor: Tensor,
    rows: Range<usize>,
}

/// The memory behind the rows, and what views show of it.
#[derive(Debug)]
struct Space {
    /// Views of all rows are parts of it. It is dropped before the range.
    base: Mutex<Option<Base>>,
    extent: Extent,
    /// No view shows bytes from this offset on.
    viewed_end: AtomicUsize,
}

impl Space {
    /// Rows in this extent, which no view shows.
    fn over(extent: Extent) -> Self {
        Self {
            base: Mutex::default(),
            extent,
            viewed_end: AtomicUsize::new(0),
        }
    }

    /// Returns whether these bytes must not be written: a view shows them, or work on a dropped
    /// view may still read them when work that is queued next on `stream` runs.
    fn is_in_use(&mut self, bytes: &Range<usize>, stream: &Stream) -> Result<bool> {
        // New rows lie behind all views unless rows were dropped, so most appends end here.
        let viewed_end = *self.viewed_end.get_mut();
        if bytes.start >= viewed_end {
            return Ok(false);
        }
        self.drop_base();
        let range = self.extent.range();
        if range.is_leased(bytes.start, bytes.len()) || !range.order_after_leases(stream)? {
            return Ok(true);
        }
        if !range.is_leased(bytes.start, viewed_end.saturating_sub(bytes.start)) {
            *self.viewed_end.get_mut() = bytes.start;
        }
        Ok(false)
    }

    fn drop_base(&mut self) {
        *self.base.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Frees live bytes at the start or the end.
    fn free(&mut self, bytes: Range<usize>) {
        if !bytes.is_empty() {
            self.drop_base();
            self.extent.free(bytes);
        }
    }
}

/// Rows of one shape, contiguous in a range of addresses.
#[derive(Debug)]
pub(super) struct DeviceRows {
    memory: Arc<DeviceMemory>,
    addresses: Addresses,
    row: Vec<usize>,
    dtype: DType,
    row_bytes: usize,
    space: Option<Space>,
    /// The current rows, counted from the start of the range.
    rows: Range<usize>,
}

impl DeviceRows {
    pub(super) fn new(
        memory: &Arc<DeviceMemory>,
        addresses: Addresses,
        row: Vec<usize>,
        dtype: DType,
        row_bytes: usize,
    ) -> Self {
        Self {
            memory: memory.clone(),
            addresses,
            row,
            dtype,
            row_bytes,
            space: None,
            rows: 0..0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    fn bytes(&self, rows: &Range<usize>) -> Range<usize> {
        rows.start * self.row_bytes..rows.end * self.row_bytes
    }

    /// Makes room for `more` rows after the last, in place. Returns `false` if the rows must move.
    fn extend(&mut self, more: usize) -> Result<bool> {
        let bytes = self.bytes(&(self.rows.end..self.rows.end + more));
        let Some(space) = &mut self.space else {
            return Ok(false);
        };
        if !space.extent.has_addresses(bytes.end)
            || space.is_in_use(&bytes, self.memory.common.stream())?
        {
            return Ok(false);
        }
        match space.extent.extend(bytes.end) {
            // The page was freed while a view shows it.
            Err(cuda_vmm::VmmError::Leased { .. }) => Ok(false),
            extended => Ok(extended.map(|()| true)?),
        }
    }

    /// Reserves addresses for rows that take this many bytes.
    fn reserve_addresses(&self, need: usize) -> Result<Extent> {
        let bytes = match &self.space {
            None => self.addresses.first(need),
            Some(_) => self.addresses.again(need),
        };
        Extent::new(&self.memory.common, bytes)
    }

    /// Copies the rows to a new range, with room for `more` rows after them.
    fn copy_to_new_space(&self, more: usize) -> Result<Space> {
        let len = self.rows.len();
        // Cannot overflow: `ElasticTensor` has checked the number of rows.
        let bytes = (len + more) * self.row_bytes;
        let mut fresh = Space::over(self.reserve_addresses(bytes)?);
        fresh.extent.extend(bytes)?;
        if len > 0 {
            self.copy_to(&fresh.extent)?;
        }
        Ok(fresh)
    }

    /// Replaces the range. Memory of the old one that views show is held until they are dropped.
    fn replace_space(&mut self, fresh: Space) {
        self.space = Some(fresh);
        self.rows = 0..self.rows.len();
    }

    /// Adds `count` rows, which `write` writes from an offset of a range on. After an error rows
    /// and memory are as before.
    fn add(
        &mut self,
        count: usize,
        write: impl FnOnce(&VirtualMemoryPool, usize) -> Result<()>,
    ) -> Result<()> {
        let live = self.live_bytes();
        if self.extend(count)? {
            let offset = self.rows.end * self.row_bytes;
            let space = self.space.as_ref();
            if let Err(error) = space.map_or(Ok(()), |space| write(space.extent.range(), offset)) {
                self.free_behind(live);
                return Err(error);
            }
        } else {
            let fresh = self.copy_to_new_space(count)?;
            write(fresh.extent.range(), self.rows.len() * self.row_bytes)?;
            self.replace_space(fresh);
        }
        self.rows.end += count;
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

    pub(super) fn append(&mut self, rows: &Tensor) -> Result<()> {
        let memory = self.memory.clone();
        let write = |range: &_, offset| memory.leases.write(range, offset, rows);
        self.add(rows.dim(0)?, write)
    }

    /// Makes room for `count` more rows, and returns the address of the first row. The rows may
    /// move.
    fn reserve(&mut self, count: usize) -> Result<u64> {
        if !self.extend(count)? {
            let fresh = self.copy_to_new_space(count)?;
            self.replace_space(fresh);
        }
        let base = (self.space.as_ref()).map_or(0, |space| space.extent.range().base_address());
        Ok(base + (self.rows.start * self.row_bytes) as u64)
    }

    /// Appends keys and values by one launch, and returns all of them contiguous if `contiguous` is
    /// set.
    ///
    /// Both have one shape and dtype, the same number of rows, and their sequence in dimension
    /// `dim`. Returns [`AppendOutcome::Unsupported`] if one launch cannot do it. In that case, and
    /// after an error, memory may have been allocated; [`undo`](Self::undo) frees it.
    pub(super) fn append_both(
        [keys, values]: [(&mut Self, &Tensor); 2],
        dim: usize,
        contiguous: bool,
    ) -> Result<AppendOutcome> {
        let memory = keys.0.memory.clone();
        let (old, count) = (keys.0.len(), keys.1.dim(dim)?);
        let side = |(rows, tokens): (&mut Self, _)| {
            let rows = rows.reserve(count)?;
            Ok::<_, VmmError>(Side { tokens, rows })
        };
        let sides = [
            side((&mut *keys.0, keys.1))?,
            side((&mut *values.0, values.1))?,
        ];
        // SAFETY: `reserve` made all rows live, including the new ones, which no view shows.
        let queued = unsafe { memory.append.queue(sides, dim, old, contiguous) }?;
        if !matches!(queued, AppendOutcome::Unsupported) {
            keys.0.rows.end += count;
            values.0.rows.end += count;
        }
        Ok(queued)
    }

    pub(super) fn grow(&mut self, count: usize) -> Result<()> {
        let (memory, bytes) = (self.memory.clone(), count * self.row_bytes);
        self.add(count, |range, offset| {
            lease::zero(memory.common.stream(), range, offset, bytes)
        })
    }

    pub(super) fn truncate(&mut self, len: usize) {
        self.rows.end = self.rows.start + len;
        if len == 0 {
            return self.clear();
        }
        let end = self.rows.end * self.row_bytes;
        if let Some(space) = &mut self.space {
            space.free(space.extent.behind_spare(end));
        }
    }

    /// Drops the rows from `len` on, and frees what was allocated for them since `live` was live.
    pub(super) fn undo(&mut self, len: usize, live: &Live) {
        self.rows.end = self.rows.start + len;
        let end = self.rows.end * self.row_bytes;
        if let Some(space) = &mut self.space {
            space.free(space.extent.newer(live, end));
        }
    }

    pub(super) fn extent(&self) -> Option<&Extent> {
        self.space.as_ref().map(|space| &space.extent)
    }

    /// What `more` rows after the last need. They move if a view shows memory that they need.
    pub(super) fn plan(&mut self, more: usize) -> Result<Growth> {
        let bytes = self.bytes(&(self.rows.end..self.rows.end + more));
        if let Some(space) = &mut self.space
            && space.extent.has_addresses(bytes.end)
        {
            let missing = space.extent.missing(bytes.end);
            let range = space.extent.range();
            let is_leased = (missing.as_ref())
                .is_some_and(|missing| range.is_leased(missing.start, missing.len()));
            if !is_leased && !space.is_in_use(&bytes, self.memory.common.stream())? {
                let (bytes, moved) = (missing, None);
                return Ok(Growth { bytes, moved });
            }
        }
        let need = (self.rows.len() + more) * self.row_bytes;
        let moved = self.reserve_addresses(need)?;
        let bytes = moved.missing(need);
        let moved = Some(moved);
        Ok(Growth { bytes, moved })
    }

    /// Copies the rows to new addresses, whose memory is allocated.
    pub(super) fn copy_to(&self, moved: &Extent) -> Result<()> {
        if self.rows.is_empty() {
            return Ok(());
        }
        let rows = self.view(0..self.rows.len())?;
        self.memory.leases.write(moved.range(), 0, &rows)
    }

    /// Notes that what was planned is allocated, and the rows are copied if they move.
    pub(super) fn finish(&mut self, growth: Growth) {
        if let Some(extent) = growth.moved {
            self.replace_space(Space::over(extent));
        }
        if let (Some(space), Some(bytes)) = (&mut self.space, growth.bytes) {
            space.extent.extended(bytes);
        }
    }

    pub(super) fn release_front(&mut self, count: usize) {
        self.rows.start += count;
        if self.rows.is_empty() {
            return self.clear();
        }
        let start = self.rows.start * self.row_bytes;
        if let Some(space) = &mut self.space {
            space.free(space.extent.before(start));
        }
    }

    pub(super) fn clear(&mut self) {
        if let Some(space) = &mut self.space {
            space.free(space.extent.live());
        }
        self.rows = 0..0;
    }

    /// Returns a view of some rows, counted from the first.
    pub(super) fn view(&self, rows: Range<usize>) -> Result<Tensor> {
        match &self.space {
            Some(space) if !rows.is_empty() => {
                let is_all = rows == (0..self.len());
                let rows = self.rows.start + rows.start..self.rows.start + rows.end;
                let end = rows.end * self.row_bytes;
                space.viewed_end.fetch_max(end, Ordering::Relaxed);
                match is_all {
                    true => self.view_of_base(space, rows),
                    false => self.lease(space, rows),
                }
            }
            _ => self
                .memory
                .leases
                .empty(&self.shape(rows.len()), self.dtype),
        }
    }

    fn shape(&self, rows: usize) -> Vec<usize> {
        iter::once(rows).chain(self.row.iter().copied()).collect()
    }

    /// Makes a tensor with a lease of its own over some rows, counted from the start of the range.
    fn lease(&self, space: &Space, rows: Range<usize>) -> Result<Tensor> {
        let (shape, offset) = (self.shape(rows.len()), rows.start * self.row_bytes);
        (self.memory.leases).tensor(space.extent.range(), offset, &shape, self.dtype)
    }

    /// Returns a part of the base over some rows, counted from the start of the range. Makes a new
    /// base if the pages around the rows have changed.
    fn view_of_base(&self, space: &Space, rows: Range<usize>) -> Result<Tensor> {
        let (page_bytes, live) = (space.extent.range().page_bytes(), space.extent.live());
        let first = (rows.start * self.row_bytes / page_bytes * page_bytes)
            .max(live.start)
            .div_ceil(self.row_bytes);
        let end = (rows.end * self.row_bytes).next_multiple_of(page_bytes);
        let base_rows = first..end.min(live.end) / self.row_bytes;
        // In a forked process the lock may never be released.
        let engine = self.memory.common.account().engine();
        engine.device().driver().check_process()?;
        let mut base = space.base.lock().unwrap_or_else(PoisonError::into_inner);
        if base.as_ref().is_none_or(|base| base.rows != base_rows) {
            let tensor = self.lease(space, base_rows.clone())?;
            *base = Some(Base {
                tensor,
                rows: base_rows.clone(),
            });
        }
        match &*base {
            Some(base) => Ok(base
                .tensor
                .narrow(0, rows.start - base_rows.start, rows.len())?),
            None => self.lease(space, rows),
        }
    }
}
