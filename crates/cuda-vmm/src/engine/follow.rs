//! Taking back memory before the device has finished with it: the streams that will use it wait,
//! not the caller.
//!
//! A chunk retires behind fences. If all streams that are named for its range come after these
//! fences, so does all work that they get from now on, and the chunk may be used again at once. A
//! stream comes after a fence of its own anyway; it is made to come after another's by
//! `cuStreamWaitEvent`. So with one stream no call is made.
//!
//! When the chunk is freed again, the new fences on the same streams end the earlier work as well,
//! for each of these streams came after it.

use super::books::range_id::RangeId;
use super::changes::Locked;
use super::handle::RangeHandle;
use super::queue::{Entry, Queue, Until};
use super::range::Range;
use super::state::State;
use super::users::Users;
use crate::stream::{Handle, Named};
use crate::sync::Arc;
use crate::{CaptureGuard, Fence, Result, Stream, VmmError};

/// Streams that are to wait for the fences of an entry of the queue.
struct Following {
    entry: u64,
    fences: Arc<Vec<Arc<Fence>>>,
    /// The number of the naming after the last that was looked at.
    followers: u64,
    streams: Vec<Named>,
}

impl Following {
    /// Makes the streams wait for those fences that are not past and not their own.
    ///
    /// A stream that is being captured is not made to wait for anything outside, and no stream for
    /// an event that belongs to a capture, which would draw it in; the question whether the fence
    /// is past finds those events.
    fn run(&self) -> Result<bool> {
        // A capture that begins between the question and the wait would be drawn in.
        let Some(_no_capture) = CaptureGuard::try_none() else {
            return Ok(false);
        };
        for named in &self.streams {
            let stream = named.handle();
            let others = self.fences.iter().filter(|fence| !fence.is_on(stream));
            for fence in others {
                if fence.is_complete()? {
                    continue;
                }
                if stream.is_capturing()? {
                    return Ok(false);
                }
                stream.wait_for(fence)?;
            }
        }
        Ok(true)
    }
}

impl Entry {
    fn fences(&self) -> Option<&Arc<Vec<Arc<Fence>>>> {
        match &self.until {
            Until::Fences(fences) => Some(fences),
            Until::Synchronised => None,
        }
    }

    /// Those of the streams that do not come after the fences yet.
    fn strangers<'a>(&'a self, streams: &'a [(u64, Named)]) -> impl Iterator<Item = &'a Named> {
        let rest = streams.iter().filter(|(at, _)| *at >= self.followers);
        let rest = rest.map(|(_, named)| named);
        rest.filter(|named| !self.is_on(named.handle()))
    }
}

impl Queue {
    /// The entry that holds a retiring chunk, if fences end it.
    fn fenced_holder(&self, id: RangeId, first: usize) -> Option<&Entry> {
        let entry = self.holder(id, first);
        entry.filter(|entry| entry.fences().is_some())
    }

    /// Notes that the range's streams of smaller numbers than this come after an entry's fences.
    fn add_followers(&mut self, id: u64, followers: u64) {
        if let Some(entry) = self.entry_mut(id) {
            entry.followers = entry.followers.max(followers);
        }
    }
}

impl State {
    /// Whether retiring chunks may be used again now: all streams that are named for the range come
    /// after their fences. Not while a capture is declared: it could be a capture of one of these
    /// streams.
    pub(crate) fn may_follow(&self, id: RangeId, range: &Range, chunks: &[usize]) -> bool {
        let Some(streams) = range.users.followers().filter(|_| !CaptureGuard::any()) else {
            return false;
        };
        chunks.iter().all(|first| {
            let holder = self.queue.fenced_holder(id, *first);
            holder.is_some_and(|entry| entry.strangers(streams).next().is_none())
        })
    }

    /// What would let these chunks be used again; `None` if some have no fences.
    fn following(&self, id: RangeId, chunks: &[usize]) -> Option<Vec<Following>> {
        let range = self.ranges.get(id)?;
        let streams = range.users.followers().filter(|_| !CaptureGuard::any())?;
        let mut needed: Vec<Following> = Vec::new();
        for first in chunks {
            let entry = self.queue.fenced_holder(id, *first)?;
            if needed.iter().all(|known| known.entry != entry.id) {
                needed.push(Following {
                    entry: entry.id,
                    fences: entry.fences()?.clone(),
                    followers: range.users.next(),
                    streams: entry.strangers(streams).cloned().collect(),
                });
            }
        }
        Some(needed)
    }

