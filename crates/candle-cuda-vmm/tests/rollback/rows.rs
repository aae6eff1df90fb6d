//! Tensors, caches and blocks on the CPU device. After each failed call rows and memory are as
//! before, and what failed succeeds when it is repeated.

use crate::bench::Bench;
use crate::common::GRANULE;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::cuda_vmm::sim::Fault;
use candle_cuda_vmm::cuda_vmm::{EngineOptions, EngineStats, WorkerMode, sys};
use candle_cuda_vmm::{
    ElasticBlocks, ElasticKvCache, ElasticRotatingKvCache, ElasticTensor, Result, TensorPool,
    TensorPoolOptions,
};
use std::time::{Duration, Instant};

/// Four rows, tokens or blocks in a page.
const ROW: usize = GRANULE / 4;

/// Makes a pool that frees page by page, and only when the test says so.
fn pool() -> Result<TensorPool> {
    let engine = EngineOptions::new()
        .chunk_bytes_max(0)
        .worker(WorkerMode::Manual);
    let options = TensorPoolOptions::new()
        .engine(engine)
        .reservation_bytes(8 * GRANULE);
    TensorPool::with_options(&Device::Cpu, options)
}

/// Makes rows `[count, ROW]`. All bytes of a row are its number.
fn rows(first: usize, count: usize) -> Tensor {
    let rows: Vec<_> = (first..first + count)
        .map(|number| vec![number as u8; ROW])
        .collect();
    Tensor::from_vec(rows.concat(), (count, ROW), &Device::Cpu).unwrap()
}

/// Returns the last byte of each row.
fn numbers(rows: &Tensor) -> Vec<u8> {
    let last = |row| {
        let byte = rows.get(row).and_then(|row| row.get(ROW - 1));
        byte.and_then(|byte| byte.to_scalar()).unwrap()
    };
    (0..rows.dims()[0]).map(last).collect()
}

fn tensor(pool: &TensorPool, count: usize) -> ElasticTensor {
    let mut tensor = pool.tensor(ROW, DType::U8).unwrap();
    tensor.append(&rows(0, count)).unwrap();
    tensor
}

fn cache(pool: &TensorPool, count: usize) -> ElasticKvCache {
    cache_of(pool, 16, count)
}

fn cache_of(pool: &TensorPool, max_seq_len: usize, count: usize) -> ElasticKvCache {
    let mut cache = pool.kv_cache(0, max_seq_len);
    let (k, v) = (rows(0, count), rows(100, count));
    cache.append(&k, &v).unwrap();
    cache
}

/// What a call must leave as it was.
trait Contents {
    fn contents(&self) -> Vec<u8>;
}

impl Contents for ElasticTensor {
    fn contents(&self) -> Vec<u8> {
        numbers(&self.view().unwrap())
    }
}

impl Contents for ElasticKvCache {
    fn contents(&self) -> Vec<u8> {
        let both = [self.k().unwrap().unwrap(), self.v().unwrap().unwrap()];
        both.iter().flat_map(numbers).collect()
    }
}

impl Contents for ElasticBlocks {
    fn contents(&self) -> Vec<u8> {
        (0..self.num_blocks())
            .map(|block| self.is_backed(block).into())
            .collect()
    }
}

/// Waits until the engine holds what it should, and the driver too.
#[track_caller]
fn expect(bench: &Bench, pool: &TensorPool, expected: &EngineStats, what: &str) {
    let until = Instant::now() + Duration::from_secs(10);
    let is_so = || {
        pool.engine().step();
        pool.engine().stats() == *expected
            && bench.books().physical_bytes == expected.committed_bytes
    };
    while !is_so() {
        let (stats, books) = (pool.engine().stats(), bench.books());
        assert!(
            Instant::now() < until,
            "{what}: {stats} instead of {expected}; {books:?}"
        );
    }
}

/// Runs `work` on what `make` makes with its first driver call failing, then with its second, up to
/// its last. Returns how many failures `work` reported.
#[track_caller]
fn fail_each_call<S: Contents>(
    make: impl Fn(&TensorPool) -> S,
    work: impl Fn(&mut S) -> Result<()>,
) -> usize {
    let bench = Bench::new();
    let pool = pool().unwrap();
    let nothing = pool.engine().stats();
    let states = |subject: &S| (subject.contents(), pool.engine().stats());
    let mut subject = make(&pool);
    pool.engine().step();
    let before = states(&subject);
    bench.simulator().start_trace();
    work(&mut subject).unwrap();
    let calls = bench.simulator().take_trace().len();
    pool.engine().step();
    let after = states(&subject);
    drop(subject);
    let mut failures = 0;
    for call in 1..=calls {
        let what = format!("call {call} of {calls}");
        expect(&bench, &pool, &nothing, &what);
        let mut subject = make(&pool);
        expect(&bench, &pool, &before.1, &what);
        let fault = Fault::nth_call(call as u64, sys::CUDA_ERROR_UNKNOWN);
        bench.simulator().inject(fault);
        let outcome = work(&mut subject);
        bench.simulator().clear_faults();
        if let Err(error) = outcome {
            assert_eq!(error.driver_code(), Some(sys::CUDA_ERROR_UNKNOWN), "{what}");
            failures += 1;
            assert_eq!(subject.contents(), before.0, "{what}");
            expect(&bench, &pool, &before.1, &what);
            work(&mut subject).unwrap();
        }
        assert_eq!(subject.contents(), after.0, "{what}");
        expect(&bench, &pool, &after.1, &what);
    }
    failures
}

