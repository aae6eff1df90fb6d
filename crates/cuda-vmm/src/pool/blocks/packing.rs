//! Which blocks are handed out, and which comes next, so that few pages are used and others empty
//! out.
//!
//! A block is taken from the pages of the largest class of tensors. Pages in which some block has
//! memory come first, and of those the fullest. In a page, blocks that have memory come first, and
//! of those the lowest. A block belongs to the page that it begins in.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::layout::{Class, Layout};
use super::{BlockError, BlockId, ReclaimPlan};
use crate::size::push_run;
use core::cmp::Reverse;
use core::ops::Range;
use std::collections::BTreeSet;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Free,
    Taken,
    /// In a plan that is being carried out; was it taken?
    Committing(bool),
}

#[derive(Debug, Clone, Copy)]
struct Block {
    state: Use,
    /// Whether it has memory, as far as the allocator knows.
    has_memory: bool,
}

/// What is known of a page.
#[derive(Debug, Clone, Copy, Default)]
struct Page {
    free: usize,
    /// Taken, or in a plan that is being carried out.
    taken: usize,
    with_memory: usize,
}

/// The order of pages: the greatest is the first to be taken from.
type Rank = (bool, usize, Reverse<usize>);

#[derive(Debug)]
pub(super) struct Packing {
    class: Class,
    blocks: Vec<Block>,
    pages: Vec<Page>,
    /// Pages with free blocks.
    ranked: BTreeSet<Rank>,
    /// Free blocks, those that have memory first.
    free: BTreeSet<(usize, bool, BlockId)>,
    /// How many of them have memory.
    free_backed: usize,
    taken: usize,
}

impl Packing {
    pub(super) fn new(layout: &Layout) -> Self {
        let class = layout.classes[layout.largest()];
        let block = Block {
            state: Use::Taken,
            has_memory: false,
        };
        let mut packing = Self {
            class,
            blocks: vec![block; layout.blocks],
            pages: vec![Page::default(); class.pages()],
            ranked: BTreeSet::new(),
            free: BTreeSet::new(),
            free_backed: 0,
            taken: layout.blocks,
        };
        for block in 0..layout.blocks {
            let page = packing.page_of(block);
            packing.pages[page].taken += 1;
        }
        for block in 0..layout.blocks {
            packing.set(block, Use::Free, false);
        }
        packing
    }

    fn page_of(&self, block: BlockId) -> usize {
        self.class.pages_of(&(block..block + 1)).start
    }

    pub(super) fn taken(&self) -> usize {
        self.taken
    }

    pub(super) fn free_backed(&self) -> usize {
        self.free_backed
    }

    pub(super) fn is_taken(&self, block: BlockId) -> bool {
        let found = self.blocks.get(block);
        found.is_some_and(|found| found.state == Use::Taken)
    }

    fn rank(&self, page: usize) -> Rank {
        let found = &self.pages[page];
        (found.with_memory > 0, found.taken, Reverse(page))
    }

    fn set(&mut self, block: BlockId, state: Use, has_memory: bool) {
        let page = self.page_of(block);
        let before = self.blocks[block];
        self.ranked.remove(&self.rank(page));
        self.free.remove(&(page, !before.has_memory, block));
        let was_free = usize::from(before.state == Use::Free);
        let is_free = usize::from(state == Use::Free);
        let found = &mut self.pages[page];
        found.free = found.free + is_free - was_free;
        found.taken = found.taken + was_free - is_free;
        found.with_memory =
            found.with_memory + usize::from(has_memory) - usize::from(before.has_memory);
        let is_ranked = found.free > 0;
        self.free_backed -= usize::from(before.state == Use::Free && before.has_memory);
        self.free_backed += usize::from(state == Use::Free && has_memory);
        self.taken -= usize::from(before.state == Use::Taken);
        self.taken += usize::from(state == Use::Taken);
        self.blocks[block] = Block { state, has_memory };
        if is_free == 1 {
            self.free.insert((page, !has_memory, block));
        }
        if is_ranked {
            self.ranked.insert(self.rank(page));
        }
    }

    /// Hands out blocks, which will have memory.
    pub(super) fn take(&mut self, count: usize) -> Result<Vec<BlockId>, BlockError> {
        let free = self.free.len();
        if count > free {
            return Err(BlockError::OutOfBlocks {
                asked: count,
                free,
                blocks: self.blocks.len(),
            });
        }
        let taken: Vec<_> = self.upcoming().take(count).collect();
        for block in &taken {
            self.set(*block, Use::Taken, true);
        }
        Ok(taken)
    }

