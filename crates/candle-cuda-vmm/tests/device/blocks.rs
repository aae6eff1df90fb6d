//! Tensors of paged caches. Nothing here launches kernels: on a GPU blocks are written as bytes.

use crate::bytes;
use crate::common::{UnderTest, block_page, open, settle_to};
use candle_core::{DType, Device, Error, Shape, Tensor};
use candle_cuda_vmm::cuda_vmm::pool::blocks::BlockError;
use candle_cuda_vmm::cuda_vmm::{self, EngineOptions, Stream, WorkerMode};
use candle_cuda_vmm::{
    ElasticBlocks, ElasticBlocksOptions, HostStore, Keep, TensorPool, TensorPoolOptions, VmmError,
    WakeOptions,
};
use std::time::{Duration, Instant};

fn options() -> TensorPoolOptions {
    TensorPoolOptions::new().page_bytes(block_page())
}

pub fn pool(test: &UnderTest) -> TensorPool {
    TensorPool::with_options(&test.device, options()).unwrap()
}

/// Returns a block shape of `f32` with a little over a third of a page.
pub fn wide() -> (usize, usize) {
    (block_page() / 4 / 3 / 8 + 3, 8)
}

/// Lets the engine free retiring memory.
#[track_caller]
pub fn settle(blocks: &ElasticBlocks, bytes_max: usize) {
    let until = Instant::now() + Duration::from_secs(60);
    while blocks.stats().committed_bytes > bytes_max {
        assert!(Instant::now() < until, "{}", blocks.stats());
        blocks.pool().device().synchronize().unwrap();
        blocks.engine().step();
    }
}

/// Returns the address of the first element of a tensor of `f32`.
fn address(tensor: &Tensor) -> usize {
    let (storage, layout) = tensor.storage_and_layout();
    let offset_bytes = layout.start_offset() * 4;
    match &*storage {
        #[cfg(feature = "cuda")]
        candle_core::Storage::Cuda(storage) => {
            use candle_core::cuda::cudarc::driver::DevicePtr;
            let slice = storage.as_cuda_slice::<f32>().unwrap();
            slice.device_ptr(slice.stream()).0 as usize + offset_bytes
        }
        candle_core::Storage::Cpu(storage) => {
            storage.as_slice::<f32>().unwrap().as_ptr() as usize + offset_bytes
        }
        _ => panic!("the tests have no such device"),
    }
}

fn numbers(seed: usize, elements: usize) -> Vec<f32> {
    (0..elements)
        .map(|element| (seed * 1000 + element % 997) as f32)
        .collect()
}

/// Writes a seed's numbers to a block of a tensor `[n, …]` of `f32`.
fn write(test: &UnderTest, tensor: &Tensor, block: usize, seed: usize) {
    let place = tensor.narrow(0, block, 1).unwrap();
    let numbers = numbers(seed, place.elem_count());
    if test.device.is_cuda() {
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_ne_bytes()).collect();
        test.device.synchronize().unwrap();
        let stream = Stream::new(&test.core).unwrap();
        bytes::write(&stream, address(&place), &bytes);
        stream.record().unwrap().wait().unwrap();
    } else {
        let values = Tensor::from_vec(numbers, place.shape(), &Device::Cpu).unwrap();
        tensor.slice_set(&values, 0, block).unwrap();
    }
}

/// Fails unless a backed block holds a seed's numbers. Candle reads whole storages, so the block is
/// copied first.
#[track_caller]
fn expect(tensor: &Tensor, block: usize, seed: usize) {
    let there = tensor.narrow(0, block, 1).unwrap();
    let there = there.force_contiguous().unwrap().flatten_all().unwrap();
    let same = there.to_vec1::<f32>().unwrap() == numbers(seed, there.elem_count());
    assert!(same, "block {block} has other numbers than those of {seed}");
}

fn reserved(blocks: &ElasticBlocks) -> Vec<Tensor> {
    // SAFETY: the tests touch backed blocks only, one by one.
    unsafe { blocks.reserved_tensors() }.unwrap()
}

