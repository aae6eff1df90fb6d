//! A model is compacted while others free its bytes, and while another model needs memory.

use crate::books::PAGE;
use crate::explore::explore;
use crate::world::{World, assert_adds_up, insist, limit, settle, write};
use cuda_vmm::{EngineOptions, SharedMemoryPool, SharedPoolOptions, WorkerMode};
use shuttle::thread;

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
    for model in ["a", "b"] {
        pool.register_model(model, PAGES * PAGE)
            .expect("a new name");
    }
    let [model, other] = ["a", "b"].map(|name| pool.model(name).expect("registered"));
    let stream = world.stream();
    model.use_stream(&stream).expect("same device");
    let address = model.allocate(0, PAGES * PAGE).expect("room");
    write(&stream, address, PAGES * PAGE);
    for page in [1, 3, 4] {
        model.deallocate(page * PAGE, PAGE).expect("live");
    }
    let freeing = thread::spawn(move || {
        for page in [0, 5] {
            model.deallocate(page * PAGE, PAGE).expect("live");
        }
        assert_adds_up(model.engine());
    });
    let taking = thread::spawn(move || {
        insist(&other, 0, PAGE);
        other.deallocate(0, PAGE).expect("live");
    });
    // SAFETY: nothing is launched after the write above.
    let report = unsafe { pool.compact_model("a") }.expect("no call fails");
    assert!(report.moved_bytes <= 3 * PAGE, "{report:?}");
    assert_adds_up(pool.engine());
    freeing.join().expect("no thread fails");
    taking.join().expect("no thread fails");
    pool.deallocate_for_model("a", 2 * PAGE, PAGE)
        .expect("live");
    pool.deallocate_for_model("a", 6 * PAGE, (PAGES - 6) * PAGE)
        .expect("live");
    settle(pool.engine(), mode);
    drop((pool, stream));
    world.end();
}

#[test]
fn bytes_are_freed_while_their_chunks_move() {
    explore(|| freed_meanwhile(WorkerMode::Thread));
    explore(|| freed_meanwhile(WorkerMode::Manual));
}
