//! Chunks that several ranges of an account map: one physical handle at several addresses, counted
//! once.
//!
//! The books of pages know that a chunk is shared, and count it in no part of their range. Here is
//! which mappings there are of it, and what it is for its account:
//!
//! ```text
//! some range uses it ─────── shared
//! none does, all retire ──── retiring: it comes back when the last of them is unmapped
//! none does, one is stuck ── quarantined
//! one mapping is left ────── it is shared no more, and in the books of that range alone
//! ```

use super::account::AccountId;
use super::range_id::RangeId;
use crate::MemoryParts;
use std::collections::{BTreeMap, BTreeSet};

/// Names a shared chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SharedId(u64);

/// The range of a mapping, and its first page there.
pub(crate) type Place = (RangeId, usize);

/// One mapping of a shared chunk.
#[derive(Debug, Clone, Copy)]
struct SharedMapping {
    place: Place,
    /// Whether its range has live bytes in it, or a pin keeps it.
    is_used: bool,
    /// Whether the driver refused to unmap it.
    is_stuck: bool,
}

#[derive(Debug)]
struct SharedChunk<M> {
    account: AccountId,
    bytes: usize,
    /// Kept here too, so that no mapping is the last to hold it.
    memory: M,
    mappings: Vec<SharedMapping>,
}

impl<M> SharedChunk<M> {
    /// What it is for its account.
    fn parts(&self) -> MemoryParts {
        let any = |is: fn(&SharedMapping) -> bool| self.mappings.iter().any(is);
        let mut parts = MemoryParts::default();
        if any(|mapping| mapping.is_used) {
            parts.shared_bytes = self.bytes;
        } else if any(|mapping| mapping.is_stuck) {
            parts.quarantined_bytes = self.bytes;
        } else {
            parts.retiring_bytes = self.bytes;
        }
        parts
    }
}

/// What is left of a shared chunk when a mapping of it has ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Left<M> {
    /// Other mappings.
    Others(SharedId),
    /// Its memory alone, of this account.
    Memory(AccountId, M),
}

/// The shared chunks of an engine, each with the payload `M`: its memory, or a number in tests.
#[derive(Debug)]
pub(crate) struct SharedChunks<M> {
    chunks: BTreeMap<SharedId, SharedChunk<M>>,
    by_place: BTreeMap<Place, SharedId>,
    /// What they are, and what those of each account are.
    parts: MemoryParts,
    by_account: BTreeMap<AccountId, MemoryParts>,
    /// Accounts whose sums have changed since that was asked.
    changed: BTreeSet<AccountId>,
    next: u64,
}

impl<M> Default for SharedChunks<M> {
    fn default() -> Self {
        Self {
            chunks: BTreeMap::new(),
            by_place: BTreeMap::new(),
            parts: MemoryParts::default(),
            by_account: BTreeMap::new(),
            changed: BTreeSet::new(),
            next: 0,
        }
    }
}

impl<M> SharedChunks<M> {
    /// What all of them are.
    pub(crate) fn parts(&self) -> MemoryParts {
        self.parts
    }

    /// What those of an account are.
    pub(crate) fn of_account(&self, account: AccountId) -> MemoryParts {
        self.by_account.get(&account).copied().unwrap_or_default()
    }

    /// The accounts whose sums have changed since this was asked.
    pub(crate) fn take_changed(&mut self) -> BTreeSet<AccountId> {
        core::mem::take(&mut self.changed)
    }

    /// The shared chunk that is mapped at a place.
    pub(crate) fn at(&self, place: Place) -> Option<SharedId> {
        self.by_place.get(&place).copied()
    }

    /// A chunk that one range maps is to be mapped by others too. That range uses it.
    pub(crate) fn share(
        &mut self,
        account: AccountId,
        bytes: usize,
        place: Place,
        memory: M,
    ) -> SharedId {
        let id = SharedId(self.next);
        self.next += 1;
        let chunk = SharedChunk {
            account,
            bytes,
            memory,
            mappings: Vec::new(),
        };
        self.count(account, MemoryParts::default(), chunk.parts());
        self.chunks.insert(id, chunk);
        self.add(id, place);
        id
    }

    /// Another range maps the chunk, or is about to, and uses it.
    pub(crate) fn add(&mut self, id: SharedId, place: Place) {
        let before = self.by_place.insert(place, id);
        debug_assert!(before.is_none(), "two chunks at {place:?}");
        let mapping = SharedMapping {
            place,
            is_used: true,
            is_stuck: false,
        };
        self.change(id, |mappings| mappings.push(mapping));
    }

    /// The range of a mapping has no live byte in it any more. Nothing, if no shared chunk is
    /// mapped there.
    pub(crate) fn retire(&mut self, place: Place) {
        self.change_at(place, |mapping| mapping.is_used = false);
    }

    /// The driver refused to unmap a mapping that is not used.
    pub(crate) fn refuse(&mut self, place: Place) {
        self.change_at(place, |mapping| {
            (mapping.is_used, mapping.is_stuck) = (false, true);
        });
    }

    /// A mapping has ended, or has not come about. `None` if there was none at the place.
    pub(crate) fn end(&mut self, place: Place) -> Option<Left<M>> {
        let id = self.by_place.remove(&place)?;
        self.change(id, |mappings| {
            mappings.retain(|mapping| mapping.place != place);
        });
        let chunk = self.chunks.get(&id)?;
        if !chunk.mappings.is_empty() {
            return Some(Left::Others(id));
        }
        let account = chunk.account;
        self.forget(id).map(|memory| Left::Memory(account, memory))
    }

    /// The place of the only mapping that is left.
    pub(crate) fn only_place(&self, id: SharedId) -> Option<Place> {
        match &self.chunks.get(&id)?.mappings[..] {
            [only] => Some(only.place),
            _ => None,
        }
    }

    /// The chunk is shared no more. Returns its memory, which the range of its only mapping has
    /// too.
    pub(crate) fn forget(&mut self, id: SharedId) -> Option<M> {
        let chunk = self.chunks.remove(&id)?;
        for mapping in &chunk.mappings {
            self.by_place.remove(&mapping.place);
        }
        self.count(chunk.account, chunk.parts(), MemoryParts::default());
        Some(chunk.memory)
    }

    fn change_at(&mut self, place: Place, change: impl FnOnce(&mut SharedMapping)) {
        let Some(id) = self.at(place) else {
            return;
        };
        self.change(id, |mappings| {
            let mut at = mappings.iter_mut();
            at.find(|mapping| mapping.place == place).map(change);
        });
    }

    /// Changes the mappings of a chunk, and counts it as what it is then.
    fn change(&mut self, id: SharedId, change: impl FnOnce(&mut Vec<SharedMapping>)) {
        let Some(chunk) = self.chunks.get_mut(&id) else {
            return;
        };
        let (account, before) = (chunk.account, chunk.parts());
        change(&mut chunk.mappings);
        let after = chunk.parts();
        self.count(account, before, after);
    }

    fn count(&mut self, account: AccountId, before: MemoryParts, after: MemoryParts) {
        if before == after {
            return;
        }
        self.parts = self.parts - before + after;
        let own = self.by_account.entry(account).or_default();
        *own = *own - before + after;
        if *own == MemoryParts::default() {
            self.by_account.remove(&account);
        }
        self.changed.insert(account);
    }
}

#[cfg(test)]
mod tests;
