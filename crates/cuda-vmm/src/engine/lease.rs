//! Memory that someone outside uses until a token of theirs says otherwise.

use super::books::intervals::Intervals;
use super::range::Range;
use super::{AtWork, Handle, Inner};
use crate::foreign::{self, Foreign};
use crate::sync::Arc;
use crate::sync::thread::{self, ThreadId};
use crate::{MemoryParts, Result, VmmError};
use core::{fmt, ops};

/// Tells whether leased memory can still be used; see [`VirtualMemoryPool::lease`](crate::VirtualMemoryPool::lease).
///
/// An `Arc` is one: it is released when no other `Arc` or `Weak` shares its value.
pub trait LeaseToken: fmt::Debug + Send + 'static {
    /// Whether nobody can queue work on the memory any more, or ever will. Work that is queued already may still run, on any
    /// stream of any device.
    ///
    /// The pools ask again and again, from any thread, with no lock held; so this may call them. While one thread asks, others
    /// take the token for not released; those that need to know wait a tenth of a second at most. So it should be quick. After
    /// it has returned `true` the token is dropped, on any thread. A token that panics here counts as not released; a
    /// panic of its drop is caught.
    fn is_released(&mut self) -> bool;
}

impl<T: ?Sized + fmt::Debug + Send + Sync + 'static> LeaseToken for std::sync::Arc<T> {
    fn is_released(&mut self) -> bool {
        Self::get_mut(self).is_some()
    }
}

type Token = Foreign<Box<dyn LeaseToken>>;

/// A token that is out to be asked, by the number of its lease.
type Asked = (u64, Token);

/// What a thread does while another one asks the tokens of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asker {
    /// Takes them for not released.
    Passing,
    /// Waits for the answers, for a while.
    Waiting,
}

#[derive(Debug)]
struct Lease {
    number: u64,
    bytes: ops::Range<usize>,
    /// None while it is being asked.
    token: Option<Token>,
}

/// The leases of one range.
#[derive(Debug, Default)]
pub(super) struct Leases {
    /// By rising number.
    leases: Vec<Lease>,
    next: u64,
    /// The thread that has tokens out to ask them.
    asking: Option<ThreadId>,
    /// Bytes that were freed while they were leased. They are live in the books of pages, so that nobody gets them.
    freed: Intervals,
    /// Tokens are asked before the list grows longer than this.
    look_at: usize,
}

impl Leases {
    /// As few as are worth a look.
    const FEW: usize = 4;

    /// Adds a lease; says whether the tokens are to be asked again: not for each new one, so that many views at once do not cost
    /// the square of their number.
    fn add(&mut self, bytes: ops::Range<usize>, token: Token) -> bool {
        let is_due = self.leases.len() >= self.look_at.max(Self::FEW);
        self.leases.push(Lease {
            number: self.next,
            bytes,
            token: Some(token),
        });
        self.next += 1;
        is_due
    }

    /// Takes out the tokens, to be asked without the lock; none while a thread asks them.
    fn take_tokens(&mut self) -> Vec<Asked> {
        if self.asking.is_some() || self.leases.is_empty() {
            return Vec::new();
        }
        self.asking = Some(thread::current().id());
        let leases = self.leases.iter_mut();
        let asked = leases.filter_map(|lease| Some((lease.number, lease.token.take()?)));
        asked.collect()
    }

    /// Ends the leases of which the tokens are released, and puts the others back.
    fn answer(&mut self, answers: Vec<(Asked, bool)>) -> Vec<Token> {
        self.asking = None;
        let mut answers = answers.into_iter().peekable();
        let mut released = Vec::new();
        self.leases.retain_mut(|lease| {
            let is_its = |answer: &(Asked, bool)| answer.0.0 == lease.number;
            let Some(((_, token), is_released)) = answers.next_if(is_its) else {
                return true;
            };
            match is_released {
                true => released.push(token),
                false => lease.token = Some(token),
            }
            !is_released
        });
        self.look_at = 2 * self.leases.len();
        released
    }

