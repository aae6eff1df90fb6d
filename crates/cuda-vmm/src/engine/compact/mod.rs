//! Returning slack: live pages of partly live chunks move to chunks that fit, at unchanged addresses.
//!
//! First the work on the range ends, and no capture may begin until all is done. Then one chunk
//! after another moves:
//!
//! ```text
//!  charge               for the live pages; without room for them the chunk stays
//!  create, map, copy    new memory at scratch addresses; wait for the copies
//!  unmap the scratch    then unmap the old memory, which still has the contents
//!  map, set access      the new memory in its place; release the old
//!
//!  a call fails         unmap and release the new memory, map the old one in its place again
//!  that fails too       the chunk is stranded: charged, counted as quarantined, retried
//! ```
//!
//! The old memory is the one copy that counts until all of the new is accessible. Bytes may be
//! freed meanwhile; a chunk that nobody uses retires when its move has ended.

mod relocation;
mod report;
mod stranded;

pub use report::CompactReport;
pub(super) use stranded::Relocations;

use super::books::move_plan::MovePlan;
use super::books::pages::PartlyLive;
use super::refused::Which;
use super::relief::Relief;
use super::retire::Until;
use super::users::Users;
use super::{AtWork, Inner, RangeId, State};
use crate::capture::CaptureGuard;
use crate::events::Entered;
use crate::sync::Arc;
use crate::{PhysicalMemory, Reservation, Result, Stream, VmmError};
use relocation::{Place, Relocation};

impl State {
    /// What can be moved of a range now, and what that would come to.
    fn plan(&self, id: RangeId) -> (MovePlan, CompactReport) {
        // What can be spared is given up for it.
        let stats = self.parts();
        let spare_bytes = stats.ahead_bytes + stats.cached_bytes + self.spare_parked_bytes();
        let Some(range) = self.ranges.get(id).filter(|range| !range.closed) else {
            return Default::default();
        };
        let parts = range.parts();
        let plan = if CaptureGuard::any() {
            MovePlan::default()
        } else {
            let room = self.ledger.room(range.account, None);
            let own_bytes = parts.ahead_bytes + range.spare_parked_bytes();
            let in_budget = room.free_bytes.saturating_add(spare_bytes);
            let below_ceiling = room.below_ceiling_bytes.saturating_add(own_bytes);
            let chunks = range.pages.partly_live();
            let chunks = chunks.filter(|chunk| !range.is_chunk_held(chunk.first));
            MovePlan::new(chunks, in_budget.min(below_ceiling))
        };
        let report = CompactReport {
            moved_bytes: plan.moved_bytes(),
            returned_bytes: plan.returned_bytes(),
            skipped_bytes: parts.slack_bytes - plan.returned_bytes(),
            chunks_before: range.pages.chunks(),
            chunks_after: range.pages.chunks() + plan.more_chunks(),
        };
        (plan, report)
    }
}

impl Inner {
    /// What [`compact`](Self::compact) would do now.
    pub(crate) fn compact_report(&self, id: RangeId) -> Result<CompactReport> {
        self.check_process()?;
        Ok(self.lock().plan(id).1)
    }

    /// Moves the live pages of partly live chunks of a range. The caller sees to it that nobody launches work on the
    /// range meanwhile.
    pub(crate) fn compact(self: &Arc<Self>, id: RangeId) -> Result<CompactReport> {
        self.check_process()?;
        let _span = Entered::new(|| tracing::debug_span!("compact"));
        self.retry(&Which::All);
        // Held to the end, so that no capture begins meanwhile.
        let no_capture = CaptureGuard::try_none();
        let (users, page_bytes, plan, mut report) = {
            let state = self.lock();
            let (users, page_bytes) = match state.ranges.get(id) {
                Some(range) if !range.closed => (range.users.clone(), range.page_bytes),
                _ => return Err(VmmError::Closed),
            };
            let (plan, report) = state.plan(id);
            (users, page_bytes, plan, report)
        };
        report.skipped_bytes += core::mem::take(&mut report.returned_bytes);
        report.moved_bytes = 0;
        report.chunks_after = report.chunks_before;
        if no_capture.is_none() || plan.moves.is_empty() {
            return Ok(report);
        }
        for stream in users.named() {
            if !stream.is_per_thread() && stream.is_capturing()? {
                return Ok(report);
            }
        }
        self.finish_work(&users)?;
        let stream = Stream::new(&self.device)?;
        let scratch = Reservation::with_alignment(&self.device, plan.scratch_bytes(), page_bytes)?;
        let scratch = Arc::new(scratch);
        let _work = AtWork::begin();
        for chunk in &plan.moves {
            if let Some(relocation) = self.depart(id, chunk.first, scratch.bytes())? {
                let moved_bytes = relocation.charged_bytes;
                report.returned_bytes += self.relocate(relocation, &scratch, &stream)?;
                report.moved_bytes += moved_bytes;
            }
        }
        let mut is_left = false;
        if let Some(range) = self.lock().ranges.get(id) {
            report.skipped_bytes = range.pages.parts().slack_bytes;
            report.chunks_after = range.pages.chunks();
            is_left = range.closed && !range.attended;
        }
        if is_left {
            self.go_on_closing();
        }
        Ok(report)
    }

