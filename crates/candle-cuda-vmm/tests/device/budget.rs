//! One limit for tensors, caches and blocks: the pages that each takes, and what is refused.
//! Nothing here launches a kernel, because simulated devices have none.

use crate::common::{UnderTest, open, page};
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::cuda_vmm::{EngineOptions, EngineStats, VmmError as Core, WorkerMode};
use candle_cuda_vmm::{ElasticTensor, Engine, Result, TensorPool, TensorPoolOptions, VmmError};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeSet;
use std::ops::Range;
use std::time::{Duration, Instant};

/// An engine with a limit in pages that frees page by page, and only when the test says so.
fn engine(limit_pages: usize) -> EngineOptions {
    EngineOptions::new()
        .limit_bytes(limit_pages * page())
        .chunk_bytes_max(0)
        .worker(WorkerMode::Manual)
}

fn options(limit_pages: usize) -> TensorPoolOptions {
    TensorPoolOptions::new()
        .page_bytes(page())
        .engine(engine(limit_pages))
        .reservation_bytes(64 * page())
}

fn pool(test: &UnderTest, limit_pages: usize) -> TensorPool {
    TensorPool::with_options(&test.device, options(limit_pages)).unwrap()
}

/// Lets the engine free what the device has finished with, and returns what is left.
#[track_caller]
fn settle(test: &UnderTest, engine: &Engine) -> EngineStats {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        test.device.synchronize().unwrap();
        engine.step();
        let stats = engine.stats();
        if stats.parts.retiring_bytes + stats.parts.leased_bytes == 0 {
            return stats;
        }
        assert!(Instant::now() < until, "{stats}");
    }
}

/// Fails unless the engine holds this many pages, once the device has finished.
#[track_caller]
fn expect_pages(test: &UnderTest, pool: &TensorPool, pages: usize) {
    let stats = settle(test, pool.engine());
    assert_eq!(stats.committed_bytes, pages * page(), "{stats}");
    assert_eq!(pool.committed_bytes(), stats.committed_bytes);
}

/// Fails unless this many pages were refused because only so many were free.
#[track_caller]
fn expect_refused<T>(pool: &TensorPool, outcome: Result<T>, asked_pages: usize, free_pages: usize) {
    let limit = pool.engine().stats().limit_bytes;
    match outcome.map(drop) {
        Err(VmmError::Vmm(Core::OutOfPhysicalMemory {
            asked_bytes,
            free_bytes,
            limit_bytes,
            ..
        })) => assert_eq!(
            (asked_bytes, free_bytes, limit_bytes),
            (asked_pages * page(), free_pages * page(), limit)
        ),
        other => panic!("{other:?}"),
    }
}

/// Makes `[1, count, 2, page / 32]` of ones: four tokens in a page.
fn tokens(test: &UnderTest, count: usize) -> Tensor {
    // Made on the CPU, because ones on a GPU take a kernel.
    let tokens = Tensor::ones((1, count, 2, page() / 32), DType::F32, &Device::Cpu).unwrap();
    tokens.to_device(&test.device).unwrap()
}

/// The dimension of the sequence.
const DIM: usize = 1;

/// One block table with four blocks in a page.
fn table(pool: &TensorPool, blocks: usize) -> candle_cuda_vmm::ElasticBlocks {
    let entries = [("k", page() / 16, DType::F32)];
    pool.blocks(blocks, entries).unwrap()
}

#[test]
fn of_two_tables_that_do_not_both_fit_the_second_is_refused() {
    let test = open();
    let pool = pool(&test, 10);
    let [first, second] = [table(&pool, 32), table(&pool, 32)];
    assert!(first.engine().stats() == pool.engine().stats());
    first.back(0..32).unwrap();
    expect_refused(&pool, second.back(0..32), 8, 2);
    assert_eq!((first.backed_prefix(), second.backed_prefix()), (32, 0));
    first.check_table(0..32).unwrap();
    expect_pages(&test, &pool, 8);
    second.back(0..8).unwrap();
    expect_pages(&test, &pool, 10);
    expect_refused(&pool, second.back(8..9), 1, 0);
    first.unback(0..24).unwrap();
    // It waits for what is still retiring.
    second.back(8..32).unwrap();
    expect_pages(&test, &pool, 10);
    drop(first);
    expect_pages(&test, &pool, 8);
    drop(second);
    expect_pages(&test, &pool, 0);
}

