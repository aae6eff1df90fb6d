//! Moves that were broken off: put back, or tried again later.

use super::at_work::AtWork;
use super::inner::Inner;
use super::relocation::Relocation;
use super::state::State;
use crate::Result;
use crate::sync::Arc;

impl Relocation {
    /// Ends a move that was broken off, or that is tried again: everything goes back to its place,
    /// as far as the driver lets it. The rest stays charged and is retried; then the error is the
    /// driver's.
    pub(crate) fn put_back(mut self, engine: &Arc<Inner>) -> Result<()> {
        let mut left = self.back();
        let error = left.error.take();
        let owner = self.site.owner;
        let (id, first) = (owner.range, self.first);
        let charged_bytes = self.charged_bytes;
        self.charged_bytes = self.new_bytes();
        let kept_bytes = self.charged_bytes + left.bytes();
        let mut state = engine.state.lock();
        state.relocations.end(owner, charged_bytes);
        state
            .ledger
            .refund(owner.account, charged_bytes - kept_bytes);
        let stuck = left.mapped.into_iter().map(|mapping| (owner, mapping));
        state.relocations.stuck.extend(stuck);
        let unreleased = left.unreleased.into_iter();
        state
            .unreleased
            .extend(unreleased.map(|memory| (Some(owner), memory)));
        let mut unused = Vec::new();
        // The range cannot have gone: it ends with its last chunk, and one moves.
        let State {
            ranges,
            relocations,
            ..
        } = &mut *state;
        if let Some(mut range) = ranges.get(id) {
            if let Some(mapping) = self.take_home() {
                // First, so that the memory is the mapping's alone.
                drop(self);
                unused = range.pages.come_back(first, mapping);
            } else {
                range.pages.strand(first);
                relocations.stranded.push(self);
            }
        }
        if let Some(shared) = state.shared.at((id, first)) {
            state.settle_shared(shared);
        }
        engine.retire(state, id, unused);
        match error {
            Some(error) => {
                engine.note_refusal(engine.state.lock(), Some(&error), kept_bytes);
                Err(error)
            }
            None => Ok(()),
        }
    }
}

/// Tries again to put one stranded chunk back in its place.
pub(crate) fn retry_stranded(engine: &Arc<Inner>) -> Result<usize> {
    let _work = AtWork::begin();
    let relocation = {
        let mut state = engine.state.lock();
        if state.relocations.stranded.is_empty() {
            return Ok(0);
        }
        let relocation = state.relocations.stranded.remove(0);
        let site = &relocation.site;
        (state.relocations).begin(site.owner, relocation.charged_bytes);
        if let Some(mut range) = state.ranges.get(site.owner.range) {
            range.pages.resume(relocation.first);
        }
        relocation
    };
    relocation.put_back(engine).map(|()| 0)
}

/// Tries again to unmap what a move has left at scratch addresses; returns the bytes that went to
/// the driver.
pub(crate) fn retry_stuck(engine: &Arc<Inner>) -> Result<usize> {
    let _work = AtWork::begin();
    let (owner, mapping) = {
        let mut state = engine.state.lock();
        if state.relocations.stuck.is_empty() {
            return Ok(0);
        }
        let (owner, mapping) = state.relocations.stuck.remove(0);
        state.begin_releasing(Some(owner), mapping.bytes());
        (owner, mapping)
    };
    let bytes = mapping.bytes();
    match mapping.unmap() {
        Ok(memory) => match Arc::into_inner(memory) {
            Some(memory) => engine.release(Some(owner), memory),
            None => Ok(0),
        },
        Err(failure) => {
            let mut state = engine.state.lock();
            state.end_releasing(Some(owner), bytes);
            state.relocations.stuck.push((owner, failure.object));
            engine.note_refusal(state, Some(&failure.error), bytes);
            Err(failure.error)
        }
    }
}
