//! Chunks that wait until the device has finished with them: retiring.

use super::books::range_id::RangeId;
use super::users::Users;
use crate::capture::NoCapture;
use crate::stream::Handle;
use crate::sync::Arc;
use crate::{CaptureGuard, Device, Fence, Result};
use core::ops::Range;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// What must be past before a chunk may be unmapped.
#[derive(Debug, Clone)]
pub(crate) enum Until {
    /// These fences.
    Fences(Arc<Vec<Arc<Fence>>>),
    /// A context synchronise that begins from now on.
    Synchronised,
}

impl Until {
    /// The end of all work that can use the range now. That is the work queued on the named
    /// streams, and the *ends* of streams that are named no more (`users`). If no stream was named,
    /// it is all work of the context; if the range was leased, all work of every context. Queues at
    /// most one event for each stream, or each context, and waits for nothing. If no fence can be
    /// had, a context synchronise later is as good.
    ///
    /// A stream that is being captured has no fence to give: an event recorded there belongs to the
    /// capture. The per-thread default stream is another one for each thread, so a fence of the
    /// context stands for it.
    pub(crate) fn now(device: &Device, users: &Users) -> Self {
        let is_captured = |stream: &Arc<_>| crate::stream::Handle::is_capturing(stream);
        let mut shared = users.named().filter(|stream| !stream.is_per_thread());
        if shared.any(|stream| is_captured(stream).unwrap_or(true)) {
            return Self::Synchronised;
        }
        let fences = match users.streams() {
            Some(streams) => {
                let mut fences = users.ends().to_vec();
                let several = streams.len() > 1;
                let recorded = streams.iter().try_for_each(|(_, named)| {
                    let stream = named.handle();
                    if !(several && stream.is_idle()?) {
                        fences.push(Arc::new(Fence::on_stream(stream)?));
                    }
                    Ok(())
                });
                recorded.map(|()| Some(fences))
            }
            None => match CaptureGuard::try_none() {
                Some(none) => Self::of_contexts(device, users.are_all(), &none),
                None => Ok(None),
            },
        };
        match fences {
            Ok(Some(fences)) => Self::Fences(Arc::new(fences)),
            Ok(None) | Err(_) => Self::Synchronised,
        }
    }

    /// Fences behind all work of the device's context, or of the contexts of all devices. `None` if
    /// the driver is too old for it.
    pub(crate) fn of_contexts(
        device: &Device,
        all: bool,
        none: &NoCapture,
    ) -> Result<Option<Vec<Arc<Fence>>>> {
        let peers = if all { device.peers()? } else { Vec::new() };
        let mut fences = Vec::with_capacity(1 + peers.len());
        for device in [device].into_iter().chain(&peers) {
            match Fence::on_context(device, none)? {
                Some(fence) => fences.push(Arc::new(fence)),
                None => return Ok(None),
            }
        }
        Ok(Some(fences))
    }

    /// Whether both are the same fences.
    pub(crate) fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Fences(own), Self::Fences(other)) => Arc::ptr_eq(own, other),
            (Self::Synchronised, Self::Synchronised) => true,
            _ => false,
        }
    }

    /// Whether it is past, as far as this is known without waiting.
    ///
    /// On a poisoned context nothing runs any more, so everything is past.
    pub(crate) fn is_past(&self) -> Result<bool> {
        match self {
            Self::Fences(fences) => {
                for fence in fences.iter() {
                    match fence.is_complete() {
                        Ok(true) => {}
                        Ok(false) => return Ok(false),
                        Err(error) if error.is_poisoned() => return Ok(true),
                        Err(error) => return Err(error),
                    }
                }
                Ok(true)
            }
            Self::Synchronised => Ok(false),
        }
    }
}

/// How much of the queue is done under one hold of the engine's lock. Other threads wait for it
/// meanwhile, and there may be tens of thousands of entries.
pub(crate) const BITE: usize = 64;

/// Chunks of one range that retire together.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) id: u64,
    pub(crate) range: RangeId,
    /// First pages, rising. Some may be in the entry no more; the queue knows which are.
    chunks: Vec<usize>,
    /// How many are in it.
    left: usize,
    pub(crate) until: Until,
    /// The address of the stream that its only fence is on, so that most need not look further.
    only_on: Option<usize>,
    /// How much of it is overwritten by then, in bytes.
    scrubbed_bytes: usize,
    /// The streams of the range whose namings have smaller numbers than this come after the fences.
    pub(crate) followers: u64,
    /// Whether chunks of it were taken back before its fences were past. Then it stays until they
    /// are, even without chunks: a stream that is named meanwhile must come after them too.
    pub(crate) followed: bool,
}

