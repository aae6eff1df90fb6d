//! Blocks as kernels use them: written by `slice_set`, and read by `index_select` over a table, in
//! place of paged attention.

use crate::blocks::{pool, settle, wide};
use crate::common::{UnderTest, block_page, open};
use candle_core::{DType, Shape, Tensor};
use candle_cuda_vmm::ElasticBlocks;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;

/// Makes a block whose elements all are this number.
fn block_of(test: &UnderTest, shape: impl Into<Shape>, number: usize) -> Tensor {
    let number = Tensor::new(number as f32, &test.device).unwrap();
    let block = number.broadcast_as(shape).unwrap();
    block.unsqueeze(0).unwrap().contiguous().unwrap()
}

fn reserved(blocks: &ElasticBlocks) -> Vec<Tensor> {
    // SAFETY: the tests write, and read by tables, backed blocks only, all on Candle's stream.
    unsafe { blocks.reserved_tensors() }.unwrap()
}

/// Reads the first and the last element of each block of a table.
fn read(test: &UnderTest, blocks: &ElasticBlocks, tensor: &Tensor, table: &[usize]) -> Vec<f32> {
    blocks.check_table(table.iter().copied()).unwrap();
    let ids: Vec<u32> = table.iter().map(|block| *block as u32).collect();
    let ids = Tensor::new(ids, &test.device).unwrap();
    let found = tensor.index_select(&ids, 0).unwrap();
    let found = found.flatten_from(1).unwrap();
    let last = found.dims()[1] - 1;
    let ends = [0, last].map(|at| found.narrow(1, at, 1).unwrap());
    let ends = Tensor::cat(&ends, 1).unwrap();
    ends.flatten_all().unwrap().to_vec1::<f32>().unwrap()
}

#[test]
fn tables_are_read_where_nothing_is_between_the_blocks() {
    let test = open();
    let pool = pool(&test);
    let shapes: [&[usize]; 6] = [
        &[16, 8, 128],
        &[8, 16, 16, 8],
        &[8, 128, 16],
        &[8, 16, 128],
        &[16, 512],
        &[16, 64],
    ];
    let entries = shapes.iter().enumerate();
    let entries = entries.map(|(index, shape)| (index.to_string(), *shape, DType::F32));
    // 64 KiB and less each, so that pages are far apart.
    let blocks = pool.blocks(4096, entries).unwrap();
    let table = [4095, 0, 1700, 1701, 800];
    blocks.back(table).unwrap();
    for (index, tensor) in reserved(&blocks).iter().enumerate() {
        for block in table {
            let values = block_of(&test, shapes[index], block + index);
            tensor.slice_set(&values, 0, block).unwrap();
        }
        let expected = |block: &usize| [(block + index) as f32; 2];
        let found = read(&test, &blocks, tensor, &table);
        assert_eq!(found, table.iter().flat_map(expected).collect::<Vec<_>>());
    }
    // Each block lies in one page, or crosses into a second.
    let pages_max = 2 * table.len() * shapes.len();
    assert!(blocks.stats().committed_bytes <= pages_max * block_page());
}

#[test]
fn a_prefix_is_a_tensor_as_any_other() {
    let test = open();
    let pool = pool(&test);
    let blocks = pool.blocks(64, [("k", (4, 3), DType::F32)]).unwrap();
    blocks.back(0..5).unwrap();
    let prefix = blocks.prefix("k").unwrap();
    for block in 0..5 {
        let values = block_of(&test, (4, 3), block);
        prefix.slice_set(&values, 0, block).unwrap();
    }
    let sums = prefix.affine(2.0, 1.0).unwrap().sum((1, 2)).unwrap();
    assert_eq!(sums.to_vec1::<f32>().unwrap(), [12., 36., 60., 84., 108.]);
}

/// A prefix cache's record of a block that it holds.
struct Cached {
    block: usize,
    used: usize,
}

