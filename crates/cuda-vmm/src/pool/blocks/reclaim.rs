//! Choosing what to give up so that whole pages empty, at the least cost.
//!
//! A page empties when all blocks in it go. A block may lie in several pages of each of several
//! classes of tensors. So each choice takes all that is left in one page. It is the page whose
//! blocks cost the least for each byte that then empties, here and elsewhere. The search repeats
//! that until enough is free. Chosen blocks cost nothing more. So a page beside an emptied one
//! becomes cheaper, and runs of pages grow.
//!
//! A block that is moved goes to a block of no value that stays: first in the pages that would cost
//! the most to empty. Pages with only such blocks cost nothing and go first. So if much is asked
//! for, no room may be left to move to. Then the search runs again and keeps that room back, at the
//! low end if it can. It lets the room go block by block from the other end.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::BlockId;
use super::layout::Layout;
use core::cmp::{Ordering, Reverse};
use core::ops::Range;
use std::collections::{BTreeSet, BinaryHeap};

/// What a plan may do with a block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Candidate {
    /// Nothing: it has no memory.
    Absent,
    /// Nothing: it must stay where it is.
    Fixed,
    /// Evict it at this cost, finite and not below zero, and perhaps move another into it; or move
    /// it.
    Held { evict: Option<f64> },
}

/// What was chosen.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Reclaim {
    pub(super) evicted: Vec<BlockId>,
    pub(super) moves: Vec<(BlockId, BlockId)>,
    pub(super) freed_bytes: usize,
    pub(super) cost: f64,
    /// The pages that empty, for each class.
    pub(super) pages: Vec<Vec<usize>>,
}

/// Chooses blocks so that `bytes` bytes are free, or as many as it finds. It moves blocks if
/// `move_cost` is given and evicting them costs more.
pub(super) fn reclaim(
    layout: &Layout,
    candidates: &[Candidate],
    bytes: usize,
    move_cost: Option<f64>,
) -> Reclaim {
    let search = |candidates: &[Candidate], move_cost, reserve| {
        Search::new(layout, candidates, move_cost, reserve).run(bytes)
    };
    let mut best = search(candidates, move_cost, false);
    if best.freed_bytes >= bytes || move_cost.is_none() {
        return best;
    }
    // Blocks of no value went first, and with them the room to move to: so keep that room. A block
    // that is moved into keeps its page from emptying: so move nothing. And last, a block that can
    // be evicted is room as well.
    let of_no_value: Vec<_> = candidates.iter().map(Candidate::without_cost).collect();
    let searches = [
        (candidates, move_cost, true),
        (candidates, None, false),
        (&of_no_value, move_cost, true),
    ];
    for (given, move_cost, reserve) in searches {
        let mut other = search(given, move_cost, reserve);
        other.cost = other.cost_of(candidates, move_cost);
        let is_cheaper = other.freed_bytes == best.freed_bytes && other.cost < best.cost;
        if other.freed_bytes > best.freed_bytes || is_cheaper {
            best = other;
        }
        if best.freed_bytes >= bytes {
            break;
        }
    }
    best
}

impl Candidate {
    /// The same candidate, with an eviction that costs nothing if it can be evicted.
    fn without_cost(&self) -> Self {
        match self {
            Self::Held { evict: Some(_) } => Self::Held { evict: Some(0.0) },
            other => *other,
        }
    }

    fn price(&self) -> f64 {
        match self {
            Self::Held { evict } => evict.unwrap_or_default(),
            _ => 0.0,
        }
    }
}

impl Reclaim {
    /// The cost of the choice, if blocks have these prices.
    fn cost_of(&self, candidates: &[Candidate], move_cost: Option<f64>) -> f64 {
        let targets = self.moves.iter().map(|(_, to)| to);
        let given_up = self.evicted.iter().chain(targets);
        let prices: f64 = given_up.map(|block| candidates[*block].price()).sum();
        prices + move_cost.unwrap_or_default() * self.moves.len() as f64
    }
}

/// All that is left in one page.
struct Offer {
    evict: Vec<BlockId>,
    relocate: Vec<BlockId>,
    cost: f64,
    /// What empties, for each class.
    pages: Vec<Vec<usize>>,
    freed_bytes: usize,
}

impl Offer {
    fn cost_per_byte(&self) -> f64 {
        self.cost / self.freed_bytes as f64
    }
}

/// A page, and what its offer was when it was last looked at.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Entry {
    cost_per_byte: f64,
    freed_bytes: usize,
    first: BlockId,
    class: usize,
    page: usize,
}

impl Eq for Entry {}

