//! Moving live pages of a range to other memory, at unchanged addresses: what a compaction and the
//! end of sharing have in common.

use super::books::pages::relocation::PartlyLive;
use super::books::range_id::RangeId;
use super::inner::Inner;
use super::queue::Until;
use super::relief::Relief;
use super::relocation::{Relocation, Site};
use super::state::State;
use super::users::Users;
use crate::capture::NoCapture;
use crate::sync::Arc;
use crate::{Device, PhysicalMemory, Reservation, Result, Stream};

/// What the moves of one call share.
pub(crate) struct Mover<'a> {
    pub(crate) engine: &'a Arc<Inner>,
    pub(crate) range: RangeId,
    /// Where copies are made.
    stream: Stream,
    scratch: Arc<Reservation>,
}

/// Whether chunks of a range may be moved now: no capture is declared, and none of its streams is
/// captured.
pub(crate) fn may_move(no_capture: Option<&NoCapture>, users: &Users) -> Result<bool> {
    if no_capture.is_none() {
        return Ok(false);
    }
    for stream in users.named() {
        if !stream.is_per_thread() && stream.is_capturing()? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Waits for all work that can use a range. The caller has made sure that no capture is declared.
pub(crate) fn finish_work(engine: &Inner, users: &Users) -> Result<()> {
    match Until::now(&engine.device, users) {
        Until::Fences(fences) => fences.iter().try_for_each(|fence| fence.wait()),
        Until::Synchronised => engine.device.finish_work(users.are_all()),
    }
}

impl State {
    /// Takes a chunk out of the books to be moved, for whose live pages the account is charged.
    pub(crate) fn begin_move(&mut self, id: RangeId, chunk: PartlyLive) -> Option<Relocation> {
        let mut range = self.ranges.get(id)?;
        let site = Site {
            owner: range.owner(id),
            target: range.target()?,
        };
        let mapping = range.pages.depart(chunk.first)?;
        let charged_bytes = chunk.live_page_bytes;
        self.relocations.begin(site.owner, charged_bytes);
        let (first, pieces) = (chunk.first, chunk.pieces);
        Some(Relocation::new(site, first, pieces, charged_bytes, mapping))
    }
}

impl<'a> Mover<'a> {
    /// For moves of a range with these pages, of at most `scratch_bytes` each.
    pub(crate) fn new(
        engine: &'a Arc<Inner>,
        (range, page_bytes): (RangeId, usize),
        scratch_bytes: usize,
    ) -> Result<Self> {
        let device: &Device = &engine.device;
        let stream = Stream::new(device)?;
        let scratch = Reservation::with_alignment(device, scratch_bytes, page_bytes)?;
        Ok(Self {
            engine,
            range,
            stream,
            scratch: Arc::new(scratch),
        })
    }

    /// The most that one move may copy, in bytes.
    pub(crate) fn scratch_bytes(&self) -> usize {
        self.scratch.bytes()
    }

    /// Moves one chunk, or puts it back; returns the bytes that this gave back.
    pub(crate) fn relocate(&self, mut relocation: Relocation) -> Result<usize> {
        let engine = self.engine;
        let create = |bytes| self.create(bytes);
        if let Err(error) = relocation.forward(create, &self.scratch, &self.stream) {
            // What could not be put back is retried.
            let _ = relocation.put_back(engine);
            return Err(error);
        }
        let charged_bytes = relocation.charged_bytes;
        let (owner, first) = (relocation.site.owner, relocation.first);
        let (chunks, old) = relocation.into_arrived();
        let old_bytes = old.bytes();
        let mut state = engine.state.lock();
        let unused = (state.ranges.get(self.range))
            .map_or_else(Vec::new, |mut range| range.arrive(first, chunks));
        state.relocations.end(owner, charged_bytes);
        if state.shared.at((self.range, first)).is_some() {
            // The old memory is others' too, and the books of shared chunks hold it.
            drop(old);
            let released = state.end_sharing((self.range, first));
            engine.retire(state, self.range, unused);
            engine.release_shared(released)?;
            return Ok(0);
        }
        state.begin_releasing(Some(owner), old_bytes);
        engine.retire(state, self.range, unused);
        if let Some(old) = Arc::into_inner(old) {
            engine.release(Some(owner), old)?;
        }
        Ok(old_bytes - charged_bytes)
    }

    /// Makes memory for which the budget has room. If the device has none, it is relieved and asked
    /// again.
    fn create(&self, bytes: usize) -> Result<PhysicalMemory> {
        let mut relief = Relief::default();
        loop {
            match PhysicalMemory::new(&self.engine.device, bytes) {
                Err(error)
                    if error.is_out_of_memory()
                        && relief.next(self.engine, &[self.range], bytes) => {}
                outcome => return outcome,
            }
        }
    }
}
