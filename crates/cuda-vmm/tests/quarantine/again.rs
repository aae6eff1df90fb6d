//! How often the driver is asked again for what it refused, and how often that is told.

use crate::common::told::told;
use crate::common::{PAGE, Simulated, manual};
use crate::refuse;
use cuda_vmm::sim::{Fault, SimConfig, Simulator};
use cuda_vmm::sys::{
    CUDA_ERROR_ILLEGAL_ADDRESS, CUDA_ERROR_LAUNCH_FAILED, CUDA_ERROR_OPERATING_SYSTEM, CUdeviceptr,
    CUmemGenericAllocationHandle, CUresult, DriverFunction, DriverTable,
};
use cuda_vmm::{
    Access, Driver, DriverKind, Engine, EngineOptions, Mapping, PhysicalMemory, PoolOptions,
    Reservation, VirtualMemoryPool,
};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};
use tracing::Level;

const CHUNKS: usize = 64;

/// A pool of a chunk for each page, all live.
fn full(simulated: &Simulated, options: EngineOptions) -> (Engine, VirtualMemoryPool) {
    let engine = Engine::new(&simulated.device, options.chunk_bytes_max(0)).expect("an engine");
    let pool = VirtualMemoryPool::on_engine(&engine, CHUNKS * PAGE, PAGE).expect("a pool");
    pool.allocate(0, CHUNKS * PAGE).expect("room");
    (engine, pool)
}

fn messages(told: &[(Level, String)], level: Level) -> Vec<&str> {
    let of_level = told.iter().filter(|(of, _)| *of == level);
    of_level.map(|(_, text)| text.as_str()).collect()
}

/// Returns when it is so; a test that fails ends all the same.
fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn many_refusals_are_one_warning_and_one_message_at_the_end() {
    for refused in [DriverFunction::cuMemUnmap, DriverFunction::cuMemRelease] {
        let simulated = Simulated::default();
        let (engine, pool) = full(&simulated, manual());
        let told = told(|| {
            refuse(&simulated, &[refused]);
            pool.deallocate(0, CHUNKS * PAGE).expect("live");
            for _ in 0..5 {
                assert_eq!(engine.step().quarantined_bytes, CHUNKS * PAGE);
                engine.trim().expect("nothing is parked");
            }
            simulated.simulator.clear_faults();
            assert_eq!(engine.step().drained_bytes, CHUNKS * PAGE, "{refused:?}");
        });
        let warnings = messages(&told, Level::WARN);
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(warnings[0].contains("quarantined"), "{warnings:?}");
        let ends = messages(&told, Level::INFO);
        assert_eq!(ends.len(), 1, "{ends:?}");
        drop(pool);
    }
}

/// Each delay is twice the one before, and a try ends with the first refusal. So that many tries
/// take at least so long, however fast or slow the machine is.
#[test]
fn a_worker_asks_ever_less_often_and_about_one_piece() {
    let simulated = Simulated::default();
    simulated.unchanged(|| {
        let (engine, pool) = full(&simulated, EngineOptions::new());
        refuse(&simulated, &[DriverFunction::cuMemUnmap]);
        let began = Instant::now();
        pool.deallocate(0, CHUNKS * PAGE).expect("live");
        until("it is refused", || {
            engine.stats().parts.quarantined_bytes == CHUNKS * PAGE
        });
        until("it is tried again", || engine.counters().retries >= 4);
        thread::sleep(Duration::from_millis(100));
        let retries = engine.counters().retries;
        let spent = began.elapsed();
        // The nth try comes 16 * (2^n - 1) ms after the first refusal at the earliest.
        let earliest = Duration::from_millis(16) * ((1 << retries) - 1);
        assert!(earliest <= spent, "{retries} tries in {spent:?}");
        simulated.simulator.clear_faults();
        until("it goes back by itself", || {
            engine.stats().committed_bytes == 0
        });
        let left = engine.counters().retries - retries;
        assert!(left >= CHUNKS as u64, "each piece is a retry: {left}");
        drop(pool);
    });
}

