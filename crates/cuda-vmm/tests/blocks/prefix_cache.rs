//! A prefix cache as paged engines have one: blocks that no sequence uses keep their contents until
//! they are reused, the least recently used first, and what is idle goes back.

use crate::common::{manual, turn};
use crate::fixture::{Fixture, PAGE, Shapes};
use cuda_vmm::pool::blocks::{BlockAllocator, ReclaimPlan};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;

const BLOCKS: usize = 512;
/// Prompts that come again and again, each of so many blocks.
const PROMPTS: usize = 40;
const PROMPT_BLOCKS: usize = 10;

/// A part of a prompt: which, and which block of it.
type Prefix = (usize, usize);

struct Cached {
    block: usize,
    /// How many sequences use it.
    users: usize,
    /// When it was last used.
    used: usize,
}

struct Cache {
    allocator: BlockAllocator,
    cached: BTreeMap<Prefix, Cached>,
    /// What each prefix must read as in each tensor.
    expected: BTreeMap<(usize, Prefix), Vec<u8>>,
    clock: usize,
    hits: usize,
}

impl Cache {
    fn find(&self, block: usize) -> Option<Prefix> {
        let mut cached = self.cached.iter();
        cached.find_map(|(prefix, cached)| (cached.block == block).then_some(*prefix))
    }

    /// A block, taken from the least recently used prefix if there is none other.
    fn take(&mut self) -> usize {
        if let Ok(blocks) = self.allocator.allocate(1) {
            return blocks[0];
        }
        let idle = self.cached.iter().filter(|(_, cached)| cached.users == 0);
        let oldest = idle.min_by_key(|(_, cached)| cached.used);
        let prefix = *oldest.expect("not all is in use").0;
        let block = self.cached.remove(&prefix).expect("found").block;
        // Reused as it is: plans of before must not name it any more.
        self.allocator
            .backing()
            .back([block])
            .expect("backed already");
        block
    }

    /// Begins a sequence: reads what is cached and writes what is not.
    fn begin(&mut self, fixture: &mut Fixture, prompt: usize) {
        for at in 0..PROMPT_BLOCKS {
            self.clock += 1;
            let prefix = (prompt, at);
            if let Some(cached) = self.cached.get_mut(&prefix) {
                (cached.users, cached.used) = (cached.users + 1, self.clock);
                let block = cached.block;
                self.allocator
                    .backing()
                    .back([block])
                    .expect("backed already");
                self.hits += 1;
                for (index, tensor) in fixture.backing.tensors().iter().enumerate() {
                    let mut bytes = vec![0; tensor.block_bytes()];
                    let address = tensor.base_address() + (block * bytes.len()) as u64;
                    // SAFETY: the block is backed.
                    unsafe { fixture.stream.read(address, &mut bytes) }.expect("mapped");
                    assert!(
                        bytes == self.expected[&(index, prefix)],
                        "{prefix:?} in {block}"
                    );
                }
                continue;
            }
            let block = self.take();
            fixture.fill(block);
            for index in 0..fixture.backing.tensors().len() {
                let bytes = fixture.contents[&(index, block)].clone();
                self.expected.insert((index, prefix), bytes);
            }
            let (users, used) = (1, self.clock);
            self.cached.insert(prefix, Cached { block, users, used });
        }
    }

    fn end(&mut self, prompt: usize) {
        for at in 0..PROMPT_BLOCKS {
            self.cached.get_mut(&(prompt, at)).expect("in use").users -= 1;
        }
    }

    /// What it costs to evict a block: the more, the later it was used; a block in use stays.
    fn plan(&self, bytes: usize, move_cost: f64) -> ReclaimPlan {
        self.allocator
            .reclaim_candidates_with_moves(bytes, move_cost, |block| {
                let prefix = self.find(block)?;
                let cached = &self.cached[&prefix];
                (cached.users == 0).then_some(cached.used as f64)
            })
    }

    /// The contents of a block are given up.
    fn forget(&mut self, block: usize) {
        if let Some(prefix) = self.find(block) {
            let cached = self.cached.remove(&prefix).expect("found");
            assert_eq!(cached.users, 0, "{prefix:?} was in use");
        }
    }

