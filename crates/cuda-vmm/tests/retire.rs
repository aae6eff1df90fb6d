//! Freed memory stays mapped until the device has finished with it, and only a caller that needs
//! those very bytes waits for that.

mod common;

use common::Gate;
use cuda_vmm::sim::{Books, SimConfig, Simulator};
use cuda_vmm::sys::DriverFunction;
use cuda_vmm::{
    CaptureGuard, Device, Driver, Engine, EngineOptions, Stream, VirtualMemoryPool, VmmError,
    WorkerMode,
};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const PAGE: usize = 2 << 20;

/// Captures are declared for the whole process, so these tests take turns.
static TURN: Mutex<()> = Mutex::new(());

struct Fixture {
    device: Device,
    simulator: Simulator,
    engine: Engine,
    _turn: MutexGuard<'static, ()>,
}

impl Fixture {
    fn new(config: SimConfig, options: EngineOptions) -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let driver = Driver::simulated(config).expect("simulator");
        let device = driver.device(0).expect("device");
        Self {
            _turn: turn,
            simulator: driver.simulator().expect("simulated").clone(),
            engine: Engine::new(&device, options).expect("engine"),
            device,
        }
    }

    fn manual() -> Self {
        Self::new(
            SimConfig::new(),
            EngineOptions::new()
                .limit_bytes(4 * PAGE)
                .worker(WorkerMode::Manual),
        )
    }

    fn pool(&self) -> VirtualMemoryPool {
        VirtualMemoryPool::on_engine(&self.engine, 16 * PAGE, PAGE).expect("pool")
    }

    fn stream(&self) -> Stream {
        Stream::new(&self.device).expect("stream")
    }

    /// A pool with a named stream that has a write to `live` pages queued, which runs when it is
    /// let, and the first `freed` of those pages freed.
    fn freed_under_a_write(&self, live: usize, freed: usize) -> (VirtualMemoryPool, Stream) {
        let (pool, stream) = (self.pool(), self.stream());
        pool.use_stream(&stream).expect("same device");
        let address = pool.allocate(0, live * PAGE).expect("room");
        self.simulator.hold_work();
        write(&stream, address);
        pool.deallocate(0, freed * PAGE).expect("live");
        (pool, stream)
    }

    fn calls(&self, function: DriverFunction) -> u64 {
        self.simulator.calls(function)
    }
}

/// Queues a write to the address, which runs when the simulator lets it.
fn write(stream: &Stream, address: u64) {
    // SAFETY: the memory stays mapped until the work has run; that is what is tested.
    unsafe { stream.memset(address, 7, PAGE) }.expect("queued");
}

#[test]
fn memory_under_a_running_write_stays_mapped_until_the_named_stream_is_past_it() {
    let fixture = Fixture::manual();
    let (pool, stream) = fixture.freed_under_a_write(1, 1);
    assert_eq!(pool.physical_memory_usage(), 0, "it is no longer live");
    for _ in 0..3 {
        let report = fixture.engine.step();
        assert_eq!((report.drained_bytes, report.retiring_bytes), (0, PAGE));
    }
    assert_eq!(fixture.calls(DriverFunction::cuMemUnmap), 0);
    fixture.simulator.release_work();
    stream.synchronize().expect("the write was legal");
    assert_eq!(fixture.engine.step().drained_bytes, PAGE);
    assert!(!fixture.simulator.is_poisoned(0));
    assert_eq!(fixture.engine.stats().committed_bytes, 0);
}

#[test]
fn without_a_named_stream_all_work_of_the_context_is_waited_for() {
    for version in [13000, 12000] {
        let fixture = Fixture::new(
            SimConfig::new().driver_version(version),
            EngineOptions::new().worker(WorkerMode::Manual),
        );
        let (pool, stream) = (fixture.pool(), fixture.stream());
        let address = pool.allocate(0, PAGE).expect("room");
        fixture.simulator.hold_work();
        write(&stream, address);
        pool.deallocate(0, PAGE).expect("live");
        assert_eq!(
            fixture.calls(DriverFunction::cuCtxSynchronize),
            0,
            "not on the caller's thread"
        );
        fixture.simulator.release_work();
        // An old driver needs a context synchronise, which waits; a new one a fence, which may
        // still be pending.
        stream.synchronize().expect("the write was legal");
        assert_eq!(
            fixture.engine.step().drained_bytes,
            PAGE,
            "driver {version}"
        );
        let synchronised = fixture.calls(DriverFunction::cuCtxSynchronize);
        assert_eq!(synchronised, u64::from(version < 12050));
        assert!(!fixture.simulator.is_poisoned(0));
    }
}

