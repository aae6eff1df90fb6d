//! The memory behind the rows of one tensor.

use super::addresses::Addresses;
use super::generation::Rising;
use crate::error::Result;
use crate::tensor_pool::PoolMemory;
use cuda_vmm::VirtualMemoryPool;
use cuda_vmm::pool::PoolPart;
use std::ops::Range;
use std::sync::atomic::AtomicUsize;

/// A range of addresses, and the bytes of it that are live: whole pages around the rows, so that
/// most rows need no allocation.
#[derive(Debug)]
pub(super) struct Extent {
    range: VirtualMemoryPool,
    /// `0..0` if no byte is live.
    live: Range<usize>,
    /// No byte from this offset on was ever shared with other rows.
    pub(super) shared_end: AtomicUsize,
    /// Ends when the rows leave these addresses.
    pub(super) generation: Rising,
}

/// What rows need for more of them. Nothing is allocated yet.
#[derive(Debug)]
pub(super) struct Growth {
    /// The bytes to allocate, if any.
    pub(super) bytes: Option<Range<usize>>,
    /// New addresses, if the rows have to move or have none yet.
    pub(super) moved: Option<Extent>,
}

impl Growth {
    /// The bytes to allocate, if any, for rows in this extent.
    pub(super) fn part<'a>(&'a self, extent: Option<&'a Extent>) -> Option<PoolPart<'a>> {
        let extent = self.moved.as_ref().or(extent)?;
        let bytes = self.bytes.clone()?;
        Some((extent.range(), bytes.start, bytes.len()))
    }
}

/// The bytes that were live at some moment, and where. The default is none.
#[derive(Debug, Clone, Default)]
pub(crate) struct Live {
    address: u64,
    bytes: Range<usize>,
}

impl Live {
    pub(super) fn of(extent: Option<&Extent>) -> Self {
        extent.map_or_else(Self::default, |extent| Self {
            address: extent.range.base_address(),
            bytes: extent.live(),
        })
    }
}

impl Extent {
    /// Reserves addresses for rows that take `need` bytes: their first, or those that they move to.
    /// No byte is live.
    pub(super) fn new(
        memory: &PoolMemory,
        addresses: &Addresses,
        need: usize,
        is_first: bool,
    ) -> Result<Self> {
        let bytes = match is_first {
            true => addresses.first(need),
            false => addresses.again(need),
        };
        memory.range(bytes).map(Self::over)
    }

    /// Rows in this range, of which no byte is live.
    pub(super) fn over(range: VirtualMemoryPool) -> Self {
        Self {
            range,
            live: 0..0,
            shared_end: AtomicUsize::new(0),
            generation: Rising::default(),
        }
    }

    /// Notes the first bytes that are live.
    pub(super) fn start_live(&mut self, bytes: Range<usize>) {
        self.live = bytes;
    }

    pub(super) fn range(&self) -> &VirtualMemoryPool {
        &self.range
    }

    pub(super) fn live(&self) -> Range<usize> {
        self.live.clone()
    }

    /// Returns whether there are addresses for all bytes up to `end`.
    pub(super) fn has_addresses(&self, end: usize) -> bool {
        end <= self.range.capacity_bytes()
    }

    /// Returns the bytes to allocate so that all up to `end` are live, if any.
    pub(super) fn missing(&self, end: usize) -> Option<Range<usize>> {
        let whole_end = self.end_of_page(end).min(self.range.capacity_bytes());
        (end > self.live.end).then_some(self.live.end..whole_end)
    }

    /// Notes that the [`missing`](Self::missing) bytes were allocated.
    pub(super) fn extended(&mut self, bytes: Range<usize>) {
        self.live.end = bytes.end;
    }

    /// Allocates the [`missing`](Self::missing) bytes. After an error the same bytes are live as
    /// before.
    pub(super) fn allocate(&mut self, missing: Option<Range<usize>>) -> cuda_vmm::Result<()> {
        if let Some(bytes) = missing {
            self.range.allocate(bytes.start, bytes.len())?;
            self.extended(bytes);
        }
        Ok(())
    }

    /// Returns the live bytes behind those that were live at an earlier moment, and behind the rows
    /// up to `end`.
    pub(super) fn newer(&self, before: &Live, end: usize) -> Range<usize> {
        let kept_end = match before.address == self.range.base_address() {
            true => before.bytes.end,
            // The rows have moved here since.
            false => 0,
        };
        let behind = self.behind(end);
        behind.start.max(kept_end).min(behind.end)..behind.end
    }

    fn end_of_page(&self, end: usize) -> usize {
        end.next_multiple_of(self.range.page_bytes())
    }

    /// Returns the live bytes that rows up to `end` do not need.
    pub(super) fn behind(&self, end: usize) -> Range<usize> {
        self.end_of_page(end).min(self.live.end)..self.live.end
    }

    /// As [`behind`](Self::behind), but without the first page: it stays, so that a length that
    /// alternates around a page boundary makes no calls. Without rows, all live bytes.
    pub(super) fn behind_spare(&self, end: usize) -> Range<usize> {
        match end {
            0 => self.live(),
            _ => self.behind(self.end_of_page(end) + self.range.page_bytes()),
        }
    }

    /// Returns the live bytes that rows from `start` on do not need.
    pub(super) fn before(&self, start: usize) -> Range<usize> {
        let page_bytes = self.range.page_bytes();
        self.live.start..start / page_bytes * page_bytes
    }

    /// Frees live bytes at the start or the end.
    pub(super) fn free(&mut self, bytes: Range<usize>) {
        if bytes.is_empty() {
            return;
        }
        // The bytes are live, so this fails in a forked process only, which has nothing to free.
        let _ = self.range.deallocate(bytes.start, bytes.len());
        self.live = if bytes == self.live {
            self.generation.end();
            0..0
        } else if bytes.start == self.live.start {
            bytes.end..self.live.end
        } else {
            self.live.start..bytes.start
        };
    }
}