    fn commit(&mut self, fixture: &mut Fixture, plan: &ReclaimPlan) {
        self.allocator.commit(plan, &fixture.stream).expect("true");
        for block in plan.evicted() {
            self.forget(*block);
        }
        for (_, to) in plan.moves() {
            self.forget(*to);
        }
        for (from, to) in plan.moves() {
            let prefix = self.find(*from).expect("only what is cached moves");
            self.cached.get_mut(&prefix).expect("found").block = *to;
        }
        fixture.committed(plan);
        fixture.settle();
        fixture.check();
    }

    fn bytes(&self, fixture: &Fixture, counts: impl Fn(&Cached) -> bool) -> usize {
        let cached = self.cached.values().filter(|cached| counts(cached));
        cached.count() * fixture.backing.stats().block_bytes
    }
}

#[test]
fn a_warm_cache_is_read_right_and_what_is_idle_goes_back() {
    let _turn = turn();
    for shapes in Shapes::ALL {
        let mut fixture = Fixture::new(shapes, BLOCKS, manual());
        let mut cache = Cache {
            allocator: BlockAllocator::new(fixture.backing.clone()),
            cached: BTreeMap::new(),
            expected: BTreeMap::new(),
            clock: 0,
            hits: 0,
        };
        let mut random = SmallRng::seed_from_u64(11);
        let mut running: Vec<usize> = Vec::new();
        for round in 0..3 {
            // Busy: more prompts than there is room for, some of them more often than others.
            for _ in 0..120 {
                let prompt = random.random_range(0..PROMPTS * (round + 1));
                let prompt = prompt.min(random.random_range(0..PROMPTS * (round + 1)));
                cache.begin(&mut fixture, prompt);
                running.push(prompt);
                if running.len() > 12 {
                    let ended = running.swap_remove(random.random_range(0..running.len()));
                    cache.end(ended);
                }
            }
            assert!(cache.hits > 100 * (round + 1), "{} hits", cache.hits);
            fixture.check();
            // Idle: few run, and the cache is warm.
            while running.len() > 8 {
                cache.end(running.swap_remove(random.random_range(0..running.len())));
            }
            let pin = running[0];
            let pinned: Vec<_> = (0..PROMPT_BLOCKS)
                .map(|at| cache.cached[&(pin, at)].block)
                .collect();
            let tensors = fixture.backing.tensors().len();
            // Pins hold the pages that they are in.
            let beyond_pages =
                fixture.page_bytes(&pinned) - pinned.len() * fixture.backing.stats().block_bytes;
            let pin = fixture.backing.pin(pinned).expect("backed");

            // Some of it: the least recently used goes, and what is in use stays.
            let before = fixture.backing.stats();
            let some = before.committed_bytes / 4;
            let plan = cache.plan(some, f64::INFINITY);
            assert!(plan.is_enough(), "{shapes:?}");
            cache.commit(&mut fixture, &plan);
            let after = fixture.backing.stats();
            assert_eq!(
                before.committed_bytes - after.committed_bytes,
                plan.freed_bytes()
            );
            assert!(
                cache.bytes(&fixture, |cached| cached.users == 0) > 0,
                "still warm"
            );

            // All that evicting nothing gives: the cache stays warm as it is, packed.
            let cached = cache.cached.len();
            let plan = (cache.allocator).reclaim_candidates_with_moves(usize::MAX, 1.0, |_| None);
            cache.commit(&mut fixture, &plan);
            assert_eq!(cache.cached.len(), cached, "moved, not evicted");
            let most = |bytes: usize| bytes + bytes / 10 + tensors * PAGE + beyond_pages;
            let (kept, stats) = (cache.bytes(&fixture, |_| true), fixture.backing.stats());
            assert!(
                stats.committed_bytes <= most(kept),
                "{shapes:?}: {kept} kept, {stats}"
            );

            // And all of it: what is in use, or pinned, is left.
            let plan = cache.plan(usize::MAX, 1.0);
            cache.commit(&mut fixture, &plan);
            let live = cache.bytes(&fixture, |cached| cached.users > 0);
            let stats = fixture.backing.stats();
            assert!(
                stats.committed_bytes <= most(live),
                "{shapes:?}: {live} live, {stats}"
            );
            drop(pin);
        }
        drop(cache);
        fixture.end();
    }
}