#[test]
fn a_try_does_not_wait_and_says_how_much_is_retiring() {
    let fixture = Fixture::manual();
    let (pool, stream) = fixture.freed_under_a_write(4, 3);
    let error = pool
        .try_allocate(8 * PAGE, 2 * PAGE)
        .expect_err("nothing is free yet");
    assert_eq!(
        error,
        VmmError::OutOfPhysicalMemory {
            asked_bytes: 2 * PAGE,
            free_bytes: 0,
            retiring_bytes: 3 * PAGE,
            reclaimable_bytes: 0,
            limit_bytes: 4 * PAGE,
        }
    );
    assert!(error.is_retryable() && !error.is_permanent());
    assert_eq!(error.shortfall_bytes(), 2 * PAGE);
    fixture.simulator.release_work();
    stream.synchronize().expect("legal");
    pool.try_allocate(8 * PAGE, 2 * PAGE)
        .expect("the device is past it now");
}

#[test]
fn an_allocation_that_cannot_ever_fit_is_refused_before_any_driver_call() {
    let fixture = Fixture::manual();
    let pool = fixture.pool();
    fixture.simulator.start_trace();
    let error = pool
        .allocate(0, 5 * PAGE)
        .expect_err("the limit is four pages");
    assert!(error.is_permanent() && error.is_out_of_memory() && !error.is_retryable());
    assert_eq!(fixture.simulator.take_trace(), []);
}

#[test]
fn an_allocation_waits_for_retiring_memory_that_satisfies_it() {
    let fixture = Fixture::manual();
    let (pool, _stream) = fixture.freed_under_a_write(4, 2);
    let released = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(20));
            released.store(true, Ordering::SeqCst);
            fixture.simulator.release_work();
        });
        pool.allocate(8 * PAGE, 2 * PAGE).expect("it comes back");
        assert!(
            released.load(Ordering::SeqCst),
            "not before the device was past it"
        );
    });
    // But not for what would not satisfy it.
    assert!(
        pool.allocate(12 * PAGE, PAGE)
            .expect_err("full")
            .is_retryable()
    );
}

#[test]
fn pages_taken_back_at_once_are_still_mapped() {
    let fixture = Fixture::manual();
    let (pool, stream) = (fixture.pool(), fixture.stream());
    pool.use_stream(&stream).expect("same device");
    pool.allocate(0, 2 * PAGE).expect("room");
    pool.deallocate(0, 2 * PAGE).expect("live");
    stream.synchronize().expect("idle");
    pool.allocate(0, 2 * PAGE).expect("room");
    assert_eq!(fixture.calls(DriverFunction::cuMemMap), 2);
    assert_eq!(fixture.calls(DriverFunction::cuMemUnmap), 0);
}

#[test]
fn a_declared_capture_holds_back_the_context_synchronise_only() {
    let fixture = Fixture::new(
        SimConfig::new().driver_version(12000),
        EngineOptions::new()
            .limit_bytes(2 * PAGE)
            .worker(WorkerMode::Manual),
    );
    let pool = fixture.pool();
    pool.allocate(0, 2 * PAGE).expect("room");
    let capture = CaptureGuard::new();
    pool.deallocate(0, 2 * PAGE).expect("live");
    assert_eq!(fixture.engine.step().retiring_bytes, 2 * PAGE);
    let error = pool
        .allocate(4 * PAGE, PAGE)
        .expect_err("cannot be had during the capture");
    assert!(error.is_retryable(), "{error}");
    assert_eq!(fixture.calls(DriverFunction::cuCtxSynchronize), 0);
    drop(capture);
    pool.allocate(4 * PAGE, PAGE).expect("room again");
}