/// Where memory is that is not unmapped.
static REFUSED: AtomicU64 = AtomicU64::new(0);
static REAL: OnceLock<DriverTable> = OnceLock::new();

unsafe extern "C" fn unmap(address: CUdeviceptr, bytes: usize) -> CUresult {
    if address == REFUSED.load(Ordering::SeqCst) {
        return CUDA_ERROR_OPERATING_SYSTEM;
    }
    let real = REAL.get().expect("set before the driver is made");
    // SAFETY: as for this call.
    unsafe { (real.cuMemUnmap)(address, bytes) }
}

#[test]
fn a_piece_that_is_refused_for_ever_does_not_keep_the_others() {
    let simulator = Simulator::new(SimConfig::new()).expect("a simulator");
    let mut table = simulator.table();
    REAL.get_or_init(|| simulator.table());
    table.cuMemUnmap = unmap;
    // SAFETY: the simulator outlives the driver.
    let driver = unsafe { Driver::from_table(table, DriverKind::Simulated) }.expect("a driver");
    let device = driver.device(0).expect("a device");
    let engine = Engine::new(&device, EngineOptions::new().chunk_bytes_max(0)).expect("an engine");
    let pool = VirtualMemoryPool::on_engine(&engine, CHUNKS * PAGE, PAGE).expect("a pool");
    let address = pool.allocate(0, CHUNKS * PAGE).expect("room");
    // All are refused at first, and one for ever, which is the first in the order of addresses.
    REFUSED.store(address, Ordering::SeqCst);
    let all = Fault::always(DriverFunction::cuMemUnmap, CUDA_ERROR_OPERATING_SYSTEM);
    simulator.inject(all);
    pool.deallocate(0, CHUNKS * PAGE).expect("live");
    until("all are refused", || {
        engine.stats().parts.quarantined_bytes == CHUNKS * PAGE
    });
    simulator.clear_faults();
    until("the others go back", || {
        engine.stats().committed_bytes == PAGE
    });
    REFUSED.store(0, Ordering::SeqCst);
    until("the last goes back", || engine.stats().committed_bytes == 0);
}

#[test]
fn an_allocation_asks_about_the_pages_in_its_way_and_no_others() {
    let simulated = Simulated::default();
    let (engine, pool) = full(&simulated, manual());
    refuse(&simulated, &[DriverFunction::cuMemUnmap]);
    pool.deallocate(0, CHUNKS * PAGE).expect("live");
    engine.step();
    let before = simulated.simulator.calls(DriverFunction::cuMemUnmap);
    let error = pool.allocate(3 * PAGE, 2 * PAGE).expect_err("refused");
    assert!(error.is_retryable(), "{error}");
    let calls = simulated.simulator.calls(DriverFunction::cuMemUnmap) - before;
    assert_eq!(calls, 2);
    simulated.simulator.clear_faults();
    pool.allocate(3 * PAGE, 2 * PAGE).expect("at once");
    assert_eq!(engine.stats().parts.quarantined_bytes, (CHUNKS - 2) * PAGE);
}

/// Whether the calls below refuse the engine's thread, or have refused the other one.
static REFUSES_WORKER: AtomicBool = AtomicBool::new(false);
static REFUSES_OTHER: AtomicBool = AtomicBool::new(false);
static ITS_REAL: OnceLock<DriverTable> = OnceLock::new();

fn is_worker() -> bool {
    thread::current().name() == Some("cuda-vmm")
}

unsafe extern "C" fn unmap_unless_worker(address: CUdeviceptr, bytes: usize) -> CUresult {
    if is_worker() && REFUSES_WORKER.load(Ordering::SeqCst) {
        return CUDA_ERROR_OPERATING_SYSTEM;
    }
    let real = ITS_REAL.get().expect("set before the driver is made");
    // SAFETY: as for this call.
    unsafe { (real.cuMemUnmap)(address, bytes) }
}