    /// The entries of an open range of which chunks were taken back, except those that are known,
    /// and the range's users; `None` if the stream is named.
    fn taken_back(
        &self,
        id: RangeId,
        stream: &Handle,
        known: &[u64],
    ) -> Result<Option<(Vec<TakenBack>, Users)>> {
        let range = match self.ranges.get(id) {
            Some(range) if !range.closed => range,
            _ => return Err(VmmError::Closed),
        };
        if range.users.is_named(stream) {
            return Ok(None);
        }
        let entries = self.queue.of_range(id);
        let followed = entries
            .filter(|entry| entry.followed && !known.contains(&entry.id))
            .map(|entry| (entry.id, entry.fences().cloned()))
            .collect();
        Ok(Some((followed, range.users.clone())))
    }
}

/// An entry of which chunks were taken back, and its fences, unless they turned out to be captured.
type TakenBack = (u64, Option<Arc<Vec<Arc<Fence>>>>);

impl RangeHandle {
    /// Makes the named streams of the range wait for the fences of these chunks, without waiting
    /// for the device. If that cannot be done, all is as before, and the caller may wait instead.
    pub(crate) fn make_follow<'a>(&'a self, state: Locked<'a>, chunks: &[usize]) -> Locked<'a> {
        let Some(needed) = state.following(self.id(), chunks) else {
            return state;
        };
        drop(state);
        // The pages need not be kept for this: what is noted is about the entry, and holds for any
        // thread that takes its chunks. If it is gone meanwhile, the streams wait for what is over.
        let done: Vec<_> = needed.iter().map(Following::run).collect();
        let mut state = self.inner().state.lock();
        for (following, done) in needed.iter().zip(&done) {
            if matches!(done, Ok(true)) {
                let (entry, followers) = (following.entry, following.followers);
                state.queue.add_followers(entry, followers);
            }
        }
        drop(state);
        for error in done.iter().filter_map(|done| done.as_ref().err()) {
            crate::events::debug!(%error, "a stream could not be made to wait");
        }
        // Without the lock: these may be the last to hold the fences and streams, and dropping one
        // calls the driver.
        drop(needed);
        self.inner().state.lock()
    }

    /// Names another stream for the range. If memory was taken back for which the other streams
    /// wait, this one does too; if it cannot be made to, the caller does.
    pub(crate) fn add_stream(&self, stream: &Stream) -> Result<()> {
        let id = self.id();
        self.come_after_taken_back(stream.handle(), |state| {
            let State { ranges, queue, .. } = state;
            let mut range = ranges.get(id)?;
            let followers = range.users.next();
            queue.each_of_range(id, |entry| {
                if entry.followed && entry.followers == followers {
                    entry.followers += 1;
                }
            });
            Some(range.users.name(stream))
        })
    }

    /// Makes a stream that is not named wait for what is still done with memory of the range that
    /// was taken back.
    pub(crate) fn order_stream(&self, stream: &Stream) -> Result<()> {
        self.engine().open()?;
        self.come_after_taken_back(stream.handle(), |_| None)
    }

    /// Makes a stream wait for what is still done with memory of the range that was taken back. If
    /// the stream is not named, it calls `finish` in the moment when nothing is left to wait for.
    /// What `finish` returns is dropped without the lock.
    fn come_after_taken_back(
        &self,
        stream: &Arc<Handle>,
        finish: impl FnOnce(&mut State) -> Option<Arc<[(u64, Named)]>>,
    ) -> Result<()> {
        let mut known: Vec<u64> = Vec::new();
        loop {
            let mut state = self.inner().state.lock();
            let Some((followed, users)) = state.quietly().taken_back(self.id(), stream, &known)?
            else {
                return Ok(());
            };
            if followed.is_empty() {
                let dropped = finish(&mut state);
                drop(state);
                drop((dropped, users));
                return Ok(());
            }
            drop(state);
            for (entry, fences) in followed {
                let fences = match fences {
                    Some(fences) => fences,
                    // They turned out to be captured. Fences of now cover the same work.
                    None => {
                        let record = |stream| Fence::on_stream(stream).map(Arc::new);
                        Arc::new(users.named().map(record).collect::<Result<_>>()?)
                    }
                };
                for fence in fences.iter() {
                    if !fence.is_on(stream) && !fence.is_complete()? {
                        come_after(stream, fence)?;
                    }
                }
                known.push(entry);
            }
        }
    }
}

/// Makes a stream, or else the caller, wait for a fence.
fn come_after(stream: &Handle, fence: &Fence) -> Result<()> {
    let can_wait = !stream.is_per_thread() && !stream.is_capturing().unwrap_or(true);
    match can_wait && stream.wait_for(fence).is_ok() {
        true => Ok(()),
        false => fence.wait(),
    }
}