    /// Waits for all work that can use a range. The caller has made sure that no capture is declared.
    fn finish_work(&self, users: &Users) -> Result<()> {
        match Until::now(&self.device, users) {
            Until::Fences(fences) => fences.iter().try_for_each(|fence| fence.wait()),
            Until::Synchronised => self.device.finish_work(users.are_all()),
        }
    }

    /// Charges for what the live pages of a chunk need, and takes the chunk out of the books to be moved. `None` if it
    /// is no longer to be moved, or if there is no room.
    fn depart(
        self: &Arc<Self>,
        id: RangeId,
        first: usize,
        bytes_max: usize,
    ) -> Result<Option<Relocation>> {
        let mut polled = false;
        // Why the driver would not take back what was given up for this.
        let mut refused = None;
        loop {
            let mut state = self.lock();
            let State {
                ledger,
                ranges,
                relocations,
                ..
            } = &mut *state;
            let mut range = ranges.get(id).ok_or(VmmError::Closed)?;
            let chunk = range.pages.partly_live_at(first);
            let fits = |chunk: &PartlyLive| chunk.live_bytes <= bytes_max;
            let Some(chunk) = chunk.filter(|chunk| fits(chunk) && !range.is_chunk_held(first))
            else {
                return Ok(None);
            };
            let reservation = range.reservation.clone().ok_or(VmmError::Closed)?;
            let Err(refusal) = ledger.charge(range.account, chunk.live_bytes, None) else {
                let place = Place {
                    range: id,
                    account: range.account,
                    reservation,
                    access: range.access.clone(),
                    page_bytes: range.page_bytes,
                };
                let mapping = range.pages.depart(first);
                return Ok(mapping.map(|mapping| {
                    relocations.begin(range.account, chunk.live_bytes);
                    Relocation::new(place, first, chunk.pieces, chunk.live_bytes, mapping)
                }));
            };
            drop(range);
            // At its own ceiling a range is helped by its own memory only.
            let only = (chunk.live_bytes > refusal.below_ceiling_bytes).then_some(id);
            if !polled {
                polled = true;
                drop(state);
                self.poll();
                continue;
            }
            match self.give_up_one(state, only) {
                None => return refused.map_or(Ok(None), Err),
                Some(Ok(_)) => {}
                Some(Err(error)) => refused = Some(error),
            }
        }
    }

    /// Moves one chunk, or puts it back; returns the bytes that this gave back.
    fn relocate(
        self: &Arc<Self>,
        mut relocation: Relocation,
        scratch: &Arc<Reservation>,
        stream: &Stream,
    ) -> Result<usize> {
        let id = relocation.place.range;
        let create = |bytes| self.create(id, bytes);
        if let Err(error) = relocation.forward(create, scratch, stream) {
            // What could not be put back is retried.
            let _ = self.put_back(relocation);
            return Err(error);
        }
        let charged_bytes = relocation.charged_bytes;
        let (account, first) = (relocation.place.account, relocation.first);
        let (chunks, old) = relocation.into_arrived();
        let old_bytes = old.bytes();
        let mut state = self.lock();
        let unused = (state.ranges.get(id))
            .map_or_else(Vec::new, |mut range| range.pages.arrive(first, chunks));
        state.relocations.end(account, charged_bytes);
        state.releasing.push((Some(account), old_bytes));
        self.retire(state, id, unused);
        if let Some(old) = Arc::into_inner(old) {
            self.release(Some(account), old)?;
        }
        Ok(old_bytes - charged_bytes)
    }

    /// Makes memory for which the budget has room. If the device has none, it is relieved and asked again.
    fn create(&self, id: RangeId, bytes: usize) -> Result<PhysicalMemory> {
        let mut relief = Relief::default();
        loop {
            match PhysicalMemory::new(&self.device, bytes) {
                Err(error) if error.is_out_of_memory() && relief.next(self, id, bytes) => {}
                outcome => return outcome,
            }
        }
    }
}
