//! Memory in blocks, with a cache of prefixes that sequences share.

use crate::scheduler::{Blocks, Growth, Id};
use std::collections::BTreeMap;

/// Blocks of a sequence.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Held {
    /// Those of the prefix cache.
    shared: usize,
    own: usize,
}

/// Sequences of one family begin with the same tokens.
#[derive(Debug, Clone, Copy)]
struct Prefix {
    family: usize,
    /// How many tokens are cached when a sequence of the family is released.
    tokens: usize,
    prompt_tokens: usize,
}

#[derive(Debug, Clone)]
pub(super) struct Memory {
    block_tokens: usize,
    most: usize,
    /// Blocks that other models leave now.
    now: usize,
    prefixes: BTreeMap<Id, Prefix>,
    /// Blocks in the cache, of each family.
    cache: BTreeMap<usize, usize>,
    /// Tokens that are said to be in the cache, whatever is there.
    claims: BTreeMap<Id, usize>,
    held: BTreeMap<Id, Held>,
    /// With how many cached tokens each was admitted last.
    pub(super) cached: BTreeMap<Id, usize>,
    /// Whether the last call found no memory.
    is_short: bool,
    /// How often more memory is said to be about to come.
    pub(super) comes: usize,
    /// For whom it was.
    pub(super) waiting: Vec<Id>,
    /// Who was released, and whether that was for want of memory.
    pub(super) released: Vec<(Id, bool)>,
}

impl Memory {
    pub(super) fn new(block_tokens: usize, blocks: usize) -> Self {
        Self {
            block_tokens,
            most: blocks,
            now: blocks,
            prefixes: BTreeMap::new(),
            cache: BTreeMap::new(),
            claims: BTreeMap::new(),
            held: BTreeMap::new(),
            cached: BTreeMap::new(),
            is_short: false,
            comes: 0,
            waiting: Vec::new(),
            released: Vec::new(),
        }
    }

    pub(super) fn set_now(&mut self, blocks: usize) {
        self.now = blocks.min(self.most);
    }

    pub(super) fn has_most(&self) -> bool {
        self.now == self.most
    }

    pub(super) fn set_cached(&mut self, id: Id, tokens: usize) {
        self.claims.insert(id, tokens);
    }

    pub(super) fn set_prefix(&mut self, id: Id, family: usize, tokens: usize, prompt: usize) {
        let prompt_tokens = prompt;
        let prefix = Prefix {
            family,
            tokens,
            prompt_tokens,
        };
        self.prefixes.insert(id, prefix);
    }

    pub(super) fn holders(&self) -> Vec<Id> {
        self.held.keys().copied().collect()
    }

    /// Blocks that a sequence has, and those that so many tokens take.
    pub(super) fn blocks_of(&self, id: Id, tokens: usize) -> (usize, usize) {
        let held = self.held.get(&id).copied().unwrap_or_default();
        (held.shared + held.own, tokens.div_ceil(self.block_tokens))
    }

    /// Blocks that sequences have, without those that they share.
    pub(super) fn own(&self) -> usize {
        self.held.values().map(|held| held.own).sum()
    }

    /// Tokens of whole blocks beyond what there is now.
    pub(super) fn excess_tokens(&self) -> usize {
        let used = self.own() + self.pinned();
        used.saturating_sub(self.now) * self.block_tokens
    }

    fn pinned_of(&self, family: usize) -> usize {
        let held = self.held.iter();
        let of_family = held.filter(|(id, _)| {
            let prefix = self.prefixes.get(id);
            prefix.is_some_and(|prefix| prefix.family == family)
        });
        of_family.map(|(_, held)| held.shared).max().unwrap_or(0)
    }

    fn pinned(&self) -> usize {
        self.cache
            .keys()
            .map(|family| self.pinned_of(*family))
            .sum()
    }

    /// Has the cache give up what keeps others from so many blocks, if nobody uses it.
    fn evict_for(&mut self, blocks: usize) {
        for family in self.cache.keys().copied().collect::<Vec<_>>() {
            let used = self.own() + self.cache.values().sum::<usize>();
            let excess = (used + blocks).saturating_sub(self.now);
            let pinned = self.pinned_of(family);
            if let Some(cached) = self.cache.get_mut(&family) {
                *cached -= excess.min(*cached - pinned);
            }
        }
    }
}

impl Blocks for Memory {
    fn sequence_tokens_max(&self) -> usize {
        self.most * self.block_tokens
    }

    fn cached_prefix(&mut self, id: Id) -> usize {
        self.is_short = false;
        let mut held = Held::default();
        if let Some(prefix) = self.prefixes.get(&id) {
            let cached = self.cache.get(&prefix.family).copied().unwrap_or(0);
            held.shared = cached.min((prefix.prompt_tokens - 1) / self.block_tokens);
        }
        let mut tokens = held.shared * self.block_tokens;
        if let Some(claim) = self.claims.get(&id) {
            (tokens, held.own) = (*claim, claim.div_ceil(self.block_tokens));
        }
        assert_eq!(self.held.insert(id, held), None, "it is admitted once");
        self.cached.insert(id, tokens);
        tokens
    }

    fn grow(&mut self, id: Id, tokens: usize) -> Growth {
        let held = *self.held.get(&id).expect("it was admitted");
        let blocks = tokens.div_ceil(self.block_tokens);
        let more = blocks.saturating_sub(held.shared + held.own);
        self.evict_for(more);
        let cached = self.cache.values().sum::<usize>();
        self.is_short = more > 0 && self.own() + cached + more > self.now;
        if self.is_short && self.comes > 0 {
            self.comes -= 1;
            self.waiting.push(id);
            return Growth::Coming;
        }
        if self.is_short {
            return Growth::Short;
        }
        self.held.entry(id).or_default().own += more;
        Growth::Done
    }

    fn release(&mut self, id: Id) {
        let held = self.held.remove(&id).expect("it has memory");
        self.released.push((id, self.is_short));
        self.is_short = false;
        if let Some(prefix) = self.prefixes.get(&id) {
            let tokens = prefix.tokens.min(prefix.prompt_tokens);
            let blocks = (tokens / self.block_tokens).min(held.shared + held.own);
            let cached = self.cache.entry(prefix.family).or_default();
            *cached = blocks.max(*cached);
        }
    }
}
