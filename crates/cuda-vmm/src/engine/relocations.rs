//! The chunks of an engine that move now, and what moves that were broken off have left.

use super::books::ledger::AccountId;
use super::relocation::Relocation;
use crate::{Device, Mapping};

/// The books of an engine's relocations.
#[derive(Debug, Default)]
pub(crate) struct Relocations {
    /// Bytes that are charged for new memory of chunks that move now.
    moving: Vec<(AccountId, usize)>,
    /// Chunks that are neither moved nor in their place.
    pub(crate) stranded: Vec<Relocation>,
    /// Memory at scratch addresses that the driver would not unmap.
    pub(crate) stuck: Vec<(AccountId, Mapping)>,
}

impl Relocations {
    /// Notes that a chunk moves, and the bytes that are charged for that.
    pub(crate) fn begin(&mut self, account: AccountId, charged_bytes: usize) {
        self.moving.push((account, charged_bytes));
    }

    /// It moves no more.
    pub(crate) fn end(&mut self, account: AccountId, charged_bytes: usize) {
        let mut moving = self.moving.iter();
        let at = moving.position(|moves| *moves == (account, charged_bytes));
        at.map(|at| self.moving.swap_remove(at));
    }

    /// Bytes held for chunks that move, of one account or of all.
    pub(crate) fn moving_bytes(&self, only: Option<AccountId>) -> usize {
        let moving = self.moving.iter();
        let moving = moving.filter(|(account, _)| only.is_none_or(|only| only == *account));
        moving.map(|(_, bytes)| bytes).sum()
    }

    /// Bytes that the driver would not take back, of one account or of all, beside the chunks
    /// themselves.
    pub(crate) fn quarantined_bytes(&self, only: Option<AccountId>) -> usize {
        let stranded = self.stranded.iter();
        let stranded = stranded.map(|relocation| (relocation.site.account, relocation.new_bytes()));
        let stuck = (self.stuck.iter()).map(|(account, mapping)| (*account, mapping.bytes()));
        let all = stranded.chain(stuck);
        let of_account = all.filter(|(account, _)| only.is_none_or(|only| only == *account));
        of_account.map(|(_, bytes)| bytes).sum()
    }

    /// How many chunks are stranded, and how many mappings are left at scratch addresses.
    pub(crate) fn left(&self) -> (usize, usize) {
        (self.stranded.len(), self.stuck.len())
    }

    /// Hands over what must not be unmapped yet to the device, at the end of the engine; all else
    /// is dropped.
    pub(crate) fn abandon(&mut self, device: &Device) {
        for relocation in core::mem::take(&mut self.stranded) {
            device.keep_unfinished(relocation.into_unfinished());
        }
    }
}
