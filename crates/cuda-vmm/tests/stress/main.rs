//! Eight threads that grow, shrink, drop and fail at random, with work running over the memory all
//! the while, and every byte checked that is read back.
//!
//! The environment chooses the driver, the devices and the page (`common/under_test.rs`), and
//! `CUDA_VMM_TEST_STRESS_SECONDS` for how long (2 where it is unset).

#[path = "../common/mod.rs"]
mod common;

mod pieces;
mod player;

use common::{Models, number, under_test};
use cuda_vmm::{Device, EngineOptions, HostStore, HostStoreOptions, SharedPoolOptions};
use player::{Player, Tally};
use std::time::{Duration, Instant};

/// Threads of each device.
const THREADS: usize = 8;
/// The budget of a device, in pages: less than its threads want together.
const LIMIT_PAGES: usize = 72;

fn seconds() -> u64 {
    number("CUDA_VMM_TEST_STRESS_SECONDS").unwrap_or(2) as u64
}

fn pool(device: &Device, page: usize) -> Models {
    let engine = EngineOptions::new()
        .limit_bytes(LIMIT_PAGES * page)
        .park_bytes_max(4 * page)
        .cache_bytes_max(8 * page)
        .chunk_bytes_max(4 * page);
    let options = SharedPoolOptions::new().engine(engine).page_bytes(page);
    Models::with_options(device, options).expect("a pool")
}

/// Pinned memory for some of the ranges of a device, but not for all.
fn store(device: &Device) -> HostStore {
    let bytes = (LIMIT_PAGES / 3 * under_test().page_bytes).next_multiple_of(2 << 20);
    let options = HostStoreOptions::new().piece_bytes(16 << 20);
    HostStore::with_options(device, bytes, options).expect("whole pieces")
}

/// Plays on all devices for the seconds asked, and gives everything back.
fn play(round: u64) -> Tally {
    let under_test = under_test();
    let until = Instant::now() + Duration::from_secs(seconds());
    let pools: Vec<_> = (under_test.devices.iter())
        .map(|device| pool(device, under_test.page_bytes))
        .collect();
    let stores: Vec<_> = under_test.devices.iter().map(store).collect();
    let tally = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS * pools.len())
            .map(|number| {
                let at = number % pools.len();
                let (pool, store) = (&pools[at], &stores[at]);
                scope.spawn(move || Player::new(number, round, pool, store).play(until))
            })
            .collect();
        let tallies = threads.into_iter().map(|thread| thread.join());
        tallies.fold(Tally::default(), |sum, tally| {
            sum + tally.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    });
    under_test.interposer.clear_faults();
    drop(stores);
    for (pool, device) in pools.iter().zip(&under_test.devices) {
        device
            .synchronize()
            .expect("no work met memory that was gone");
        pool.trim().expect("nothing is in the way");
        device.retry_quarantine();
        // The worker may be about to end a closed range, whose memory the driver had refused.
        let patience = Instant::now() + Duration::from_secs(10);
        while pool.stats().ranges > 0 && Instant::now() < patience {
            std::thread::yield_now();
        }
        let stats = pool.stats();
        assert_eq!((stats.committed_bytes, stats.ranges), (0, 0), "{stats}");
    }
    tally
}

#[test]
fn threads_that_grow_shrink_drop_and_fail_keep_every_byte() {
    // A slow machine may take another round until everything has happened that is to be shown.
    const ROUNDS: u64 = 10;
    let tally = under_test().unchanged(|| {
        let mut tally = Tally::default();
        for round in 0..ROUNDS {
            tally = tally + play(round);
            println!("after {} × {} s: {tally}", round + 1, seconds());
            if tally.missing().is_none() {
                break;
            }
        }
        tally
    });
    assert_eq!(tally.missing(), None, "never happened");
}