unsafe extern "C" fn release_by_worker(handle: CUmemGenericAllocationHandle) -> CUresult {
    if !is_worker() && REFUSES_OTHER.swap(false, Ordering::SeqCst) {
        // The worker's next try is due meanwhile, and there is nothing to try.
        thread::sleep(Duration::from_millis(300));
        REFUSES_WORKER.store(false, Ordering::SeqCst);
        return CUDA_ERROR_OPERATING_SYSTEM;
    }
    let real = ITS_REAL.get().expect("set before the driver is made");
    // SAFETY: as for this call.
    unsafe { (real.cuMemRelease)(handle) }
}

#[test]
fn a_worker_that_found_nothing_while_another_had_it_in_hand_is_woken() {
    let simulator = Simulator::new(SimConfig::new()).expect("a simulator");
    let mut table = simulator.table();
    ITS_REAL.get_or_init(|| simulator.table());
    (table.cuMemUnmap, table.cuMemRelease) = (unmap_unless_worker, release_by_worker);
    // SAFETY: the simulator outlives the driver.
    let driver = unsafe { Driver::from_table(table, DriverKind::Simulated) }.expect("a driver");
    let device = driver.device(0).expect("a device");
    let engine = Engine::new(&device, EngineOptions::new()).expect("an engine");
    let pool = VirtualMemoryPool::on_engine(&engine, PAGE, PAGE).expect("a pool");
    pool.allocate(0, PAGE).expect("room");
    REFUSES_WORKER.store(true, Ordering::SeqCst);
    REFUSES_OTHER.store(true, Ordering::SeqCst);
    pool.deallocate(0, PAGE).expect("live");
    until("the worker is refused", || {
        engine.stats().parts.quarantined_bytes == PAGE
    });
    _ = engine.trim();
    assert_eq!(engine.stats().parts.quarantined_bytes, PAGE);
    until("the worker tries again", || {
        engine.stats().committed_bytes == 0
    });
}

#[test]
fn an_allocation_that_lacks_memory_asks_about_all_until_a_piece_is_refused() {
    for refused in [DriverFunction::cuMemUnmap, DriverFunction::cuMemRelease] {
        let simulated = Simulated::default();
        let (engine, pool) = full(&simulated, manual().limit_bytes(CHUNKS * PAGE));
        let other = VirtualMemoryPool::on_engine(&engine, CHUNKS * PAGE, PAGE).expect("a pool");
        refuse(&simulated, &[refused]);
        pool.deallocate(0, CHUNKS * PAGE).expect("live");
        engine.step();
        let before = simulated.simulator.calls(refused);
        let error = other.allocate(0, PAGE).expect_err("refused");
        assert!(error.is_retryable(), "{error}");
        assert_eq!(simulated.simulator.calls(refused) - before, 1);
        simulated.simulator.clear_faults();
        other.allocate(0, PAGE).expect("at once");
        assert_eq!(engine.stats().parts.quarantined_bytes, 0);
    }
}

#[test]
fn in_a_context_beyond_use_the_driver_is_asked_once_and_no_more() {
    for code in [CUDA_ERROR_ILLEGAL_ADDRESS, CUDA_ERROR_LAUNCH_FAILED] {
        for refused in [DriverFunction::cuMemUnmap, DriverFunction::cuMemRelease] {
            let simulated = Simulated::default();
            let device = &simulated.device;
            let (engine, pool) = full(&simulated, manual());
            let other = Reservation::new(device, PAGE).expect("addresses");
            let memory = PhysicalMemory::new(device, PAGE).expect("memory");
            let calls = || {
                let of = |call| simulated.simulator.calls(call);
                of(DriverFunction::cuMemUnmap)
                    + of(DriverFunction::cuMemRelease)
                    + of(DriverFunction::cuMemAddressFree)
            };
            let told = told(|| {
                simulated.simulator.inject(Fault::always(refused, code));
                pool.deallocate(0, CHUNKS * PAGE).expect("live");
                engine.step();
                assert_eq!(simulated.simulator.calls(refused), 1, "{refused:?}");
                let before = calls();
                assert_eq!(engine.stats().parts.quarantined_bytes, CHUNKS * PAGE);
                for _ in 0..3 {
                    engine.step();
                    engine.trim().expect("nothing is parked");
                    assert_eq!(engine.relieve(PAGE), 0);
                    assert_eq!(device.retry_quarantine(), 0);
                    let _ = pool.allocate(0, PAGE);
                }
                drop((other, memory));
                drop(pool);
                drop(engine);
                assert_eq!(calls(), before, "{refused:?}");
            });
            let warnings = messages(&told, Level::WARN);
            assert_eq!(warnings.len(), 1, "{warnings:?}");
            assert_eq!(device.quarantined_bytes(), 0, "it went with its context");
            assert_eq!(device.quarantined_address_bytes(), 0);
        }
    }
}

