//! What the order of an engine's free list costs in memory: `docs/design/blocks.md` has the recipe.

use crate::common::{Simulated, manual, turn};
use crate::fixture::PAGE;
use cuda_vmm::pool::blocks::{
    BlockAllocator, BlockBacking, BlockId, ElementSize, LayerSpec, TensorSpec,
};
use cuda_vmm::sim::SimConfig;
use cuda_vmm::{Engine, Stream};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeSet, VecDeque};

const BLOCKS: usize = 4096;
const BLOCKS_OF_A_PAGE: usize = 64;

/// Where the next block comes from.
#[derive(Debug)]
enum FreeList {
    /// As engines have it that never give memory back: first in, first out.
    Queue(VecDeque<BlockId>),
    /// The same with two lines changed.
    Lowest(BTreeSet<BlockId>),
    Ours(BlockAllocator),
}

/// An engine's allocator, whose blocks are backed while they are in use.
struct Engines {
    free: FreeList,
    backing: BlockBacking,
}

impl Engines {
    fn allocate(&mut self) -> BlockId {
        let block = match &mut self.free {
            FreeList::Queue(free) => free.pop_front(),
            FreeList::Lowest(free) => free.pop_first(),
            FreeList::Ours(allocator) => return allocator.allocate(1).expect("room")[0],
        };
        let block = block.expect("there are enough");
        self.backing.back([block]).expect("room");
        block
    }

    fn free(&mut self, blocks: Vec<BlockId>) {
        match &mut self.free {
            FreeList::Queue(free) => free.extend(&blocks),
            FreeList::Lowest(free) => free.extend(&blocks),
            FreeList::Ours(allocator) => return allocator.free(blocks).expect("handed out"),
        }
        self.backing.unback(blocks).expect("backed");
    }
}

/// Pages that are committed at the end of a busy time and of a quiet one, and the fewest that the
/// blocks in use would fill then.
fn pages(free: impl Fn(&BlockBacking) -> FreeList) -> [(usize, usize); 2] {
    let simulated = Simulated::new(SimConfig::new().granularity_bytes(PAGE).unbacked());
    let engine = Engine::new(&simulated.device, manual()).expect("an engine");
    let stream = Stream::new(&simulated.device).expect("a stream");
    let shape = [PAGE / BLOCKS_OF_A_PAGE];
    let tensor = TensorSpec::new("k", &shape, ElementSize::new(1).expect("not zero"));
    let spec = LayerSpec::new([tensor.expect("small")]).expect("one tensor");
    let backing = BlockBacking::new(&engine, spec, BLOCKS, PAGE).expect("a backing");
    backing.use_stream(&stream).expect("of this device");
    let mut engines = Engines {
        free: free(&backing),
        backing,
    };
    let mut random = SmallRng::seed_from_u64(16);
    // Each sequence has blocks, and how many it will have. Most are short, and some are long.
    let mut sequences: Vec<(Vec<BlockId>, usize)> = Vec::new();
    let mut run = |running: usize, steps: usize| {
        for _ in 0..steps {
            for index in (0..sequences.len()).rev() {
                let (blocks, most) = &mut sequences[index];
                if blocks.len() < *most {
                    blocks.push(engines.allocate());
                } else {
                    let (blocks, _) = sequences.swap_remove(index);
                    engines.free(blocks);
                }
            }
            while sequences.len() < running {
                let most = 4 << random.random_range(0..6_u32);
                sequences.push((Vec::new(), random.random_range(most / 2..=most)));
            }
        }
        if let FreeList::Ours(allocator) = &engines.free {
            let plan = allocator.reclaim_candidates(usize::MAX, |_| None);
            allocator.commit(&plan, &stream).expect("true");
        }
        simulated.device.synchronize().expect("done");
        engine.step();
        let held: usize = sequences.iter().map(|(blocks, _)| blocks.len()).sum();
        let committed_pages = engine.stats().committed_bytes / PAGE;
        (committed_pages, held.div_ceil(BLOCKS_OF_A_PAGE))
    };
    [run(64, 300), run(8, 150)]
}

#[test]
fn the_lowest_free_block_leaves_pages_that_go_back_and_a_queue_does_not() {
    let _turn = turn();
    let queue = pages(|_| FreeList::Queue((0..BLOCKS).collect()));
    let lowest = pages(|_| FreeList::Lowest((0..BLOCKS).collect()));
    let ours = pages(|backing| FreeList::Ours(BlockAllocator::new(backing.clone())));
    // As many blocks are in use, whatever their numbers.
    println!("queue {queue:?}, lowest {lowest:?}, ours {ours:?}");
    for (at, tenths) in [(0, 15), (1, 80)] {
        let ((queued, least), (low, _), (packed, _)) = (queue[at], lowest[at], ours[at]);
        assert_eq!([lowest[at].1, ours[at].1], [least; 2]);
        assert!(10 * queued >= tenths * low, "{queue:?} {lowest:?}");
        assert!(
            packed <= low && 4 * low <= 5 * least + 4,
            "{lowest:?} {ours:?}"
        );
    }
}
