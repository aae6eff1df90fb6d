//! Memory that someone outside uses until a token of theirs says otherwise.

use super::intervals::Intervals;
use super::range::Range;
use super::{Handle, Inner, Parts};
use crate::sync::Arc;
use crate::{Result, VmmError};
use core::{fmt, ops};

/// Tells whether leased memory can still be used; see [`VirtualMemoryPool::lease`](crate::VirtualMemoryPool::lease).
///
/// An `Arc` is one: it is released when no other `Arc` or `Weak` shares its value.
pub trait LeaseToken: fmt::Debug + Send + 'static {
    /// Whether nobody can queue work on the memory any more, or ever will. Work that is queued already may still run.
    ///
    /// Asked again and again, from any thread, with a lock of the pool's held: it must be quick, and call neither the
    /// pool nor the driver. After it has answered `true` the token is dropped, without the lock.
    fn is_released(&mut self) -> bool;
}

impl<T: ?Sized + fmt::Debug + Send + Sync + 'static> LeaseToken for std::sync::Arc<T> {
    fn is_released(&mut self) -> bool {
        Self::get_mut(self).is_some()
    }
}

/// Tokens that were released, to be dropped without a lock.
pub(super) type Released = Vec<Box<dyn LeaseToken>>;

#[derive(Debug)]
struct Lease {
    bytes: ops::Range<usize>,
    token: Box<dyn LeaseToken>,
}

/// The leases of one range.
#[derive(Debug, Default)]
pub(super) struct Leases {
    leases: Vec<Lease>,
    /// Bytes that were freed while they were leased. They are live in the books of pages, so that nobody gets them.
    freed: Intervals,
    /// So many leases at least are looked at again before the list grows longer.
    look_at: usize,
}

impl Leases {
    /// As few as are worth a look.
    const FEW: usize = 4;

    fn add(&mut self, bytes: ops::Range<usize>, token: Box<dyn LeaseToken>) -> Released {
        // Not at each, so that many views at once do not cost the square of their number.
        let released = if self.leases.len() >= self.look_at.max(Self::FEW) {
            let released = self.take_released();
            self.look_at = 2 * self.leases.len();
            released
        } else {
            Vec::new()
        };
        self.leases.push(Lease { bytes, token });
        released
    }

    /// Takes out the tokens that are released.
    fn take_released(&mut self) -> Released {
        let released = self
            .leases
            .extract_if(.., |lease| lease.token.is_released());
        released.map(|lease| lease.token).collect()
    }

    fn is_empty(&self) -> bool {
        self.leases.is_empty()
    }

    /// Whether any of the bytes are leased.
    fn overlaps(&self, bytes: &ops::Range<usize>) -> bool {
        let mut leases = self.leases.iter();
        leases.any(|lease| lease.bytes.start < bytes.end && bytes.start < lease.bytes.end)
    }

    /// The parts of some bytes that are not leased, in order.
    fn unleased(&self, bytes: &ops::Range<usize>) -> Vec<ops::Range<usize>> {
        let mut leased: Vec<_> = (self.leases.iter())
            .map(|lease| lease.bytes.start.max(bytes.start)..lease.bytes.end.min(bytes.end))
            .filter(|part| !part.is_empty())
            .collect();
        leased.sort_by_key(|part| part.start);
        let mut at = bytes.start;
        let mut parts = Vec::new();
        for part in leased {
            if at < part.start {
                parts.push(at..part.start);
            }
            at = at.max(part.end);
        }
        if at < bytes.end {
            parts.push(at..bytes.end);
        }
        parts
    }

    /// The owner frees bytes. Those that are not leased are to be freed now; the others are later.
    fn free(&mut self, bytes: &ops::Range<usize>) -> Vec<ops::Range<usize>> {
        let now = self.unleased(bytes);
        let mut at = bytes.start;
        for part in &now {
            if at < part.start {
                self.freed.insert(at..part.start);
            }
            at = part.end;
        }
        if at < bytes.end {
            self.freed.insert(at..bytes.end);
        }
        now
    }

    /// Takes out the bytes that were freed while they were leased, and are leased no longer.
    fn sweep(&mut self) -> Vec<ops::Range<usize>> {
        let freed: Vec<_> = self.freed.iter().collect();
        let parts: Vec<_> = freed.iter().flat_map(|part| self.unleased(part)).collect();
        for part in &parts {
            self.freed.remove(part);
        }
        parts
    }

    /// Pages in which freed bytes are, and of the live bytes no others.
    fn pages(&self, live: &Intervals, page_bytes: usize) -> usize {
        let is_only_freed = |page: usize| {
            let bytes = page * page_bytes..(page + 1) * page_bytes;
            self.freed.within(&bytes) == live.within(&bytes)
        };
        let (mut pages, mut page) = (0, 0);
        for part in self.freed.iter() {
            let whole = part.start.div_ceil(page_bytes)..part.end / page_bytes;
            page = page.max(part.start / page_bytes);
            while page < part.end.div_ceil(page_bytes) {
                if whole.contains(&page) {
                    pages += whole.end - page;
                    page = whole.end;
                } else {
                    pages += usize::from(is_only_freed(page));
                    page += 1;
                }
            }
        }
        pages
    }
}

impl Range {
    /// Whether all of the bytes are live and the owner has not freed them.
    pub(super) fn is_live(&self, bytes: &ops::Range<usize>) -> bool {
        self.pages.live().contains(bytes) && !self.leases.freed.overlaps(bytes)
    }

