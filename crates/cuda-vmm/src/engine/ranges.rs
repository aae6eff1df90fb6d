//! The ranges of an engine, each behind a lock of its own.
//!
//! The order of locks is the engine's, then one range's; nobody holds two ranges' at a time. Whoever makes or gives back
//! memory holds the engine's. What is there already is taken and freed under the range's lock alone, so models that do
//! so write to no cache line in common.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::range::{Range, Remains};
use crate::Result;
use crate::process::Process;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Apart, Arc, Mutex, MutexGuard, PoisonError};
use std::collections::BTreeMap;

/// Names a range of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct RangeId(u64);

/// A range by its name and by itself, for its pool.
#[derive(Debug, Clone)]
pub(crate) struct Handle {
    id: RangeId,
    process: Process,
    place: Arc<Apart<Place>>,
}

#[derive(Debug)]
struct Place {
    range: Mutex<Range>,
    /// Whether the range has something for a step to look after; changed under its lock, and asked without, as there may
    /// be many ranges.
    has_news: AtomicBool,
}

impl Handle {
    pub(crate) fn id(&self) -> RangeId {
        self.id
    }

    /// Fails in a forked process, where the lock may be held for good.
    pub(super) fn check_process(&self) -> Result<()> {
        self.process.check()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Range> {
        let range = self.place.range.lock();
        range.unwrap_or_else(PoisonError::into_inner)
    }

    /// Says whether the range has something for a step to look after, with its lock, after what may have changed that.
    pub(super) fn note(&self, range: &Range) {
        let has_news = range.has_news();
        if self.has_news() != has_news {
            self.place.has_news.store(has_news, Ordering::SeqCst);
        }
    }

    fn has_news(&self) -> bool {
        self.place.has_news.load(Ordering::SeqCst)
    }
}

/// The ranges that are open or still hold something, by name.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    by_id: BTreeMap<RangeId, Handle>,
    next: u64,
}

impl Ranges {
    pub(super) fn insert(&mut self, range: Range, process: Process) -> Handle {
        let id = RangeId(self.next);
        self.next += 1;
        let place = Arc::new(Apart(Place {
            range: Mutex::new(range),
            has_news: AtomicBool::new(false),
        }));
        let handle = Handle { id, process, place };
        self.by_id.insert(id, handle.clone());
        handle
    }

    /// Takes a range out that holds no memory any more. What is left of it is to be dropped without a lock: that calls
    /// the driver.
    pub(super) fn remove(&mut self, id: RangeId) -> Option<Remains> {
        let handle = self.by_id.remove(&id)?;
        let remains = handle.lock().end();
        Some(remains)
    }

    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(super) fn handle(&self, id: RangeId) -> Option<&Handle> {
        self.by_id.get(&id)
    }

    /// Locks one range.
    pub(super) fn get(&self, id: RangeId) -> Option<MutexGuard<'_, Range>> {
        self.by_id.get(&id).map(Handle::lock)
    }

    /// The ranges that have something for a step to look after.
    pub(super) fn with_news(&self) -> impl Iterator<Item = &Handle> {
        self.by_id.values().filter(|handle| handle.has_news())
    }

    /// Locks one range after the other, in the order in which they were made.
    pub(super) fn iter(&self) -> impl Iterator<Item = (RangeId, MutexGuard<'_, Range>)> {
        self.by_id.iter().map(|(id, handle)| (*id, handle.lock()))
    }

    /// As [`iter`](Self::iter), without the names.
    pub(super) fn values(&self) -> impl Iterator<Item = MutexGuard<'_, Range>> {
        self.by_id.values().map(Handle::lock)
    }
}
