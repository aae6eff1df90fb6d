//! A model waits for ever, and memory comes free in one of the ways that there are: it is woken.
//!
//! Nothing else happens that could wake it, so a change that is not told leaves a thread that waits
//! for ever.

use crate::books::{PAGE, books};
use crate::explore::explore;
use crate::models::{ModelOptions, Models};
use crate::world::{World, limit, write};
use cuda_vmm::sys::{CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_OUT_OF_MEMORY, DriverFunction};
use cuda_vmm::{
    EngineOptions, LeaseToken, Quota, SharedPoolOptions, VirtualMemoryPool, VmmError, WorkerMode,
};
use shuttle::sync::atomic::{AtomicBool, Ordering};
use shuttle::thread::{self, JoinHandle};
use std::sync::Arc;
use std::time::Duration;

const FOREVER: Duration = Duration::MAX;

/// Two models and a budget: `holds` is to let some go, and `wants` waits.
struct Scene {
    world: World,
    pool: Models,
    holds: Arc<VirtualMemoryPool>,
    wants: Arc<VirtualMemoryPool>,
}

impl Scene {
    fn new(limit_pages: usize, options: EngineOptions) -> Self {
        let world = World::new(true);
        let engine = options.limit_bytes(limit(limit_pages));
        let options = SharedPoolOptions::new().engine(engine).page_bytes(PAGE);
        let pool = Models::with_options(&world.device, options).expect("a limit");
        for model in ["holds", "wants"] {
            pool.register_model(model, 8 * PAGE).expect("a new name");
        }
        let [holds, wants] = ["holds", "wants"].map(|name| pool.model(name).expect("there"));
        Self {
            world,
            pool,
            holds,
            wants,
        }
    }

    /// A thread that waits for so many pages.
    fn wait_for(&self, pages: usize) -> JoinHandle<()> {
        let wants = self.wants.clone();
        thread::spawn(move || {
            let outcome = wants.allocate_timeout(0, pages * PAGE, FOREVER);
            outcome.expect("it is served");
        })
    }

    fn end(self, waits: JoinHandle<()>) {
        waits.join().expect("it is served");
        let Self { world, pool, .. } = self;
        drop((pool, self.holds, self.wants));
        world.end();
    }
}

/// Freed memory stays parked, and each page is a chunk.
fn parking(mode: WorkerMode) -> EngineOptions {
    let options = EngineOptions::new().park_bytes_max(8 * PAGE);
    options.chunk_bytes_max(0).worker(mode)
}

fn explore_both(scenario: fn(WorkerMode)) {
    for mode in [WorkerMode::Thread, WorkerMode::Manual] {
        explore(move || scenario(mode));
    }
}

/// Steps until what was freed is parked.
fn park(scene: &Scene) {
    while scene.holds.stats().parts.retiring_bytes > 0 {
        scene.pool.engine().step();
        thread::yield_now();
    }
}

#[test]
fn a_pin_goes() {
    explore_both(|mode| {
        let scene = Scene::new(2, parking(mode));
        scene.holds.allocate(0, 2 * PAGE).expect("room");
        let pin = scene.holds.pin_for_graph(0, 2 * PAGE).expect("live");
        scene.holds.deallocate(0, 2 * PAGE).expect("live");
        park(&scene);
        let waits = scene.wait_for(2);
        drop(pin);
        scene.end(waits);
    });
}

#[test]
fn a_registration_fails() {
    explore_both(|mode| {
        let scene = Scene::new(4, parking(mode));
        scene.holds.allocate(0, PAGE).expect("room");
        let reserve = DriverFunction::cuMemAddressReserve;
        books(|books| books.fail(reserve, 0, CUDA_ERROR_OUT_OF_MEMORY));
        let pool = scene.pool.clone();
        let registers = thread::spawn(move || {
            let options = ModelOptions {
                guarantee_bytes: PAGE,
                ..ModelOptions::new(PAGE)
            };
            pool.register_model_with("fails", options)
                .expect_err("no addresses");
        });
        let waits = scene.wait_for(3);
        registers.join().expect("it is told");
        scene.end(waits);
    });
}