    /// Whether some of the bytes were freed and wait for a lease to end.
    pub(super) fn is_held_by_lease(&self, bytes: &ops::Range<usize>) -> bool {
        self.leases.freed.overlaps(bytes)
    }

    /// Whether bytes that were freed wait for leases.
    pub(super) fn waits_for_leases(&self) -> bool {
        !self.leases.freed.is_empty()
    }

    /// The bytes under each lease.
    fn leased(&self) -> Vec<ops::Range<usize>> {
        let leases = self.leases.leases.iter();
        leases.map(|lease| lease.bytes.clone()).collect()
    }

    /// Whether any of these pages is leased.
    pub(super) fn is_leased(&self, pages: &ops::Range<usize>) -> bool {
        let bytes = pages.start * self.page_bytes..pages.end * self.page_bytes;
        self.leases.overlaps(&bytes)
    }

    /// Bytes that the owner has and did not free.
    pub(super) fn owned_bytes(&self) -> usize {
        self.pages.live().total() - self.leases.freed.total()
    }

    /// Pages in which the owner has bytes.
    pub(super) fn owned_pages(&self) -> usize {
        self.pages.live_pages() - self.leases.pages(self.pages.live(), self.page_bytes)
    }

    /// What its pages are.
    pub(super) fn parts(&self) -> Parts {
        let mut parts = self.pages.parts();
        if self.waits_for_leases() {
            parts.leased_bytes =
                self.leases.pages(self.pages.live(), self.page_bytes) * self.page_bytes;
            parts.live_bytes -= parts.leased_bytes;
        }
        parts
    }

    /// Frees bytes that are live, but for those that are leased. Adds the chunks that nobody uses any more to `unused`.
    pub(super) fn free(&mut self, bytes: &ops::Range<usize>, unused: &mut Vec<usize>) {
        if self.leases.is_empty() {
            return self.pages.release(bytes, unused);
        }
        for part in self.leases.free(bytes) {
            self.pages.release(&part, unused);
        }
    }

    /// Frees all that the owner has, but for what is leased.
    pub(super) fn free_all(&mut self) -> Vec<usize> {
        let live: Vec<_> = self.pages.live().iter().collect();
        let owned: Vec<_> = (live.into_iter())
            .flat_map(|part| self.leases.freed.gaps(part).collect::<Vec<_>>())
            .collect();
        let mut unused = Vec::new();
        owned.iter().for_each(|part| self.free(part, &mut unused));
        unused
    }

    /// Takes out the tokens that are released, to be dropped without the lock.
    pub(super) fn take_released(&mut self) -> Released {
        self.leases.take_released()
    }

    /// Frees what was freed before and is leased no longer. Returns the chunks that nobody uses any more, and tokens to
    /// be dropped without the lock.
    fn sweep_leases(&mut self) -> (Vec<usize>, Released) {
        let released = self.leases.take_released();
        let parts = self.leases.sweep();
        let mut unused = Vec::new();
        for part in &parts {
            self.pages.release(part, &mut unused);
        }
        (unused, released)
    }
}

impl Inner {
    /// Leases live bytes until the token is released.
    pub(crate) fn lease(
        &self,
        handle: &Handle,
        offset: usize,
        bytes: usize,
        token: Box<dyn LeaseToken>,
    ) -> Result<()> {
        handle.check_process()?;
        // The token comes from outside, so where it is refused it is dropped after the lock, as are those that are
        // released.
        let mut range = handle.lock();
        if range.closed {
            return Err(VmmError::Closed);
        }
        let extent = range.live_extent(offset, bytes)?;
        let released = range.leases.add(extent.range(), token);
        // For good: what is queued by then may run long after the token is released.
        range.users.open_to_all();
        drop(range);
        drop(released);
        Ok(())
    }

    /// Whether a token that is not released covers any of the bytes.
    pub(crate) fn is_leased(&self, handle: &Handle, offset: usize, bytes: usize) -> bool {
        let end = offset.saturating_add(bytes);
        let look = self.with_range(handle, |range| {
            let released = range.leases.take_released();
            (range.leases.overlaps(&(offset..end)), released)
        });
        look.is_ok_and(|(leased, _released)| leased)
    }

    /// The bytes under each lease whose token is not released; they may overlap.
    pub(crate) fn leased(&self, handle: &Handle) -> Vec<ops::Range<usize>> {
        let look = self.with_range(handle, |range| {
            let released = range.leases.take_released();
            (range.leased(), released)
        });
        look.map_or(Vec::new(), |(leased, _released)| leased)
    }

    /// Puts what was freed into the queue, and lets go what was freed while it was leased and is leased no longer: it
    /// retires, behind a fence of now.
    pub(super) fn look_at_news(self: &Arc<Self>) {
        let mut state = self.lock();
        let mut any_swept = false;
        let news: Vec<_> = state.ranges.with_news().cloned().collect();
        for handle in news {
            let mut range = handle.lock();
            state.queue.collect(handle.id(), &mut range);
            let swept = range.waits_for_leases().then(|| range.sweep_leases());
            handle.note(&range);
            drop(range);
            if let Some((unused, released)) = swept {
                any_swept |= !unused.is_empty();
                self.retire(state, handle.id(), unused);
                drop(released);
                state = self.lock();
            }
        }
        if any_swept {
            state.collect_freed();
        }
    }
}