#[test]
fn tensors_caches_and_blocks_have_one_limit() {
    let test = open();
    let pool = pool(&test, 8);
    let mut tensor = pool.tensor(page() / 16, DType::F32).unwrap();
    let mut cache = pool.kv_cache(DIM, 64);
    let blocks = table(&pool, 64);
    tensor.grow(8).unwrap();
    drop(cache.append(&tokens(&test, 4), &tokens(&test, 4)).unwrap());
    blocks.back(0..8).unwrap();
    let before = settle(&test, pool.engine());
    assert_eq!(before.committed_bytes, 6 * page());
    let unchanged = || assert_eq!(settle(&test, pool.engine()), before);

    expect_refused(&pool, tensor.grow(9), 3, 2);
    unchanged();
    let rows = Tensor::zeros((9, page() / 16), DType::F32, &test.device).unwrap();
    expect_refused(&pool, tensor.append(&rows), 3, 2);
    unchanged();
    expect_refused(&pool, blocks.back(8..20), 3, 2);
    unchanged();
    // The keys fit, the values do not.
    let many = tokens(&test, 8);
    let refused = cache.append(&many, &many).unwrap_err();
    let shortage = VmmError::find(&refused).and_then(VmmError::shortage);
    let shortage = shortage.unwrap();
    assert_eq!(shortage.requested_bytes, 2 * page());
    assert_eq!(shortage.available_bytes, 0);
    unchanged();
    assert_eq!((tensor.len(), blocks.backed_prefix()), (8, 8));
    let [k, v] = [cache.k().unwrap().unwrap(), cache.v().unwrap().unwrap()];
    for all in [k, v] {
        let all = all.to_device(&Device::Cpu).unwrap().flatten_all().unwrap();
        assert_eq!(all.to_vec1::<f32>().unwrap(), vec![1.; page() / 4]);
    }

    // Each may have what another gives up.
    tensor.grow(8).unwrap();
    expect_refused(&pool, blocks.back(8..9), 1, 0);
    tensor.truncate(1).unwrap();
    blocks.back(8..16).unwrap();
    expect_pages(&test, &pool, 8);
    blocks.unback(0..16).unwrap();
    drop(cache.append(&many, &many).unwrap());
    expect_pages(&test, &pool, 8);
    cache.reset();
    tensor.clear();
    expect_pages(&test, &pool, 0);
}

#[test]
fn a_cache_takes_and_frees_memory_page_by_page() {
    let test = open();
    let pool = pool(&test, 64);
    let mut cache = pool.kv_cache(DIM, 64);
    expect_pages(&test, &pool, 0);
    for count in 1_usize..=13 {
        drop(cache.append(&tokens(&test, 1), &tokens(&test, 1)).unwrap());
        expect_pages(&test, &pool, 2 * count.div_ceil(4));
    }
    // One page stays behind the last token.
    for (len, pages) in [(12, 4), (9, 4), (8, 3), (5, 3), (4, 2), (3, 2)] {
        cache.truncate(len).unwrap();
        expect_pages(&test, &pool, 2 * pages);
    }
    drop(cache.append(&tokens(&test, 9), &tokens(&test, 9)).unwrap());
    for (count, pages) in [(3, 3), (1, 2), (3, 2), (1, 1), (3, 1), (1, 0)] {
        cache.release_front(count).unwrap();
        expect_pages(&test, &pool, 2 * pages);
    }
    drop(cache.append(&tokens(&test, 5), &tokens(&test, 5)).unwrap());
    expect_pages(&test, &pool, 4);
    let clone = cache.try_clone().unwrap();
    expect_pages(&test, &pool, 8);
    cache.reset();
    expect_pages(&test, &pool, 4);
    drop(clone);
    expect_pages(&test, &pool, 0);
}

#[test]
fn what_is_freed_and_what_is_made_ahead_counts() {
    let test = open();
    let options = TensorPoolOptions::new()
        .page_bytes(page())
        .engine(engine(64).park_bytes_max(4 * page()))
        .reservation_bytes(64 * page());
    let pool = TensorPool::with_options(&test.device, options).unwrap();
    let mut tensor = pool.tensor(page() / 4, DType::F32).unwrap();
    tensor.grow(4).unwrap();
    tensor.clear();
    let stats = settle(&test, pool.engine());
    assert_eq!(stats.parts.parked_bytes, 4 * page(), "{stats}");
    expect_pages(&test, &pool, 4);
    assert_eq!(pool.trim().unwrap(), 4 * page());
    expect_pages(&test, &pool, 0);
    assert_eq!(pool.to_string(), pool.engine().stats().to_string());

    let pool = TensorPool::with_options(&test.device, options.ahead_bytes_max(3 * page())).unwrap();
    let mut tensor = pool.tensor(page() / 4, DType::F32).unwrap();
    tensor.grow(2).unwrap();
    let stats = settle(&test, pool.engine());
    assert_eq!(stats.parts.live_page_bytes, 2 * page(), "{stats}");
    assert_eq!(stats.parts.ahead_bytes, 3 * page(), "{stats}");
    assert_eq!(pool.committed_bytes(), 5 * page());
}

#[test]
fn everything_is_freed_whatever_is_dropped_last() {
    let test = open();
    for last in 0..4 {
        let pool = pool(&test, 16);
        let engine = pool.engine().clone();
        let mut tensor = pool.tensor(page() / 16, DType::F32).unwrap();
        tensor.grow(8).unwrap();
        let mut cache = pool.kv_cache(DIM, 64);
        drop(cache.append(&tokens(&test, 4), &tokens(&test, 4)).unwrap());
        let blocks = table(&pool, 64);
        blocks.back(0..8).unwrap();
        let mut owners: Vec<Box<dyn Send>> = vec![
            Box::new(pool),
            Box::new(tensor),
            Box::new(cache),
            Box::new(blocks),
        ];
        owners.swap(0, last);
        let kept = owners.remove(0);
        drop(owners);
        let pages = [0, 2, 2, 2][last];
        let stats = settle(&test, &engine);
        assert_eq!(stats.committed_bytes, pages * page(), "{last}: {stats}");
        drop(kept);
        let stats = settle(&test, &engine);
        assert_eq!((stats.committed_bytes, stats.ranges), (0, 0), "{stats}");
    }
}