#[test]
fn an_append_to_a_tensor_that_fails_leaves_rows_and_memory() {
    let failures = fail_each_call(|pool| tensor(pool, 3), |tensor| tensor.append(&rows(3, 6)));
    assert!(failures >= 3, "creates, maps and sets access: {failures}");
}

#[test]
fn a_first_append_that_fails_leaves_no_addresses() {
    let failures = fail_each_call(
        |pool| pool.tensor(ROW, DType::U8).unwrap(),
        |tensor| tensor.append(&rows(0, 3)),
    );
    assert!(failures >= 4, "it reserves too: {failures}");
}

#[test]
fn growth_that_fails_leaves_rows_and_memory() {
    let failures = fail_each_call(|pool| tensor(pool, 3), |tensor| tensor.grow(6));
    assert!(failures >= 3, "{failures}");
}

#[test]
fn a_window_that_cannot_move_on_stays_where_it_is() {
    let make = |pool: &TensorPool| {
        let mut window = tensor(pool, 32);
        window.release_front(29).unwrap();
        window
    };
    let failures = fail_each_call(make, |window| window.append(&rows(32, 2)));
    assert!(failures >= 4, "it reserves too: {failures}");
}

#[test]
fn an_append_to_a_cache_that_fails_leaves_keys_values_and_memory() {
    let append = |cache: &mut ElasticKvCache| {
        let (k, v) = (rows(3, 6), rows(103, 6));
        Ok(cache.append(&k, &v).map(drop)?)
    };
    let failures = fail_each_call(|pool| cache(pool, 3), append);
    assert!(failures >= 6, "three on each side: {failures}");
}

#[test]
fn a_cache_that_cannot_move_to_more_addresses_stays_where_it_is() {
    let append = |cache: &mut ElasticKvCache| {
        let (k, v) = (rows(4, 5), rows(104, 5));
        Ok(cache.append(&k, &v).map(drop)?)
    };
    let failures = fail_each_call(|pool| cache_of(pool, 4, 4), append);
    assert!(failures >= 8, "each side reserves too: {failures}");
}

#[test]
fn rows_are_dropped_whatever_call_fails() {
    let make = |pool: &TensorPool| tensor(pool, 30);
    let ways: [fn(&mut ElasticTensor); 3] = [
        |tensor| tensor.truncate(3).unwrap(),
        |tensor| tensor.release_front(9).unwrap(),
        ElasticTensor::clear,
    ];
    for drop_rows in ways {
        let work = |tensor: &mut ElasticTensor| {
            drop_rows(tensor);
            Ok(())
        };
        assert_eq!(fail_each_call(make, work), 0);
    }
}

#[test]
fn blocks_that_cannot_be_backed_leave_memory_as_it_was() {
    let make = |pool: &TensorPool| {
        let entries = ["k", "v"].map(|name| (name, ROW, DType::U8));
        let blocks = pool.blocks(16, entries).unwrap();
        blocks.back(0..3).unwrap();
        blocks
    };
    let failures = fail_each_call(make, |blocks| blocks.back([1, 3, 4, 5, 12]));
    assert!(failures >= 12, "two pages in each tensor: {failures}");
}

#[test]
fn pools_and_blocks_that_cannot_be_made_leave_nothing_behind() {
    let bench = Bench::new();
    let start = bench.books();
    let same = |call| assert_eq!(bench.books(), start, "call {call}");
    let (calls, made) = bench.fail_each_call(pool, same);
    assert!(calls >= 1, "it makes a stream");
    let with_pool = bench.books();
    let entries = || ["k", "v"].map(|name| (name, ROW, DType::U8));
    let (calls, blocks) = bench.fail_each_call(
        || made.blocks(16, entries()),
        |call| assert_eq!(bench.books(), with_pool, "call {call}"),
    );
    assert!(calls >= 2, "each tensor has addresses");
    drop((made, blocks));
    same(0);
}

impl Contents for ElasticRotatingKvCache {
    fn contents(&self) -> Vec<u8> {
        let both = [self.k().unwrap().unwrap(), self.v().unwrap().unwrap()];
        let state = [self.offset() as u8, self.current_seq_len() as u8];
        both.iter().flat_map(numbers).chain(state).collect()
    }
}

#[test]
fn an_append_to_a_rotating_cache_that_fails_leaves_keys_values_and_memory() {
    // Behind the tokens, over some of them too, and over all.
    for count in [3, 5, 6, 8] {
        let make = |pool: &TensorPool| {
            let mut cache = pool.rotating_kv_cache(0, 6).unwrap();
            cache.append(&rows(0, 3), &rows(100, 3)).unwrap();
            cache
        };
        let append = |cache: &mut ElasticRotatingKvCache| {
            Ok(cache.append(&rows(3, count), &rows(103, count)).map(drop)?)
        };
        let failures = fail_each_call(make, append);
        assert!(failures >= 6, "three on each side: {failures}");
    }
}
