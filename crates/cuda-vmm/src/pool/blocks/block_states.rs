//! Which blocks are backed, how many pins each has, and when each was last used.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::layout::Layout;
use super::reclaim::Candidate;
use super::runs::Runs;
use super::{BlockError, BlockId, ReclaimPlan};
use crate::engine::Hint;
use core::ops::Range;
use std::collections::BTreeSet;

/// What is behind a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Unbacked,
    /// Being backed; the block is the reservation of that work.
    Arriving,
    Backed,
    /// Being given up; the block is the reservation of that work.
    Leaving,
}

#[derive(Debug, Clone, Copy)]
struct Block {
    state: State,
    /// Pins and calls under way that keep it where it is.
    pins: u32,
    /// The clock when it was last named by a call that uses it.
    used: u64,
}

/// The record of all blocks.
#[derive(Debug)]
pub(super) struct BlockStates {
    layout: Layout,
    blocks: Vec<Block>,
    /// How many blocks with memory each page of each class holds.
    held: Vec<Vec<u32>>,
    /// The pages that hold one, in bytes.
    page_bytes: usize,
    clock: u64,
    backed: usize,
    pinned: usize,
    /// Launches under way that keep every block where it is.
    holds: usize,
    /// How many calls have given blocks up.
    generation: u64,
    pub(super) rest: Rest,
}

/// Whether the blocks have their memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rest {
    Awake,
    /// A thread puts them to sleep or wakes them.
    Changing,
    Asleep,
}

impl Rest {
    /// What they are after a call.
    pub(super) fn after(is_asleep: bool) -> Self {
        match is_asleep {
            true => Self::Asleep,
            false => Self::Awake,
        }
    }
}

/// What a call that backs blocks has to do.
#[derive(Debug)]
pub(super) struct Arrival {
    /// Blocks to be backed.
    pub(super) missing: Runs,
    /// Blocks that are backed already, and held meanwhile.
    held: Runs,
}

/// What the commit of a plan has to do.
#[derive(Debug)]
pub(super) struct Departure {
    /// Blocks to be given up.
    pub(super) leaving: Runs,
    /// Blocks that others are moved into, held meanwhile.
    targets: Runs,
}

impl BlockStates {
    /// Makes the record, with no block backed. Fails if the host has no memory for it: there may be
    /// far more blocks of addresses than the host can count.
    pub(super) fn new(layout: &Layout) -> Result<Self, BlockError> {
        let block = Block {
            state: State::Unbacked,
            pins: 0,
            used: 0,
        };
        let count = layout.blocks;
        let classes = layout.classes.iter();
        Ok(Self {
            blocks: list(count, block, count)?,
            held: classes
                .map(|class| list(class.pages(), 0, count))
                .collect::<Result<_, _>>()?,
            layout: layout.clone(),
            page_bytes: 0,
            clock: 0,
            backed: 0,
            pinned: 0,
            holds: 0,
            generation: 0,
            rest: Rest::Awake,
        })
    }

    /// Whether none of the blocks is being backed or given up.
    pub(super) fn is_settled(&self, runs: &Runs) -> bool {
        runs.blocks()
            .all(|block| matches!(self.blocks[block].state, State::Unbacked | State::Backed))
    }

    pub(super) fn is_backed(&self, block: BlockId) -> bool {
        let found = self.blocks.get(block);
        found.is_some_and(|found| found.state == State::Backed)
    }

    /// How many blocks from the first on are backed without a gap.
    pub(super) fn backed_prefix(&self) -> usize {
        let gap = self
            .blocks
            .iter()
            .position(|block| block.state != State::Backed);
        gap.unwrap_or(self.blocks.len())
    }

    pub(super) fn backed(&self) -> usize {
        self.backed
    }

    pub(super) fn pinned(&self) -> usize {
        self.pinned
    }

    fn hold(&mut self, block: BlockId) {
        let found = &mut self.blocks[block];
        self.pinned += usize::from(found.pins == 0);
        found.pins += 1;
    }

    fn let_go(&mut self, block: BlockId) {
        let found = &mut self.blocks[block];
        found.pins -= 1;
        self.pinned -= usize::from(found.pins == 0);
    }