/// The pages that a tensor should have, in a range of addresses that are counted from 0.
struct Model {
    row_bytes: usize,
    addresses: usize,
    limit_pages: usize,
    first: usize,
    len: usize,
    pages: BTreeSet<usize>,
}

impl Model {
    fn pages_of(&self, rows: Range<usize>) -> BTreeSet<usize> {
        let bytes = rows.start * self.row_bytes..rows.end * self.row_bytes;
        (bytes.start / page()..bytes.end.div_ceil(page())).collect()
    }

    /// Returns whether there is room for the rows.
    fn grow(&mut self, count: usize) -> bool {
        let end = self.first + self.len + count;
        let is_moved = end * self.row_bytes > self.addresses;
        let (first, pages) = match is_moved {
            true => (0, self.pages_of(0..self.len + count)),
            false => {
                let new = self.pages_of(self.first + self.len..end);
                (self.first, self.pages.union(&new).copied().collect())
            }
        };
        // Rows that move are there twice for a moment.
        let moved_pages = if is_moved { self.pages.len() } else { 0 };
        if moved_pages + pages.len() > self.limit_pages {
            return false;
        }
        (self.first, self.pages) = (first, pages);
        self.len += count;
        true
    }

    fn truncate(&mut self, len: usize) {
        self.len = len;
        let last = ((self.first + len) * self.row_bytes).div_ceil(page());
        // One page more.
        self.pages.retain(|page| *page <= last);
        self.clear_if_empty();
    }

    fn release_front(&mut self, count: usize) {
        (self.first, self.len) = (self.first + count, self.len - count);
        let first = self.first * self.row_bytes / page();
        self.pages.retain(|page| *page >= first);
        self.clear_if_empty();
    }

    fn clear_if_empty(&mut self) {
        if self.len == 0 {
            self.pages.clear();
            self.first = 0;
        }
    }
}

/// Carries out the same random operations on a tensor and on the model.
fn compare(test: &UnderTest, seed: u64, row_elements: usize) -> [usize; 2] {
    let mut random = StdRng::seed_from_u64(seed);
    let (limit_pages, addresses) = (10, 12 * page() - 100);
    let options = options(limit_pages).reservation_bytes(addresses);
    let pool = TensorPool::with_options(&test.device, options).unwrap();
    let mut tensor: ElasticTensor = pool.tensor(row_elements, DType::F32).unwrap();
    let mut model = Model {
        row_bytes: 4 * row_elements,
        addresses,
        limit_pages,
        first: 0,
        len: 0,
        pages: BTreeSet::new(),
    };
    let (mut moved, mut refused) = (0, 0);
    for step in 0..100 {
        let most = (tensor.rows_max() - tensor.len()).min(tensor.rows_max() / 3);
        match random.random_range(0..8) {
            0..4 if most > 0 => {
                let (count, first) = (random.random_range(1..=most), model.first);
                let has_room = model.grow(count);
                match tensor.grow(count) {
                    Ok(()) => assert!(has_room, "seed {seed}, step {step}"),
                    Err(VmmError::Vmm(Core::OutOfPhysicalMemory { .. })) => {
                        assert!(!has_room, "seed {seed}, step {step}");
                        refused += 1;
                    }
                    Err(other) => panic!("{other:?}"),
                }
                moved += usize::from(model.first < first);
            }
            4 => {
                let len = random.random_range(tensor.len() / 2..=tensor.len());
                tensor.truncate(len).unwrap();
                model.truncate(len);
            }
            5 if random.random_range(0..8) == 0 => {
                tensor.clear();
                model.truncate(0);
            }
            _ => {
                let count = random.random_range(0..=tensor.len() / 2);
                tensor.release_front(count).unwrap();
                model.release_front(count);
            }
        }
        assert_eq!(tensor.len(), model.len);
        let live = pool.engine().stats().parts.live_page_bytes;
        let pages = model.pages.len();
        assert_eq!(live, pages * page(), "seed {seed}, step {step}");
        if step % 10 == 0 {
            expect_pages(test, &pool, pages);
        }
    }
    drop(tensor);
    expect_pages(test, &pool, 0);
    [moved, refused]
}

#[test]
fn a_tensor_has_the_whole_pages_around_its_rows() {
    let test = open();
    let mut seen = [0, 0];
    for seed in 0..4 {
        for row_elements in [page() / 4 / 7 + 3, page() / 4, 3 * page() / 8 + 1] {
            let more = compare(&test, seed, row_elements);
            seen = [seen[0] + more[0], seen[1] + more[1]];
        }
    }
    assert!(seen.iter().all(|times| *times > 10), "{seen:?}");
}
