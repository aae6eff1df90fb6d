//! Several parts freed at once.

use crate::common::{PAGE, Simulated, manual};
use cuda_vmm::sys::DriverFunction;
use cuda_vmm::{Engine, PoolStats, Stream, VirtualMemoryPool};
use proptest::prelude::*;

#[test]
fn parts_that_are_freed_at_once_record_one_event_for_each_stream() {
    for streams in 1..=2 {
        let simulated = Simulated::default();
        let engine = Engine::new(&simulated.device, manual()).expect("an engine");
        let pool = VirtualMemoryPool::on_engine(&engine, 64 * PAGE, PAGE).expect("a pool");
        let streams: Vec<_> = (0..streams)
            .map(|_| Stream::new(&simulated.device).expect("a stream"))
            .collect();
        for stream in &streams {
            pool.use_stream(stream).expect("of the device");
        }
        for page in 0..32 {
            pool.allocate(2 * page * PAGE, PAGE).expect("room");
        }
        let parts: Vec<_> = (0..32).rev().map(|page| (2 * page * PAGE, PAGE)).collect();
        let _held = simulated.hold_work();
        for stream in &streams {
            // SAFETY: live, and mapped until the engine has seen the fence.
            unsafe { stream.memset(pool.base_address(), 1, PAGE) }.expect("queued");
        }
        simulated.simulator.start_trace();
        pool.deallocate_many(&parts).expect("live");
        let calls = simulated.simulator.take_trace();
        let records = calls.iter();
        let records = records.filter(|call| **call == DriverFunction::cuEventRecord);
        assert_eq!(records.count(), streams.len(), "{calls:?}");
        assert_eq!(pool.stats().parts.retiring_bytes, 32 * PAGE);
        assert_eq!(pool.counters().deallocations, 1);

        // They can be had again before the device is past that, one by one and in any order.
        simulated.simulator.start_trace();
        for page in [7, 31, 0, 16] {
            pool.try_allocate(2 * page * PAGE, PAGE).expect("follows");
        }
        let calls = simulated.simulator.take_trace();
        assert!(!calls.contains(&DriverFunction::cuMemMap), "{calls:?}");
        assert_eq!(pool.stats().parts.retiring_bytes, 28 * PAGE);
    }
}

#[test]
fn the_parts_of_a_page_free_it_together() {
    let simulated = Simulated::default();
    let engine = Engine::new(&simulated.device, manual()).expect("an engine");
    let pool = VirtualMemoryPool::on_engine(&engine, 8 * PAGE, PAGE).expect("a pool");
    pool.allocate(0, 3 * PAGE).expect("room");
    let half = PAGE / 2;
    let parts = [(PAGE + half, half), (2 * PAGE, half), (PAGE, half), (0, 8)];
    pool.deallocate_many(&parts).expect("live");
    let stats = pool.stats();
    assert_eq!(stats.live_bytes, PAGE - 8 + half);
    assert_eq!((stats.live_pages, stats.parts.retiring_bytes), (2, PAGE));
}

/// A pool whose every second quarter of a page, as `live` says, is live; and what it looks like.
fn made(live: &[bool], chunk_bytes_max: usize) -> (Simulated, VirtualMemoryPool) {
    let simulated = Simulated::default();
    let options = manual().chunk_bytes_max(chunk_bytes_max);
    let engine = Engine::new(&simulated.device, options).expect("an engine");
    let pool = VirtualMemoryPool::on_engine(&engine, 16 * PAGE, PAGE).expect("a pool");
    pool.allocate(0, 16 * PAGE).expect("room");
    for (at, _) in live.iter().enumerate().filter(|(_, live)| !**live) {
        pool.deallocate(at * (PAGE / 4), PAGE / 4).expect("live");
    }
    (simulated, pool)
}

fn looks(pool: &VirtualMemoryPool) -> (PoolStats, Vec<bool>) {
    let quarters = (0..64).map(|at| pool.is_mapped(at * (PAGE / 4), PAGE / 4));
    (pool.stats(), quarters.collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn freeing_at_once_is_freeing_one_by_one_or_nothing(
        live in prop::collection::vec(any::<bool>(), 64),
        parts in prop::collection::vec((0..64usize, 1..6usize), 0..12),
        chunk_pages in 0..2usize,
    ) {
        let parts: Vec<_> = parts.into_iter().map(|(at, count)| (at * (PAGE / 4), count * (PAGE / 4))).collect();
        let chunk_bytes_max = chunk_pages * 4 * PAGE;
        let (_one, one_by_one) = made(&live, chunk_bytes_max);
        let (_many, at_once) = made(&live, chunk_bytes_max);
        let before = looks(&at_once);
        let mut outcomes = Vec::new();
        for (offset, bytes) in &parts {
            outcomes.push(one_by_one.deallocate(*offset, *bytes));
        }
        let is_right = outcomes.iter().all(Result::is_ok);
        prop_assert_eq!(at_once.deallocate_many(&parts).is_ok(), is_right);
        let expected = if is_right { looks(&one_by_one) } else { before };
        prop_assert_eq!(looks(&at_once), expected);
    }
}
