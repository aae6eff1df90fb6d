//! Blocks of prompts that were computed, to be found again by other prompts that begin alike.
//!
//! A block is known by its tokens and by the block before it, so a chain of blocks is a prefix
//! (RadixAttention, Zheng et al. 2023; vLLM's automatic prefix caching). The key holds the tokens
//! themselves: two prefixes are never taken for each other.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};

/// The number of a block.
pub type Block = usize;

/// A block's tokens, and the block before it.
type Key = (Option<Block>, Box<[u32]>);

struct Entry {
    key: Key,
    /// Sequences that use it.
    users: usize,
    /// Blocks behind it that are known.
    children: usize,
    /// When it was last used, if nothing uses it and nothing is behind it: then it may go.
    idle_since: Option<u64>,
}

/// The blocks of prefixes. Each block is used by any number of sequences, or by none.
pub struct PrefixCache {
    block_tokens: usize,
    blocks: HashMap<Key, Block>,
    entries: HashMap<Block, Entry>,
    /// Blocks that may go, the longest unused first.
    idle: BTreeMap<u64, Block>,
    clock: u64,
    /// How many blocks nothing uses.
    unused: usize,
}

impl PrefixCache {
    /// A cache without blocks, for blocks of this many tokens.
    pub fn new(block_tokens: usize) -> Self {
        Self {
            block_tokens,
            blocks: HashMap::new(),
            entries: HashMap::new(),
            idle: BTreeMap::new(),
            clock: 0,
            unused: 0,
        }
    }

    /// Returns the known blocks that these tokens begin with, whole blocks only, and counts one
    /// more user of each.
    pub fn take(&mut self, tokens: &[u32]) -> Vec<Block> {
        let mut taken = Vec::new();
        for part in tokens.chunks_exact(self.block_tokens) {
            let key = (taken.last().copied(), part.into());
            let Some(block) = self.blocks.get(&key).copied() else {
                break;
            };
            taken.push(block);
        }
        for block in &taken {
            self.change(*block, |entry| entry.users += 1);
        }
        taken
    }

    /// Makes a block known that holds these tokens behind `before`, a known block or the beginning.
    /// Its sequence is its one user. Returns `false`, and knows nothing new, if the same tokens are
    /// known in another block, or if `before` is not known.
    pub fn add(&mut self, before: Option<Block>, tokens: &[u32], block: Block) -> bool {
        let key: Key = (before, tokens.into());
        let is_new = tokens.len() == self.block_tokens
            && !self.blocks.contains_key(&key)
            && !self.entries.contains_key(&block)
            && before.is_none_or(|before| self.entries.contains_key(&before));
        if is_new {
            if let Some(before) = before {
                self.change(before, |entry| entry.children += 1);
            }
            self.blocks.insert(key.clone(), block);
            let entry = Entry {
                key,
                users: 1,
                children: 0,
                idle_since: None,
            };
            self.entries.insert(block, entry);
        }
        is_new
    }

    /// Counts one user less of a block. Returns whether it is known, and so stays.
    pub fn release(&mut self, block: Block) -> bool {
        let is_known = self.entries.contains_key(&block);
        self.change(block, |entry| entry.users = entry.users.saturating_sub(1));
        is_known
    }

    /// Forgets up to `count` blocks that nothing uses, the longest unused first, and returns them.
    pub fn evict(&mut self, count: usize) -> Vec<Block> {
        let mut evicted = Vec::new();
        while evicted.len() < count
            && let Some((_, block)) = self.idle.pop_first()
            && let Some(entry) = self.entries.remove(&block)
        {
            self.unused -= 1;
            self.blocks.remove(&entry.key);
            if let Some(before) = entry.key.0 {
                self.change(before, |entry| entry.children -= 1);
            }
            evicted.push(block);
        }
        evicted
    }

    /// The number of blocks that nothing uses. All of them can be evicted.
    pub fn unused(&self) -> usize {
        self.unused
    }