#[test]
fn a_pool_dropped_during_a_capture_is_finished_by_the_engine_afterwards() {
    let fixture = Fixture::new(
        SimConfig::new().driver_version(12000),
        EngineOptions::new().worker(WorkerMode::Manual),
    );
    let pool = fixture.pool();
    pool.allocate(0, PAGE).expect("room");
    let capture = CaptureGuard::new();
    drop(pool);
    assert_eq!(fixture.simulator.books(0).physical_bytes, PAGE);
    drop(capture);
    fixture.engine.step();
    let books = fixture.simulator.books(0);
    assert_eq!((books.physical_bytes, books.reservations), (0, 0));
}

#[test]
fn the_worker_gives_memory_back_by_itself_and_ends_with_the_engine() {
    let fixture = Fixture::new(SimConfig::new(), EngineOptions::new());
    let pool = fixture.pool();
    pool.allocate(0, 8 * PAGE).expect("room");
    pool.deallocate(0, 8 * PAGE).expect("live");
    let mut patience = 5_000;
    while fixture.engine.stats().committed_bytes > 0 {
        patience -= 1;
        assert!(patience > 0, "{}", fixture.engine.stats());
        std::thread::sleep(Duration::from_millis(1));
    }
    let Fixture {
        simulator,
        engine,
        device,
        _turn,
    } = fixture;
    drop((pool, engine, device));
    ends(&simulator);
}

#[test]
fn an_engine_without_owners_lives_until_a_capture_lets_it_give_everything_back() {
    let fixture = Fixture::new(SimConfig::new().driver_version(12000), EngineOptions::new());
    let pool = fixture.pool();
    pool.allocate(0, PAGE).expect("room");
    let Fixture {
        simulator,
        engine,
        device,
        _turn,
    } = fixture;
    let capture = CaptureGuard::new();
    drop((pool, engine, device));
    assert_eq!(simulator.books(0).physical_bytes, PAGE);
    drop(capture);
    ends(&simulator);
}

/// Waits until nothing is left, which the engine's worker may be about to see to.
fn ends(simulator: &Simulator) {
    for _ in 0..5_000 {
        if simulator.books(0) == Books::default() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("left behind: {:?}", simulator.books(0));
}

#[test]
fn dropping_a_pool_waits_for_the_device_and_returns_every_byte() {
    let fixture = Fixture::new(SimConfig::new(), EngineOptions::new());
    let (pool, stream) = (fixture.pool(), fixture.stream());
    let address = pool.allocate(0, PAGE).expect("room");
    fixture.simulator.hold_work();
    write(&stream, address);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(20));
            fixture.simulator.release_work();
        });
        drop(pool);
    });
    stream.synchronize().expect("the write was legal");
    let books = fixture.simulator.books(0);
    assert_eq!((books.physical_bytes, books.reservations), (0, 0));
}

#[test]
fn memory_of_an_engine_that_ended_during_a_capture_is_unmapped_after_a_synchronise_only() {
    let fixture = Fixture::new(
        SimConfig::new().driver_version(12000),
        EngineOptions::new().worker(WorkerMode::Manual),
    );
    let pool = fixture.pool();
    let stream = fixture.stream();
    let address = pool.allocate(0, PAGE).expect("room");
    fixture.simulator.hold_work();
    write(&stream, address);
    let Fixture {
        simulator,
        engine,
        device,
        _turn,
    } = fixture;
    let capture = CaptureGuard::new();
    drop((pool, engine));
    assert_eq!(device.quarantined_bytes(), PAGE);
    assert_eq!(device.retry_quarantine(), 0, "a capture is declared");
    assert_eq!(simulator.calls(DriverFunction::cuMemUnmap), 0);
    drop(capture);
    simulator.release_work();
    assert_eq!(device.retry_quarantine(), PAGE);
    assert!(!simulator.is_poisoned(0), "the write was over");
    drop((stream, device));
    ends(&simulator);
}