#[test]
fn a_worker_leaves_a_context_beyond_use_alone() {
    let simulated = Simulated::default();
    let (engine, pool) = full(&simulated, EngineOptions::new());
    let fault = Fault::always(DriverFunction::cuMemUnmap, CUDA_ERROR_ILLEGAL_ADDRESS);
    simulated.simulator.inject(fault);
    pool.deallocate(0, CHUNKS * PAGE).expect("live");
    until("it is refused", || {
        engine.stats().parts.quarantined_bytes == CHUNKS * PAGE
    });
    thread::sleep(Duration::from_millis(100));
    assert_eq!(simulated.simulator.calls(DriverFunction::cuMemUnmap), 1);
    assert_eq!(engine.counters().retries, 0);
}

#[test]
fn what_many_owners_leave_to_the_device_is_one_warning_and_one_message_at_the_end() {
    let simulated = Simulated::default();
    let device = &simulated.device;
    let reservation = Arc::new(Reservation::new(device, 8 * PAGE).expect("addresses"));
    let access = [(device.clone(), Access::ReadWrite)];
    let mappings: Vec<_> = (0..8)
        .map(|page| {
            let memory = Arc::new(PhysicalMemory::new(device, PAGE).expect("memory"));
            Mapping::new(&reservation, page * PAGE, &memory, &access).expect("mapped")
        })
        .collect();
    let told = told(|| {
        refuse(&simulated, &[DriverFunction::cuMemUnmap]);
        drop(mappings);
        for _ in 0..3 {
            assert_eq!(device.retry_quarantine(), 0);
            assert_eq!(device.quarantined_bytes(), 8 * PAGE);
        }
        simulated.simulator.clear_faults();
        assert_eq!(device.retry_quarantine(), 8 * PAGE);
    });
    assert_eq!(messages(&told, Level::WARN).len(), 1, "{told:?}");
    assert_eq!(messages(&told, Level::INFO).len(), 1, "{told:?}");
}

#[test]
fn a_move_that_cannot_be_undone_is_one_warning() {
    let simulated = Simulated::default();
    let engine = Engine::new(&simulated.device, manual()).expect("an engine");
    let single = PoolOptions::new().single_handle(true);
    let open = || VirtualMemoryPool::with_options(&engine, 64 * PAGE, PAGE, single);
    let mut pool = open().expect("a pool");
    for chunk in 0..8 {
        pool.allocate(chunk * 8 * PAGE, 8 * PAGE).expect("room");
        pool.deallocate(chunk * 8 * PAGE, 6 * PAGE).expect("live");
    }
    let told = told(|| {
        // Neither the new memory nor the old comes to its place.
        let second = Fault::nth_of(DriverFunction::cuMemMap, 2, 999);
        simulated.simulator.inject(second);
        refuse(&simulated, &[DriverFunction::cuMemSetAccess]);
        refuse(&simulated, &[DriverFunction::cuMemUnmap]);
        pool.compact().expect_err("refused");
        for _ in 0..5 {
            engine.step();
        }
        assert!(engine.stats().parts.quarantined_bytes > 0);
        simulated.simulator.clear_faults();
        engine.step();
    });
    assert_eq!(messages(&told, Level::WARN).len(), 1, "{told:?}");
    assert_eq!(messages(&told, Level::INFO).len(), 1, "{told:?}");
    assert_eq!(engine.stats().parts.quarantined_bytes, 0);
    pool.compact().expect("all is well again");
}
