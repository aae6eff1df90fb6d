//! Faults that a review found.

use crate::common::{Simulated, manual};
use crate::fixture::{CHUNK, Fixture, PAGE, PAGES};
use cuda_vmm::sim::SimConfig;
use cuda_vmm::{Engine, PoolOptions, Quota, VirtualMemoryPool, VmmError};
use std::thread;
use std::time::Duration;

#[test]
fn first_fit_passes_over_shared_chunks() {
    let mut fixture = Fixture::new(manual(), 2);
    fixture.take(0, 0..CHUNK);
    fixture.share(0, 1, 0..CHUNK);
    fixture.free(1, 0..1);
    let pool = &fixture.pools[1];
    let taken = pool.allocate_anywhere(PAGE, PAGE);
    assert_eq!(taken, Ok(pool.base_address() + (CHUNK * PAGE) as u64));
    let largest_free_bytes = (PAGES - CHUNK - 1) * PAGE;
    let asked_bytes = largest_free_bytes + 1;
    let error = VmmError::OutOfVirtualMemory {
        asked_bytes,
        largest_free_bytes,
    };
    assert_eq!(pool.allocate_anywhere(asked_bytes, 1), Err(error));
}

#[test]
fn a_share_that_is_refused_leaves_the_target_what_it_has() {
    let mut fixture = Fixture::new(manual().park_bytes_max(PAGES * PAGE), 2);
    fixture.take(0, 0..CHUNK);
    fixture.try_take(1, 20..24).expect("there is room");
    fixture.free(1, 20..24);
    fixture.settle();
    let before = fixture.account.stats();
    assert!(before.parts.parked_bytes > 0);
    let refused = fixture.try_share(0, 1, 8..12).map(drop);
    assert!(
        matches!(refused, Err(VmmError::NotMapped { .. })),
        "{refused:?}"
    );
    assert_eq!(fixture.account.stats(), before);
}

/// The charge comes back although the call that shares still runs.
#[test]
fn chunks_that_are_freed_before_the_call_ends_are_counted_to_the_end() {
    const CHUNKS: usize = 2048;
    for _ in 0..10 {
        let simulated = Simulated::new(SimConfig::new().granularity_bytes(PAGE).unbacked());
        let options = manual().chunk_bytes_max(PAGE);
        let engine = Engine::new(&simulated.device, options).expect("an engine");
        let account = engine.account("model", Quota::new()).expect("an account");
        let open = || {
            let options = PoolOptions::new();
            VirtualMemoryPool::on_account(&account, CHUNKS * PAGE, PAGE, options).expect("a pool")
        };
        let (source, target) = (open(), open());
        source.allocate(0, CHUNKS * PAGE).expect("there is room");
        thread::scope(|scope| {
            scope.spawn(|| {
                while target.deallocate(0, 64 * PAGE).is_err() {
                    thread::sleep(Duration::from_micros(50));
                }
                source.deallocate(0, 64 * PAGE).expect("it is live");
                thread::scope(|scope| (0..2).for_each(|_| _ = scope.spawn(|| engine.step())));
            });
            let shared = account.share_many(&[(&source, &target, 0, CHUNKS * PAGE)]);
            shared.expect("it can").keep();
        });
        for pool in [&source, &target] {
            pool.deallocate(64 * PAGE, (CHUNKS - 64) * PAGE)
                .expect("it is live");
        }
        simulated.device.synchronize().expect("done");
        engine.step();
        engine.trim().expect("no call fails");
        let stats = engine.stats();
        assert_eq!((stats.committed_bytes, stats.parts.total_bytes()), (0, 0));
        assert_eq!(simulated.books().physical_bytes, 0);
    }
}