#[test]
fn tensors_have_the_shapes_that_paged_engines_have() {
    let test = open();
    let pool = pool(&test);
    // [n, size, heads, dim]; [n, heads, dim/x, size, x] with [n, heads, dim, size]; [n, heads,
    // size, dim]; and MLA.
    let engines: [[&[usize]; 2]; 4] = [
        [&[16, 8, 128], &[16, 8, 128]],
        [&[8, 16, 16, 8], &[8, 128, 16]],
        [&[8, 16, 128], &[8, 16, 128]],
        [&[16, 512], &[16, 64]],
    ];
    for shapes in engines {
        for dtype in [DType::F16, DType::BF16, DType::F32, DType::F8E4M3] {
            let entries = ["k", "v"].into_iter().zip(shapes);
            let entries = entries.map(|(name, shape)| (name, shape, dtype));
            let blocks = pool.blocks(300, entries).unwrap();
            assert!(blocks.names().eq(["k", "v"]));
            for (tensor, shape) in reserved(&blocks).iter().zip(shapes) {
                assert_eq!(tensor.dims()[0], 300);
                assert_eq!((&tensor.dims()[1..], tensor.dtype()), (shape, dtype));
            }
            for count in [0, 1, 7, 300] {
                blocks.back(0..count).unwrap();
                for (index, name) in ["k", "v"].into_iter().enumerate() {
                    let prefix = blocks.prefix(name).unwrap();
                    assert_eq!(prefix.dims()[0], count);
                    assert_eq!(
                        (&prefix.dims()[1..], prefix.dtype()),
                        (shapes[index], dtype)
                    );
                    assert!(prefix.is_contiguous());
                    assert_eq!(blocks.prefix_of(index).unwrap().dims(), prefix.dims());
                }
            }
        }
    }
}

#[test]
fn a_prefix_ends_at_the_first_gap_and_shows_what_is_written() {
    let test = open();
    let pool = pool(&test);
    let blocks = pool.blocks(32, [("k", wide(), DType::F32), ("v", wide(), DType::F32)]);
    let blocks = blocks.unwrap();
    blocks.back([0, 1, 2, 3, 5]).unwrap();
    assert_eq!((blocks.num_blocks(), blocks.backed_prefix()), (32, 4));
    let all = reserved(&blocks);
    for (index, tensor) in all.iter().enumerate() {
        for block in [0, 1, 2, 3, 5] {
            write(&test, tensor, block, 100 * index + block);
        }
    }
    for (index, whole) in all.iter().enumerate() {
        let prefix = blocks.prefix_of(index).unwrap();
        assert_eq!(prefix.dims()[0], 4);
        for block in 0..4 {
            expect(&prefix, block, 100 * index + block);
        }
        // The view and the whole tensor have the same addresses, and share their contents.
        assert_eq!(address(&prefix), address(whole));
        write(&test, &prefix, 2, 7);
        expect(whole, 2, 7);
    }
    // The gap is closed, and the blocks behind it are in the prefix.
    blocks.back([4]).unwrap();
    let prefix = blocks.prefix("v").unwrap();
    assert_eq!(prefix.dims()[0], 6);
    expect(&prefix, 5, 105);
    expect(&prefix, 2, 7);
    blocks.unback([0]).unwrap();
    assert_eq!(blocks.prefix("v").unwrap().dims()[0], 0);
    let again = reserved(&blocks);
    assert!(all.iter().map(address).eq(again.iter().map(address)));
    expect(&again[0], 5, 5);
}

#[test]
fn memory_follows_what_is_backed_and_moved_blocks_keep_what_they_hold() {
    let test = open();
    let pool = pool(&test);
    let blocks = pool.blocks(64, [("k", wide(), DType::F32), ("v", wide(), DType::F32)]);
    let blocks = blocks.unwrap();
    assert_eq!(blocks.stats().committed_bytes, 0);
    blocks.back(0..64).unwrap();
    let all = reserved(&blocks);
    let used: Vec<_> = (0..64).step_by(4).collect();
    for block in &used {
        for (index, tensor) in all.iter().enumerate() {
            write(&test, tensor, *block, 100 * index + block);
        }
    }
    let busy_bytes = blocks.stats().committed_bytes;
    assert!(busy_bytes >= 64 * blocks.stats().block_bytes);
    let cost = |block: usize| (!block.is_multiple_of(4)).then_some(0.0);
    let plan = blocks.reclaim_candidates_with_moves(usize::MAX, 1.0, cost);
    assert!(!plan.moves().is_empty());
    blocks.commit(&plan).unwrap();
    let mut table = used.clone();
    for block in &mut table {
        if let Some((_, to)) = plan.moves().iter().find(|(from, _)| from == block) {
            *block = *to;
        }
    }
    blocks.check_table(table.iter().copied()).unwrap();
    for (block, before) in table.iter().zip(&used) {
        for (index, tensor) in all.iter().enumerate() {
            expect(tensor, *block, 100 * index + before);
        }
    }
    settle(&blocks, busy_bytes - plan.freed_bytes());
    // The sixteen in use, and a page or two at each of their ends in both tensors.
    let least = 16 * blocks.stats().block_bytes;
    assert!(blocks.stats().committed_bytes <= least + 4 * block_page());
    let last = blocks.reclaim_candidates(usize::MAX, |_| Some(0.0));
    blocks.commit(&last).unwrap();
    settle(&blocks, 0);
    assert_eq!(blocks.stats().backed_blocks, 0);
}

