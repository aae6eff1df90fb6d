//! A model is compacted while others free its bytes and close its account, and while another model
//! needs memory.

use crate::books::PAGE;
use crate::explore::explore;
use crate::world::{World, assert_adds_up, insist, limit, settle, write};
use cuda_vmm::{
    EngineOptions, PoolOptions, Quota, SharedMemoryPool, SharedPoolOptions, VirtualMemoryPool,
    VmmError, WorkerMode,
};
use shuttle::thread;
use std::sync::Arc;

/// Pages of the model, in chunks of two.
const PAGES: usize = 16;

fn freed_meanwhile(mode: WorkerMode) {
    let world = World::new(true);
    let options = SharedPoolOptions::new().engine(
        EngineOptions::new()
            .limit_bytes(limit(PAGES + 1))
            .chunk_bytes_max(2 * PAGE)
            .worker(mode),
    );
    let pool = SharedMemoryPool::with_options(&world.device, options).expect("a limit");
    let [model, other] = ["a", "b"].map(|name| {
        let account = pool.register_model(name, Quota::new()).expect("new");
        let (bytes, options) = (PAGES * PAGE, PoolOptions::new());
        let range = VirtualMemoryPool::on_account(&account, bytes, PAGE, options);
        Arc::new(range.expect("addresses"))
    });
    let stream = world.stream();
    model.use_stream(&stream).expect("same device");
    let address = model.allocate(0, PAGES * PAGE).expect("room");
    write(&stream, address, PAGES * PAGE);
    for page in [1, 3, 4] {
        model.deallocate(page * PAGE, PAGE).expect("live");
    }
    let closing = thread::spawn({
        let (pool, model) = (pool.clone(), model.clone());
        move || {
            model.deallocate(0, PAGE).expect("live");
            pool.unregister_model("a").expect("registered");
            model.deallocate(5 * PAGE, PAGE).expect("live");
            assert_adds_up(pool.engine());
        }
    });
    let taking = thread::spawn(move || {
        insist(&other, 0, PAGE);
        other.deallocate(0, PAGE).expect("live");
    });
    // SAFETY: nothing is launched after the write above.
    let report = unsafe { model.compact_shared() }.expect("no call fails");
    assert!(report.moved_bytes <= 3 * PAGE, "{report:?}");
    assert_adds_up(pool.engine());
    closing.join().expect("no thread fails");
    taking.join().expect("no thread fails");
    assert_eq!(model.try_allocate(PAGE, PAGE), Err(VmmError::Closed));
    model.deallocate(2 * PAGE, PAGE).expect("live");
    model
        .deallocate(6 * PAGE, (PAGES - 6) * PAGE)
        .expect("live");
    settle(pool.engine(), mode);
    drop((model, pool, stream));
    world.end();
}

#[test]
fn bytes_are_freed_and_the_account_is_closed_while_chunks_move() {
    explore(|| freed_meanwhile(WorkerMode::Thread));
    explore(|| freed_meanwhile(WorkerMode::Manual));
}
