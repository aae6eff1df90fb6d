//! Tensors that begin with the rows of others, in the same memory. Forks of caches and sequences are
//! in the module `kernels`, since layers in one range are copied by kernels.

use crate::common::{GRANULE, UnderTest, open, page};
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::cuda_vmm::{EngineOptions, WorkerMode};
use candle_cuda_vmm::{ElasticTensor, TensorPool, TensorPoolOptions, VmmError};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::time::{Duration, Instant};

pub fn pool_with(test: &UnderTest, limit_pages: usize) -> TensorPool {
    let engine = EngineOptions::new()
        .limit_bytes(limit_pages * page())
        .worker(WorkerMode::Manual);
    let options = TensorPoolOptions::new()
        .engine(engine)
        .page_bytes(page())
        .reservation_bytes(64 * page());
    TensorPool::with_options(&test.device, options).unwrap()
}

fn pool(test: &UnderTest) -> TensorPool {
    pool_with(test, 64)
}

/// Half a page, so that two rows fill one.
fn row() -> usize {
    page() / 2
}

/// The bytes of a row: a mark, and then its number again and again.
fn bytes(number: u64, row: usize) -> Vec<u8> {
    let mut bytes = number.to_le_bytes().repeat(row.div_ceil(8));
    bytes[..8].copy_from_slice(b"mark    ");
    bytes.truncate(row);
    bytes
}

/// Rows of `row` bytes with these numbers.
pub fn rows(device: &Device, numbers: &[u64], row: usize) -> Tensor {
    let all: Vec<_> = numbers.iter().map(|it| bytes(*it, row)).collect();
    let rows = Tensor::from_vec(all.concat(), (numbers.len(), row), &Device::Cpu).unwrap();
    rows.to_device(device).unwrap()
}

#[track_caller]
pub fn expect(view: &Tensor, numbers: &[u64]) {
    let (count, row) = view.dims2().unwrap();
    assert_eq!(count, numbers.len());
    // The ends and the middle of each row, which has many pages of the host. A part of one row is
    // read by a plain copy, without a kernel.
    let part = row.min(4096);
    for (at, number) in numbers.iter().enumerate() {
        for start in [0, row / 2, row - part] {
            let part = part.min(row - start);
            let found = view.narrow(0, at, 1).unwrap().narrow(1, start, part);
            let found = found.unwrap().flatten_all().unwrap().force_contiguous();
            let found = found.unwrap().to_vec1::<u8>().unwrap();
            // Each row repeats its number, after a mark of the same length.
            let expected = &bytes(*number, part + 16)[8 + start % 8..][..part];
            let mark = if start == 0 { 8 } else { 0 };
            assert!(found[mark..] == expected[mark..], "row {number} at {start}");
            assert!(mark == 0 || found[..8] == *b"mark    ", "row {number}");
        }
    }
}

#[track_caller]
pub fn expect_rows(tensor: &ElasticTensor, numbers: &[u64]) {
    expect(&tensor.to_owned().unwrap(), numbers);
}

/// Pages that are shared, and pages with rows of one tensor alone.
pub fn held(pool: &TensorPool) -> (usize, usize) {
    let parts = pool.account().stats().parts;
    assert_eq!(
        parts.total_bytes(),
        pool.account().stats().committed_bytes,
        "{parts}"
    );
    (parts.shared_bytes / page(), parts.live_page_bytes / page())
}

/// Lets the engine free what retires.
#[track_caller]
pub fn settle(pool: &TensorPool) {
    let until = Instant::now() + Duration::from_secs(60);
    let is_coming = |pool: &TensorPool| {
        let parts = pool.engine().stats().parts;
        parts.retiring_bytes + parts.leased_bytes > 0
    };
    loop {
        // At least once: a mapping that is to end is in no part while others use its chunk.
        pool.device().synchronize().unwrap();
        pool.engine().step();
        if !is_coming(pool) {
            return;
        }
        assert!(Instant::now() < until, "{pool}");
    }
}