#[test]
fn what_a_living_prefix_shows_stays_and_what_it_has_is_given_to_no_other() {
    let test = open();
    if !test.device.is_cuda() {
        // On the CPU a Candle tensor keeps its memory, which is overwritten.
        return;
    }
    let pool = pool(&test);
    let blocks = pool.blocks(48, [("k", wide(), DType::F32)]).unwrap();
    blocks.back(0..12).unwrap();
    for block in 0..12 {
        write(&test, &blocks.prefix("k").unwrap(), block, block);
    }
    let prefix = blocks.prefix("k").unwrap();
    let part = prefix.narrow(0, 3, 4).unwrap();
    drop(prefix);
    // Blocks behind the prefix could empty pages by moving into it.
    blocks.back(12..48).unwrap();
    let cost = |block: usize| (block < 40).then_some(0.0);
    let plan = blocks.reclaim_candidates_with_moves(usize::MAX, 1.0, cost);
    let to = plan.moves().iter().map(|(_, to)| to);
    assert!(plan.evicted().iter().chain(to).all(|block| *block >= 12));
    blocks.commit(&plan).unwrap();
    blocks.unback(0..12).unwrap();
    settle(&blocks, 25 * block_page());
    let refused = blocks.back([5]).unwrap_err();
    assert!(
        matches!(refused, VmmError::Vmm(cuda_vmm::VmmError::Leased { .. })),
        "{refused}"
    );
    for block in 0..4 {
        expect(&part, block, 3 + block);
    }
    let rest = blocks.reclaim_candidates(usize::MAX, |_| Some(0.0));
    blocks.commit(&rest).unwrap();
    let engine = blocks.engine().clone();
    drop((blocks, pool));
    for block in 0..4 {
        expect(&part, block, 3 + block);
    }
    drop(part);
    settle_to(&test.device, &engine, 0);
}

#[test]
fn pinned_blocks_stay_whatever_else_goes() {
    let test = open();
    let pool = pool(&test);
    let blocks = pool.blocks(16, [("k", wide(), DType::F32)]).unwrap();
    blocks.back(0..16).unwrap();
    let pin = blocks.pin_for_graph([3, 9]).unwrap();
    let plan = blocks.reclaim_candidates(usize::MAX, |_| Some(0.0));
    assert!(plan.evicted().iter().all(|block| ![3, 9].contains(block)));
    blocks.commit(&plan).unwrap();
    blocks.check_table([9, 3]).unwrap();
    let error = blocks.unback([3]).unwrap_err();
    expect_block(Err(error), BlockError::Pinned { block: 3 });
    let other = blocks.clone();
    drop(blocks);
    assert_eq!(other.stats().pinned_blocks, 2);
    drop(pin);
    assert_eq!(other.stats().pinned_blocks, 0);
}

#[track_caller]
fn expect_block(outcome: Result<(), VmmError>, error: BlockError) {
    let expected = Err::<(), _>(VmmError::Vmm(cuda_vmm::VmmError::Block(error)));
    assert_eq!(format!("{outcome:?}"), format!("{expected:?}"));
}

