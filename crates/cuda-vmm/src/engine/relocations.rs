//! The chunks of an engine that move now, and what moves that were broken off have left.

use super::books::owner::Owner;
use super::relocation::Relocation;
use crate::{Device, Mapping};

/// The books of an engine's relocations.
#[derive(Debug, Default)]
pub(crate) struct Relocations {
    /// Bytes that are charged for new memory of chunks that move now.
    moving: Vec<(Owner, usize)>,
    /// Chunks that are neither moved nor in their place.
    pub(crate) stranded: Vec<Relocation>,
    /// Memory at scratch addresses that the driver would not unmap.
    pub(crate) stuck: Vec<(Owner, Mapping)>,
}

impl Relocations {
    /// Notes that a chunk moves, and the bytes that are charged for that.
    pub(crate) fn begin(&mut self, owner: Owner, charged_bytes: usize) {
        self.moving.push((owner, charged_bytes));
    }

    /// It moves no more.
    pub(crate) fn end(&mut self, owner: Owner, charged_bytes: usize) {
        let mut moving = self.moving.iter();
        let at = moving.position(|moves| *moves == (owner, charged_bytes));
        at.map(|at| self.moving.swap_remove(at));
    }

    /// Bytes held for chunks that move, of the owners that are meant.
    pub(crate) fn moving_bytes(&self, is_meant: impl Fn(&Owner) -> bool) -> usize {
        let moving = self.moving.iter().filter(|(owner, _)| is_meant(owner));
        moving.map(|(_, bytes)| bytes).sum()
    }

    /// Bytes that the driver would not take back, of the owners that are meant, beside the chunks
    /// themselves.
    pub(crate) fn quarantined_bytes(&self, is_meant: impl Fn(&Owner) -> bool) -> usize {
        let stranded = self.stranded.iter();
        let stranded = stranded.map(|relocation| (relocation.site.owner, relocation.new_bytes()));
        let stuck = (self.stuck.iter()).map(|(owner, mapping)| (*owner, mapping.bytes()));
        let meant = stranded.chain(stuck).filter(|(owner, _)| is_meant(owner));
        meant.map(|(_, bytes)| bytes).sum()
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