#[test]
fn a_fork_has_the_rows_in_the_same_memory_and_goes_on_by_itself() {
    let test = open();
    let pool = pool(&test);
    let numbers: Vec<u64> = (0..19).collect();
    let mut source = pool.tensor(row(), DType::U8).unwrap();
    source.append(&rows(&test.device, &numbers, row())).unwrap();
    let view = source.view().unwrap();
    let mut forks = [source.fork().unwrap(), source.fork().unwrap()];
    // The tenth page is half full, so each has its own.
    assert_eq!(held(&pool), (9, 3));
    let mut expected = [numbers.clone(), numbers.clone(), numbers.clone()];
    for (at, tensor) in [&mut source].into_iter().chain(&mut forks).enumerate() {
        let more: Vec<u64> = (0..3).map(|row| 100 * (at as u64 + 1) + row).collect();
        tensor.append(&rows(&test.device, &more, row())).unwrap();
        expected[at].extend(more);
    }
    for (tensor, expected) in [&source].into_iter().chain(&forks).zip(&expected) {
        expect(&tensor.view().unwrap(), expected);
    }
    expect(&view, &numbers);
    assert_eq!(held(&pool), (9, 6), "nothing that is shared was written");
    let [first, second] = forks;
    // A fork of a fork.
    let third = first.fork().unwrap();
    drop((view, source, first));
    settle(&pool);
    expect_rows(&second, &expected[2]);
    expect_rows(&third, &expected[1]);
    drop(second);
    settle(&pool);
    assert_eq!(held(&pool), (0, 11), "the last one has it alone");
    expect_rows(&third, &expected[1]);
}

#[test]
fn rows_that_are_dropped_and_written_anew_are_copied_first() {
    let test = open();
    let pool = pool(&test);
    let numbers: Vec<u64> = (0..16).collect();
    for of_source in [false, true] {
        let mut source = pool.tensor(row(), DType::U8).unwrap();
        source.append(&rows(&test.device, &numbers, row())).unwrap();
        let mut fork = source.fork().unwrap();
        assert_eq!(held(&pool), (8, 0));
        let (writer, other) = match of_source {
            true => (&mut source, &mut fork),
            false => (&mut fork, &mut source),
        };
        writer.truncate(13).unwrap();
        let address_space = pool.engine().stats().ranges;
        writer
            .append(&rows(&test.device, &[77, 78], row()))
            .unwrap();
        settle(&pool);
        // The chunk of rows 12 and 13 was copied, and the one behind it is the other's alone.
        assert_eq!(held(&pool), (6, 4));
        assert_eq!(pool.engine().stats().ranges, address_space, "in place");
        let written: Vec<u64> = (0..13).chain([77, 78]).collect();
        expect_rows(writer, &written);
        expect_rows(other, &numbers);
        // From the start: all of it.
        writer.truncate(1).unwrap();
        writer.append(&rows(&test.device, &[80], row())).unwrap();
        expect_rows(writer, &[0, 80]);
        expect_rows(other, &numbers);
        writer.clear();
        writer.append(&rows(&test.device, &[90], row())).unwrap();
        expect_rows(writer, &[90]);
        expect_rows(other, &numbers);
        settle(&pool);
        assert_eq!(held(&pool), (0, 9));
        drop((source, fork));
        settle(&pool);
        assert_eq!(held(&pool), (0, 0));
    }
}

#[test]
fn a_reservation_makes_private_what_the_next_rows_are_written_to() {
    let test = open();
    let pool = pool(&test);
    let mut source = pool.tensor(row(), DType::U8).unwrap();
    let numbers: Vec<u64> = (0..8).collect();
    source.append(&rows(&test.device, &numbers, row())).unwrap();
    let mut fork = source.fork().unwrap();
    fork.truncate(3).unwrap();
    fork.reserve(4).unwrap();
    let before = pool.engine().counters().ranges.allocations;
    fork.append(&rows(&test.device, &[50, 51, 52, 53], row()))
        .unwrap();
    assert_eq!(pool.engine().counters().ranges.allocations, before);
    expect_rows(&fork, &[0, 1, 2, 50, 51, 52, 53]);
    expect_rows(&source, &numbers);
}

#[test]
fn a_copy_that_has_no_room_is_refused_and_changes_nothing() {
    let test = open();
    let pool = pool_with(&test, 8);
    let numbers: Vec<u64> = (0..16).collect();
    let mut source = pool.tensor(row(), DType::U8).unwrap();
    source.append(&rows(&test.device, &numbers, row())).unwrap();
    let mut fork = source.fork().unwrap();
    let more = rows(&test.device, &[60], row());
    for tensor in [&mut source, &mut fork] {
        tensor.truncate(15).unwrap();
        let error = tensor.append(&more).unwrap_err();
        let VmmError::Vmm(error) = error else {
            panic!("{error}");
        };
        assert_eq!(error.shortfall_bytes(), page(), "{error}");
        expect_rows(tensor, &numbers[..15]);
        assert_eq!(held(&pool).0, 8);
    }
    drop(source);
    settle(&pool);
    // It has the memory alone now.
    fork.append(&more).unwrap();
    let expected: Vec<u64> = (0..15).chain([60]).collect();
    expect_rows(&fork, &expected);
}

