//! Chunks that wait until the device has finished with them: retiring.

use super::books::range_id::RangeId;
use super::users::Users;
use crate::capture::NoCapture;
use crate::sync::Arc;
use crate::{CaptureGuard, Device, Fence, Result};

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

/// Chunks of one range that retire together.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) id: u64,
    pub(crate) range: RangeId,
    /// First pages, rising.
    pub(crate) chunks: Vec<usize>,
    pub(crate) until: Until,
    /// How much of it is overwritten by then, in bytes.
    pub(crate) scrubbed_bytes: usize,
    /// The streams of the range whose namings have smaller numbers than this come after the fences.
    pub(crate) followers: u64,
    /// Whether chunks of it were taken back before its fences were past. Then it stays until they
    /// are, even without chunks: a stream that is named meanwhile must come after them too.
    pub(crate) followed: bool,
}

/// Entries in the order in which they were made.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    entries: Vec<Entry>,
    next: u64,
    /// Entries that were left when a thread last looked which are past.
    left: usize,
}

impl Queue {
    pub(crate) fn push(&mut self, range: RangeId, chunks: Vec<usize>, until: Until) {
        self.add(range, chunks, until, 0);
    }

    /// Adds what was freed of a range under its own lock.
    pub(crate) fn collect(
        &mut self,
        id: RangeId,
        freed: impl IntoIterator<Item = (Vec<usize>, Until)>,
    ) {
        for (chunks, until) in freed {
            self.push(id, chunks, until);
        }
    }

    /// A chunk that is being overwritten.
    pub(crate) fn push_scrub(&mut self, range: RangeId, first: usize, bytes: usize, until: Until) {
        self.add(range, vec![first], until, bytes);
    }

    fn add(&mut self, range: RangeId, chunks: Vec<usize>, until: Until, scrubbed_bytes: usize) {
        let id = self.next;
        self.next += 1;
        self.entries.push(Entry {
            id,
            range,
            chunks,
            until,
            scrubbed_bytes,
            followers: 0,
            followed: false,
        });
    }

    /// What is being overwritten, in bytes.
    pub(crate) fn scrubbing_bytes(&self) -> usize {
        self.entries.iter().map(|entry| entry.scrubbed_bytes).sum()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Every entry's number and condition, to be asked without the lock.
    pub(crate) fn conditions(&self) -> Vec<(u64, Until)> {
        let entries = self.entries.iter();
        entries
            .map(|entry| (entry.id, entry.until.clone()))
            .collect()
    }

    /// The first entry whose chunks come back when fences are past, of the ranges that are meant.
    pub(crate) fn first_fences(
        &self,
        is_meant: impl Fn(RangeId) -> bool,
    ) -> Option<(u64, Arc<Vec<Arc<Fence>>>)> {
        let mut entries = self.of(is_meant).filter(|entry| !entry.chunks.is_empty());
        entries.find_map(|entry| match &entry.until {
            Until::Fences(fences) => Some((entry.id, fences.clone())),
            Until::Synchronised => None,
        })
    }

    /// Numbers of the entries that need a context synchronise, of the ranges that are meant.
    pub(crate) fn unsynchronised(&self, is_meant: impl Fn(RangeId) -> bool) -> Vec<u64> {
        self.of(is_meant)
            .filter(|entry| matches!(entry.until, Until::Synchronised))
            .map(|entry| entry.id)
            .collect()
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter()
    }

    pub(crate) fn entries_mut(&mut self) -> impl Iterator<Item = &mut Entry> {
        self.entries.iter_mut()
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

    fn of(&self, is_meant: impl Fn(RangeId) -> bool) -> impl Iterator<Item = &Entry> {
        let entries = self.entries.iter();
        entries.filter(move |entry| is_meant(entry.range))
    }

    /// Makes entries wait for a context synchronise whose fences turned out to be captured. Returns
    /// the fences, to be dropped without the lock: that calls the driver.
    pub(crate) fn give_up_fences(&mut self, ids: &[u64]) -> Vec<Until> {
        let entries = self.entries.iter_mut();
        entries
            .filter(|entry| ids.contains(&entry.id))
            .map(|entry| core::mem::replace(&mut entry.until, Until::Synchronised))
            .collect()
    }

    /// Takes out the entries of these numbers, which rise.
    pub(crate) fn take(&mut self, ids: &[u64]) -> Vec<Entry> {
        self.entries
            .extract_if(.., |entry| ids.binary_search(&entry.id).is_ok())
            .collect()
    }
}
