//! What the driver refuses to take back: a device's quarantine, and an engine's.

mod common;

#[path = "quarantine/again.rs"]
mod again;

use common::{PAGE, Simulated, failure, manual};
use cuda_vmm::sim::{Fault, SimConfig};
use cuda_vmm::sys::{
    CUDA_ERROR_ILLEGAL_ADDRESS, CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_OPERATING_SYSTEM,
    DriverFunction,
};
use cuda_vmm::{
    Access, Engine, EngineOptions, Mapping, PhysicalMemory, Reservation, VirtualMemoryPool,
    VmmError, WorkerMode,
};
use std::sync::Arc;
use std::time::{Duration, Instant};

fn refuse(simulated: &Simulated, calls: &[DriverFunction]) {
    for call in calls {
        let fault = Fault::always(*call, CUDA_ERROR_OPERATING_SYSTEM);
        simulated.simulator.inject(fault);
    }
}

#[test]
fn each_noun_is_counted_and_each_comes_back_when_it_can() {
    let simulated = Simulated::default();
    let device = &simulated.device;
    simulated.unchanged(|| {
        let reservation = Arc::new(Reservation::new(device, 4 * PAGE).expect("address space"));
        let spare = Reservation::new(device, 8 * PAGE).expect("address space");
        let mapped = Arc::new(PhysicalMemory::new(device, PAGE).expect("memory"));
        let unmapped = PhysicalMemory::new(device, 2 * PAGE).expect("memory");
        let access = [(device.clone(), Access::ReadWrite)];
        let mapping = Mapping::new(&reservation, 0, &mapped, &access).expect("mapped");
        use DriverFunction::{cuMemAddressFree, cuMemRelease, cuMemUnmap};
        refuse(&simulated, &[cuMemAddressFree, cuMemRelease, cuMemUnmap]);
        drop((mapping, reservation, mapped, unmapped, spare));
        assert_eq!(device.quarantined_bytes(), 3 * PAGE);
        assert_eq!(device.quarantined_address_bytes(), 8 * PAGE);

        // One call works again, then the next: what is given back falls to the next stage.
        simulated.simulator.clear_faults();
        refuse(&simulated, &[cuMemAddressFree, cuMemRelease]);
        assert_eq!(device.retry_quarantine(), 0, "unmapped, but not released");
        assert_eq!(device.quarantined_bytes(), 3 * PAGE);
        assert_eq!(device.quarantined_address_bytes(), 12 * PAGE);
        assert_eq!(simulated.books().mappings, 0);
        assert_eq!(simulated.books().physical_bytes, 3 * PAGE);
        simulated.simulator.clear_faults();
        refuse(&simulated, &[cuMemAddressFree]);
        assert_eq!(device.retry_quarantine(), 3 * PAGE);
        assert_eq!(device.quarantined_bytes(), 0);
        assert_eq!(device.quarantined_address_bytes(), 12 * PAGE);
        simulated.simulator.clear_faults();
        assert_eq!(device.retry_quarantine(), 0, "addresses are not memory");
        assert_eq!(device.quarantined_address_bytes(), 0);
    });
    assert_eq!(device.retry_quarantine(), 0, "nothing is left");
}

#[test]
fn the_quarantine_outlives_the_devices_clones() {
    let simulated = Simulated::default();
    let Simulated {
        driver,
        simulator,
        device,
    } = simulated;
    let memory = PhysicalMemory::new(&device, PAGE).expect("memory");
    simulator.inject(Fault::always(
        DriverFunction::cuMemRelease,
        CUDA_ERROR_INVALID_VALUE,
    ));
    drop((memory, device));
    let again = driver.device(0).expect("the device");
    assert_eq!(again.quarantined_bytes(), PAGE);
    simulator.clear_faults();
    assert_eq!(again.retry_quarantine(), PAGE);
    assert_eq!(simulator.books(0).physical_bytes, 0);
    drop(again);
    assert_eq!(simulator.books(0).context_retains, 0);
}

#[test]
fn a_poisoned_context_makes_drop_silent() {
    let simulated = Simulated::default();
    let device = &simulated.device;
    let reservation = Reservation::new(device, PAGE).expect("address space");
    let memory = PhysicalMemory::new(device, PAGE).expect("memory");
    for call in [
        DriverFunction::cuMemAddressFree,
        DriverFunction::cuMemRelease,
    ] {
        let fault = Fault::always(call, CUDA_ERROR_ILLEGAL_ADDRESS);
        simulated.simulator.inject(fault);
    }
    drop((reservation, memory));
    assert_eq!(device.quarantined_bytes(), 0, "it went with its context");
    assert_eq!(device.quarantined_address_bytes(), 0);
}