#[test]
fn a_prefix_cache_is_read_right_while_idle_blocks_move_and_go_back() {
    const PROMPTS: usize = 12;
    const PROMPT_BLOCKS: usize = 4;
    let test = open();
    let pool = pool(&test);
    let entries = [("k", wide(), DType::F32), ("v", wide(), DType::F32)];
    let blocks = pool.blocks(40, entries).unwrap();
    let tensors = reserved(&blocks);
    let mut random = StdRng::seed_from_u64(5);
    // Indexed by prompt and position. Blocks that are not in it are free.
    let mut cached: BTreeMap<(usize, usize), Cached> = BTreeMap::new();
    let (mut hits, mut moved, mut returned_bytes) = (0, 0, 0);
    for round in 0..150 {
        let prompt = random
            .random_range(0..PROMPTS)
            .min(random.random_range(0..PROMPTS));
        for place in 0..PROMPT_BLOCKS {
            if let Some(found) = cached.get_mut(&(prompt, place)) {
                (hits, found.used) = (hits + 1, round);
                blocks.back([found.block]).unwrap();
                continue;
            }
            let free = (0..40).find(|block| cached.values().all(|other| other.block != *block));
            // The least recently used block still has its contents.
            let block = free.unwrap_or_else(|| {
                let oldest = cached.iter().min_by_key(|(_, cached)| cached.used);
                let oldest = *oldest.unwrap().0;
                cached.remove(&oldest).unwrap().block
            });
            blocks.back([block]).unwrap();
            for (index, tensor) in tensors.iter().enumerate() {
                let number = 1000 * index + 10 * prompt + place;
                let values = block_of(&test, wide(), number);
                tensor.slice_set(&values, 0, block).unwrap();
            }
            cached.insert((prompt, place), Cached { block, used: round });
        }
        let table: Vec<_> = (0..PROMPT_BLOCKS)
            .map(|place| cached[&(prompt, place)].block)
            .collect();
        for (index, tensor) in tensors.iter().enumerate() {
            let expected: Vec<_> = (0..PROMPT_BLOCKS)
                .flat_map(|place| [(1000 * index + 10 * prompt + place) as f32; 2])
                .collect();
            assert_eq!(
                read(&test, &blocks, tensor, &table),
                expected,
                "round {round}"
            );
        }
        if round % 10 == 9 {
            let owner = |block| cached.values().find(|cached| cached.block == block);
            // A block that was just used is still in use: it may only be moved.
            let cost = |block| match owner(block) {
                Some(cached) if cached.used + 2 > round => None,
                Some(cached) => Some(1.0 + cached.used as f64),
                None => Some(0.0),
            };
            let bytes = random.random_range(1..30) * block_page();
            let plan = blocks.reclaim_candidates_with_moves(bytes, 1.0, cost);
            blocks.commit(&plan).unwrap();
            returned_bytes += plan.freed_bytes();
            moved += plan.moves().len();
            let gone = |block: &usize| {
                plan.evicted().contains(block) || plan.moves().iter().any(|(_, to)| to == block)
            };
            cached.retain(|_, cached| !gone(&cached.block));
            for cached in cached.values_mut() {
                if let Some((_, to)) = plan.moves().iter().find(|(from, _)| *from == cached.block) {
                    cached.block = *to;
                }
            }
        }
    }
    assert!(
        hits > 50 && moved > 0 && returned_bytes > 0,
        "{hits} {moved}"
    );
    // Idle: blocks that are read often are kept.
    let idle = blocks.reclaim_candidates(usize::MAX, |block| {
        let warm = cached
            .iter()
            .any(|((prompt, _), cached)| *prompt == 0 && cached.block == block);
        (!warm).then_some(0.0)
    });
    let before = blocks.stats().committed_bytes;
    blocks.commit(&idle).unwrap();
    settle(&blocks, before - idle.freed_bytes());
    let warm: Vec<_> = cached
        .iter()
        .filter(|((prompt, _), _)| *prompt == 0)
        .collect();
    for ((_, place), cached) in warm {
        let found = read(&test, &blocks, &tensors[1], &[cached.block]);
        assert_eq!(found, [(1000 + place) as f32; 2]);
    }
}