#[test]
fn a_view_keeps_the_memory_and_the_rows_move() {
    let test = open();
    let pool = pool(&test);
    let numbers: Vec<u64> = (0..8).collect();
    let mut source = pool.tensor(row(), DType::U8).unwrap();
    source.append(&rows(&test.device, &numbers, row())).unwrap();
    let mut fork = source.fork().unwrap();
    let view = fork.view().unwrap();
    fork.truncate(5).unwrap();
    fork.append(&rows(&test.device, &[70], row())).unwrap();
    expect(&view, &numbers);
    expect_rows(&fork, &[0, 1, 2, 3, 4, 70]);
    expect_rows(&source, &numbers);
    drop(source);
    test.device.synchronize().unwrap();
    pool.engine().step();
    expect(&view, &numbers);
    drop((view, fork));
    settle(&pool);
    assert_eq!(held(&pool), (0, 0));
}

#[test]
fn a_window_is_forked_where_it_is() {
    let test = open();
    let pool = pool(&test);
    let numbers: Vec<u64> = (0..14).collect();
    let mut source = pool.tensor(row(), DType::U8).unwrap();
    source.append(&rows(&test.device, &numbers, row())).unwrap();
    source.release_front(5).unwrap();
    let mut fork = source.fork().unwrap();
    // Pages 2 to 6, and the second half of page 2 is the first row.
    assert_eq!(held(&pool), (5, 0));
    fork.append(&rows(&test.device, &[40, 41], row())).unwrap();
    fork.release_front(3).unwrap();
    let expected: Vec<u64> = (8..14).chain([40, 41]).collect();
    expect_rows(&fork, &expected);
    expect_rows(&source, &numbers[5..]);
    let empty = pool.tensor(row(), DType::U8).unwrap().fork().unwrap();
    assert!(empty.is_empty() && empty.allocated_bytes() == 0);
}

#[test]
fn random_forks_are_plain_copies() {
    let test = open();
    let pool = pool(&test);
    let mut random = StdRng::seed_from_u64(16);
    // Rows of less than a page, and of more.
    for row in [page() / 8, page() / 3 + 5, page() + 3] {
        let mut all: Vec<(ElasticTensor, Vec<u64>)> = Vec::new();
        let mut views: Vec<(Tensor, Vec<u64>)> = Vec::new();
        let mut next = 0;
        for _ in 0..if page() > GRANULE { 15 } else { 60 } {
            if all.is_empty() {
                all.push((pool.tensor(row, DType::U8).unwrap(), Vec::new()));
            }
            let at = random.random_range(0..all.len());
            let tensors = all.len();
            let (tensor, numbers) = &mut all[at];
            let len = numbers.len();
            match random.random_range(0..12) {
                0..4 if len < 14 => {
                    let more: Vec<u64> = (next..).take(random.random_range(1..5)).collect();
                    next += more.len() as u64;
                    match tensor.append(&rows(&test.device, &more, row)) {
                        Ok(()) => numbers.extend(more),
                        Err(error) => assert!(error.is_retryable(), "{error}"),
                    }
                }
                4 | 5 => {
                    let kept = random.random_range(0..=len);
                    tensor.truncate(kept).unwrap();
                    numbers.truncate(kept);
                }
                6 => {
                    let gone = random.random_range(0..=len);
                    tensor.release_front(gone).unwrap();
                    numbers.drain(..gone);
                }
                7..10 if tensors < 5 => {
                    let (fork, numbers) = (tensor.fork(), numbers.clone());
                    match fork {
                        Ok(fork) => all.push((fork, numbers)),
                        Err(error) => assert!(error.is_retryable(), "{error}"),
                    }
                }
                10 if views.len() < 2 => {
                    views.push((tensor.view().unwrap(), numbers.clone()));
                }
                10 => drop(views.swap_remove(0)),
                _ => drop(all.swap_remove(at)),
            }
            for (tensor, numbers) in &all {
                if !numbers.is_empty() {
                    expect_rows(tensor, numbers);
                }
            }
            for (view, numbers) in views.iter().filter(|(_, numbers)| !numbers.is_empty()) {
                expect(view, numbers);
            }
            let account = pool.account().stats();
            assert_eq!(account.parts.total_bytes(), account.committed_bytes);
        }
        drop((all, views));
        settle(&pool);
        assert_eq!(held(&pool), (0, 0));
    }
}
