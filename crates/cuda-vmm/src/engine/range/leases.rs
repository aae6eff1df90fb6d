//! The leases of one range: bytes that code outside uses until a token is released.

use crate::engine::books::intervals::Intervals;
use crate::foreign::Foreign;
use crate::sync::thread::{self, ThreadId};
use core::{fmt, ops};

/// Tells whether leased memory can still be used; see
/// [`VirtualMemoryPool::lease`](crate::VirtualMemoryPool::lease).
///
/// An `Arc` is one: it is released when no other `Arc` or `Weak` shares its value.
pub trait LeaseToken: fmt::Debug + Send + 'static {
    /// Whether no code can queue work on the memory any more, now or later. Work that is queued
    /// already may still run, on any stream of any device.
    ///
    /// The pools ask again and again, from any thread, with no lock held; so this may call them.
    /// While one thread asks, others take the token for not released; those that need to know wait
    /// a tenth of a second at most. So it should be quick. After it has returned `true` the token
    /// is dropped, on any thread. A token that panics here counts as not released; a panic of its
    /// drop is caught.
    fn is_released(&mut self) -> bool;
}

impl<T: ?Sized + fmt::Debug + Send + Sync + 'static> LeaseToken for std::sync::Arc<T> {
    fn is_released(&mut self) -> bool {
        Self::get_mut(self).is_some()
    }
}

pub(crate) type Token = Foreign<Box<dyn LeaseToken>>;

/// A token that is out to be asked, by the number of its lease.
pub(crate) type Asked = (u64, Token);

/// What a thread does while another one asks the tokens of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asker {
    /// Takes them for not released.
    Passing,
    /// Waits until they were asked, for a while.
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
pub(crate) struct Leases {
    /// By rising number.
    leases: Vec<Lease>,
    next: u64,
    /// The thread that has tokens out to ask them.
    asking: Option<ThreadId>,
    /// Bytes that were freed while they were leased. They are live in the books of pages, so that
    /// no allocation gets them.
    freed: Intervals,
    /// Tokens are asked before the list grows longer than this.
    look_at: usize,
}

impl Leases {
    /// As few as are worth a look.
    const FEW: usize = 4;

    /// Adds a lease; returns whether the tokens are to be asked again: not for each new one, so
    /// that many views at once do not cost the square of their number.
    pub(crate) fn add(&mut self, bytes: ops::Range<usize>, token: Token) -> bool {
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
    pub(crate) fn take_tokens(&mut self) -> Vec<Asked> {
        if self.asking.is_some() || self.leases.is_empty() {
            return Vec::new();
        }
        self.asking = Some(thread::current().id());
        let leases = self.leases.iter_mut();
        let asked = leases.filter_map(|lease| Some((lease.number, lease.token.take()?)));
        asked.collect()
    }

    /// Ends the leases whose tokens are released, and puts the other tokens back.
    pub(crate) fn answer(&mut self, answers: Vec<(Asked, bool)>) -> Vec<Token> {
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
    pub(crate) fn is_asked_elsewhere(&self) -> bool {
        self.asking
            .is_some_and(|asking| asking != thread::current().id())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.leases.is_empty()
    }

    /// Whether any of the bytes are leased.
    pub(crate) fn overlap(&self, bytes: &ops::Range<usize>) -> bool {
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
    pub(crate) fn free(&mut self, bytes: &ops::Range<usize>) -> Vec<ops::Range<usize>> {
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
    pub(crate) fn sweep(&mut self) -> Vec<ops::Range<usize>> {
        let freed: Vec<_> = self.freed.iter().collect();
        let parts: Vec<_> = freed.iter().flat_map(|part| self.unleased(part)).collect();
        for part in &parts {
            self.freed.remove(part);
        }
        parts
    }

    /// Pages in which freed bytes are, and of the live bytes no others.
    pub(crate) fn pages(&self, live: &Intervals, page_bytes: usize) -> usize {
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

    /// Bytes that were freed while they were leased.
    pub(crate) fn freed(&self) -> &Intervals {
        &self.freed
    }

    /// The bytes under each lease.
    pub(crate) fn bytes(&self) -> Vec<ops::Range<usize>> {
        let leases = self.leases.iter();
        leases.map(|lease| lease.bytes.clone()).collect()
    }
}
