//! The leases of one range: bytes that code outside uses until a token is released.

use crate::engine::books::cover::Cover;
use crate::engine::books::intervals::Intervals;
use crate::engine::queue::BITE;
use crate::foreign::Foreign;
use crate::sync::thread::{self, ThreadId};
use core::fmt;
use core::ops::Range;
use std::collections::{BTreeMap, VecDeque};

/// Tells whether leased memory can still be used; see
/// [`VirtualMemoryPool::lease`](crate::VirtualMemoryPool::lease).
///
/// An `Arc` is one: it is released when no other `Arc` or `Weak` shares its value. So an `Arc` that
/// the caller does not keep a clone of is released at once, whatever is in it.
///
/// ```
/// use cuda_vmm::{Fence, LeaseToken};
///
/// /// Released when the device is past a fence.
/// #[derive(Debug)]
/// struct UntilPast(Fence);
///
/// impl LeaseToken for UntilPast {
///     fn is_released(&mut self) -> bool {
///         // One that cannot be asked now is asked again.
///         self.0.is_complete().unwrap_or(false)
///     }
/// }
/// ```
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
    bytes: Range<usize>,
    /// None while it is being asked.
    token: Option<Token>,
}

/// Which tokens a thread has still to ask.
#[derive(Debug)]
enum ToAsk {
    /// Those of all leases with these numbers.
    All(Range<u64>),
    These(VecDeque<u64>),
}

/// The leases of one range.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    leases: BTreeMap<u64, Lease>,
    next: u64,
    cover: Cover,
    /// The thread that has tokens out to ask them, and what it has still to ask.
    asking: Option<(ThreadId, ToAsk)>,
    /// Bytes that were freed while they were leased. They are live in the books of pages, so that
    /// no allocation gets them.
    freed: Intervals,
    /// Those of them that are leased no longer.
    over: VecDeque<Range<usize>>,
    /// Tokens are asked before the list grows longer than this.
    look_at: usize,
}

impl Leases {
    /// As few as are worth a look.
    const FEW: usize = 4;

    /// Adds a lease; returns whether the tokens are to be asked again: not for each new one, so
    /// that many views at once do not cost the square of their number.
    pub(crate) fn add(&mut self, bytes: Range<usize>, token: Token) -> bool {
        let is_due = self.leases.len() >= self.look_at.max(Self::FEW);
        self.cover.add(&bytes, self.next);
        let token = Some(token);
        self.leases.insert(self.next, Lease { bytes, token });
        self.next += 1;
        is_due
    }

    /// Begins to ask the tokens of all leases, or of those over some bytes; not while a thread asks
    /// them. They are out of the leases while they are asked, without the lock, some at a time.
    pub(crate) fn begin_asking(&mut self, over: Option<&[(usize, usize)]>) -> Vec<Asked> {
        if self.asking.is_some() || self.leases.is_empty() {
            return Vec::new();
        }
        let to_ask = match over {
            None => ToAsk::All(0..self.next),
            Some(parts) => {
                let parts = parts.iter();
                let parts = parts.map(|(offset, bytes)| *offset..offset.saturating_add(*bytes));
                ToAsk::These(
                    parts
                        .flat_map(|part| self.cover.numbers(&part).collect::<Vec<_>>())
                        .collect(),
                )
            }
        };
        self.asking = Some((thread::current().id(), to_ask));
        self.next_tokens()
    }

    /// The next tokens to ask; none when all were asked.
    pub(crate) fn next_tokens(&mut self) -> Vec<Asked> {
        let leases = &mut self.leases;
        let count = leases.len();
        let mut asked = Vec::new();
        match &mut self.asking {
            None => return asked,
            Some((_, ToAsk::All(numbers))) => {
                let leases = leases.range_mut(numbers.clone());
                let tokens =
                    leases.filter_map(|(number, lease)| Some((*number, lease.token.take()?)));
                asked.extend(tokens.take(BITE));
                if let Some((last, _)) = asked.last() {
                    numbers.start = last + 1;
                } else {
                    self.look_at = 2 * count;
                }
            }
            Some((_, ToAsk::These(numbers))) => {
                while asked.len() < BITE
                    && let Some(number) = numbers.pop_front()
                {
                    let lease = leases.get_mut(&number);
                    let token = lease.and_then(|lease| lease.token.take());
                    asked.extend(token.map(|token| (number, token)));
                }
            }
        }
        if asked.is_empty() {
            self.asking = None;
        }
        asked
    }

    /// Ends the leases whose tokens are released, and puts the other tokens back.
    pub(crate) fn answer(&mut self, answers: Vec<(Asked, bool)>) -> Vec<Token> {
        let mut released = Vec::new();
        for ((number, token), is_released) in answers {
            if !is_released {
                if let Some(lease) = self.leases.get_mut(&number) {
                    lease.token = Some(token);
                }
                continue;
            }
            released.push(token);
            if let Some(lease) = self.leases.remove(&number) {
                self.end(&lease.bytes, number);
            }
        }
        released
    }

    /// Ends a lease of these bytes: what of them was freed and no other lease covers is over.
    fn end(&mut self, bytes: &Range<usize>, number: u64) {
        self.cover.remove(bytes, number);
        if self.freed.is_empty() {
            return;
        }
        for part in self.cover.gaps(bytes) {
            self.over.extend(self.freed.parts(part));
        }
    }

    /// Whether another thread asks the tokens now.
    pub(crate) fn is_asked_elsewhere(&self) -> bool {
        let asking = self.asking.as_ref();
        asking.is_some_and(|(asking, _)| *asking != thread::current().id())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.leases.is_empty()
    }

    /// Whether any of the bytes are leased.
    pub(crate) fn overlap(&self, bytes: &Range<usize>) -> bool {
        self.cover.overlaps(bytes)
    }

    /// The owner frees bytes. Those that are not leased are to be freed now; the others are later.
    pub(crate) fn free(&mut self, bytes: &Range<usize>) -> Vec<Range<usize>> {
        let now = self.cover.gaps(bytes);
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

    /// The next bytes that were freed while they were leased, and are leased no longer.
    pub(crate) fn next_over(&self) -> Option<Range<usize>> {
        self.over.front().cloned()
    }

    /// Takes these out.
    pub(crate) fn take_over(&mut self) {
        if let Some(part) = self.over.pop_front() {
            self.freed.remove(&part);
        }
    }

    /// Of these pages, how many have freed bytes in them, and of the live bytes no others.
    pub(crate) fn pages(&self, live: &Intervals, page_bytes: usize, pages: Range<usize>) -> usize {
        let is_only_freed = |page: usize| {
            let bytes = page * page_bytes..(page + 1) * page_bytes;
            self.freed.within(&bytes) == live.within(&bytes)
        };
        let (mut count, mut page) = (0, pages.start);
        let bytes = pages.start * page_bytes..pages.end * page_bytes;
        for part in self.freed.parts(bytes) {
            let whole = part.start.div_ceil(page_bytes)..part.end / page_bytes;
            page = page.max(part.start / page_bytes);
            while page < part.end.div_ceil(page_bytes) {
                if whole.contains(&page) {
                    count += whole.end - page;
                    page = whole.end;
                } else {
                    count += usize::from(is_only_freed(page));
                    page += 1;
                }
            }
        }
        count
    }

    /// Bytes that were freed while they were leased.
    pub(crate) fn freed(&self) -> &Intervals {
        &self.freed
    }

    /// The bytes under each lease.
    pub(crate) fn bytes(&self) -> Vec<Range<usize>> {
        let leases = self.leases.values();
        leases.map(|lease| lease.bytes.clone()).collect()
    }
}