    /// Whether another thread asks the tokens now.
    pub(super) fn is_asked_elsewhere(&self) -> bool {
        self.asking
            .is_some_and(|asking| asking != thread::current().id())
    }

    pub(super) fn is_empty(&self) -> bool {
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
    pub(super) fn parts(&self) -> MemoryParts {
        let mut parts = self.pages.parts();
        if self.waits_for_leases() {
            parts.leased_bytes =
                self.leases.pages(self.pages.live(), self.page_bytes) * self.page_bytes;
            parts.live_page_bytes -= parts.leased_bytes;
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

    /// Frees what was freed before and is leased no longer. Says whether there was any, and returns the chunks that nobody
    /// uses any more.
    fn sweep_leases(&mut self) -> (bool, Vec<usize>) {
        let parts = self.leases.sweep();
        let mut unused = Vec::new();
        for part in &parts {
            self.pages.release(part, &mut unused);
        }
        (!parts.is_empty(), unused)
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
        // Before the lock, so that it is dropped after that if it is refused.
        let token = Foreign::new(token);
        handle.check_process()?;
        let mut range = handle.lock();
        if range.closed {
            return Err(VmmError::Closed);
        }
        let extent = range.live_extent(offset, bytes)?;
        let is_due = range.leases.add(extent.range(), token);
        // For good: what is queued by then may run long after the token is released.
        range.users.open_to_all();
        drop(range);
        if is_due {
            self.ask_tokens(handle, Asker::Passing);
        }
        Ok(())
    }

    /// Asks the tokens of a range, and ends the leases of those that are released. The caller holds no lock: the tokens are
    /// out of the range while they are asked, and the leases stay until they have answered.
    pub(super) fn ask_tokens(&self, handle: &Handle, asker: Asker) {
        let mut range = handle.lock();
        if range.leases.is_empty() {
            return;
        }
        if asker == Asker::Waiting && !AtWork::any() {
            range = handle.await_answers(range);
        }
        let asked = range.leases.take_tokens();
        drop(range);
        if asked.is_empty() {
            return;
        }
        let ask = |(number, mut token): Asked| {
            let is_released = foreign::call(|| token.is_released());
            if is_released.is_none() {
                crate::events::debug!("a lease's token panicked, and counts as not released");
            }
            ((number, token), is_released.unwrap_or_default())
        };
        let answers = asked.into_iter().map(ask).collect();
        let released = handle.lock().leases.answer(answers);
        handle.tell_answers();
        drop(released);
    }

    /// Whether a token that is not released covers any of the bytes.
    pub(crate) fn is_leased(&self, handle: &Handle, offset: usize, bytes: usize) -> bool {
        let end = offset.saturating_add(bytes);
        if handle.check_process().is_ok() {
            self.ask_tokens(handle, Asker::Waiting);
        }
        let look = self.with_range(handle, |range| range.leases.overlaps(&(offset..end)));
        look.unwrap_or_default()
    }

    /// The bytes under each lease whose token is not released; they may overlap.
    pub(crate) fn leased(&self, handle: &Handle) -> Vec<ops::Range<usize>> {
        if handle.check_process().is_ok() {
            self.ask_tokens(handle, Asker::Waiting);
        }
        let look = self.with_range(handle, |range| range.leased());
        look.unwrap_or_default()
    }

    /// Puts what was freed into the queue, and lets go what was freed while it was leased and is leased no longer: it
    /// retires, behind a fence of now.
    pub(super) fn look_at_news(self: &Arc<Self>) {
        let mut state = self.lock();
        state.quietly().collect_freed();
        // What has news still waits for leases.
        let leased: Vec<_> = state.ranges.with_news().cloned().collect();
        drop(state);
        if leased.is_empty() {
            return;
        }
        for handle in &leased {
            self.ask_tokens(handle, Asker::Passing);
            let mut range = handle.lock();
            let (any, unused) = range.sweep_leases();
            handle.note(&range);
            let users = range.users.clone();
            drop(range);
            if !unused.is_empty() {
                self.record(handle, users, unused);
            } else if any {
                self.tell();
            }
        }
        self.lock().quietly().collect_freed();
    }
}
