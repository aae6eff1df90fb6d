//! Three complete workloads: more addresses than memory, two models under one limit, and a cache
//! that grows token by token.

use crate::bytes::{expect_pattern, pattern, write};
use crate::common::{GIB, GRANULE, MIB, open, page, refused_with};
use candle_cuda_vmm::cuda_vmm::Stream;
use candle_cuda_vmm::{SharedMemoryPool, VirtualMemoryPool, VmmError};
use std::collections::BTreeSet;

/// Allocated bytes. Both ends are written, up to 1 MiB each.
#[derive(Clone, Copy)]
struct Block {
    address: usize,
    size: usize,
}

impl Block {
    fn new(address: usize, size: usize, stream: &Stream) -> Self {
        let block = Self { address, size };
        for (address, size) in block.ends() {
            write(stream, address, &pattern(address, size));
        }
        block
    }

    /// Returns the offsets of the two ends, and their length. They do not overlap.
    fn ends(self) -> [(usize, usize); 2] {
        let half = self.size / 2;
        let (first, last) = (half.min(MIB), (self.size - half).min(MIB));
        [
            (self.address, first),
            (self.address + self.size - last, last),
        ]
    }

    #[track_caller]
    fn expect_kept(self, stream: &Stream) {
        for (address, size) in self.ends() {
            expect_pattern(stream, address, address, size);
        }
    }

    fn is_apart_from(self, other: Self) -> bool {
        self.address + self.size <= other.address || other.address + other.size <= self.address
    }
}

#[test]
fn a_pool_of_128_gib_is_backed_where_it_is_used_and_only_there() {
    let test = open();
    let stream = Stream::new(&test.core).unwrap();
    let (free, page, total) = (test.free_bytes(), page(), test.core.total_bytes());
    // For a GPU of 80 GB. A larger one gets more, so that it also has more addresses than memory.
    let capacity = (128 * GIB).max((total + total / 2).next_multiple_of(GIB));
    let mut pool = VirtualMemoryPool::new(capacity, page, test.device.clone()).unwrap();
    assert_eq!(pool.capacity(), capacity);
    assert_eq!(pool.page_size(), page);
    assert_eq!(pool.physical_memory_usage(), 0);
    test.expect_in_use(free, 0);

    // The quick start.
    let address = pool.allocate(0, GIB).unwrap();
    assert_eq!(address, pool.base_address());
    assert_eq!(pool.physical_memory_usage(), GIB);
    test.expect_in_use(free, GIB);
    pool.deallocate(0, GIB).unwrap();
    assert_eq!(pool.physical_memory_usage(), 0);

    // The beginning, two bytes on two pages, three pages' length on four pages, and the end.
    let places = [
        (0, GIB, GIB / page),
        (8 * GIB - 1, 2, 2),
        (16 * GIB + 5, 3 * page, 4),
        (capacity - 2 * page, 2 * page, 2),
    ];
    let mut blocks = Vec::new();
    let (mut live_bytes, mut live_pages) = (0, 0);
    for (offset, size, pages) in places {
        assert!(!pool.is_mapped(offset, 1));
        let address = pool.allocate(offset, size).unwrap();
        assert_eq!(address, pool.base_address() + offset);
        assert!(pool.is_mapped(offset, size));
        blocks.push(Block::new(address, size, &stream));
        live_bytes += size;
        live_pages += pages;
        assert_eq!(pool.physical_memory_usage(), live_pages * page);
        assert_eq!(pool.stats().mapped_pages, live_pages);
        assert_eq!(pool.detailed_stats().live_bytes, live_bytes);
        assert!(free - test.free_bytes() >= live_pages * page);
    }
    assert!(!pool.is_mapped(GIB, 1) && !pool.is_mapped(capacity - 2 * page - 1, 1));
    blocks.iter().for_each(|block| block.expect_kept(&stream));

    // There are addresses for all of the GPU's memory, but not enough memory.
    let all = total - total % page;
    let before = pool.detailed_stats();
    refused_with(
        pool.allocate(20 * GIB, all),
        VmmError::OutOfPhysicalMemory {
            requested: all,
            available: total - live_pages * page,
        },
    );
    assert_eq!(pool.detailed_stats(), before);
    assert!(!pool.is_mapped(20 * GIB, 1));
    blocks.iter().for_each(|block| block.expect_kept(&stream));

    for (offset, size, pages) in places {
        pool.deallocate(offset, size).unwrap();
        live_pages -= pages;
        assert_eq!(pool.physical_memory_usage(), live_pages * page);
    }
    assert_eq!(pool.detailed_stats().live_bytes, 0);
    drop(pool);
    test.expect_in_use(free, 0);
}

