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
use super::moving::{Mover, finish_work, may_move};
use super::relocation::Relocation;
use super::retry::Which;
use super::scope::Scope;
use super::shortage::Shortage;
use super::state::State;
use crate::capture::CaptureGuard;
use crate::events::Entered;
use crate::{Result, VmmError};

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
                Some(range) if !range.closed => {
                    range.check_awake()?;
                    (range.users.clone(), range.page_bytes)
                }
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
        let mover = Mover::new(engine, (id, page_bytes), plan.scratch_bytes())?;
        let work = AtWork::begin();
        mover.compact(&plan, &mut report)?;
        let is_left = mover.report_to(&mut report);
        if is_left {
            engine.go_on_closing();
        }
        drop(work);
        Ok(report)
    }
}

impl Mover<'_> {
    /// Moves the chunks of a plan, and counts the bytes.
    fn compact(&self, plan: &MovePlan, report: &mut CompactReport) -> Result<()> {
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
            let State { ledger, ranges, .. } = &mut *state;
            let range = ranges.get(id).ok_or(VmmError::Closed)?;
            range.check_awake()?;
            let chunk = range.pages.partly_live_at(first);
            let fits = |chunk: &PartlyLive| chunk.live_page_bytes <= self.scratch_bytes();
            let Some(chunk) = chunk.filter(|chunk| fits(chunk) && !range.is_chunk_held(first))
            else {
                return Ok(None);
            };
            let account = range.account;
            drop(range);
            let Err(refusal) = ledger.charge(account, chunk.live_page_bytes, None) else {
                return Ok(state.begin_move(id, chunk));
            };
            // At its own ceiling an account is helped by its own memory only.
            let scope = match chunk.live_page_bytes > refusal.below_ceiling_bytes {
                true => Scope::Account(account),
                false => Scope::All,
            };
            if shortage.relieve(self.engine, state, scope).is_some() {
                return shortage.refused().map_or(Ok(None), Err);
            }
        }
    }
}
