//! The memory behind the rows on a CUDA device, and the views of it.

use super::extent::Extent;
use crate::error::Result;
use crate::lease::check_not_captured;
use candle_core::Tensor;
use cuda_vmm::Stream;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// A tensor over all rows that fit in the pages around the current rows, under one lease.
///
/// A view of all rows of a column is a part of it, so making or dropping a view takes no lease and
/// calls no driver. It holds no page that a tensor of exactly the rows would not hold. While it
/// lives its lease cannot end, so it is dropped before leases are inspected.
#[derive(Debug)]
struct Base {
    tensor: Tensor,
    rows: Range<usize>,
}

/// The memory behind the rows, and what views show of it.
#[derive(Debug)]
pub(super) struct Space {
    /// Views of all rows are parts of it. It is dropped before the range.
    base: Mutex<Option<Base>>,
    pub(super) extent: Extent,
    /// No view of a column shows rows that begin at this offset or behind it, by column.
    viewed_ends: Vec<AtomicUsize>,
}

impl Space {
    /// Rows of this many columns in this extent, which no view shows.
    pub(super) fn over(extent: Extent, columns: usize) -> Self {
        Self {
            base: Mutex::default(),
            extent,
            viewed_ends: (0..columns).map(|_| AtomicUsize::new(0)).collect(),
        }
    }

    /// Returns whether a column's part of these rows must not be written: a view shows it, or work
    /// on a dropped view may still read it when work that is queued next on `stream` runs.
    ///
    /// Views of other columns count only if the column has shown these rows before. Leases do not
    /// tell of which column a view is.
    pub(super) fn is_in_use(
        &mut self,
        column: usize,
        bytes: &Range<usize>,
        stream: &Stream,
    ) -> Result<bool> {
        // New rows lie behind all views unless rows were dropped, so most appends end here.
        if bytes.start >= *self.viewed_ends[column].get_mut() {
            return Ok(false);
        }
        self.drop_base();
        let range = self.extent.range();
        if range.is_leased(bytes.start, bytes.len()) || !range.order_after_leases(stream)? {
            return Ok(true);
        }
        let ends = self.viewed_ends.iter_mut().map(AtomicUsize::get_mut);
        let viewed_end = ends.fold(0, |last, end| last.max(*end));
        if !range.is_leased(bytes.start, viewed_end - bytes.start) {
            // No view is left of any column, so the next columns need not ask.
            for end in &mut self.viewed_ends {
                let end = end.get_mut();
                *end = (*end).min(bytes.start);
            }
        }
        Ok(false)
    }

    /// Makes sure that no other range reads what is written when rows come to these bytes. Returns
    /// `false` if the rows must move for that.
    pub(super) fn make_private(&mut self, bytes: &Range<usize>) -> Result<bool> {
        let base = self.base.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Its lease would keep the chunk.
        Ok(self.extent.make_private(bytes, || *base = None)?)
    }

    fn drop_base(&mut self) {
        *self.base.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Frees live bytes at the start or the end.
    pub(super) fn free(&mut self, bytes: Range<usize>) {
        if !bytes.is_empty() {
            self.drop_base();
            self.extent.free(bytes);
        }
    }

    /// Notes that a view of a column shows rows up to this offset.
    pub(super) fn note_view(&self, column: usize, end: usize) {
        self.viewed_ends[column].fetch_max(end, Ordering::Relaxed);
    }

    /// Returns a part of the base over some rows, counted from the start of the range. Makes a new
    /// base by `lease`, if the pages around the rows have changed.
    pub(super) fn part_of_base(
        &self,
        rows: Range<usize>,
        row_bytes: usize,
        lease: impl Fn(Range<usize>) -> Result<Tensor>,
    ) -> Result<Tensor> {
        check_not_captured()?;
        let (page_bytes, live) = (self.extent.range().page_bytes(), self.extent.live());
        let first = (rows.start * row_bytes / page_bytes * page_bytes)
            .max(live.start)
            .div_ceil(row_bytes);
        let end = (rows.end * row_bytes).next_multiple_of(page_bytes);
        let base_rows = first..end.min(live.end) / row_bytes;
        let mut base = self.base.lock().unwrap_or_else(PoisonError::into_inner);
        if base.as_ref().is_none_or(|base| base.rows != base_rows) {
            *base = Some(Base {
                tensor: lease(base_rows.clone())?,
                rows: base_rows.clone(),
            });
        }
        match &*base {
            Some(base) => Ok(base
                .tensor
                .narrow(0, rows.start - base_rows.start, rows.len())?),
            None => lease(rows),
        }
    }
}