#[test]
fn what_cannot_be_is_refused_by_its_values() {
    let test = open();
    let limit = EngineOptions::new().limit_bytes(8 * block_page());
    let pool = TensorPool::with_options(&test.device, options().engine(limit)).unwrap();
    let made = |blocks, shape: &[usize], dtype| {
        let entries = [("k", Shape::from(shape), dtype)];
        pool.blocks(blocks, entries).map(drop)
    };
    let zero = |outcome: Result<(), VmmError>, what| {
        let expected = Err::<(), _>(VmmError::Vmm(cuda_vmm::VmmError::ZeroSize { what }));
        assert_eq!(format!("{outcome:?}"), format!("{expected:?}"));
    };
    zero(made(0, &[4], DType::F32), "number of blocks");
    zero(made(3, &[4, 0], DType::F32), "dimension of a block");
    let none: [(&str, usize, DType); 0] = [];
    zero(pool.blocks(3, none).map(drop), "number of tensors");
    for dtype in [DType::F6E2M3, DType::F6E3M2, DType::F4, DType::F8E8M0] {
        assert!(matches!(
            made(3, &[4], dtype),
            Err(VmmError::CandleError(Error::UnsupportedDTypeForOp(given, "elastic-blocks"))) if given == dtype
        ));
    }
    let twice = pool.blocks(3, [("k", 4, DType::F32), ("k", 4, DType::F32)]);
    let tensor = "k".to_owned();
    expect_block(twice.map(drop), BlockError::DuplicateTensor { tensor });
    let (what, count, each_bytes) = ("tensor", usize::MAX, 16);
    let error = BlockError::Overflow {
        what,
        count,
        each_bytes,
    };
    expect_block(made(usize::MAX, &[4], DType::F32), error);

    let blocks = pool.blocks(64, [("k", wide(), DType::F32)]).unwrap();
    blocks.back([0, 1, 4]).unwrap();
    let tensor = "value".to_owned();
    let error = BlockError::UnknownTensor { tensor };
    expect_block(blocks.prefix("value").map(drop), error);
    let (tensor, tensors) = (1, 1);
    let error = BlockError::InvalidTensor { tensor, tensors };
    expect_block(blocks.prefix_of(1).map(drop), error);
    let invalid = |block| BlockError::Invalid { block, blocks: 64 };
    let bare = |block| BlockError::NotBacked { block };
    // The first invalid block, in the order of the table.
    blocks.check_table([4, 0, 1, 1]).unwrap();
    expect_block(blocks.check_table([4, 3, 64, 2]), bare(3));
    expect_block(blocks.check_table([4, 70, 2, 64]), invalid(70));
    expect_block(blocks.back([2, 64]), invalid(64));
    expect_block(blocks.unback([0, 3]), bare(3));
    expect_block(blocks.pin([0, 3]).map(drop), bare(3));
    expect_block(
        blocks.pin_for_graph([usize::MAX]).map(drop),
        invalid(usize::MAX),
    );
    let error = blocks.back(0..64).unwrap_err();
    assert!(
        matches!(
            error,
            VmmError::Vmm(cuda_vmm::VmmError::OutOfPhysicalMemory { .. })
        ),
        "{error}"
    );
    let plan = blocks.reclaim_candidates(usize::MAX, |_| Some(0.0));
    blocks.back([1]).unwrap();
    let stale = BlockError::StalePlan { block: 1 };
    expect_block(blocks.commit(&plan), stale);
    let other = pool.blocks(64, [("k", wide(), DType::F32)]).unwrap();
    expect_block(other.commit(&plan), BlockError::ForeignPlan);
    assert_eq!(blocks.stats().backed_blocks, 3, "nothing has changed");
}

#[test]
fn steps_of_three_paged_caches_find_their_memory_made_ahead() {
    let test = open();
    let engine = EngineOptions::new().worker(WorkerMode::Manual);
    let pool = TensorPool::with_options(&test.device, options().engine(engine)).unwrap();
    let ahead = ElasticBlocksOptions::new().ahead_blocks_max(128);
    let caches = [(); 3].map(|()| {
        let entries = ["k", "v"].map(|name| (name, wide(), DType::F32));
        pool.blocks_with_options(512, entries, ahead).unwrap()
    });
    let allocators = [0, 1, 2].map(|cache| caches[cache].allocator());
    // 43 sequences in each, of many ages, of which each gets a block in every fourth step.
    let mut sequences: Vec<_> = (0..3 * 43).map(|age| (age, Vec::new())).collect();
    pool.engine().step();
    for step in 0..64 {
        for (index, (age, table)) in sequences.iter_mut().enumerate() {
            let (cache, allocator) = (&caches[index % 3], &allocators[index % 3]);
            *age += 1;
            if *age % 31 == 0 {
                allocator.free(table.drain(..)).unwrap();
            } else if *age % 4 == 0 {
                table.extend(allocator.allocate(1).unwrap());
            }
            cache.check_table(table.iter().copied()).unwrap();
        }
        if step % 16 == 15 {
            let plan = allocators[step / 16 % 3].reclaim_candidates(usize::MAX, |_| None);
            allocators[step / 16 % 3].commit(&plan).unwrap();
        }
        pool.device().synchronize().unwrap();
        pool.engine().step();
    }
    let counters = pool.engine().counters();
    assert_eq!(counters.ranges.late_prefetches, 0, "{counters:?}");
    // An engine with an allocator of its own names the blocks.
    caches[0].prefetch([500, 300]).unwrap();
    pool.engine().step();
    caches[0].back([300]).unwrap();
    caches[0].back([500]).unwrap();
    assert_eq!(pool.engine().counters().ranges.late_prefetches, 0);
    let (block, blocks) = (512, 512);
    expect_block(
        caches[0].prefetch([3, 512]),
        BlockError::Invalid { block, blocks },
    );
    // Nothing is made ahead unless that is asked for.
    let without = pool.blocks(512, [("k", wide(), DType::F32)]).unwrap();
    let ahead_bytes = pool.engine().stats().parts.ahead_bytes;
    without.prefetch([3]).unwrap();
    pool.engine().step();
    assert_eq!(pool.engine().stats().parts.ahead_bytes, ahead_bytes);
}