    /// The free blocks in the order in which they are handed out. A page that is taken from stays
    /// the first until all its blocks are out.
    fn upcoming(&self) -> impl Iterator<Item = BlockId> + '_ {
        let pages = self.ranked.iter().rev();
        pages.flat_map(|(_, _, Reverse(page))| self.free_of(*page, false))
    }

    /// The free blocks of a page in the order in which they are handed out, or those without
    /// memory, which are the last.
    fn free_of(&self, page: usize, bare: bool) -> impl Iterator<Item = BlockId> + '_ {
        let of_page = self.free.range((page, bare, 0)..(page + 1, false, 0));
        of_page.map(|(_, _, block)| *block)
    }

    /// Those of the next `count` blocks to be handed out that have no memory, as runs in order.
    /// Looks at pages rather than at blocks: an allocator asks at each call.
    pub(super) fn upcoming_bare(&self, mut count: usize) -> Vec<Range<BlockId>> {
        let mut runs: Vec<Range<BlockId>> = Vec::new();
        let mut push = |run| push_run(&mut runs, run);
        for (_, _, Reverse(page)) in self.ranked.iter().rev() {
            let found = &self.pages[*page];
            // What is handed out has memory.
            let bare = found.free + found.taken - found.with_memory;
            count = count.saturating_sub(found.free - bare);
            if count == 0 {
                break;
            }
            match found.with_memory {
                0 => {
                    let all = self.class.blocks_from(*page);
                    push(all.start..all.start + bare.min(count));
                }
                _ => (self.free_of(*page, true).take(count)).for_each(|at| push(at..at + 1)),
            }
            count = count.saturating_sub(bare);
        }
        runs
    }

    /// Takes back what was handed out and could not be backed.
    pub(super) fn untake(&mut self, blocks: &[BlockId], with_memory: &BTreeSet<BlockId>) {
        for block in blocks {
            self.set(*block, Use::Free, with_memory.contains(block));
        }
    }

    /// Takes back blocks, all of them or, if one is not handed out, none.
    pub(super) fn put(&mut self, blocks: &BTreeSet<BlockId>) -> Result<(), BlockError> {
        for block in blocks.iter().copied() {
            let blocks = self.blocks.len();
            if block >= blocks {
                return Err(BlockError::Invalid { block, blocks });
            }
            if !self.is_taken(block) {
                return Err(BlockError::NotAllocated { block });
            }
        }
        for block in blocks {
            self.set(*block, Use::Free, self.blocks[*block].has_memory);
        }
        Ok(())
    }

    /// Keeps the blocks of a plan from being handed out or taken back. All of them have memory.
    pub(super) fn begin(&mut self, plan: &ReclaimPlan) -> Result<(), BlockError> {
        // What moves has an owner, which learns where it is afterwards.
        let mut sources = plan.moves().iter().map(|(from, _)| *from);
        if let Some(block) = sources.find(|from| !self.is_taken(*from)) {
            return Err(BlockError::StalePlan { block });
        }
        for block in blocks_of(plan) {
            let was_taken = self.is_taken(block);
            self.set(block, Use::Committing(was_taken), true);
        }
        Ok(())
    }

    /// Ends what [`begin`](Self::begin) began.
    pub(super) fn end(&mut self, plan: &ReclaimPlan, is_done: bool) {
        if !is_done {
            for block in blocks_of(plan) {
                let was_taken = self.blocks[block].state == Use::Committing(true);
                let state = if was_taken { Use::Taken } else { Use::Free };
                self.set(block, state, true);
            }
            return;
        }
        for block in plan.evicted() {
            self.set(*block, Use::Free, false);
        }
        for (from, to) in plan.moves() {
            self.set(*from, Use::Free, false);
            self.set(*to, Use::Taken, true);
        }
    }
}

fn blocks_of(plan: &ReclaimPlan) -> impl Iterator<Item = BlockId> + '_ {
    let moves = plan.moves().iter().flat_map(|(from, to)| [*from, *to]);
    plan.evicted().iter().copied().chain(moves)
}

#[cfg(test)]
mod tests;
