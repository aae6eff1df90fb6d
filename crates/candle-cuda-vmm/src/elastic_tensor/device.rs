//! Rows in a range of addresses of their own, backed where they are.
//!
//! # Safety
//! One launch writes to rows for which room was made just before, as [`Append`](crate::append::Append) wants it.

#![allow(unsafe_code)]

use crate::append::{Queued, Side};
use crate::error::{Result, VmmError};
use crate::lease;
use crate::tensor_pool::DeviceMemory;
use candle_core::{DType, Tensor};
use cuda_vmm::{PoolOptions, Stream, VirtualMemoryPool};
use std::iter;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A tensor over the rows that lie in whole pages around all that there are, leased as one.
///
/// Handing out a part of it takes no lease, and dropping that part asks the driver for nothing. It holds no page that a
/// tensor of exactly the rows would not hold. While it is here nobody can tell whether parts of it live: it is let go before
/// that is asked.
#[derive(Debug)]
struct Base {
    tensor: Tensor,
    rows: Range<usize>,
}

/// A range of addresses, and the bytes of it that are live: whole pages, so that most rows take no call.
#[derive(Debug)]
struct Space {
    /// What views of all rows are parts of. It goes before the range does.
    base: Mutex<Option<Base>>,
    range: VirtualMemoryPool,
    live: Range<usize>,
    /// No view shows bytes from here on.
    unseen: AtomicUsize,
}

impl Space {
    fn new(memory: &DeviceMemory) -> Result<Self> {
        let range = VirtualMemoryPool::with_options(
            &memory.engine,
            memory.reservation_bytes,
            memory.page_bytes,
            PoolOptions::new().ahead_bytes_max(memory.ahead_bytes_max),
        )?;
        range.use_stream(&memory.stream)?;
        Ok(Self {
            base: Mutex::default(),
            range,
            live: 0..0,
            unseen: AtomicUsize::new(0),
        })
    }

    /// Makes the bytes up to `end` live.
    fn extend(&mut self, end: usize) -> cuda_vmm::Result<()> {
        if end <= self.live.end {
            return Ok(());
        }
        let capacity_bytes = self.range.capacity_bytes();
        let end = end
            .next_multiple_of(self.range.page_bytes())
            .min(capacity_bytes);
        self.range.allocate(self.live.end, end - self.live.end)?;
        self.live.end = end;
        Ok(())
    }

    /// Whether a view shows any of these bytes, or work on one that is gone may read them after what the stream is given
    /// next.
    fn is_seen(&mut self, bytes: &Range<usize>, stream: &Stream) -> Result<bool> {
        // What is appended lies behind all views unless rows were forgotten, and then nobody is asked.
        let unseen = *self.unseen.get_mut();
        if bytes.start >= unseen {
            return Ok(false);
        }
        self.let_base_go();
        if self.range.is_leased(bytes.start, bytes.len())
            || !self.range.order_after_leases(stream)?
        {
            return Ok(true);
        }
        if !(self.range).is_leased(bytes.start, unseen.saturating_sub(bytes.start)) {
            *self.unseen.get_mut() = bytes.start;
        }
        Ok(false)
    }