#[test]
fn a_guarantee_is_lowered() {
    explore_both(|mode| {
        let scene = Scene::new(4, parking(mode));
        let sure = Quota::new().guarantee_bytes(PAGE);
        scene.holds.allocate(0, PAGE).expect("room");
        scene.pool.register_model("sure", PAGE).expect("a new name");
        scene.pool.set_quota("sure", sure).expect("room");
        let waits = scene.wait_for(3);
        scene
            .pool
            .set_quota("sure", Quota::new())
            .expect("less than before");
        scene.end(waits);
    });
}

#[test]
fn a_ceiling_is_raised() {
    explore_both(|mode| {
        let scene = Scene::new(4, parking(mode));
        let ceiling = |pages| Quota::new().ceiling_bytes(pages * PAGE);
        scene.pool.set_quota("wants", ceiling(2)).expect("no more");
        scene.wants.allocate(2 * PAGE, PAGE).expect("room");
        let waits = scene.wait_for(2);
        scene.pool.set_quota("wants", ceiling(3)).expect("room");
        scene.end(waits);
    });
}

#[test]
fn a_waiting_thread_ahead_leaves_the_line() {
    explore_both(|mode| {
        let scene = Scene::new(2, parking(mode));
        scene.holds.allocate(0, PAGE).expect("room");
        scene.pool.register_model("ahead", 8 * PAGE).expect("new");
        let ahead = scene.pool.model("ahead").expect("registered");
        let leaves = thread::spawn(move || {
            let outcome = ahead.allocate_timeout(0, 2 * PAGE, Duration::from_secs(3));
            assert!(outcome.expect_err("one is held").is_retryable());
        });
        let waits = scene.wait_for(1);
        leaves.join().expect("it gives up");
        scene.end(waits);
    });
}

#[test]
fn a_model_goes() {
    explore_both(|mode| {
        let mut scene = Scene::new(2, parking(mode));
        scene.holds.allocate(0, 2 * PAGE).expect("room");
        let waits = scene.wait_for(2);
        // The only handle beside the pool's own.
        scene.holds = scene.wants.clone();
        scene.pool.unregister_model("holds").expect("registered");
        scene.end(waits);
    });
}

#[test]
fn a_model_that_is_gone_frees_memory() {
    explore_both(|mode| {
        let scene = Scene::new(2, parking(mode));
        scene.holds.allocate(0, 2 * PAGE).expect("room");
        scene.pool.unregister_model("holds").expect("registered");
        let waits = scene.wait_for(2);
        scene.holds.deallocate(0, 2 * PAGE).expect("live");
        let again = scene.holds.try_allocate(0, PAGE);
        assert_eq!(again, Err(VmmError::Closed));
        scene.end(waits);
    });
}

#[test]
fn a_guarantee_goes_with_its_account() {
    explore_both(|mode| {
        let scene = Scene::new(4, parking(mode));
        scene.holds.allocate(0, PAGE).expect("room");
        let sure = Quota::new().guarantee_bytes(PAGE);
        let sure = scene.pool.engine().account("sure", sure).expect("room");
        let waits = scene.wait_for(3);
        drop(sure);
        scene.end(waits);
    });
}

#[test]
fn a_limit_is_raised() {
    explore_both(|mode| {
        let scene = Scene::new(4, parking(mode));
        scene.pool.set_limit_bytes(2 * PAGE).expect("no guarantees");
        scene.holds.allocate(0, PAGE).expect("room");
        let waits = scene.wait_for(2);
        let limit_of_holds = Quota::new().ceiling_bytes(PAGE);
        scene
            .pool
            .set_quota("holds", limit_of_holds)
            .expect("no more");
        scene.pool.set_limit_bytes(3 * PAGE).expect("more");
        scene.end(waits);
    });
}

/// The driver refuses once to take memory back; a thread that waits for that very work learns of
/// it.
#[test]
fn an_unmapping_is_refused() {
    explore_both(|mode| {
        let scene = Scene::new(2, parking(mode));
        scene.holds.allocate(0, 2 * PAGE).expect("room");
        scene.holds.deallocate(0, 2 * PAGE).expect("live");
        park(&scene);
        let unmap = DriverFunction::cuMemUnmap;
        books(|books| books.fail(unmap, 0, CUDA_ERROR_INVALID_VALUE));
        let takes = ["a", "b"].map(|name| {
            scene
                .pool
                .register_model(name, PAGE)
                .expect("no call fails");
            let model = scene.pool.model(name).expect("registered");
            thread::spawn(move || {
                loop {
                    // It waits for memory that comes back by itself, and for no other.
                    match model.allocate(0, PAGE) {
                        Ok(_) => return,
                        Err(VmmError::Driver(_)) => {}
                        Err(error) => assert!(error.is_retryable(), "{error}"),
                    }
                    model.engine().step();
                    thread::yield_now();
                }
            })
        });
        for thread in takes {
            thread.join().expect("it is served");
        }
        for name in ["a", "b"] {
            scene.pool.unregister_model(name).expect("registered");
        }
        let waits = scene.wait_for(2);
        scene.end(waits);
    });
}

