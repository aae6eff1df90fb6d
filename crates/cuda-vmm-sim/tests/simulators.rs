//! Several simulators in one process, and what remains when one ends.
#![allow(
    clippy::macro_metavars_in_unsafe,
    reason = "every call of the table is unsafe"
)]

mod common;
use common::*;
use std::ffi::c_void;
use std::sync::Mutex;

/// Runs the tests one at a time, because they need free slots.
static SLOTS: Mutex<()> = Mutex::new(());

#[test]
fn two_simulators_share_nothing() {
    let _slots = SLOTS
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    let (first, second) = (
        Driver::small(),
        Driver::new(SimConfig::new().memory_bytes(PAGE)),
    );
    let address = first.reserve(2 * PAGE).unwrap();
    first.back(address, PAGE).unwrap();
    assert_eq!(
        second.books(),
        Books {
            context_retains: 1,
            ..Books::default()
        }
    );
    assert_eq!(second.unmap(address, PAGE), Err(CUDA_ERROR_INVALID_VALUE));
    assert_eq!(second.memset(address, 1, 1), Err(CUDA_ERROR_INVALID_VALUE));
    assert_eq!(second.create(2 * PAGE), Err(CUDA_ERROR_OUT_OF_MEMORY));
    first.poison(address);
    assert!(first.simulator.is_poisoned(0) && !second.simulator.is_poisoned(0));
    second.simulator.hold_work();
    assert!(second.reserve(PAGE).is_ok());
    call!(second, cuCtxSetCurrent(std::ptr::null_mut())).unwrap();
    let mut device = 9;
    assert_eq!(
        call!(first, cuCtxGetDevice(&mut device)),
        Ok(()),
        "its own context is still current"
    );
}

#[test]
fn slots_are_limited_and_used_again() {
    let _slots = SLOTS
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    let all: Vec<_> = (0..Simulator::LIMIT).map(|_| Driver::small()).collect();
    for (index, driver) in all.iter().enumerate() {
        let address = driver.reserve(PAGE * (index + 1)).unwrap();
        assert_eq!(
            driver.books().reserved_bytes,
            PAGE * (index + 1),
            "{address:x}"
        );
    }
    let refused = Simulator::new(SimConfig::new()).unwrap_err();
    assert_eq!(refused, SimError::TooMany { limit: 64 });
    assert_eq!(
        refused.to_string(),
        "64 simulated drivers are alive in this process, which is the limit"
    );
    let table = all[5].table;
    drop(all);
    // SAFETY: the functions of a table are always valid.
    let late = unsafe { (table.cuMemUnmap)(0, PAGE) };
    assert_eq!(late, CUDA_ERROR_DEINITIALIZED);
    let fresh = Simulator::new(SimConfig::new()).unwrap();
    let fresh = Driver {
        table: fresh.table(),
        simulator: fresh,
    };
    call!(fresh, cuInit(0)).unwrap();
    let mut context = std::ptr::without_provenance_mut(1);
    call!(fresh, cuCtxGetCurrent(&mut context)).unwrap();
    assert!(
        context.is_null(),
        "nothing is left of the slot's earlier simulator"
    );
    assert_eq!(fresh.simulator.thread_clock_ns(), 0);
}

#[test]
fn a_simulator_lives_as_long_as_its_last_clone() {
    let _slots = SLOTS
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    let driver = Driver::small();
    let clone = driver.simulator.clone();
    let address = driver.reserve(PAGE).unwrap();
    driver.back(address, PAGE).unwrap();
    let table = driver.table;
    drop(driver);
    let driver = Driver {
        table,
        simulator: clone,
    };
    assert_eq!(driver.memset(address, 3, PAGE), Ok(()));
    let stream = driver.stream().unwrap();
    driver.simulator.hold_work();
    driver.memset_async(address, 4, PAGE, stream).unwrap();
    drop(driver);
    assert!(!is_host_mapped(address), "the addresses are given back");
}

#[test]
fn the_last_clone_may_be_dropped_by_a_host_function() {
    let _slots = SLOTS
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    struct Last {
        simulator: Mutex<Option<Simulator>>,
        done: std::sync::mpsc::Sender<()>,
    }
    unsafe extern "C" fn drop_it(data: *mut c_void) {
        // SAFETY: the box was leaked for this one call.
        let last = unsafe { Box::from_raw(data.cast::<Last>()) };
        drop(last.simulator.lock().unwrap().take());
        last.done.send(()).unwrap();
    }
    let (done, ended) = std::sync::mpsc::channel();
    let driver = Driver::small();
    let stream = driver.stream().unwrap();
    let simulator = Mutex::new(Some(driver.simulator.clone()));
    let data = Box::into_raw(Box::new(Last { simulator, done })).cast();
    driver.simulator.hold_work();
    call!(driver, cuLaunchHostFunc(stream, Some(drop_it), data)).unwrap();
    driver.simulator.release_work();
    drop(driver);
    let waited = ended.recv_timeout(std::time::Duration::from_secs(20));
    waited.expect("the function holds a clone, so it runs before the simulator ends");
}

#[test]
fn configurations_that_cannot_be_are_refused() {
    let invalid =
        |config: SimConfig| matches!(Simulator::new(config), Err(SimError::InvalidConfig { .. }));
    assert!(invalid(
        SimConfig::new().devices(SimConfig::MAX_DEVICES + 1)
    ));
    for granularity in [0, 1, 2048, 3 << 20] {
        assert!(
            invalid(SimConfig::new().granularity_bytes(granularity)),
            "{granularity}"
        );
    }
    assert!(invalid(SimConfig::new().memory_bytes(usize::MAX)));
}

#[test]
fn many_threads_on_one_simulator() {
    let _slots = SLOTS
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    let driver = Driver::small();
    let context = Shared(driver.retain(0).unwrap());
    std::thread::scope(|scope| {
        for thread in 0..8u8 {
            let driver = driver.clone();
            scope.spawn(move || {
                call!(driver, cuCtxSetCurrent(context.get())).unwrap();
                let stream = driver.stream().unwrap();
                let address = driver.reserve(8 * PAGE).unwrap();
                for round in 0..50u8 {
                    let place = address + u64::from(round % 8) * PAGE as u64;
                    driver.back(place, PAGE).unwrap();
                    let value = thread * 16 + round % 16;
                    driver.memset_async(place, value, 8192, stream).unwrap();
                    call!(driver, cuStreamSynchronize(stream)).unwrap();
                    // SAFETY: the page is accessible, and the only work on it has completed.
                    let seen = unsafe { std::slice::from_raw_parts(place as *const u8, 8192) };
                    assert!(seen.iter().all(|&byte| byte == value));
                    driver.unmap(place, PAGE).unwrap();
                }
                call!(driver, cuStreamDestroy(stream)).unwrap();
                driver.address_free(address, 8 * PAGE).unwrap();
            });
        }
    });
    call!(driver, cuDevicePrimaryCtxRelease(0)).unwrap();
    assert_eq!(
        driver.books(),
        Books {
            context_retains: 1,
            ..Books::default()
        }
    );
}

/// Returns whether this process has anything mapped at an address.
fn is_host_mapped(address: u64) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().any(|line| {
        let (range, _) = line.split_once(' ').unwrap();
        let (start, end) = range.split_once('-').unwrap();
        let bounds = [start, end].map(|bound| u64::from_str_radix(bound, 16).unwrap());
        (bounds[0]..bounds[1]).contains(&address)
    })
}
