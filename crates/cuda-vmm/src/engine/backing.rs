//! Backing pages: charge for them, create, map, set access, and undo it all if one call fails.

use super::books::account::AccountId;
use super::books::ledger::Refusal;
use super::books::owner::Owner;
use super::books::pressure::Ticket;
use super::changes::Locked;
use super::state::State;
use super::target::Target;
use crate::mapping::MapFailure;
use crate::sync::Arc;
use crate::{Mapping, PhysicalMemory, Result, VmmError};
use core::ops;

/// Memory from the cache, for chunks to be made.
pub(crate) type Supply = Vec<PhysicalMemory>;

/// Why a chunk could not be made, and what is left of it.
pub(crate) struct Failure {
    pub(crate) error: VmmError,
    pub(crate) left: Left,
}

/// What was undone of chunks that have no use, and what of them could not be undone.
#[derive(Default)]
pub(crate) struct Left {
    pub(crate) still_mapped: Vec<(ops::Range<usize>, Mapping)>,
    unreleased: Vec<PhysicalMemory>,
    /// What came from the cache.
    pub(crate) cached: Vec<PhysicalMemory>,
}

/// A chunk that was made.
pub(crate) struct Made {
    pub(crate) pages: ops::Range<usize>,
    pub(crate) mapping: Mapping,
    /// Whether its memory came from the cache.
    from_cache: bool,
}

impl Locked<'_> {
    /// Charges an account for chunks of these sizes, of `need_bytes` bytes together, in its turn,
    /// and takes from the cache what serves them. A refusal changes nothing, so it wakes no thread.
    pub(crate) fn charge(
        &mut self,
        account: AccountId,
        need_bytes: usize,
        chunks: impl Iterator<Item = usize>,
        ticket: Option<Ticket>,
    ) -> Result<Supply, Refusal> {
        let state = self.quietly();
        let State { ledger, cache, .. } = &mut *state;
        let mut supply = Supply::new();
        let cached_bytes = cache.bytes();
        let room_bytes = || ledger.room(account, ticket).free_bytes;
        // Otherwise the cache cannot help, and no chunk has to be looked at.
        if cached_bytes > 0 && need_bytes <= room_bytes().saturating_add(cached_bytes) {
            supply.extend(chunks.filter_map(|bytes| cache.take(bytes)));
        }
        ledger.take_from_cache(supply.iter().map(PhysicalMemory::bytes).sum());
        match ledger.charge(account, need_bytes, ticket) {
            Ok(()) => {
                self.note_change();
                Ok(supply)
            }
            Err(refusal) => {
                state.restock(supply.into_iter().rev());
                Err(refusal)
            }
        }
    }
}

impl State {
    /// Refunds the charge for what was not made, except for what is still mapped and what the
    /// driver would not release.
    pub(crate) fn settle(
        &mut self,
        owner: Owner,
        charged_bytes: usize,
        mapped_bytes: usize,
        left: &mut Left,
    ) {
        let unreleased = left.unreleased.iter().map(PhysicalMemory::bytes);
        let kept_bytes = mapped_bytes + unreleased.sum::<usize>();
        self.ledger
            .refund(owner.account, charged_bytes - kept_bytes);
        let unreleased = left.unreleased.drain(..);
        self.unreleased
            .extend(unreleased.map(|memory| (Some(owner), memory)));
        self.restock(left.cached.drain(..));
    }

    /// Puts back what was taken from the cache.
    pub(crate) fn restock(&mut self, supply: impl IntoIterator<Item = PhysicalMemory>) {
        for memory in supply {
            self.ledger.restock(memory.bytes());
            self.cache.put(memory.bytes(), memory);
        }
    }
}

impl Failure {
    fn new(error: VmmError) -> Self {
        let left = Left::default();
        Self { error, left }
    }
}

impl Left {
    /// Whether nothing is left that the driver would not undo.
    pub(crate) fn is_clean(&self) -> bool {
        self.still_mapped.is_empty() && self.unreleased.is_empty()
    }

    /// Undoes chunks, the last one first, or keeps what cannot be undone.
    pub(crate) fn undo(&mut self, made: Vec<Made>) {
        for made in made.into_iter().rev() {
            match made.mapping.unmap() {
                Ok(memory) => self.release(memory, made.from_cache),
                Err(failure) => self.still_mapped.push((made.pages, failure.object)),
            }
        }
    }

    fn release(&mut self, memory: Arc<PhysicalMemory>, from_cache: bool) {
        match Arc::into_inner(memory) {
            Some(memory) if from_cache => self.cached.push(memory),
            Some(memory) => {
                let stuck = memory.close().err();
                self.unreleased.extend(stuck.map(|failure| failure.object));
            }
            None => {}
        }
    }
}

impl Target {
    /// Makes one chunk, of memory from the supply if some fits. `before` is called before the calls
    /// of the driver that take long.
    pub(crate) fn make(
        &self,
        pages: &ops::Range<usize>,
        supply: &mut Supply,
        before: impl Fn(),
    ) -> Result<Made, Failure> {
        let bytes = pages.len() * self.page_bytes;
        let fitting = supply.iter().position(|memory| memory.bytes() == bytes);
        let from_cache = fitting.is_some();
        let memory = match fitting {
            Some(at) => Ok(supply.swap_remove(at)),
            None => {
                before();
                PhysicalMemory::new(self.reservation.device(), bytes)
            }
        };
        before();
        let memory = memory.map(Arc::new).map_err(Failure::new)?;
        match self.map(pages.start, &memory) {
            Ok(mapping) => Ok(Made {
                pages: pages.clone(),
                mapping,
                from_cache,
            }),
            Err(MapFailure { error, stuck }) => {
                let mut failure = Failure::new(error);
                match stuck {
                    Some(mapping) => {
                        drop(memory);
                        failure.left.still_mapped.push((pages.clone(), mapping));
                    }
                    None => failure.left.release(memory, from_cache),
                }
                Err(failure)
            }
        }
    }
}