impl Ord for Entry {
    /// The greatest is the best: the cheapest, of those the one that frees most, of those the last.
    fn cmp(&self, other: &Self) -> Ordering {
        other
            .cost_per_byte
            .total_cmp(&self.cost_per_byte)
            .then(self.freed_bytes.cmp(&other.freed_bytes))
            .then(self.first.cmp(&other.first))
            .then(self.class.cmp(&other.class))
            .then(self.page.cmp(&other.page))
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

struct Search<'a> {
    layout: &'a Layout,
    blocks: Vec<Candidate>,
    move_cost: Option<f64>,
    /// How many blocks with memory are left in each page of each class.
    held: Vec<Vec<u32>>,
    /// Blocks that others may be moved into, the best first: by the bits of what their page costs
    /// for each byte, which for numbers not below zero are in the order of the numbers.
    targets: BTreeSet<(Reverse<u64>, BlockId)>,
    /// What the pages of the largest class cost for each byte at first, as in `targets`.
    worth: Vec<u64>,
    /// Whether blocks of no value are kept for others to be moved into, until nothing else is left.
    reserve: bool,
    heap: BinaryHeap<Entry>,
    chosen: Reclaim,
}

impl<'a> Search<'a> {
    fn new(
        layout: &'a Layout,
        candidates: &[Candidate],
        move_cost: Option<f64>,
        reserve: bool,
    ) -> Self {
        let mut search = Self {
            layout,
            blocks: candidates.to_vec(),
            move_cost,
            held: Vec::new(),
            targets: BTreeSet::new(),
            worth: Vec::new(),
            reserve: false,
            heap: BinaryHeap::new(),
            chosen: Reclaim {
                pages: vec![Vec::new(); layout.classes.len()],
                ..Reclaim::default()
            },
        };
        for class in &layout.classes {
            let mut held = vec![0; class.pages()];
            for (block, candidate) in candidates.iter().enumerate() {
                if *candidate != Candidate::Absent {
                    for page in class.pages_of(&(block..block + 1)) {
                        held[page] += 1;
                    }
                }
            }
            search.held.push(held);
        }
        if move_cost.is_some() {
            search.find_targets(reserve);
        }
        for class in 0..layout.classes.len() {
            search.look_at(class, 0..layout.classes[class].pages());
        }
        search
    }

    fn find_targets(&mut self, reserve: bool) {
        // What a page costs does not yet depend on where its blocks could go: as if there were room
        // for all.
        let largest = self.layout.largest();
        let pages = 0..self.layout.classes[largest].pages();
        let worth = pages.map(|page| {
            let offer = self.offer(largest, page, usize::MAX);
            offer.map_or(f64::INFINITY, |offer| offer.cost_per_byte())
        });
        self.worth = worth.map(f64::to_bits).collect();
        self.reserve = reserve;
        for block in 0..self.blocks.len() {
            if self.is_free(block) {
                self.targets.insert(self.target(block));
            }
        }
        if self.reserve {
            // No more than there are blocks to move.
            let blocks = self.blocks.iter();
            let movable = blocks.filter(|candidate| match candidate {
                Candidate::Held { evict: Some(price) } => {
                    self.move_cost.is_some_and(|cost| *price > cost)
                }
                Candidate::Held { evict: None } => true,
                _ => false,
            });
            for _ in movable.count()..self.targets.len() {
                self.targets.pop_last();
            }
            for (_, block) in &self.targets {
                self.blocks[*block] = Candidate::Fixed;
            }
        }
    }

    fn target(&self, block: BlockId) -> (Reverse<u64>, BlockId) {
        let class = &self.layout.classes[self.layout.largest()];
        let mut worth = self.worth[class.pages_of(&(block..block + 1))]
            .iter()
            .copied();
        let worth = if self.reserve {
            // Into pages that stay in any case, and else close together.
            u64::from(worth.all(|worth| worth == f64::INFINITY.to_bits()))
        } else {
            worth.max().unwrap_or_default()
        };
        (Reverse(worth), block)
    }

    fn is_free(&self, block: BlockId) -> bool {
        self.blocks[block] == Candidate::Held { evict: Some(0.0) }
    }

    fn run(mut self, bytes: usize) -> Reclaim {
        while self.chosen.freed_bytes < bytes {
            let Some(entry) = self.heap.pop() else {
                if self.reserve && self.release_target() {
                    continue;
                }
                break;
            };
            let Some(offer) = self.offer(entry.class, entry.page, self.targets.len()) else {
                continue;
            };
            if offer.cost_per_byte() > entry.cost_per_byte {
                // There are fewer places to move its blocks to than there were.
                self.push(entry.class, entry.page, &offer);
            } else {
                self.choose(offer);
            }
        }
        self.chosen.evicted.sort_unstable();
        self.chosen.moves.sort_unstable();
        self.chosen
    }

    /// Lets the block of no value go that would be moved into last; says whether there was one.
    fn release_target(&mut self) -> bool {
        let Some((_, block)) = self.targets.pop_last() else {
            return false;
        };
        self.blocks[block] = Candidate::Held { evict: Some(0.0) };
        for class in 0..self.layout.classes.len() {
            let pages = self.layout.classes[class].pages_of(&(block..block + 1));
            self.look_at(class, pages);
        }
        true
    }

    fn look_at(&mut self, class: usize, pages: Range<usize>) {
        for page in pages {
            if let Some(offer) = self.offer(class, page, self.targets.len()) {
                self.push(class, page, &offer);
            }
        }
    }

