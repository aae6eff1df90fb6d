//! Tensors that begin with the rows of others, in the same memory.
//!
//! A fork has addresses of its own, and its rows lie there as those of the source lie in theirs.
//! Whole chunks of memory are shared. What is left is copied: the edges, and the page in which the
//! next row goes. So neither the source nor the fork writes to shared memory when it appends. One
//! that has dropped rows and appends there gets memory of its own first ([`Extent::make_private`]).
//!
//! # Safety
//! Rows are moved to other memory at unchanged addresses only if they are borrowed mutably, so no
//! work of this crate is queued on them meanwhile. Other code reaches them by views alone, which
//! are leased: what is leased is not moved.
#![allow(unsafe_code)]

use super::extent::Extent;
use super::rows::{Rows, with_rows};
use super::shared::{Column, SharedRows};
use super::{ElasticTensor, Place};
use crate::error::Result;
use crate::tensor_pool::{PoolMemory, TensorPool};
use cuda_vmm::VirtualMemoryPool;
use cuda_vmm::pool::{PoolPart, SharedPart};
use std::iter;
use std::ops::Range;
use std::sync::atomic::Ordering;

impl Extent {
    /// Reserves as many addresses, for the same bytes at the same offsets. No byte is live.
    fn for_fork(&self, memory: &PoolMemory) -> Result<Self> {
        let range = memory.range(self.range().capacity_bytes())?;
        Ok(Self::over(range))
    }

    /// Returns the live bytes that a fork of some bytes has: whole pages around them, of which all
    /// but the last can be shared.
    fn forked(&self, bytes: &Range<usize>) -> ForkBytes {
        let page_bytes = self.range().page_bytes();
        let live = bytes.start / page_bytes * page_bytes
            ..(bytes.end.next_multiple_of(page_bytes)).min(self.range().capacity_bytes());
        // The next row is written to the page in which the last one ends.
        let whole_end = (bytes.end / page_bytes * page_bytes).max(live.start);
        ForkBytes {
            rows: bytes.clone(),
            shared: live.start..whole_end,
            live,
        }
    }

    /// Notes that bytes up to an offset may be shared.
    fn note_shared(&self, end: usize) {
        self.shared_end.fetch_max(end, Ordering::Relaxed);
        self.generation.end();
    }

    /// Returns the bytes that are written when rows come to these, and may be shared.
    fn shared_bytes(&mut self, bytes: &Range<usize>) -> Option<Range<usize>> {
        let shared_end = *self.shared_end.get_mut();
        if shared_end == 0 {
            return None;
        }
        let missing = self.missing(bytes.end);
        let start = missing.map_or(bytes.start, |missing| missing.start.min(bytes.start));
        let written = start..bytes.end.next_multiple_of(self.range().page_bytes());
        let written = written.start..written.end.min(self.range().capacity_bytes());
        (start < shared_end && self.range().is_shared(written.start, written.len()))
            .then_some(written)
    }

