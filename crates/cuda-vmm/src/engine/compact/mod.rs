//! Returning slack: live pages of partly live chunks move to chunks that fit, at unchanged
//! addresses.
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
//! freed meanwhile; a chunk without live bytes retires when its move has ended.

mod report;

pub use report::CompactReport;

use super::at_work::AtWork;
use super::books::move_plan::MovePlan;
use super::books::pages::relocation::PartlyLive;
use super::books::range_id::RangeId;
use super::handle::RangeHandle;
use super::inner::Inner;
use super::queue::Until;
use super::relief::Relief;
use super::relocation::{Relocation, Site};
use super::retry::Which;
use super::scope::Scope;
use super::shortage::Shortage;
use super::state::State;
use super::users::Users;
use crate::capture::{CaptureGuard, NoCapture};
use crate::events::Entered;
use crate::sync::Arc;
use crate::{PhysicalMemory, Reservation, Result, Stream, VmmError};

impl State {
    /// What can be moved of a range now, and what that would come to.
    fn plan_moves(&mut self, id: RangeId) -> (MovePlan, CompactReport) {
        // What can be spared is given up for it.
        let stats = self.parts();
        let tally = self.ranges.tally();
        let spare_bytes = stats.ahead_bytes + stats.cached_bytes + tally.spare_parked_bytes();
        let own = tally.of_range(id).map(|range| range.account);
        let own_bytes = own.map_or(0, |own| tally.comes_back(own).spare_bytes);
        let Some(range) = self.ranges.get(id).filter(|range| !range.closed) else {
            return Default::default();
        };
        let parts = range.parts();
        let plan = if CaptureGuard::any() {
            MovePlan::default()
        } else {
            let room = self.ledger.room(range.account, None);
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

/// What the moves of one call share.
struct Compaction<'a> {
    engine: &'a Arc<Inner>,
    range: RangeId,
    /// Where copies are made.
    stream: Stream,
    scratch: Arc<Reservation>,
}

impl RangeHandle {
    /// What [`compact`](Self::compact) would do now.
    pub(crate) fn compact_report(&self) -> Result<CompactReport> {
        let engine = self.engine().open()?;
        Ok(engine.state.lock().quietly().plan_moves(self.id()).1)
    }

    /// Moves the live pages of partly live chunks of the range. The caller makes sure that no work
    /// is launched on the range meanwhile.
    pub(crate) fn compact(&self) -> Result<CompactReport> {
        let engine = self.engine().open()?;
        let id = self.id();
        let _span = Entered::new(|| tracing::debug_span!("compact"));
        engine.retry(&Which::All);
        // Held to the end, so that no capture begins meanwhile.
        let no_capture = CaptureGuard::try_none();
        let (users, page_bytes, plan, mut report) = {
            let mut state = engine.state.lock();
            let (users, page_bytes) = match state.ranges.get(id) {
                Some(range) if !range.closed => (range.users.clone(), range.page_bytes),
                _ => return Err(VmmError::Closed),
            };
            let (plan, report) = state.quietly().plan_moves(id);
            (users, page_bytes, plan, report)
        };
        report.skipped_bytes += core::mem::take(&mut report.returned_bytes);
        report.moved_bytes = 0;
        report.chunks_after = report.chunks_before;
        if plan.moves.is_empty() || !may_move(no_capture.as_ref(), &users)? {
            return Ok(report);
        }
        finish_work(engine, &users)?;
        let device = &engine.device;
        let stream = Stream::new(device)?;
        let scratch = Reservation::with_alignment(device, plan.scratch_bytes(), page_bytes)?;
        let compaction = Compaction {
            engine,
            range: id,
            stream,
            scratch: Arc::new(scratch),
        };
        let work = AtWork::begin();
        compaction.run(&plan, &mut report)?;
        let is_left = compaction.report_to(&mut report);
        if is_left {
            engine.go_on_closing();
        }
        drop(work);
        Ok(report)
    }
}

/// Whether chunks of a range may be moved now: no capture is declared, and none of its streams is
/// captured.
fn may_move(no_capture: Option<&NoCapture>, users: &Users) -> Result<bool> {
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
fn finish_work(engine: &Inner, users: &Users) -> Result<()> {
    match Until::now(&engine.device, users) {
        Until::Fences(fences) => fences.iter().try_for_each(|fence| fence.wait()),
        Until::Synchronised => engine.device.finish_work(users.are_all()),
    }
}

impl Compaction<'_> {
    /// Moves the chunks of a plan, and counts the bytes.
    fn run(&self, plan: &MovePlan, report: &mut CompactReport) -> Result<()> {
        for chunk in &plan.moves {
            if let Some(relocation) = self.depart(chunk.first)? {
                let moved_bytes = relocation.charged_bytes;
                report.returned_bytes += self.relocate(relocation)?;
                report.moved_bytes += moved_bytes;
            }
        }
        Ok(())
    }

    /// Counts what there is afterwards. Returns whether only this thread can go on with the closing
    /// of the range.
    fn report_to(&self, report: &mut CompactReport) -> bool {
        let state = self.engine.state.lock();
        let range = state.ranges.get(self.range);
        range.is_some_and(|range| {
            report.skipped_bytes = range.pages.parts().slack_bytes;
            report.chunks_after = range.pages.chunks();
            range.is_left()
        })
    }

    /// Charges for what the live pages of a chunk need, and takes the chunk out of the books to be
    /// moved. `None` if it is no longer to be moved, or if there is no room.
    fn depart(&self, first: usize) -> Result<Option<Relocation>> {
        let id = self.range;
        let mut shortage = Shortage::default();
        loop {
            let mut state = self.engine.state.lock();
            let State {
                ledger,
                ranges,
                relocations,
                ..
            } = &mut *state;
            let mut range = ranges.get(id).ok_or(VmmError::Closed)?;
            let chunk = range.pages.partly_live_at(first);
            let fits = |chunk: &PartlyLive| chunk.live_page_bytes <= self.scratch.bytes();
            let Some(chunk) = chunk.filter(|chunk| fits(chunk) && !range.is_chunk_held(first))
            else {
                return Ok(None);
            };
            let reservation = range.reservation.clone().ok_or(VmmError::Closed)?;
            let Err(refusal) = ledger.charge(range.account, chunk.live_page_bytes, None) else {
                let site = Site {
                    owner: range.owner(id),
                    reservation,
                    access: range.access.clone(),
                    page_bytes: range.page_bytes,
                };
                let mapping = range.pages.depart(first);
                return Ok(mapping.map(|mapping| {
                    relocations.begin(range.owner(id), chunk.live_page_bytes);
                    Relocation::new(site, first, chunk.pieces, chunk.live_page_bytes, mapping)
                }));
            };
            // At its own ceiling an account is helped by its own memory only.
            let scope = match chunk.live_page_bytes > refusal.below_ceiling_bytes {
                true => Scope::Account(range.account),
                false => Scope::All,
            };
            drop(range);
            if shortage.relieve(self.engine, state, scope).is_some() {
                return shortage.refused().map_or(Ok(None), Err);
            }
        }
    }

    /// Moves one chunk, or puts it back; returns the bytes that this gave back.
    fn relocate(&self, mut relocation: Relocation) -> Result<usize> {
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
            .map_or_else(Vec::new, |mut range| range.pages.arrive(first, chunks));
        state.relocations.end(owner, charged_bytes);
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