    fn set(&mut self, block: BlockId, state: State) {
        let before = core::mem::replace(&mut self.blocks[block].state, state);
        self.backed -= usize::from(before == State::Backed);
        self.backed += usize::from(state == State::Backed);
        let (had, has) = (before != State::Unbacked, state != State::Unbacked);
        if had == has {
            return;
        }
        for (class, held) in self.layout.classes.iter().zip(&mut self.held) {
            for page in class.pages_of(&(block..block + 1)) {
                let was_empty = held[page] == 0;
                held[page] = held[page] + u32::from(has) - u32::from(had);
                match (was_empty, held[page] == 0) {
                    (true, false) => self.page_bytes += class.page_bytes(),
                    (false, true) => self.page_bytes -= class.page_bytes(),
                    _ => {}
                }
            }
        }
    }

    fn set_all(&mut self, runs: &Runs, state: State) {
        for block in runs.blocks() {
            self.set(block, state);
        }
    }

    fn go(&mut self, runs: &Runs) {
        self.generation += u64::from(!runs.is_empty());
        self.set_all(runs, State::Leaving);
    }

    /// Makes plans stale that name the blocks or empty their pages.
    pub(super) fn used(&mut self, runs: &Runs) {
        self.clock += 1;
        for block in runs.blocks() {
            self.blocks[block].used = self.clock;
        }
    }

    /// Reserves the blocks, all of them settled, for a call that backs what is missing.
    pub(super) fn arrive(&mut self, runs: &Runs) -> Arrival {
        self.used(runs);
        let is_backed = |block: &BlockId| self.is_backed(*block);
        let arrival = Arrival {
            missing: Runs::of_ordered(runs.blocks().filter(|block| !is_backed(block))),
            held: Runs::of_ordered(runs.blocks().filter(is_backed)),
        };
        self.set_all(&arrival.missing, State::Arriving);
        for block in arrival.held.blocks() {
            self.hold(block);
        }
        arrival
    }

    /// Ends what [`arrive`](Self::arrive) began.
    pub(super) fn arrived(&mut self, arrival: &Arrival, is_done: bool) {
        let state = if is_done {
            State::Backed
        } else {
            State::Unbacked
        };
        self.set_all(&arrival.missing, state);
        for block in arrival.held.blocks() {
            self.let_go(block);
        }
    }

    /// Keeps every block where it is. Returns how many calls have given blocks up.
    pub(super) fn hold_all(&mut self) -> u64 {
        self.holds += 1;
        self.generation
    }

    /// Ends what [`hold_all`](Self::hold_all) began.
    pub(super) fn let_all_go(&mut self) {
        self.holds -= 1;
    }

    /// Whether a launch keeps every block where it is. Then none may leave.
    pub(super) fn is_held(&self) -> bool {
        self.holds > 0
    }

    /// Reserves the blocks, all of them settled, for a call that gives them up.
    pub(super) fn leave(&mut self, runs: &Runs) -> Result<(), BlockError> {
        for block in runs.blocks() {
            self.expect_backed(block)?;
            if self.blocks[block].pins > 0 {
                return Err(BlockError::Pinned { block });
            }
        }
        self.used(runs);
        self.go(runs);
        Ok(())
    }

    /// Reserves the unused ones of the blocks for a call that gives them up. All blocks must be
    /// settled. A block is unused if it is backed, nothing keeps it, and no call has used it since
    /// `clock`.
    pub(super) fn leave_unused(&mut self, runs: &Runs, clock: u64) -> Runs {
        let is_unused = |block: &BlockId| {
            let found = &self.blocks[*block];
            found.state == State::Backed && found.pins == 0 && found.used <= clock
        };
        let unused = Runs::of_ordered(runs.blocks().filter(is_unused));
        self.used(&unused);
        self.go(&unused);
        unused
    }

    /// How many calls have used blocks.
    pub(super) fn clock(&self) -> u64 {
        self.clock
    }

    /// Ends what [`leave`](Self::leave) began.
    pub(super) fn left(&mut self, runs: &Runs) {
        self.set_all(runs, State::Unbacked);
    }

    fn expect_backed(&self, block: BlockId) -> Result<(), BlockError> {
        match self.is_backed(block) {
            true => Ok(()),
            false => Err(BlockError::NotBacked { block }),
        }
    }

