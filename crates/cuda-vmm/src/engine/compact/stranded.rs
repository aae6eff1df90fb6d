//! What moves now, and what a move that was broken off has left.

use super::relocation::Relocation;
use crate::engine::books::ledger::AccountId;
use crate::engine::{AtWork, Inner, State, take_out};
use crate::sync::Arc;
use crate::{Device, Mapping, Result};

/// The books of an engine's relocations.
#[derive(Debug, Default)]
pub(crate) struct Relocations {
    /// Bytes that are charged for new memory of chunks that move now.
    moving: Vec<(AccountId, usize)>,
    /// Chunks that are neither moved nor in their place.
    stranded: Vec<Relocation>,
    /// Memory at scratch addresses that the driver would not unmap.
    stuck: Vec<(AccountId, Mapping)>,
}

impl Relocations {
    /// A chunk moves, and so many bytes are charged for that.
    pub(super) fn begin(&mut self, account: AccountId, charged_bytes: usize) {
        self.moving.push((account, charged_bytes));
    }

    /// It moves no more.
    pub(super) fn end(&mut self, account: AccountId, charged_bytes: usize) {
        take_out(&mut self.moving, account, charged_bytes);
    }

    /// Bytes held for chunks that move, of one account or of all.
    pub(crate) fn moving_bytes(&self, only: Option<AccountId>) -> usize {
        let moving = self.moving.iter();
        let moving = moving.filter(|(account, _)| only.is_none_or(|only| only == *account));
        moving.map(|(_, bytes)| bytes).sum()
    }

    /// Bytes that the driver would not take back, of one account or of all, beside the chunks themselves.
    pub(crate) fn quarantined_bytes(&self, only: Option<AccountId>) -> usize {
        let stranded = self.stranded.iter();
        let stranded =
            stranded.map(|relocation| (relocation.place.account, relocation.new_bytes()));
        let stuck = (self.stuck.iter()).map(|(account, mapping)| (*account, mapping.bytes()));
        let all = stranded.chain(stuck);
        let of_account = all.filter(|(account, _)| only.is_none_or(|only| only == *account));
        of_account.map(|(_, bytes)| bytes).sum()
    }

    /// How many chunks are stranded, and how many mappings are left at scratch addresses.
    pub(in crate::engine) fn left(&self) -> (usize, usize) {
        (self.stranded.len(), self.stuck.len())
    }

    /// Hands over what must not be unmapped yet to the device, at the end of the engine; all else is dropped.
    pub(crate) fn abandon(&mut self, device: &Device) {
        for relocation in core::mem::take(&mut self.stranded) {
            device.keep_unfinished(relocation.into_unfinished());
        }
    }
}

impl Inner {
    /// Ends a move that was broken off, or that is tried again: everything goes back where it was, so far as the
    /// driver lets it. The rest stays charged and is retried; then the error is the driver's.
    pub(super) fn put_back(self: &Arc<Self>, mut relocation: Relocation) -> Result<()> {
        let mut left = relocation.back();
        let error = left.error.take();
        let account = relocation.place.account;
        let (id, first) = (relocation.place.range, relocation.first);
        let charged_bytes = relocation.charged_bytes;
        relocation.charged_bytes = relocation.new_bytes();
        let kept_bytes = relocation.charged_bytes + left.bytes();
        let mut state = self.lock();
        state.relocations.end(account, charged_bytes);
        state.ledger.refund(account, charged_bytes - kept_bytes);
        let stuck = left.mapped.into_iter().map(|mapping| (account, mapping));
        state.relocations.stuck.extend(stuck);
        let unreleased = left.unreleased.into_iter();
        state
            .unreleased
            .extend(unreleased.map(|memory| (Some(account), memory)));
        let mut unused = Vec::new();
        // The range cannot have gone: it ends with its last chunk, and one moves.
        let State {
            ranges,
            relocations,
            ..
        } = &mut *state;
        if let Some(mut range) = ranges.get(id) {
            if let Some(mapping) = relocation.take_home() {
                // First, so that the memory is the mapping's alone.
                drop(relocation);
                unused = range.pages.come_back(first, mapping);
            } else {
                range.pages.strand(first);
                relocations.stranded.push(relocation);
            }
        }
        self.retire(state, id, unused);
        match error {
            Some(error) => {
                self.note_refusal(self.lock(), Some(&error), kept_bytes);
                Err(error)
            }
            None => Ok(()),
        }
    }

    /// Tries again to put one stranded chunk back in its place.
    pub(in crate::engine) fn retry_stranded(self: &Arc<Self>) -> Result<usize> {
        let _work = AtWork::begin();
        let relocation = {
            let mut state = self.lock();
            if state.relocations.stranded.is_empty() {
                return Ok(0);
            }
            let relocation = state.relocations.stranded.remove(0);
            let place = &relocation.place;
            (state.relocations).begin(place.account, relocation.charged_bytes);
            if let Some(mut range) = state.ranges.get(place.range) {
                range.pages.resume(relocation.first);
            }
            relocation
        };
        self.put_back(relocation).map(|()| 0)
    }

    /// Tries again to unmap what a move has left at scratch addresses; returns the bytes that went to the driver.
    pub(in crate::engine) fn retry_stuck(self: &Arc<Self>) -> Result<usize> {
        let _work = AtWork::begin();
        let (account, mapping) = {
            let mut state = self.lock();
            if state.relocations.stuck.is_empty() {
                return Ok(0);
            }
            let (account, mapping) = state.relocations.stuck.remove(0);
            state.releasing.push((Some(account), mapping.bytes()));
            (account, mapping)
        };
        let bytes = mapping.bytes();
        match mapping.unmap() {
            Ok(memory) => match Arc::into_inner(memory) {
                Some(memory) => self.release(Some(account), memory),
                None => Ok(0),
            },
            Err(failure) => {
                let mut state = self.lock();
                take_out(&mut state.releasing, Some(account), bytes);
                state.relocations.stuck.push((account, failure.object));
                self.note_refusal(state, Some(&failure.error), bytes);
                Err(failure.error)
            }
        }
    }
}