    fn let_base_go(&mut self) {
        *self.base.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Frees live bytes at one of the ends.
    fn free(&mut self, bytes: Range<usize>) {
        if bytes.is_empty() {
            return;
        }
        self.let_base_go();
        // They are live, so it only fails where there is nothing to free any more: in a forked process.
        let _ = self.range.deallocate(bytes.start, bytes.len());
        if bytes.start == self.live.start {
            self.live.start = bytes.end;
        } else {
            self.live.end = bytes.start;
        }
    }
}

/// Rows of one shape, one behind the other in a range.
#[derive(Debug)]
pub(super) struct DeviceRows {
    memory: Arc<DeviceMemory>,
    row: Vec<usize>,
    dtype: DType,
    row_bytes: usize,
    space: Option<Space>,
    /// Those that are there, by their places in the range.
    rows: Range<usize>,
}

impl DeviceRows {
    pub(super) fn new(
        memory: &Arc<DeviceMemory>,
        row: Vec<usize>,
        dtype: DType,
        row_bytes: usize,
    ) -> Self {
        Self {
            memory: memory.clone(),
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

    /// Whether there is room for so many rows more behind the last, which is in no view; makes it, if memory is all that it
    /// takes.
    fn extend(&mut self, more: usize) -> Result<bool> {
        let bytes = self.bytes(&(self.rows.end..self.rows.end + more));
        let Some(space) = &mut self.space else {
            return Ok(false);
        };
        if bytes.end > space.range.capacity_bytes() || space.is_seen(&bytes, &self.memory.stream)? {
            return Ok(false);
        }
        match space.extend(bytes.end) {
            // The page was freed under a view.
            Err(cuda_vmm::VmmError::Leased { .. }) => Ok(false),
            extended => Ok(extended.map(|()| true)?),
        }
    }

    /// A fresh range with copies of the rows and room for more behind them.
    fn moved(&self, more: usize) -> Result<Space> {
        let len = self.rows.len();
        // Within the addresses: `ElasticTensor` has counted the rows.
        let bytes = (len + more) * self.row_bytes;
        let mut fresh = Space::new(&self.memory)?;
        fresh.extend(bytes)?;
        if len > 0 {
            let rows = self.view(0..len)?;
            self.memory.leases.write(&fresh.range, 0, &rows)?;
        }
        Ok(fresh)
    }

    /// Takes a fresh range for the rows. The old one goes, but for what views hold of it.
    fn settle(&mut self, fresh: Space) {
        self.space = Some(fresh);
        self.rows = 0..self.rows.len();
    }

    /// Adds so many rows, which `write` writes from an offset of a range on. After an error everything is as before, the
    /// memory that is held too.
    fn add(
        &mut self,
        count: usize,
        write: impl FnOnce(&VirtualMemoryPool, usize) -> Result<()>,
    ) -> Result<()> {
        let live = self.live();
        if self.extend(count)? {
            let offset = self.rows.end * self.row_bytes;
            let space = self.space.as_ref();
            if let Err(error) = space.map_or(Ok(()), |space| write(&space.range, offset)) {
                self.give_back_to(live);
                return Err(error);
            }
        } else {
            let fresh = self.moved(count)?;
            write(&fresh.range, self.rows.len() * self.row_bytes)?;
            self.settle(fresh);
        }
        self.rows.end += count;
        Ok(())
    }

    /// The bytes that are live.
    fn live(&self) -> Range<usize> {
        self.space.as_ref().map_or(0..0, |space| space.live.clone())
    }

    /// Gives back what became live behind these bytes, which were.
    fn give_back_to(&mut self, live: Range<usize>) {
        if let Some(space) = &mut self.space {
            space.free(live.end..space.live.end);
            space.live = live;
        }
    }

    pub(super) fn append(&mut self, rows: &Tensor) -> Result<()> {
        let memory = self.memory.clone();
        let write = |range: &_, offset| memory.leases.write(range, offset, rows);
        self.add(rows.dim(0)?, write)
    }

    /// Makes room for so many rows more, for which the rows move if they must; the address of the first row then.
    fn base_with_room(&mut self, count: usize) -> Result<u64> {
        if !self.extend(count)? {
            let fresh = self.moved(count)?;
            self.settle(fresh);
        }
        let base = (self.space.as_ref()).map_or(0, |space| space.range.base_address());
        Ok(base + (self.rows.start * self.row_bytes) as u64)
    }

    /// Appends keys and values by one launch, and answers all of them contiguous if that is wanted; both are of one shape and
    /// type, their sequence is dimension `dim`, and both have as many rows. [`Queued::Not`] if it takes more than that; room
    /// may have been made then, as after an error, which [`undo`](Self::undo) gives back.
    pub(super) fn append_both(
        [keys, values]: [(&mut Self, &Tensor); 2],
        dim: usize,
        wants_answers: bool,
    ) -> Result<Queued> {
        let memory = keys.0.memory.clone();
        let (old, count) = (keys.0.len(), keys.1.dim(dim)?);
        let side = |(rows, tokens): (&mut Self, _)| {
            let rows = rows.base_with_room(count)?;
            Ok::<_, VmmError>(Side { tokens, rows })
        };
        let sides = [
            side((&mut *keys.0, keys.1))?,
            side((&mut *values.0, values.1))?,
        ];
        // SAFETY: there is room now for all rows and those that come, and none of the new ones is in a view.
        let queued = unsafe { memory.append.queue(sides, dim, old, wants_answers) }?;
        if !matches!(queued, Queued::Not) {
            keys.0.rows.end += count;
            values.0.rows.end += count;
        }
        Ok(queued)
    }

    pub(super) fn grow(&mut self, count: usize) -> Result<()> {
        let (memory, bytes) = (self.memory.clone(), count * self.row_bytes);
        self.add(count, |range, offset| {
            lease::zero(&memory.stream, range, offset, bytes)
        })
    }

    pub(super) fn truncate(&mut self, len: usize) {
        self.rows.end = self.rows.start + len;
        if len == 0 {
            return self.clear();
        }
        let end = self.rows.end * self.row_bytes;
        if let Some(space) = &mut self.space {
            // The page behind stays, so that a length that moves to and fro over its edge makes no calls.
            let page_bytes = space.range.page_bytes();
            let keep = (end.next_multiple_of(page_bytes) + page_bytes).min(space.live.end);
            space.free(keep..space.live.end);
        }
    }

    /// Forgets what was appended since there were `len` rows, and gives back all pages behind them.
    pub(super) fn undo(&mut self, len: usize) {
        self.truncate(len);
        let end = self.rows.end * self.row_bytes;
        if let Some(space) = &mut self.space {
            let keep = end.next_multiple_of(space.range.page_bytes());
            space.free(keep.min(space.live.end)..space.live.end);
        }
    }

    pub(super) fn release_front(&mut self, count: usize) {
        self.rows.start += count;
        if self.rows.is_empty() {
            return self.clear();
        }
        let start = self.rows.start * self.row_bytes;
        if let Some(space) = &mut self.space {
            let page_bytes = space.range.page_bytes();
            space.free(space.live.start..start / page_bytes * page_bytes);
        }
    }

    pub(super) fn clear(&mut self) {
        if let Some(space) = &mut self.space {
            space.free(space.live.clone());
            space.live = 0..0;
        }
        self.rows = 0..0;
    }

    /// A view of some of the rows, counted from the first.
    pub(super) fn view(&self, rows: Range<usize>) -> Result<Tensor> {
        match &self.space {
            Some(space) if !rows.is_empty() => {
                let is_all = rows == (0..self.len());
                let rows = self.rows.start + rows.start..self.rows.start + rows.end;
                let end = rows.end * self.row_bytes;
                space.unseen.fetch_max(end, Ordering::Relaxed);
                match is_all {
                    true => self.part_of_base(space, rows),
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

    /// A tensor of its own over some rows, by their places.
    fn lease(&self, space: &Space, rows: Range<usize>) -> Result<Tensor> {
        let (shape, offset) = (self.shape(rows.len()), rows.start * self.row_bytes);
        (self.memory.leases).tensor(&space.range, offset, &shape, self.dtype)
    }

    /// A part of the base over some rows, by their places. The base is made anew where it has not the pages of just these.
    fn part_of_base(&self, space: &Space, rows: Range<usize>) -> Result<Tensor> {
        let page_bytes = space.range.page_bytes();
        let first = (rows.start * self.row_bytes / page_bytes * page_bytes)
            .max(space.live.start)
            .div_ceil(self.row_bytes);
        let end = (rows.end * self.row_bytes).next_multiple_of(page_bytes);
        let whole = first..end.min(space.live.end) / self.row_bytes;
        // In a forked process the lock may be held for good.
        self.memory.engine.device().driver().check_process()?;
        let mut base = space.base.lock().unwrap_or_else(PoisonError::into_inner);
        if base.as_ref().is_none_or(|base| base.rows != whole) {
            let tensor = self.lease(space, whole.clone())?;
            *base = Some(Base {
                tensor,
                rows: whole.clone(),
            });
        }
        match &*base {
            Some(base) => Ok(base
                .tensor
                .narrow(0, rows.start - whole.start, rows.len())?),
            None => self.lease(space, rows),
        }
    }
}