/// A pool of four pages on an engine of its own, limited to three.
fn pool(simulated: &Simulated) -> (Engine, VirtualMemoryPool) {
    let engine = Engine::new(&simulated.device, manual().limit_bytes(3 * PAGE)).expect("an engine");
    let pool = VirtualMemoryPool::on_engine(&engine, 4 * PAGE, PAGE).expect("a pool");
    (engine, pool)
}

#[test]
fn what_an_engine_cannot_unmap_stays_charged_and_is_not_handed_out() {
    let simulated = Simulated::default();
    simulated.unchanged(|| {
        let (engine, pool) = pool(&simulated);
        pool.allocate(0, 2 * PAGE).expect("room");
        refuse(&simulated, &[DriverFunction::cuMemUnmap]);
        pool.deallocate(0, 2 * PAGE).expect("all of it is live");
        let report = engine.step();
        assert_eq!(report.retired_bytes, 2 * PAGE);
        assert_eq!(
            (report.drained_bytes, report.quarantined_bytes),
            (0, 2 * PAGE)
        );
        let stats = engine.stats();
        assert_eq!(stats.parts.quarantined_bytes, 2 * PAGE);
        assert_eq!(stats.committed_bytes, 2 * PAGE);
        assert_eq!(stats.parts.total_bytes(), stats.committed_bytes);
        assert_eq!(pool.stats().parts.quarantined_bytes, 2 * PAGE);
        assert_eq!(pool.physical_memory_usage(), 0, "none of it is live");
        assert!(!pool.is_mapped(0, 1));
        assert_eq!(
            simulated.device.quarantined_bytes(),
            0,
            "the engine has an account of it"
        );

        let error = pool
            .allocate(PAGE, 2 * PAGE)
            .expect_err("half is in quarantine");
        assert_eq!(
            error,
            VmmError::Quarantined {
                offset: PAGE,
                bytes: 2 * PAGE
            }
        );
        assert!(error.is_retryable() && !error.is_permanent());
        assert_eq!(error.shortfall_bytes(), 0);
        // Elsewhere there is room for one page, and no more: the rest of the budget is in
        // quarantine.
        let error = pool.allocate(2 * PAGE, 2 * PAGE).expect_err("no room");
        assert_eq!(
            error,
            VmmError::OutOfPhysicalMemory {
                asked_bytes: 2 * PAGE,
                free_bytes: PAGE,
                retiring_bytes: 0,
                reclaimable_bytes: 0,
                limit_bytes: 3 * PAGE
            }
        );
        pool.allocate(2 * PAGE, PAGE).expect("room for one");

        simulated.simulator.clear_faults();
        let report = engine.step();
        assert_eq!(
            (report.drained_bytes, report.quarantined_bytes),
            (2 * PAGE, 0)
        );
        assert_eq!(engine.stats().committed_bytes, PAGE);
        pool.allocate(0, 2 * PAGE).expect("clean again");
        pool.close().expect("closed");
    });
}

#[test]
fn an_allocation_over_quarantine_tries_it_once_more_itself() {
    let simulated = Simulated::default();
    simulated.unchanged(|| {
        let (engine, pool) = pool(&simulated);
        pool.allocate(0, PAGE).expect("room");
        pool.deallocate(0, PAGE).expect("live");
        refuse(&simulated, &[DriverFunction::cuMemUnmap]);
        engine.step();
        assert_eq!(engine.stats().parts.quarantined_bytes, PAGE);
        simulated.simulator.clear_faults();
        pool.allocate(0, PAGE)
            .expect("unmapped by the way, and backed afresh");
        assert_eq!(engine.stats().parts.quarantined_bytes, 0);
        assert_eq!(engine.stats().committed_bytes, PAGE);
    });
}

#[test]
fn what_an_engine_cannot_release_stays_charged_but_its_addresses_are_free() {
    let simulated = Simulated::default();
    simulated.unchanged(|| {
        let (engine, pool) = pool(&simulated);
        pool.allocate(0, 2 * PAGE).expect("room");
        pool.deallocate(0, 2 * PAGE).expect("live");
        refuse(&simulated, &[DriverFunction::cuMemRelease]);
        assert_eq!(
            engine.trim(),
            Err(failure!(cuMemRelease, CUDA_ERROR_OPERATING_SYSTEM))
        );
        assert_eq!(engine.stats().parts.quarantined_bytes, 2 * PAGE);
        assert_eq!(engine.stats().parts.total_bytes(), 2 * PAGE);
        assert_eq!(pool.stats().parts.quarantined_bytes, 2 * PAGE);
        assert_eq!(pool.stats().committed_bytes, 2 * PAGE);
        let books = simulated.books();
        assert_eq!((books.mappings, books.physical_bytes), (0, 2 * PAGE));
        pool.allocate(0, PAGE).expect("the addresses are unmapped");
        simulated.simulator.clear_faults();
        let report = engine.step();
        assert_eq!(
            (report.drained_bytes, report.quarantined_bytes),
            (2 * PAGE, 0)
        );
        assert_eq!(engine.stats().committed_bytes, PAGE);
    });
}

