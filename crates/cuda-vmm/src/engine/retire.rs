//! Chunks that wait until the device has finished with them.

use super::RangeId;
use crate::{CaptureGuard, Device, Fence, Result, Stream};
use std::sync::Arc;

/// What must be past before a chunk may be unmapped.
#[derive(Debug, Clone)]
pub(super) enum Until {
    /// These fences.
    Fences(Arc<Vec<Fence>>),
    /// A context synchronise that begins from now on.
    Synchronised,
}

impl Until {
    /// The end of everything that can use the range now: the work queued on the streams that were named
    /// for it, or, where none was, all work of the context. Queues at most one event for each stream and
    /// waits for nothing. Where no fence can be had, a context synchronise later is as good.
    pub(super) fn now(device: &Device, streams: &[Stream]) -> Self {
        let fences: Result<Vec<_>> = if streams.is_empty() {
            match CaptureGuard::try_none().map(|none| Fence::on_context(device, &none)) {
                Some(Ok(Some(fence))) => Ok(vec![fence]),
                Some(Err(error)) => Err(error),
                Some(Ok(None)) | None => return Self::Synchronised,
            }
        } else {
            streams.iter().map(Stream::record).collect()
        };
        fences.map_or(Self::Synchronised, |fences| Self::Fences(Arc::new(fences)))
    }

    /// Whether it is past, as far as can be told without waiting.
    ///
    /// On a poisoned context nothing runs any more, so everything is past.
    pub(super) fn is_past(&self) -> Result<bool> {
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
pub(super) struct Entry {
    pub(super) id: u64,
    pub(super) range: RangeId,
    /// First pages.
    pub(super) chunks: Vec<usize>,
    pub(super) until: Until,
}

/// Entries in the order in which they were made.
#[derive(Debug, Default)]
pub(super) struct Queue {
    entries: Vec<Entry>,
    next: u64,
}

impl Queue {
    pub(super) fn push(&mut self, range: RangeId, chunks: Vec<usize>, until: Until) {
        let id = self.next;
        self.next += 1;
        self.entries.push(Entry {
            id,
            range,
            chunks,
            until,
        });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Every entry's number and condition, to be asked without the lock.
    pub(super) fn conditions(&self) -> Vec<(u64, Until)> {
        let entries = self.entries.iter();
        entries
            .map(|entry| (entry.id, entry.until.clone()))
            .collect()
    }

    /// Numbers of the entries that need a context synchronise.
    pub(super) fn unsynchronised(&self) -> Vec<u64> {
        let entries = self.entries.iter();
        entries
            .filter(|entry| matches!(entry.until, Until::Synchronised))
            .map(|entry| entry.id)
            .collect()
    }

    /// Takes out the entries of these numbers, which rise.
    pub(super) fn take(&mut self, ids: &[u64]) -> Vec<Entry> {
        self.entries
            .extract_if(.., |entry| ids.binary_search(&entry.id).is_ok())
            .collect()
    }
}