    /// Makes sure that no other range reads what is written when rows come to these bytes. Returns
    /// `false` if the rows must move to other addresses for that. `before` is called if memory is
    /// to be moved.
    ///
    /// # Errors
    /// `OutOfPhysicalMemory` if there is no room for memory of its own; then nothing has changed.
    pub(super) fn make_private(
        &mut self,
        bytes: &Range<usize>,
        before: impl FnOnce(),
    ) -> cuda_vmm::Result<bool> {
        let Some(written) = self.shared_bytes(bytes) else {
            return Ok(true);
        };
        before();
        // SAFETY: the rows are borrowed mutably, and what views show of them is leased.
        match unsafe { (self.range()).make_private_by_ref(written.start, written.len()) } {
            Ok(_) => Ok(true),
            Err(cuda_vmm::VmmError::KeptShared { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Which bytes of a range a fork has.
struct ForkBytes {
    /// Those of the rows.
    rows: Range<usize>,
    /// Whole pages that no row is written to any more.
    shared: Range<usize>,
    live: Range<usize>,
}

/// A range whose rows are forked.
struct Source<'a> {
    rows: &'a Rows,
    extent: &'a Extent,
    /// The addresses of the fork.
    fork: Extent,
    bytes: ForkBytes,
}

impl<'a> Source<'a> {
    /// Reserves addresses for a fork; `None` if there are no rows.
    fn new(pool: &TensorPool, rows: &'a Rows) -> Result<Option<Self>> {
        let bytes = with_rows!(rows, rows => rows.bytes_of_span());
        let Some(extent) = rows.extent().filter(|_| !bytes.is_empty()) else {
            return Ok(None);
        };
        Ok(Some(Self {
            rows,
            fork: extent.for_fork(pool.inner().memory.common())?,
            bytes: extent.forked(&bytes),
            extent,
        }))
    }

    /// The bytes to share.
    fn part(&self) -> Option<SharedPart<'_>> {
        let ForkBytes { shared, .. } = &self.bytes;
        let part = (
            self.extent.range(),
            self.fork.range(),
            shared.start,
            shared.len(),
        );
        (!shared.is_empty()).then_some(part)
    }

    /// The bytes to allocate, of which `rest` could not be shared.
    fn to_allocate<'b>(&'b self, rest: &[PoolPart<'b>]) -> Vec<PoolPart<'b>> {
        let range: &VirtualMemoryPool = self.fork.range();
        let own = rest.iter().filter(|(of, ..)| core::ptr::eq(*of, range));
        let last = (
            range,
            self.bytes.shared.end,
            self.bytes.live.end - self.bytes.shared.end,
        );
        let mut parts: Vec<PoolPart<'b>> = Vec::new();
        for part in own.copied().chain(iter::once(last)) {
            match parts.last_mut() {
                Some((_, offset, bytes)) if *offset + *bytes == part.1 => *bytes += part.2,
                _ => parts.push(part),
            }
        }
        parts.retain(|(.., bytes)| *bytes > 0);
        parts
    }

    /// Queues copies of the rows in these parts of the fork.
    fn copy(&self, parts: &[PoolPart<'_>]) -> Result<()> {
        parts.iter().try_for_each(|(_, offset, bytes)| {
            let (rows, end) = (&self.bytes.rows, offset + bytes);
            let bytes = rows.start.max(*offset)..rows.end.min(end);
            match bytes.is_empty() {
                true => Ok(()),
                false => self.rows.copy_bytes(self.fork.range(), bytes),
            }
        })
    }

    /// Notes what is shared now, and makes the rows of the fork.
    fn finish(self) -> Rows {
        let Self {
            rows,
            extent,
            mut fork,
            bytes,
        } = self;
        if !bytes.shared.is_empty() {
            extent.note_shared(bytes.shared.end);
            fork.note_shared(bytes.shared.end);
        }
        fork.start_live(bytes.live);
        rows.fork(Some(fork))
    }
}

impl Rows {
    /// Queues a copy of bytes to another range at the same offsets.
    fn copy_bytes(&self, to: &VirtualMemoryPool, bytes: Range<usize>) -> Result<()> {
        match self {
            // On the CPU an extent has no contents.
            Self::Host(_) => {
                let _ = (to, bytes);
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Self::Device(rows) => rows.copy_bytes(to, bytes),
        }
    }

    /// Makes rows like these in other addresses.
    fn fork(&self, extent: Option<Extent>) -> Self {
        match self {
            Self::Host(rows) => Self::Host(rows.fork(extent)),
            #[cfg(feature = "cuda")]
            Self::Device(rows) => Self::Device(rows.fork(extent)),
        }
    }
}

/// Forks the rows of these ranges, of all of them or of none.
fn fork_all(pool: &TensorPool, all: &[&Rows]) -> Result<Vec<Rows>> {
    let account = pool.account();
    let sources: Result<Vec<_>> = all.iter().map(|rows| Source::new(pool, rows)).collect();
    let sources = sources?;
    {
        let there = || sources.iter().flatten();
        let parts: Vec<_> = there().filter_map(Source::part).collect();
        let shared = account.share_many(&parts)?;
        let missing: Vec<_> = there().map(|it| it.to_allocate(shared.rest())).collect();
        let backed = account.allocate_many(&missing.concat())?;
        // If a copy fails, the guards free the memory.
        let mut copies = there().zip(&missing);
        copies.try_for_each(|(source, parts)| source.copy(parts))?;
        backed.keep();
        shared.keep();
    }
    let forks = sources.into_iter().zip(all);
    let forks = forks.map(|(source, rows)| source.map_or_else(|| rows.fork(None), Source::finish));
    Ok(forks.collect())
}

impl ElasticTensor {
    /// Makes a tensor of the same pool with the same rows, in the same memory as far as that goes.
    ///
    /// Use it for what several tensors begin with. The rows are at addresses of their own. Chunks
    /// of memory that hold nothing but rows are mapped there a second time, which costs a driver
    /// call or two each and no memory: the account holds them once, as
    /// [`shared_bytes`](crate::MemoryParts::shared_bytes). What is left is copied, the page in
    /// which the last row ends among it. So both tensors append as before. See
    /// [`Account::share_many`](crate::Account::share_many). A chunk may hold an eighth of the rows,
    /// and the last one is copied as a whole if it is not full. Smaller chunks
    /// ([`EngineOptions::chunk_bytes_max`](crate::EngineOptions::chunk_bytes_max)) are shared more
    /// closely, and take longer to map.
    ///
    /// A tensor that drops rows ([`truncate`](Self::truncate)) and then appends over shared memory
    /// gets memory of its own for that chunk first, which waits for the device's work on the
    /// tensor. It may be refused then, the one that was forked or the fork. If a view shows the
    /// chunk, the rows move to new addresses instead.
    ///
    /// [`allocated_bytes`](Self::allocated_bytes) counts the memory in each tensor. On a CPU device
    /// the pool counts as on a GPU, and the rows themselves are copied when one of the two appends.
    ///
    /// A tensor in a [range of several](crate::Sequence::rows_in_one_range) gets a range for
    /// itself, in which the memory of the others is shared too. Fork the sequence to fork all of
    /// them.
    ///
    /// # Errors
    /// As [`append`](Self::append) and [`view`](Self::view). After an error nothing has changed.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_cuda_vmm::TensorPool;
    ///
    /// # #[cfg(not(feature = "simulator"))]
    /// # fn main() {}
    /// # #[cfg(feature = "simulator")]
    /// # fn main() -> candle_cuda_vmm::Result<()> {
    /// let pool = TensorPool::new(&Device::Cpu)?;
    /// let mut rows = pool.tensor(1 << 20, DType::U8)?;
    /// rows.append(&Tensor::ones((9, 1 << 20), DType::U8, &Device::Cpu)?)?;
    /// let mut fork = rows.fork()?;
    /// let parts = pool.account().stats().parts;
    /// // Four pages of two rows each are shared, and the ninth row is copied.
    /// assert_eq!((parts.shared_bytes, parts.live_page_bytes), (8 << 20, 4 << 20));
    /// fork.append(&Tensor::zeros((1, 1 << 20), DType::U8, &Device::Cpu)?)?;
    /// assert_eq!((rows.len(), fork.len()), (9, 10));
    /// # Ok(())
    /// # }
    /// ```
    pub fn fork(&self) -> Result<Self> {
        let (mut forks, _) = Self::fork_together(&[self], None)?;
        // One for each.
        forks.pop().map_or_else(|| self.try_clone(), Ok)
    }

    /// As [`fork`](Self::fork), for several tensors of one pool: for all of them, or after an error
    /// for none. Forks also a range of several tensors as a whole, if one is given; tensors that
    /// are columns of it are columns of its fork.
    pub(crate) fn fork_together(
        tensors: &[&Self],
        whole: Option<&SharedRows>,
    ) -> Result<(Vec<Self>, Option<SharedRows>)> {
        let pool = tensors.first().map(|tensor| &tensor.pool);
        let Some(pool) = whole.map(SharedRows::pool).or(pool) else {
            return Ok((Vec::new(), None));
        };
        let mut shared: Vec<&SharedRows> = whole.into_iter().collect();
        let mut own = Vec::new();
        for tensor in tensors {
            match &tensor.place {
                Place::Own(rows) => own.push(&**rows),
                Place::Column(column) => _ = column.shared().is_new(&mut shared),
            }
        }
        let locked: Result<Vec<_>> = shared.iter().map(|rows| rows.lock()).collect();
        let locked = locked?;
        let all: Vec<_> = own
            .into_iter()
            .chain(locked.iter().map(|it| &**it))
            .collect();
        let mut forks = fork_all(pool, &all)?;
        let shared_forks = forks.split_off(all.len() - locked.len());
        drop(locked);
        let shared_forks = shared.iter().zip(shared_forks);
        let shared_forks: Vec<_> = shared_forks
            .map(|(rows, fork)| (*rows, rows.with_rows(fork)))
            .collect();
        let mut own = forks.into_iter();
        let place = |tensor: &&Self| match &tensor.place {
            Place::Own(_) => own.next().map(|rows| Place::Own(Box::new(rows))),
            Place::Column(column) => {
                let mut forks = shared_forks.iter();
                let fork = forks.find(|(rows, _)| column.shared().is_same(rows));
                fork.map(|(_, fork)| Place::Column(Column::new(fork.clone(), column.index)))
            }
        };
        // There is a place for each.
        let places: Vec<_> = tensors.iter().filter_map(place).collect();
        let parts = shared_forks.iter().skip(usize::from(whole.is_some()));
        for (rows, fork) in parts {
            // No tensor has the other columns.
            let columns = tensors.iter().filter_map(|tensor| match &tensor.place {
                Place::Column(column) if column.shared().is_same(rows) => Some(column.index),
                _ => None,
            });
            fork.keep_columns(&columns.collect::<Vec<_>>())?;
        }
        let made = tensors.iter().zip(places).map(|(tensor, place)| Self {
            pool: tensor.pool.clone(),
            row: tensor.row.clone(),
            dtype: tensor.dtype,
            expected_rows: tensor.expected_rows,
            place,
        });
        let fork = shared_forks.first().filter(|_| whole.is_some());
        Ok((made.collect(), fork.map(|(_, fork)| fork.clone())))
    }
}