    /// Changes an entry, if there is one, and notes whether it may go.
    fn change(&mut self, block: Block, change: impl FnOnce(&mut Entry)) {
        let Some(entry) = self.entries.get_mut(&block) else {
            return;
        };
        self.unused -= usize::from(entry.users == 0);
        change(entry);
        self.unused += usize::from(entry.users == 0);
        if let Some(since) = entry.idle_since.take() {
            self.idle.remove(&since);
        }
        if entry.users == 0 && entry.children == 0 {
            self.clock += 1;
            entry.idle_since = Some(self.clock);
            self.idle.insert(self.clock, block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl PrefixCache {
        fn len(&self) -> usize {
            self.entries.len()
        }
    }
    use proptest::prelude::*;
    use std::collections::HashSet;

    const BLOCK: usize = 2;

    fn used_known(cache: &PrefixCache) -> usize {
        let used = cache.entries.values().filter(|entry| entry.users > 0);
        used.count()
    }

    #[test]
    fn the_longest_unused_leaf_goes_first() {
        let mut cache = PrefixCache::new(BLOCK);
        assert!(cache.add(None, &[1, 2], 10));
        assert!(cache.add(Some(10), &[3, 4], 11));
        assert!(cache.add(None, &[5, 6], 12));
        assert_eq!(cache.evict(9), [0; 0], "all are used");
        for block in [10, 11, 12] {
            assert!(cache.release(block));
        }
        assert!(!cache.release(13), "not known");
        assert_eq!(cache.take(&[1, 2, 3, 4, 9]), [10, 11]);
        assert_eq!(cache.unused(), 1);
        assert_eq!(cache.evict(9), [12]);
        cache.release(10);
        assert_eq!(cache.evict(9), [0; 0], "what is behind it is used");
        cache.release(11);
        assert_eq!(cache.evict(1), [11], "the leaf");
        assert_eq!(cache.evict(1), [10]);
        assert_eq!(cache.len(), 0);
    }

    #[test]
    fn the_same_tokens_are_known_once_and_only_behind_a_known_block() {
        let mut cache = PrefixCache::new(BLOCK);
        assert!(cache.add(None, &[1, 2], 10));
        assert!(!cache.add(None, &[1, 2], 11), "in another block");
        assert!(!cache.add(None, &[3, 4], 10), "the block has others");
        assert!(!cache.add(Some(11), &[3, 4], 12), "behind an unknown one");
        assert!(!cache.add(None, &[3], 12), "not whole");
        assert_eq!(cache.len(), 1);
    }

    proptest! {
        /// Sequences of few different tokens come, are computed block by block, and go; now and
        /// then blocks are evicted. What is taken holds exactly the tokens that were asked for.
        #[test]
        fn what_is_taken_holds_the_tokens(
            steps in prop::collection::vec(
                (prop::collection::vec(0..2u32, 0..9), 0..6usize, 0..4usize),
                1..60,
            ),
        ) {
            let mut cache = PrefixCache::new(BLOCK);
            // What each block holds, and the sequences that run.
            let mut contents: HashMap<Block, Vec<u32>> = HashMap::new();
            let mut free: Vec<Block> = (0..200).rev().collect();
            let mut running: Vec<Vec<Block>> = Vec::new();
            for (tokens, ends, evicts) in steps {
                let mut blocks = cache.take(&tokens);
                for (at, block) in blocks.iter().enumerate() {
                    prop_assert_eq!(&contents[block], &tokens[..(at + 1) * BLOCK]);
                }
                for end in (blocks.len() + 1..=tokens.len() / BLOCK).map(|at| at * BLOCK) {
                    let block = free.pop().expect("few run");
                    contents.insert(block, tokens[..end].to_vec());
                    let before = blocks.last().copied();
                    cache.add(before, &tokens[end - BLOCK..end], block);
                    blocks.push(block);
                }
                running.push(blocks);
                if running.len() > 3 || ends == 0 {
                    let ended = running.remove(ends % running.len());
                    for block in ended.into_iter().rev() {
                        if !cache.release(block) {
                            free.push(block);
                        }
                    }
                }
                let used: HashSet<_> = running.iter().flatten().copied().collect();
                let evicted = cache.evict(evicts);
                prop_assert!(evicted.iter().all(|block| !used.contains(block)));
                free.extend(evicted);
                let distinct: HashSet<_> = free.iter().collect();
                prop_assert_eq!(distinct.len(), free.len(), "no block is free twice");
                prop_assert!(free.iter().all(|block| !used.contains(block)));
                prop_assert_eq!(cache.unused(), cache.len() - used_known(&cache));
            }
            for block in running.into_iter().flat_map(|blocks| blocks.into_iter().rev()) {
                if !cache.release(block) {
                    free.push(block);
                }
            }
            prop_assert_eq!(cache.unused(), cache.len());
            free.extend(cache.evict(usize::MAX));
            prop_assert_eq!(free.len(), 200, "none is lost");
        }
    }
}