#[test]
fn blocks_that_are_backed_anew_are_zero_if_that_is_asked_for() {
    let test = open();
    // Freed pages stay mapped, with what was written there.
    let engine = EngineOptions::new().park_bytes_max(64 * block_page());
    let pool = TensorPool::with_options(&test.device, options().engine(engine)).unwrap();
    let zeroed = |blocks| {
        let zero = ElasticBlocksOptions::new().zero_on_back(true);
        let entries = [("k", wide(), DType::F32), ("v", wide(), DType::F32)];
        pool.blocks_with_options(blocks, entries, zero).unwrap()
    };
    let is_zero = |tensor: &Tensor, block: usize| {
        let there = tensor.narrow(0, block, 1).unwrap();
        let there = there.force_contiguous().unwrap().flatten_all().unwrap();
        there
            .to_vec1::<f32>()
            .unwrap()
            .iter()
            .all(|element| *element == 0.0)
    };
    let blocks = zeroed(16);
    let all = reserved(&blocks);
    let fill = |block: usize| {
        all.iter()
            .for_each(|tensor| write(&test, tensor, block, 7 + block))
    };
    let check = |block: usize, zero: bool| {
        for tensor in &all {
            assert_eq!(is_zero(tensor, block), zero, "block {block}");
        }
    };
    blocks.back(0..16).unwrap();
    for block in 0..16 {
        check(block, true);
        fill(block);
    }
    blocks
        .unback((0..16).filter(|block| block % 3 != 1))
        .unwrap();
    drop(blocks.try_reserve([0]).unwrap());
    blocks.back([0, 1]).unwrap();
    blocks.try_reserve([2, 3]).unwrap().keep();
    blocks.back_timeout(0..16, Duration::from_secs(60)).unwrap();
    (0..16).for_each(|block| check(block, block % 3 != 1));
    (0..16).for_each(fill);
    // One is in use and moves, and a plan gives the others up.
    let cost = |block: usize| (block != 12).then_some(0.0);
    let plan = blocks.reclaim_candidates_with_moves(usize::MAX, 1.0, cost);
    blocks.commit(&plan).unwrap();
    blocks.back(0..16).unwrap();
    let gone = |block: &usize| {
        let mut sources = plan.moves().iter().map(|(from, _)| from);
        plan.evicted().contains(block) || sources.any(|from| from == block)
    };
    assert!((0..16).any(|block| gone(&block)));
    (0..16).for_each(|block| check(block, gone(&block)));
    // An allocator backs what a plan of its own gave up.
    let other = zeroed(4);
    let allocator = other.allocator();
    for block in allocator.allocate(4).unwrap() {
        write(&test, &reserved(&other)[0], block, 7);
    }
    allocator.free(0..4).unwrap();
    let plan = allocator.reclaim_candidates(usize::MAX, |_| None);
    allocator.commit(&plan).unwrap();
    allocator.allocate(4).unwrap();
    assert!((0..4).all(|block| is_zero(&other.prefix("k").unwrap(), block)));
}