/// Entries in the order in which they were made.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    entries: BTreeMap<u64, Entry>,
    /// The entry of each chunk that retires.
    by_chunk: BTreeMap<(RangeId, usize), u64>,
    by_range: BTreeSet<(RangeId, u64)>,
    /// Those of them whose chunks come back when fences are past. One whose chunks were all taken
    /// back stays until it is met: to take a chunk back is to cost little.
    with_chunks: BTreeSet<(RangeId, u64)>,
    /// Entries whose chunks wait for a context synchronise.
    unsynchronised: BTreeSet<u64>,
    scrubbing_bytes: usize,
    next: u64,
    /// Entries that were left when a thread last looked which are past.
    left: usize,
}

impl Queue {
    pub(crate) fn push(&mut self, range: RangeId, chunks: Vec<usize>, until: Until) {
        self.add(range, chunks, until, 0);
    }

    /// Takes over what was freed of a range under its own lock, at most so many chunks; returns how
    /// many more it could take.
    pub(crate) fn collect(
        &mut self,
        id: RangeId,
        freed: &mut VecDeque<(Vec<usize>, Until)>,
        mut room: usize,
    ) -> usize {
        while room > 0
            && let Some((chunks, until)) = freed.pop_front()
        {
            let now = chunks.len().min(room);
            let (chunks, later) = chunks.split_at(now);
            if !later.is_empty() {
                freed.push_front((later.to_vec(), until.clone()));
            }
            room -= now;
            self.push(id, chunks.to_vec(), until);
        }
        room
    }

    /// A chunk that is being overwritten.
    pub(crate) fn push_scrub(&mut self, range: RangeId, first: usize, bytes: usize, until: Until) {
        self.add(range, vec![first], until, bytes);
    }

    fn add(&mut self, range: RangeId, chunks: Vec<usize>, until: Until, scrubbed_bytes: usize) {
        let id = self.next;
        self.next += 1;
        let of_chunk = chunks.iter().map(|first| ((range, *first), id));
        self.by_chunk.extend(of_chunk);
        self.by_range.insert((range, id));
        self.scrubbing_bytes += scrubbed_bytes;
        let mut only_on = None;
        match &until {
            Until::Fences(fences) => {
                if !chunks.is_empty() {
                    self.with_chunks.insert((range, id));
                }
                if let [only] = &fences[..] {
                    only_on = only.stream_address();
                }
            }
            Until::Synchronised => _ = self.unsynchronised.insert(id),
        }
        let entry = Entry {
            id,
            range,
            left: chunks.len(),
            chunks,
            until,
            only_on,
            scrubbed_bytes,
            followers: 0,
            followed: false,
        };
        self.entries.insert(id, entry);
    }

