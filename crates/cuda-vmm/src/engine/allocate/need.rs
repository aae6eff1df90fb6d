//! What an allocation finds at its pages, and so needs.

use super::obstacle::{Lack, Obstacle};
use crate::engine::backing::{Left, Made, Supply};
use crate::engine::books::account::AccountId;
use crate::engine::books::chunk_plan::ChunkPlan;
use crate::engine::books::ledger::Refusal;
use crate::engine::books::pages::Survey;
use crate::engine::books::pressure::Ticket;
use crate::engine::changes::Locked;
use crate::engine::range::Range;
use crate::engine::target::Target;
use crate::size::Extent;
use crate::{Result, VmmError};

/// What one piece of an allocation needs, one run of bytes of one range, and what is made for it.
pub(super) struct Need {
    /// The ask that it is of.
    pub(super) ask: usize,
    pub(super) extent: Extent,
    pub(super) plan: ChunkPlan,
    pub(super) page_bytes: usize,
    /// Where the missing pages go; `None` if none is missing.
    pub(super) target: Option<Target>,
    pub(super) made: Vec<Made>,
    /// What is left of chunks that were undone.
    pub(super) left: Left,
    /// The page before which pieces of the same range before it make all pages.
    claimed_end: usize,
}

/// What a whole allocation needs.
pub(super) struct Needs {
    account: AccountId,
    pub(super) pieces: Vec<Need>,
    /// Memory that is missing, or that is there and not in use, in bytes.
    pub(super) more_bytes: usize,
}

impl Need {
    /// A piece of an ask with a plan that leaves the pages before `claimed_end` to others.
    pub(super) fn new(
        ask: usize,
        extent: Extent,
        plan: ChunkPlan,
        range: &Range,
        claimed_end: usize,
    ) -> Result<Self> {
        let target = match plan.survey.missing.is_empty() {
            true => None,
            false => Some(range.target().ok_or(VmmError::Closed)?),
        };
        Ok(Self {
            ask,
            extent,
            plan,
            page_bytes: range.page_bytes,
            target,
            made: Vec::new(),
            left: Left::default(),
            claimed_end,
        })
    }

    /// What is charged for it, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.plan.pages() * self.page_bytes
    }

    fn chunk_bytes(&self) -> impl Iterator<Item = usize> + '_ {
        let chunks = self.plan.chunks();
        chunks.map(|chunk| chunk.len() * self.page_bytes)
    }

    /// Whether the range still is as it was when this was made. Before any piece of the range has
    /// begun.
    pub(super) fn is_still_true(&self, range: &Range) -> bool {
        let survey = range.pages.survey(&self.extent.range());
        let survey = survey.map(|survey| without(survey, self.claimed_end));
        !range.takes_no_more() && survey.as_ref() == Some(&self.plan.survey)
    }
}

/// A survey without the missing pages before `claimed_end`: another piece makes those.
pub(super) fn without(mut survey: Survey, claimed_end: usize) -> Survey {
    for run in &mut survey.missing {
        run.start = run.start.max(claimed_end);
    }
    survey.missing.retain(|run| !run.is_empty());
    survey
}

impl Needs {
    /// Of no piece yet, and of this many later.
    pub(super) fn new(account: AccountId, pieces: usize) -> Self {
        Self {
            account,
            pieces: Vec::with_capacity(pieces),
            more_bytes: 0,
        }
    }

    /// The page before which the pieces of this ask make all pages.
    pub(super) fn claimed_end(&self, ask: usize) -> usize {
        let last = self.pieces.last().filter(|piece| piece.ask == ask);
        last.map_or(0, |piece| {
            let end = piece.extent.pages(piece.page_bytes).end;
            end.max(piece.claimed_end)
        })
    }

    /// Adds a piece, and what it needs in bytes.
    pub(super) fn push(&mut self, need: Need, more_bytes: usize) {
        if let Some(before) = self.pieces.last_mut().filter(|it| it.ask == need.ask) {
            // What would be there for later could be what this piece makes.
            before.plan.spare_pages = 0;
        }
        self.more_bytes += more_bytes;
        self.pieces.push(need);
    }

    fn missing_bytes(&self) -> usize {
        let missing = |need: &Need| need.plan.survey.missing_pages() * need.page_bytes;
        self.pieces.iter().map(missing).sum()
    }

    /// What is charged for it, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.pieces.iter().map(Need::bytes).sum()
    }

    /// Charges the account for all of it, and takes from the cache what serves it.
    pub(super) fn charge(
        &mut self,
        state: &mut Locked<'_>,
        ticket: Option<Ticket>,
    ) -> Result<Supply, Obstacle> {
        if self.bytes() == 0 {
            // To charge nothing would tell others of a change.
            return Ok(Supply::new());
        }
        let charged = self.try_charge(state, ticket).or_else(|refusal| {
            let mut spare = self.pieces.iter().map(|need| need.plan.spare_pages);
            if spare.all(|pages| pages == 0) {
                return Err(refusal);
            }
            // What would only be there for later is left out before anything is given up for it.
            let pieces = self.pieces.iter_mut();
            pieces.for_each(|need| need.plan.spare_pages = 0);
            self.try_charge(state, ticket)
        });
        charged.map_err(|refusal| {
            Obstacle::Short(Lack {
                account: self.account,
                bytes: self.missing_bytes(),
                refusal,
                is_over: false,
            })
        })
    }

    fn try_charge(
        &self,
        state: &mut Locked<'_>,
        ticket: Option<Ticket>,
    ) -> Result<Supply, Refusal> {
        let chunks = self.pieces.iter().flat_map(Need::chunk_bytes);
        state.charge(self.account, self.bytes(), chunks, ticket)
    }
}