/// Two models of a shared pool, with their allocations.
struct Models {
    pool: SharedMemoryPool,
    stream: Stream,
    blocks: [Vec<Block>; 2],
}

impl Models {
    const NAMES: [&str; 2] = ["llama-7b", "gpt2"];
    const CAPACITIES: [usize; 2] = [64 * GIB, 32 * GIB];

    fn give(&mut self, model: usize, size: usize) {
        let name = Self::NAMES[model];
        let address = self.pool.allocate_for_model(name, size).unwrap();
        let base = self.pool.model_base_address(name).unwrap();
        assert!(address >= base && address + size <= base + Self::CAPACITIES[model]);
        let block = Block::new(address, size, &self.stream);
        let mut others = self.blocks.iter().flatten();
        assert!(others.all(|other| block.is_apart_from(*other)));
        self.blocks[model].push(block);
        self.expect_exact();
    }

    fn take_back_last(&mut self, model: usize) {
        let block = self.blocks[model].pop().unwrap();
        self.pool
            .deallocate_for_model_address(Self::NAMES[model], block.address, block.size)
            .unwrap();
        self.expect_exact();
    }

    /// Requests more than is left of the limit, and checks that nothing changes.
    fn expect_refused(&mut self, model: usize, requested: usize, available: usize) {
        let before = self.pool.detailed_stats();
        refused_with(
            self.pool.allocate_for_model(Self::NAMES[model], requested),
            VmmError::OutOfPhysicalMemory {
                requested,
                available,
            },
        );
        assert_eq!(self.pool.detailed_stats(), before);
        self.expect_exact();
    }

    /// Fails unless each model uses exactly its allocations and finds there what was written.
    fn expect_exact(&self) {
        let mut together = 0;
        for (model, name) in Self::NAMES.into_iter().enumerate() {
            let bytes: usize = self.blocks[model].iter().map(|block| block.size).sum();
            let stats = self.pool.get_model_stats(name).unwrap();
            assert_eq!(stats.virtual_capacity, Self::CAPACITIES[model]);
            assert_eq!(stats.physical_usage, bytes, "{name}");
            assert_eq!(stats.mapped_pages, bytes / GRANULE, "{name}");
            together += bytes;
        }
        assert_eq!(self.pool.global_stats().physical_usage, together);
        for block in self.blocks.iter().flatten() {
            block.expect_kept(&self.stream);
        }
    }
}

#[test]
fn two_models_share_32_gib_and_what_one_gives_back_the_other_gets() {
    const LIMIT: usize = 32 * GIB;
    const LLAMA: usize = 0;
    const GPT: usize = 1;
    let test = open();
    let free = test.free_bytes();
    let mut pool = SharedMemoryPool::new(LIMIT, test.device.clone()).unwrap();
    for (name, capacity) in Models::NAMES.into_iter().zip(Models::CAPACITIES) {
        pool.register_model(name, capacity).unwrap();
    }
    assert_eq!(pool.global_stats().num_models, 2);
    let mut models = Models {
        pool,
        stream: Stream::new(&test.core).unwrap(),
        blocks: Default::default(),
    };
    models.expect_exact();

    // One grows to most of the limit, and too little is left for the other.
    for _ in 0..7 {
        models.give(LLAMA, 4 * GIB);
    }
    models.expect_refused(GPT, 8 * GIB, 4 * GIB);
    models.give(GPT, 4 * GIB);
    assert_eq!(models.pool.global_stats().physical_usage, LIMIT);
    models.expect_refused(GPT, GIB, 0);
    models.expect_refused(LLAMA, GIB, 0);

    // The first frees memory, and the second gets it.
    models.take_back_last(LLAMA);
    models.take_back_last(LLAMA);
    models.give(GPT, 8 * GIB);
    assert_eq!(models.pool.global_stats().physical_usage, LIMIT);
    models.expect_refused(LLAMA, GIB, 0);

    // The same in the other direction, until the first has everything.
    models.take_back_last(GPT);
    models.take_back_last(GPT);
    models.give(LLAMA, 12 * GIB);
    let usage = |name| models.pool.get_model_stats(name).unwrap().physical_usage;
    assert_eq!(Models::NAMES.map(usage), [LIMIT, 0]);
    test.expect_in_use(free, LIMIT);

    for (index, name) in Models::NAMES.into_iter().enumerate() {
        models.pool.unregister_model(name).unwrap();
        assert!(models.pool.get_model_stats(name).is_none());
        let stats = models.pool.global_stats();
        assert_eq!((stats.num_models, stats.physical_usage), (1 - index, 0));
    }
    drop(models);
    test.expect_in_use(free, 0);
}

