//! Giving a range memory of its own in the place of shared chunks, at unchanged addresses.
//!
//! It is a move as a compaction makes it (`compact`), of chunks that are shared. The old memory
//! stays with the others.

use super::at_work::AtWork;
use super::books::pages::relocation::PartlyLive;
use super::handle::RangeHandle;
use super::moving::{Mover, finish_work, may_move};
use super::range::Range;
use super::range::leases::Asker;
use super::relocation::Relocation;
use super::retry::Which;
use super::scope::Scope;
use super::shortage::Shortage;
use crate::capture::CaptureGuard;
use crate::size::Extent;
use crate::{Result, VmmError};
use core::ops;

impl Range {
    /// The shared chunks behind these bytes that have live pages.
    fn to_make_private(&self, bytes: &ops::Range<usize>) -> Vec<PartlyLive> {
        let chunks = self.pages.shared_chunks(bytes);
        let chunks = chunks.filter_map(|pages| self.pages.to_make_private(pages.start));
        chunks.collect()
    }

    /// What keeps the chunk that begins at this page in its place, if anything does.
    fn keeper(&self, first: usize) -> Option<&'static str> {
        match (self.is_chunk_held(first), self.is_chunk_pinned(first)) {
            (false, _) => None,
            (true, true) => Some("a pin"),
            (true, false) => Some("a lease"),
        }
    }
}

impl RangeHandle {
    /// Whether some of the bytes lie in a shared chunk; false if the range was closed.
    pub(crate) fn is_shared(&self, offset: usize, bytes: usize) -> bool {
        let bytes = offset..offset.saturating_add(bytes);
        let range = self.slot.lock_open();
        range.is_ok_and(|range| range.pages.shared_chunks(&bytes).next().is_some())
    }

    /// Gives the range memory of its own for the live pages of the shared chunks behind these
    /// bytes; returns their bytes. The caller makes sure that no work is launched on the range
    /// meanwhile.
    pub(crate) fn make_private(&self, offset: usize, bytes: usize) -> Result<usize> {
        let engine = self.engine().open()?;
        let capacity_bytes = self.slot.lock_open()?.capacity_bytes;
        let extent = Extent::new(offset, bytes, capacity_bytes)?;
        let pages = extent.pages(self.page_bytes());
        engine.retry(&Which::At(self.id(), pages));
        // Held to the end, so that no capture begins meanwhile.
        let no_capture = CaptureGuard::try_none();
        let mut range = self.slot.lock_open()?;
        range.check_awake()?;
        let mut chunks = range.to_make_private(&extent.range());
        if !range.leases.is_empty() && !chunks.is_empty() {
            let parts: Vec<_> = (chunks.iter())
                .map(|chunk| (chunk.first, range.pages.chunk_bytes(chunk.first)))
                .map(|(first, bytes)| (first * range.page_bytes, bytes))
                .collect();
            drop(range);
            self.slot.ask_tokens(Asker::Waiting, Some(&parts));
            range = self.slot.lock_open()?;
            chunks = range.to_make_private(&extent.range());
        }
        let users = range.users.clone();
        let mut keepers = chunks.iter().filter_map(|chunk| range.keeper(chunk.first));
        let keeper = keepers.next();
        drop(range);
        let kept = |by| Err(VmmError::KeptShared { offset, bytes, by });
        let Some(scratch_bytes) = chunks.iter().map(|chunk| chunk.live_page_bytes).max() else {
            return Ok(0);
        };
        if let Some(by) = keeper {
            return kept(by);
        }
        if !may_move(no_capture.as_ref(), &users)? {
            return kept("a capture");
        }
        finish_work(engine, &users)?;
        let mover = Mover::new(engine, (self.id(), self.page_bytes()), scratch_bytes)?;
        let work = AtWork::begin();
        let moved = mover.make_private(&extent);
        let state = engine.state.lock();
        let is_left = (state.ranges.get(self.id())).is_some_and(|range| range.is_left());
        drop(state);
        if is_left {
            engine.go_on_closing();
        }
        drop(work);
        moved
    }
}

impl Mover<'_> {
    /// Moves the shared chunks behind these bytes, if there is room for all of them; returns the
    /// bytes of their live pages.
    fn make_private(&self, extent: &Extent) -> Result<usize> {
        let mut moved_bytes = 0;
        let mut relocations = self.depart_shared(extent)?.into_iter();
        while let Some(relocation) = relocations.next() {
            let bytes = relocation.charged_bytes;
            if let Err(error) = self.relocate(relocation) {
                for relocation in relocations {
                    // They are in their places still.
                    let _ = relocation.put_back(self.engine);
                }
                return Err(error);
            }
            moved_bytes += bytes;
        }
        Ok(moved_bytes)
    }

    /// Charges for the live pages of all chunks that are to be moved, and takes them out of the
    /// books.
    fn depart_shared(&self, extent: &Extent) -> Result<Vec<Relocation>> {
        let (engine, id) = (self.engine, self.range);
        let Extent { offset, bytes } = *extent;
        let mut shortage = Shortage::default();
        loop {
            let mut state = engine.state.lock();
            let range = state.ranges.get(id).ok_or(VmmError::Closed)?;
            let mut chunks = range.to_make_private(&extent.range());
            // Others were made to share meanwhile, which the caller may do itself.
            chunks.retain(|chunk| chunk.live_page_bytes <= self.scratch_bytes());
            let mut keepers = chunks.iter().filter_map(|chunk| range.keeper(chunk.first));
            if let Some(by) = keepers.next() {
                return Err(VmmError::KeptShared { offset, bytes, by });
            }
            let account = range.account;
            drop(range);
            let need_bytes: usize = chunks.iter().map(|chunk| chunk.live_page_bytes).sum();
            if need_bytes == 0 {
                return Ok(Vec::new());
            }
            let Err(refusal) = state.ledger.charge(account, need_bytes, None) else {
                let moves = chunks.into_iter();
                return Ok(moves
                    .filter_map(|chunk| state.begin_move(id, chunk))
                    .collect());
            };
            // At its own ceiling an account is helped by its own memory only.
            let scope = match need_bytes > refusal.below_ceiling_bytes {
                true => Scope::Account(account),
                false => Scope::All,
            };
            let error = state.quietly().out_of_memory(need_bytes, &refusal);
            if shortage.relieve(engine, state, scope).is_some() {
                return Err(shortage.error_or(error));
            }
        }
    }
}