/// Released when its user says so.
#[derive(Debug, Clone, Default)]
struct Token(shuttle::sync::Arc<AtomicBool>);

impl LeaseToken for Token {
    fn is_released(&mut self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

#[test]
fn a_lease_is_over() {
    explore_both(|mode| {
        let scene = Scene::new(2, parking(mode));
        scene.holds.allocate(0, 2 * PAGE).expect("room");
        let token = Token::default();
        scene.holds.lease(0, PAGE, token.clone()).expect("live");
        scene.holds.deallocate(0, 2 * PAGE).expect("live");
        let waits = scene.wait_for(2);
        token.0.store(true, Ordering::SeqCst);
        scene.end(waits);
    });
}

#[test]
fn memory_is_freed() {
    explore_both(|mode| {
        let scene = Scene::new(2, parking(mode));
        let stream = scene.world.stream();
        scene.holds.use_stream(&stream).expect("same device");
        let address = scene.holds.allocate(0, 2 * PAGE).expect("room");
        write(&stream, address, 2 * PAGE);
        let waits = scene.wait_for(2);
        scene.holds.deallocate(0, 2 * PAGE).expect("live");
        drop(stream);
        scene.end(waits);
    });
}

#[test]
fn slack_is_given_back_by_a_compaction() {
    explore_both(|mode| {
        let options = EngineOptions::new().chunk_bytes_max(2 * PAGE).worker(mode);
        let scene = Scene::new(17, options);
        scene.pool.register_model("large", 16 * PAGE).expect("new");
        // Above the thread that waits, or there would be no room to move to.
        let above = Quota::new().priority(1);
        scene.pool.set_quota("large", above).expect("no guarantee");
        let large = scene.pool.model("large").expect("registered");
        large.allocate(0, 16 * PAGE).expect("room");
        large.deallocate(PAGE, PAGE).expect("live");
        assert_eq!(large.stats().parts.slack_bytes, PAGE);
        let waits = scene.wait_for(2);
        drop(large);
        scene.pool.compact_model("large").expect("no call fails");
        scene.end(waits);
    });
}

/// Another model is charged for pages that then cannot be made.
#[test]
fn a_filling_fails() {
    explore_both(|mode| {
        let scene = Scene::new(2, parking(mode));
        let create = DriverFunction::cuMemCreate;
        books(|books| books.fail(create, 0, CUDA_ERROR_INVALID_VALUE));
        let holds = scene.holds.clone();
        let fills =
            thread::spawn(move || _ = holds.allocate(0, PAGE).map(|_| holds.deallocate(0, PAGE)));
        let wants = scene.wants.clone();
        let waits = thread::spawn(move || {
            // The failure may be its own.
            while let Err(error) = wants.allocate_timeout(0, 2 * PAGE, FOREVER) {
                assert!(matches!(error, VmmError::Driver(_)), "{error}");
            }
        });
        fills.join().expect("no thread fails");
        scene.end(waits);
    });
}

/// Memory is charged that is to be made ahead, and cannot be.
#[test]
fn making_memory_ahead_fails() {
    explore_both(|mode| {
        let scene = Scene::new(2, parking(mode));
        let map = DriverFunction::cuMemMap;
        books(|books| books.fail(map, 0, CUDA_ERROR_INVALID_VALUE));
        let options = ModelOptions {
            ahead_bytes_max: PAGE,
            ..ModelOptions::new(4 * PAGE)
        };
        let wants = scene.wants.clone();
        let waits = thread::spawn(move || {
            while let Err(error) = wants.allocate_timeout(0, 2 * PAGE, FOREVER) {
                assert!(matches!(error, VmmError::Driver(_)), "{error}");
            }
        });
        scene
            .pool
            .register_model_with("ahead", options)
            .expect("new");
        scene.pool.engine().step();
        scene.end(waits);
    });
}
