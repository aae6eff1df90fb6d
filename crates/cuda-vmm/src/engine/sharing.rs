//! Chunks that several ranges of an account map.
//!
//! ```text
//!  share        under the engine's lock, some chunks at a time: the source's chunk is marked, the
//!               target's pages are taken, and both are noted as mappings of one shared chunk
//!  map          without a lock: the same handle at the target's addresses, accessible
//!  finish       the target's bytes are live
//!
//!  a call fails      what was mapped is unmapped again; the source's chunk is its own again
//!  bytes are freed   a chunk without live bytes in one range retires there behind that range's
//!                    fences, and is then unmapped and not parked: others read its memory
//!  one is left       the chunk is ordinary memory of the last range, which may park it
//!  none is left      the memory goes to the driver
//! ```
//!
//! So memory that was shared is used anew only when the users of all ranges that mapped it are
//! past. No call writes to it while it is shared: an allocation of bytes in it is refused, and
//! `make_private` gives a range memory of its own.

use super::at_work::AtWork;
use super::books::owner::Owner;
use super::books::shared_chunks::{Left, Place, SharedId};
use super::inner::Inner;
use super::state::State;
use crate::sync::Arc;
use crate::{Mapping, PhysicalMemory, Result};

impl State {
    /// A range maps a shared chunk no longer. Returns the memory, to be
    /// [released](Inner::release_shared), if no other does.
    pub(crate) fn end_sharing(&mut self, place: Place) -> Option<(Owner, PhysicalMemory)> {
        match self.shared.end(place)? {
            Left::Others(id) => {
                self.settle_shared(id);
                None
            }
            Left::Memory(account, memory) => {
                // No mapping holds it, so nothing does.
                let memory = Arc::into_inner(memory)?;
                let range = place.0;
                let owner = Owner { account, range };
                self.begin_releasing(Some(owner), memory.bytes());
                Some((owner, memory))
            }
        }
    }

    /// As [`end_sharing`](Self::end_sharing) for a mapping that has not come about; it may be
    /// stuck.
    pub(crate) fn undo_sharing(
        &mut self,
        place: Place,
        is_stuck: bool,
    ) -> Option<(Owner, PhysicalMemory)> {
        match is_stuck {
            false => self.end_sharing(place),
            true => {
                self.refuse_sharing(place);
                None
            }
        }
    }

    /// The driver refused to unmap a mapping of a shared chunk that is not used.
    fn refuse_sharing(&mut self, place: Place) {
        self.shared.refuse(place);
        if let Some(shared) = self.shared.at(place) {
            self.settle_shared(shared);
        }
    }

    /// A shared chunk that one range alone maps is shared no more, unless a thread has it in hand,
    /// which settles it then.
    pub(crate) fn settle_shared(&mut self, shared: SharedId) {
        let Some((id, first)) = self.shared.only_place(shared) else {
            return;
        };
        let Some(mut range) = self.ranges.get(id) else {
            return;
        };
        if range.pages.is_in_hand(first) {
            return;
        }
        range.set_shared(first, false);
        drop(range);
        // The range's mapping holds the memory too, so this calls no driver.
        drop(self.shared.forget(shared));
    }
}

impl Inner {
    /// Unmaps a mapping of a shared chunk, which a thread has taken out of the books; returns the
    /// bytes that went to the driver, if it was the last.
    pub(crate) fn unmap_shared(
        self: &Arc<Self>,
        place: Place,
        mapping: Mapping,
        work: AtWork,
    ) -> Result<usize> {
        let bytes = mapping.bytes();
        let unmapped = mapping.unmap().map(drop);
        let (id, first) = place;
        let mut state = self.state.lock();
        let Some(mut range) = state.ranges.get(id) else {
            return Ok(0);
        };
        match unmapped {
            Ok(()) => {
                range.pages.drained(first);
                drop(range);
                let released = state.end_sharing(place);
                drop(state);
                let outcome = self.release_shared(released);
                drop(work);
                outcome
            }
            Err(failure) => {
                range.pages.quarantine(first, failure.object);
                drop(range);
                state.refuse_sharing(place);
                drop(work);
                self.note_refusal(state, Some(&failure.error), bytes);
                Err(failure.error)
            }
        }
    }

    /// Releases the memory of a chunk that was shared, if there is any; returns its bytes.
    pub(crate) fn release_shared(
        self: &Arc<Self>,
        released: Option<(Owner, PhysicalMemory)>,
    ) -> Result<usize> {
        match released {
            Some((owner, memory)) => self.release(Some(owner), memory),
            None => Ok(0),
        }
    }
}