/// K and V of several layers, in adjacent ranges. Each grows by tokens.
struct Cache {
    pool: VirtualMemoryPool,
    stream: Stream,
    token_bytes: usize,
    /// For each range, the bytes that were written to its live tokens.
    seeds: [Vec<usize>; Cache::RANGES],
}

impl Cache {
    const LAYERS: usize = 3;
    const RANGES: usize = 2 * Cache::LAYERS;
    const TOKENS: usize = 24;

    fn offset(&self, range: usize, token: usize) -> usize {
        (range * Self::TOKENS + token) * self.token_bytes
    }

    fn tokens(&self) -> usize {
        self.seeds[0].len()
    }

    /// Adds a token to K and V of every layer. Different generations write different bytes.
    fn push(&mut self, generation: usize) {
        for range in 0..Self::RANGES {
            let token = self.seeds[range].len();
            let offset = self.offset(range, token);
            let address = self.pool.allocate(offset, self.token_bytes).unwrap();
            assert_eq!(address, self.pool.base_address() + offset);
            let seed = (generation * Self::RANGES + range) * Self::TOKENS + token;
            write(&self.stream, address, &pattern(seed, self.token_bytes));
            self.seeds[range].push(seed);
            self.expect_exact_usage();
        }
    }

    /// Frees the last tokens of K and V of every layer, each with one call.
    fn truncate(&mut self, tokens: usize) {
        for range in 0..Self::RANGES {
            let gone = self.seeds[range].len() - tokens;
            let offset = self.offset(range, tokens);
            self.pool
                .deallocate(offset, gone * self.token_bytes)
                .unwrap();
            self.seeds[range].truncate(tokens);
            assert!(!self.pool.is_mapped(offset, 1));
            self.expect_exact_usage();
        }
    }

    /// Fails unless exactly the pages that live tokens touch are in use.
    fn expect_exact_usage(&self) {
        let page = self.pool.page_size();
        let mut pages = BTreeSet::new();
        let mut live_bytes = 0;
        for (range, seeds) in self.seeds.iter().enumerate() {
            for token in 0..seeds.len() {
                let first = self.offset(range, token);
                let last = first + self.token_bytes - 1;
                pages.extend(first / page..=last / page);
                live_bytes += self.token_bytes;
            }
        }
        assert_eq!(self.pool.physical_memory_usage(), pages.len() * page);
        assert_eq!(self.pool.stats().mapped_pages, pages.len());
        assert_eq!(self.pool.detailed_stats().live_bytes, live_bytes);
    }

    /// Fails unless every byte of every live token is the last one written.
    fn expect_every_byte(&self) {
        for (range, seeds) in self.seeds.iter().enumerate() {
            for (token, seed) in seeds.iter().enumerate() {
                let offset = self.offset(range, token);
                assert!(self.pool.is_mapped(offset, self.token_bytes));
                let address = self.pool.base_address() + offset;
                expect_pattern(&self.stream, address, *seed, self.token_bytes);
            }
        }
    }
}

#[test]
fn a_cache_of_several_layers_grows_token_by_token_and_is_truncated_and_grown_again() {
    let test = open();
    let free = test.free_bytes();
    // A little over 300 KiB if a page has 2 MiB: several per page, and some across two.
    let token_bytes = 75 * page() / 512 + 7;
    let capacity = Cache::RANGES * Cache::TOKENS * token_bytes;
    let mut cache = Cache {
        pool: VirtualMemoryPool::new(capacity, page(), test.device.clone()).unwrap(),
        stream: Stream::new(&test.core).unwrap(),
        token_bytes,
        seeds: Default::default(),
    };
    while cache.tokens() < Cache::TOKENS {
        cache.push(0);
    }
    cache.expect_every_byte();

    cache.truncate(15);
    cache.expect_every_byte();
    cache.truncate(14);
    while cache.tokens() < Cache::TOKENS {
        cache.push(1);
    }
    cache.expect_every_byte();

    cache.truncate(0);
    assert_eq!(cache.pool.physical_memory_usage(), 0);
    while cache.tokens() < 3 {
        cache.push(2);
    }
    cache.expect_every_byte();
    drop(cache);
    test.expect_in_use(free, 0);
}