#[test]
fn layers_without_blocks_are_empty_tensors_in_their_places() {
    let test = open();
    let pool = pool(&test);
    // Of eight layers every fourth attends, the last with other heads. The others keep a state of
    // their own. The engine's list has a pair for each layer, by its number.
    let shapes = |layer: usize| match layer {
        3 => [vec![8, 16, 16, 8], vec![8, 128, 16]],
        7 => [vec![4, 32, 16, 8], vec![4, 256, 16]],
        _ => [vec![0, 16, 16, 8], vec![0, 128, 16]],
    };
    let attends = |layer: &usize| layer % 4 == 3;
    let entries = (0..8).filter(attends).flat_map(|layer| {
        let names = ["k", "v"].map(|part| format!("{layer}.{part}"));
        let entries = names.into_iter().zip(shapes(layer));
        entries.map(|(name, shape)| (name, shape, DType::F16))
    });
    let blocks = pool.blocks(300, entries).unwrap();
    assert!(blocks.names().eq(["3.k", "3.v", "7.k", "7.v"]));
    let mut all = reserved(&blocks).into_iter();
    let cache = (0..8).map(|layer| {
        shapes(layer).map(|shape| match attends(&layer) {
            true => all.next().unwrap(),
            false => {
                let shape = [&[0], &shape[..]].concat();
                // Never read, so on any device.
                Tensor::zeros(shape, DType::F16, &Device::Cpu).unwrap()
            }
        })
    });
    let cache: Vec<_> = cache.collect();
    for (layer, tensors) in cache.iter().enumerate() {
        for (tensor, shape) in tensors.iter().zip(shapes(layer)) {
            assert_eq!(tensor.dims()[0], if attends(&layer) { 300 } else { 0 });
            assert_eq!(&tensor.dims()[1..], shape);
        }
    }
    // A block has memory in the layers that attend, and in no other.
    let block_bytes = [3, 7].map(|layer| {
        let elements = shapes(layer).map(|shape| shape.iter().product::<usize>());
        2 * elements.iter().sum::<usize>()
    });
    assert_eq!(
        blocks.stats().block_bytes,
        block_bytes.iter().sum::<usize>()
    );
    blocks.back([0]).unwrap();
    assert_eq!(blocks.stats().committed_bytes, 4 * block_page());
    // A layer of no elements is no entry.
    let none = pool.blocks(300, [("0.k", shapes(0)[0].clone(), DType::F16)]);
    let what = "dimension of a block";
    let expected = VmmError::Vmm(cuda_vmm::VmmError::ZeroSize { what });
    assert_eq!(format!("{:?}", none.unwrap_err()), format!("{expected:?}"));
}

/// A conversation's keys and values are kept, and nothing of them is computed again.
#[test]
fn blocks_that_slept_have_the_same_bytes_at_the_same_addresses() {
    let test = open();
    let pool = pool(&test);
    let blocks = pool
        .blocks(16, [("k", wide(), DType::F32), ("v", wide(), DType::F32)])
        .unwrap();
    blocks.back(0..7).unwrap();
    let store = HostStore::new(&test.core, 1 << 30).unwrap();
    let all = reserved(&blocks);
    for (index, tensor) in all.iter().enumerate() {
        (0..7).for_each(|block| write(&test, tensor, block, 10 * index + block));
    }
    let addresses: Vec<_> = all.iter().map(address).collect();
    for keep in [
        Keep::Host(&store),
        Keep::Constant(&store),
        Keep::Constant(&store),
    ] {
        test.device.synchronize().unwrap();
        if test.device.is_cuda() {
            let view = blocks.prefix("k").unwrap();
            let refused = blocks.sleep(keep).unwrap_err();
            assert!(
                matches!(refused, VmmError::Vmm(cuda_vmm::VmmError::KeptAwake { .. })),
                "{refused:?}"
            );
            drop(view);
            test.device.synchronize().unwrap();
        }
        blocks.sleep(keep).unwrap();
        assert!(blocks.is_asleep());
        assert_eq!(pool.committed_bytes(), 0);
        for refused in [
            blocks.back([9]).unwrap_err(),
            blocks.prefix("k").unwrap_err(),
            blocks.sleep(keep).unwrap_err(),
        ] {
            assert!(
                matches!(refused, VmmError::Vmm(cuda_vmm::VmmError::Asleep { .. })),
                "{refused:?}"
            );
        }
        blocks.wake(&WakeOptions::new()).unwrap();
        assert!(addresses.iter().copied().eq(all.iter().map(address)));
        for index in 0..2 {
            let view = blocks.prefix_of(index).unwrap();
            (0..7).for_each(|block| expect(&view, block, 10 * index + block));
        }
    }
    drop(all);
}