#[test]
fn the_per_thread_stream_of_another_thread_is_waited_for() {
    for version in [13000, 12000] {
        let fixture = Fixture::new(
            SimConfig::new().driver_version(version),
            EngineOptions::new().worker(WorkerMode::Manual),
        );
        let pool = fixture.pool();
        // SAFETY: the per-thread default stream is always there.
        let stream =
            unsafe { Stream::borrow(&fixture.device, core::ptr::without_provenance_mut(2)) };
        pool.use_stream(&stream).expect("same device");
        let address = pool.allocate(0, PAGE).expect("room");
        // The other thread's stream alone is held, so that a fence on this thread's would be past.
        let gate = std::thread::scope(|scope| {
            let gated = scope.spawn(|| {
                let gate = Gate::close(&fixture.device, stream.raw());
                write(&stream, address);
                gate
            });
            gated.join().expect("queued")
        });
        let own = stream.record().expect("recorded");
        assert_eq!(own.is_complete(), Ok(true), "this thread's is idle");
        pool.deallocate(0, PAGE).expect("live");
        std::thread::scope(|scope| {
            // An old driver's step waits for the context, so another thread opens the gate.
            let opens = version < 12050;
            if opens {
                scope.spawn(|| {
                    std::thread::sleep(Duration::from_millis(20));
                    gate.open();
                });
            }
            let drained_bytes = fixture.engine.step().drained_bytes;
            let expected = if gate.is_closed() { 0 } else { PAGE };
            assert_eq!(drained_bytes, expected, "the write is queued");
            assert!(opens || gate.is_closed());
        });
        gate.open();
        drop(pool);
        assert!(!fixture.simulator.is_poisoned(0), "driver {version}");
    }
}

#[test]
fn memory_freed_while_its_named_stream_is_captured_leaves_the_capture_alone_and_comes_back() {
    use cuda_vmm::sys::{CU_STREAM_CAPTURE_MODE_GLOBAL, CUDA_SUCCESS};
    let fixture = Fixture::manual();
    let (pool, stream) = (fixture.pool(), fixture.stream());
    pool.use_stream(&stream).expect("same device");
    pool.allocate(0, PAGE).expect("room");
    let table = fixture.device.driver().table();
    let capture = CaptureGuard::new();
    let mut graph = core::ptr::null_mut();
    // SAFETY: the context is the device's, and the stream is alive throughout.
    unsafe {
        assert_eq!(
            (table.cuCtxSetCurrent)(fixture.device.raw_context()),
            CUDA_SUCCESS
        );
        let begun = (table.cuStreamBeginCapture)(stream.raw(), CU_STREAM_CAPTURE_MODE_GLOBAL);
        assert_eq!(begun, CUDA_SUCCESS);
    }
    pool.deallocate(0, PAGE).expect("live");
    assert_eq!(
        fixture.engine.step().retiring_bytes,
        PAGE,
        "there is no telling yet"
    );
    // SAFETY: as above; the graph is destroyed at once.
    unsafe {
        assert_eq!(
            (table.cuStreamEndCapture)(stream.raw(), &mut graph),
            CUDA_SUCCESS,
            "intact"
        );
        assert_eq!((table.cuGraphDestroy)(graph), CUDA_SUCCESS);
    }
    drop(capture);
    assert_eq!(fixture.engine.step().drained_bytes, PAGE);
}

#[test]
fn closing_one_pool_does_not_wait_for_what_another_freed() {
    let fixture = Fixture::manual();
    let (busy, idle) = (fixture.pool(), fixture.pool());
    let (slow, quick) = (fixture.stream(), fixture.stream());
    busy.use_stream(&slow).expect("same device");
    idle.use_stream(&quick).expect("same device");
    let address = busy.allocate(0, PAGE).expect("room");
    idle.allocate(0, PAGE).expect("room");
    // Idle streams take a record at once, so only the held work keeps its own stream back.
    idle.deallocate(0, PAGE).expect("live");
    fixture.simulator.hold_work();
    write(&slow, address);
    busy.deallocate(0, PAGE).expect("live");
    idle.close().expect("it has nothing to wait for");
    assert_eq!(fixture.engine.stats().parts.retiring_bytes, PAGE);
    fixture.simulator.release_work();
}