    /// Holds blocks, all of them settled, where they are.
    pub(super) fn pin(&mut self, runs: &Runs) -> Result<(), BlockError> {
        runs.blocks()
            .try_for_each(|block| self.expect_backed(block))?;
        self.used(runs);
        for block in runs.blocks() {
            self.hold(block);
        }
        Ok(())
    }

    /// Lets go what was pinned.
    pub(super) fn unpin(&mut self, runs: &Runs) {
        for block in runs.blocks() {
            self.let_go(block);
        }
    }

    /// What a plan may do with each block, before its cost is known; and the clock.
    pub(super) fn candidates(&self) -> (Vec<Candidate>, u64) {
        let candidate = |block: &Block| match block.state {
            State::Unbacked => Candidate::Absent,
            State::Backed if block.pins == 0 => Candidate::Held { evict: None },
            _ => Candidate::Fixed,
        };
        (self.blocks.iter().map(candidate).collect(), self.clock)
    }

    /// Checks that a plan is still true, and reserves its blocks.
    pub(super) fn depart(&mut self, plan: &ReclaimPlan) -> Result<Departure, BlockError> {
        let moves = plan.moves().iter();
        let targets: BTreeSet<BlockId> = moves.clone().map(|(_, to)| *to).collect();
        let sources = moves.map(|(from, _)| *from);
        let leaving: BTreeSet<BlockId> = plan.evicted().iter().copied().chain(sources).collect();
        for block in leaving.iter().chain(&targets).copied() {
            if self.blocks[block].pins > 0 {
                return Err(BlockError::Pinned { block });
            }
            self.expect_unused(block, plan)?;
        }
        // No other block may have come to a page that is to empty.
        for (class, pages) in self.layout.classes.iter().zip(plan.pages()) {
            for page in pages {
                class
                    .blocks_of(*page)
                    .filter(|block| self.blocks[*block].state != State::Unbacked)
                    .filter(|block| !leaving.contains(block))
                    .try_for_each(|block| Err(BlockError::StalePlan { block }))?;
            }
        }
        let departure = Departure {
            leaving: Runs::of_ordered(leaving),
            targets: Runs::of_ordered(targets),
        };
        self.go(&departure.leaving);
        for block in departure.targets.blocks() {
            self.hold(block);
        }
        Ok(departure)
    }

    fn expect_unused(&self, block: BlockId, plan: &ReclaimPlan) -> Result<(), BlockError> {
        let found = &self.blocks[block];
        if found.state != State::Backed || found.used > plan.clock() {
            return Err(BlockError::StalePlan { block });
        }
        Ok(())
    }

    /// Ends what [`depart`](Self::depart) began. With `is_done` the plan cannot be committed again.
    pub(super) fn departed(&mut self, departure: &Departure, is_done: bool) {
        for block in departure.targets.blocks() {
            self.let_go(block);
        }
        if is_done {
            self.used(&departure.leaving);
            self.used(&departure.targets);
            self.set_all(&departure.leaving, State::Unbacked);
        } else {
            self.set_all(&departure.leaving, State::Backed);
        }
    }

    /// The pages that hold a block with memory, in bytes.
    pub(super) fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// The pages of each class that hold no block with memory and will hold one of these, in the
    /// order of the runs.
    pub(super) fn empty_pages(&self, runs: &[Range<BlockId>]) -> Vec<Hint> {
        let classes = self.layout.classes.iter().zip(&self.held);
        let empty = classes.map(|(class, held)| {
            let pages = runs.iter().flat_map(|run| class.pages_of(run));
            let empty = pages.filter(|page| held[*page] == 0);
            Hint::new(empty.map(|page| page..page + 1))
        });
        empty.collect()
    }
}

/// A list of equal items, as a part of the record of this many blocks.
fn list<T: Clone>(items: usize, item: T, blocks: usize) -> Result<Vec<T>, BlockError> {
    let mut list = Vec::new();
    if list.try_reserve_exact(items).is_err() {
        return Err(BlockError::TooMany {
            blocks,
            each_bytes: size_of::<T>().saturating_mul(items.div_ceil(blocks)),
        });
    }
    list.resize(items, item);
    Ok(list)
}