    fn push(&mut self, class: usize, page: usize, offer: &Offer) {
        self.heap.push(Entry {
            cost_per_byte: offer.cost_per_byte(),
            freed_bytes: offer.freed_bytes,
            first: self.layout.classes[class].blocks_of(page).start,
            class,
            page,
        });
    }

    /// What emptying a page takes, with this many places to move blocks to; `None` if it is empty
    /// or cannot be emptied.
    fn offer(&self, class: usize, page: usize, places: usize) -> Option<Offer> {
        if self.held[class][page] == 0 {
            return None;
        }
        let (mut evict, mut relocate) = (Vec::new(), Vec::new());
        let (mut cost, mut free) = (0.0, 0);
        for block in self.layout.classes[class].blocks_of(page) {
            let Candidate::Held { evict: price } = self.blocks[block] else {
                if self.blocks[block] == Candidate::Fixed {
                    return None;
                }
                continue;
            };
            match (price, self.move_cost) {
                (None, None) => return None,
                (Some(price), None) => {
                    cost += price;
                    evict.push(block);
                }
                (Some(price), Some(move_cost)) if price <= move_cost => {
                    free += usize::from(price == 0.0 && !self.reserve);
                    cost += price;
                    evict.push(block);
                }
                (price, Some(_)) => relocate.push((price.unwrap_or(f64::INFINITY), block)),
            }
        }
        let places = places.saturating_sub(free);
        // If there are too few places, the blocks that cost the least are evicted after all.
        relocate.sort_unstable_by(|one, other| other.0.total_cmp(&one.0));
        for (price, block) in relocate.drain(places.min(relocate.len())..) {
            if price.is_infinite() {
                return None;
            }
            cost += price;
            evict.push(block);
        }
        cost += self.move_cost.unwrap_or_default() * relocate.len() as f64;
        let relocate: Vec<_> = relocate.into_iter().map(|(_, block)| block).collect();
        if self.reserve && !self.moves_down(&relocate) {
            return None;
        }
        let pages = self.emptied(&evict, &relocate);
        let classes = self.layout.classes.iter().zip(&pages);
        let freed_bytes = classes.map(|(class, pages)| pages.len() * class.page_bytes());
        Some(Offer {
            freed_bytes: freed_bytes.sum(),
            evict,
            relocate,
            cost,
            pages,
        })
    }

    /// Whether there are places for all of these blocks that are better than their own: else what
    /// one page is rid of keeps others from emptying.
    fn moves_down(&self, relocate: &[BlockId]) -> bool {
        let best = relocate.iter().map(|block| self.target(*block)).min();
        let last = relocate.len().checked_sub(1);
        let place = last.and_then(|last| self.targets.iter().nth(last).copied());
        best.is_none_or(|best| place.is_some_and(|place| place < best))
    }

    /// The pages that empty, for each class, when these blocks go.
    fn emptied(&self, evict: &[BlockId], relocate: &[BlockId]) -> Vec<Vec<usize>> {
        let mut going: Vec<_> = evict.iter().chain(relocate).copied().collect();
        going.sort_unstable();
        let classes = self.layout.classes.iter().zip(&self.held);
        let emptied = classes.map(|(class, held)| {
            let mut emptied = Vec::new();
            // The page that was looked at last, and how many of its blocks go.
            let mut last = (usize::MAX, 0);
            for block in &going {
                for page in class.pages_of(&(*block..block + 1)) {
                    last = if last.0 == page {
                        (page, last.1 + 1)
                    } else {
                        (page, 1)
                    };
                    if held[page] == last.1 {
                        emptied.push(page);
                    }
                }
            }
            emptied
        });
        emptied.collect()
    }

    fn choose(&mut self, offer: Offer) {
        let going = || offer.evict.iter().chain(&offer.relocate).copied();
        let mut touched: Vec<BlockId> = going().collect();
        for block in going() {
            if self.move_cost.is_some() && !self.reserve && self.is_free(block) {
                self.targets.remove(&self.target(block));
            }
            self.blocks[block] = Candidate::Absent;
            for (class, held) in self.layout.classes.iter().zip(&mut self.held) {
                for page in class.pages_of(&(block..block + 1)) {
                    held[page] -= 1;
                }
            }
        }
        self.chosen.evicted.extend(offer.evict);
        for from in offer.relocate {
            // The offer was made for the places that there are.
            if let Some((_, to)) = self.targets.pop_first() {
                self.blocks[to] = Candidate::Fixed;
                self.chosen.moves.push((from, to));
                touched.push(to);
            }
        }
        self.chosen.cost += offer.cost;
        self.chosen.freed_bytes += offer.freed_bytes;
        for (chosen, pages) in self.chosen.pages.iter_mut().zip(offer.pages) {
            chosen.extend(pages);
        }
        // Pages that share a block with it have become cheaper.
        for class in 0..self.layout.classes.len() {
            let pages = touched
                .iter()
                .flat_map(|block| self.layout.classes[class].pages_of(&(*block..block + 1)));
            let pages: BTreeSet<_> = pages.collect();
            for page in pages {
                self.look_at(class, page..page + 1);
            }
        }
    }
}

#[cfg(test)]
mod tests;