    /// What is being overwritten, in bytes.
    pub(crate) fn scrubbing_bytes(&self) -> usize {
        self.scrubbing_bytes
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The number that the next entry gets.
    pub(crate) fn end(&self) -> u64 {
        self.next
    }

    /// Numbers and conditions of entries from a number on, to be asked without the lock: as many as
    /// are done at once.
    pub(crate) fn conditions(&self, numbers: Range<u64>) -> Vec<(u64, Until)> {
        let entries = self.entries.range(numbers).take(BITE);
        entries
            .map(|(id, entry)| (*id, entry.until.clone()))
            .collect()
    }

    /// The first entry whose chunks come back when fences are past, of one range.
    pub(crate) fn first_fences(&mut self, range: RangeId) -> Option<(u64, Arc<Vec<Arc<Fence>>>)> {
        let of_range = (range, 0)..=(range, u64::MAX);
        while let Some(&(_, id)) = self.with_chunks.range(of_range.clone()).next() {
            let returns = self.entries.get(&id).and_then(Entry::returns);
            if returns.is_some() {
                return returns;
            }
            self.with_chunks.remove(&(range, id));
        }
        None
    }

    /// The same, of the ranges that are meant.
    pub(crate) fn first_fences_of(
        &self,
        is_meant: impl Fn(RangeId) -> bool,
    ) -> Option<(u64, Arc<Vec<Arc<Fence>>>)> {
        let entries = self.entries.values();
        let mut entries = entries.filter(|entry| is_meant(entry.range));
        entries.find_map(Entry::returns)
    }

    /// Numbers of the entries that need a context synchronise, of the ranges that are meant.
    pub(crate) fn unsynchronised(&self, is_meant: impl Fn(RangeId) -> bool) -> Vec<u64> {
        let ids = self.unsynchronised.iter().copied();
        ids.filter(|id| {
            let entry = self.entries.get(id);
            entry.is_some_and(|entry| is_meant(entry.range))
        })
        .collect()
    }

    /// The entries of one range.
    pub(crate) fn of_range(&self, range: RangeId) -> impl Iterator<Item = &Entry> {
        let ids = self.by_range.range((range, 0)..=(range, u64::MAX));
        ids.filter_map(|(_, id)| self.entries.get(id))
    }

    /// Does something with each entry of a range.
    pub(crate) fn each_of_range(&mut self, range: RangeId, act: impl Fn(&mut Entry)) {
        let ids = self.by_range.range((range, 0)..=(range, u64::MAX));
        for (_, id) in ids {
            if let Some(entry) = self.entries.get_mut(id) {
                act(entry);
            }
        }
    }

    /// An entry by its number.
    pub(crate) fn entry_mut(&mut self, id: u64) -> Option<&mut Entry> {
        self.entries.get_mut(&id)
    }

    /// The entry that holds a retiring chunk.
    pub(crate) fn holder(&self, range: RangeId, first: usize) -> Option<&Entry> {
        self.entries.get(self.by_chunk.get(&(range, first))?)
    }

    /// Takes chunks out that are used again before their fences are past.
    pub(crate) fn follow(&mut self, range: RangeId, chunks: &[usize]) {
        for first in chunks {
            let id = self.by_chunk.remove(&(range, *first));
            if let Some(entry) = id.and_then(|id| self.entries.get_mut(&id)) {
                entry.left -= 1;
                entry.followed = true;
                self.scrubbing_bytes -= core::mem::take(&mut entry.scrubbed_bytes);
            }
        }
    }

    /// Whether enough entries have come since that a call should look which are past, if no step
    /// does.
    pub(crate) fn is_overgrown(&self) -> bool {
        self.entries.len() > 2 * self.left + 64
    }

    /// Notes that a thread has looked which entries are past.
    pub(crate) fn was_looked_through(&mut self) {
        self.left = self.entries.len();
    }

    /// Makes entries wait for a context synchronise whose fences turned out to be captured. Returns
    /// the fences, to be dropped without the lock: that calls the driver.
    pub(crate) fn give_up_fences(&mut self, ids: &[u64]) -> Vec<Until> {
        let mut fences = Vec::new();
        for id in ids {
            if let Some(entry) = self.entries.get_mut(id) {
                self.unsynchronised.insert(*id);
                self.with_chunks.remove(&(entry.range, *id));
                fences.push(core::mem::replace(&mut entry.until, Until::Synchronised));
            }
        }
        fences
    }

    /// Takes chunks out of an entry that is past, at most this many, and the entry when none is
    /// left. Returns its range and the chunks.
    pub(crate) fn take(
        &mut self,
        id: u64,
        at_most: usize,
    ) -> Option<(RangeId, Vec<usize>, Option<Entry>)> {
        let entry = self.entries.get_mut(&id)?;
        let range = entry.range;
        let at = entry.chunks.len().min(at_most);
        let later = entry.chunks.split_off(at);
        let mut chunks = core::mem::replace(&mut entry.chunks, later);
        chunks.retain(|first| {
            let key = (range, *first);
            let is_its = self.by_chunk.get(&key) == Some(&id);
            if is_its {
                self.by_chunk.remove(&key);
            }
            is_its
        });
        entry.left -= chunks.len();
        let is_done = entry.chunks.is_empty();
        let entry = is_done.then(|| self.entries.remove(&id)).flatten();
        if let Some(entry) = &entry {
            self.by_range.remove(&(range, id));
            self.with_chunks.remove(&(range, id));
            self.unsynchronised.remove(&id);
            self.scrubbing_bytes -= entry.scrubbed_bytes;
        }
        Some((range, chunks, entry))
    }
}

impl Entry {
    /// Whether its fences are all on this stream, if they are fences.
    pub(crate) fn is_on(&self, stream: &Arc<Handle>) -> bool {
        match (&self.until, self.only_on) {
            (Until::Fences(_), Some(address)) => address == Arc::as_ptr(stream).addr(),
            (Until::Fences(fences), None) => fences.iter().all(|fence| fence.is_on(stream)),
            (Until::Synchronised, _) => true,
        }
    }

    /// Its fences, if chunks come back when they are past.
    fn returns(&self) -> Option<(u64, Arc<Vec<Arc<Fence>>>)> {
        match &self.until {
            Until::Fences(fences) if self.left > 0 => Some((self.id, fences.clone())),
            _ => None,
        }
    }
}