#[test]
fn a_pool_that_cannot_be_closed_leaves_its_memory_to_the_engine() {
    let simulated = Simulated::default();
    simulated.unchanged(|| {
        let (engine, pool) = pool(&simulated);
        pool.allocate(0, 2 * PAGE).expect("room");
        refuse(&simulated, &[DriverFunction::cuMemUnmap]);
        assert_eq!(
            pool.close(),
            Err(failure!(cuMemUnmap, CUDA_ERROR_OPERATING_SYSTEM))
        );
        let stats = engine.stats();
        assert_eq!((stats.parts.quarantined_bytes, stats.ranges), (2 * PAGE, 1));
        simulated.simulator.clear_faults();
        engine.step();
        let stats = engine.stats();
        assert_eq!((stats.committed_bytes, stats.ranges), (0, 0));
        assert_eq!(simulated.books().reservations, 0);
    });
}

#[test]
fn an_engine_that_ends_leaves_its_memory_to_the_device() {
    let simulated = Simulated::default();
    simulated.unchanged(|| {
        let (engine, pool) = pool(&simulated);
        pool.allocate(0, 3 * PAGE).expect("room");
        refuse(&simulated, &[DriverFunction::cuMemUnmap]);
        drop((pool, engine));
        assert_eq!(simulated.device.quarantined_bytes(), 3 * PAGE);
        assert_eq!(simulated.books().physical_bytes, 3 * PAGE);
        simulated.simulator.clear_faults();
        assert_eq!(simulated.device.retry_quarantine(), 3 * PAGE);
    });
}

/// Until then the engine has had nothing to do, so that it has no thread yet.
#[test]
fn what_a_failed_allocation_cannot_undo_wakes_the_worker() {
    use DriverFunction::{cuMemSetAccess, cuMemUnmap};
    let simulated = Simulated::default();
    let options = EngineOptions::new().limit_bytes(3 * PAGE);
    let engine = Engine::new(&simulated.device, options).expect("an engine");
    let pool = VirtualMemoryPool::on_engine(&engine, 4 * PAGE, PAGE).expect("a pool");
    for call in [cuMemSetAccess, cuMemUnmap] {
        let fault = Fault::nth_of(call, 1, CUDA_ERROR_OPERATING_SYSTEM);
        simulated.simulator.inject(fault);
    }
    assert_eq!(
        pool.allocate(0, PAGE),
        Err(failure!(cuMemSetAccess, CUDA_ERROR_OPERATING_SYSTEM))
    );
    let until = Instant::now() + Duration::from_secs(60);
    while engine.stats().committed_bytes > 0 {
        assert!(Instant::now() < until, "{}", engine.stats());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Both ways in which an engine learns that the device has finished refuse for as long as they are
/// asked.
#[test]
fn a_driver_that_cannot_say_whether_it_has_finished_is_an_error_and_no_endless_wait() {
    for worker in [WorkerMode::Manual, WorkerMode::Thread] {
        let simulated = Simulated::new(SimConfig::new().driver_version(12040));
        simulated.unchanged(|| {
            let options = manual().worker(worker).limit_bytes(3 * PAGE);
            let engine = Engine::new(&simulated.device, options).expect("an engine");
            let pool = VirtualMemoryPool::on_engine(&engine, 4 * PAGE, PAGE).expect("a pool");
            pool.allocate(0, 2 * PAGE).expect("room");
            refuse(&simulated, &[DriverFunction::cuCtxSynchronize]);
            pool.deallocate(0, 2 * PAGE).expect("live");
            let expected = failure!(cuCtxSynchronize, CUDA_ERROR_OPERATING_SYSTEM);
            assert_eq!(pool.allocate(0, PAGE), Err(expected.clone()), "{worker:?}");
            assert_eq!(pool.close(), Err(expected), "{worker:?}");
            assert_eq!(engine.stats().committed_bytes, 2 * PAGE);
            assert_eq!(engine.stats().parts.total_bytes(), 2 * PAGE);
            simulated.simulator.clear_faults();
            while engine.stats().ranges > 0 {
                engine.step();
            }
            assert_eq!(engine.stats().committed_bytes, 0);
        });
    }
}

#[test]
fn a_fence_that_was_waited_for_need_not_be_asked() {
    let simulated = Simulated::default();
    simulated.unchanged(|| {
        let (engine, pool) = pool(&simulated);
        pool.allocate(0, 3 * PAGE).expect("room");
        refuse(&simulated, &[DriverFunction::cuEventQuery]);
        pool.deallocate(0, 3 * PAGE).expect("live");
        assert_eq!(engine.step().retiring_bytes, 3 * PAGE, "not to be known");
        pool.allocate(0, PAGE).expect("waited for");
        pool.close().expect("waited for");
        assert_eq!(engine.stats().committed_bytes, 0);
    });
}
