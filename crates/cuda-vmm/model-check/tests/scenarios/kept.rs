//! Memory that is kept or made without being asked for: parked, cached, pinned and ahead.

use crate::books::PAGE;
use crate::explore::explore;
use crate::world::{World, assert_adds_up, insist, write};
use cuda_vmm::{EngineOptions, PoolOptions, VirtualMemoryPool, WorkerMode};
use shuttle::thread;

/// Two ranges grow into what the worker makes ahead of them, with a budget that is too small for
/// both, and give back to the parked pages and the cache, one page of each pinned meanwhile.
fn two_ranges(mode: WorkerMode) {
    let world = World::new(true);
    let options = EngineOptions::new()
        .park_bytes_max(PAGE)
        .cache_bytes_max(PAGE)
        .worker(mode);
    let engine = world.engine_with(4, options);
    let threads = [(); 2].map(|()| {
        let ahead = PoolOptions::new().ahead_bytes_max(2 * PAGE);
        let pool = VirtualMemoryPool::with_options(&engine, 4 * PAGE, PAGE, ahead);
        let (pool, stream) = (pool.expect("no call fails"), world.stream());
        pool.use_stream(&stream).expect("same device");
        thread::spawn(move || {
            for page in 0..2 {
                let address = insist(&pool, page * PAGE, PAGE);
                write(&stream, address, PAGE);
                assert_adds_up(pool.engine());
            }
            let pin = pool.pin_for_graph(0, PAGE).expect("live");
            pool.deallocate(0, 2 * PAGE).expect("live");
            let address = insist(&pool, 0, PAGE);
            write(&stream, address, PAGE);
            pool.deallocate(0, PAGE).expect("live");
            // The pool's addresses stay until the pin is gone.
            drop(pool);
            drop(pin);
        })
    });
    if mode == WorkerMode::Manual {
        engine.step();
    }
    for thread in threads {
        thread.join().expect("no thread fails");
    }
    while engine.stats().committed_bytes > 0 {
        engine.trim().expect("no call fails");
        engine.step();
        assert_adds_up(&engine);
        thread::yield_now();
    }
    drop(engine);
    world.end();
}

#[test]
fn ranges_that_grow_ahead_share_parked_and_cached_memory() {
    explore(|| two_ranges(WorkerMode::Thread));
    explore(|| two_ranges(WorkerMode::Manual));
}
