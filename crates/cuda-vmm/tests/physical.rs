//! Physical memory: what it refuses, and that its bytes come back on every path.

mod common;

use common::{PAGE, Simulated, failure};
use cuda_vmm::sim::{Fault, SimConfig};
use cuda_vmm::sys::{CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_OUT_OF_MEMORY, DriverFunction};
use cuda_vmm::{PhysicalMemory, VmmError};

const SIZE: &str = "physical size";

#[test]
fn memory_has_the_size_asked_for_and_gives_it_back() {
    let simulated = Simulated::default();
    simulated.unchanged(|| {
        let memory = PhysicalMemory::new(&simulated.device, 3 * PAGE).expect("memory");
        assert_eq!(memory.bytes(), 3 * PAGE);
        assert_eq!(memory.device(), &simulated.device);
        assert_ne!(memory.handle(), 0);
        assert_eq!(simulated.books().physical_bytes, 3 * PAGE);
        assert_eq!(simulated.books().handles, 1);
        let free_bytes = simulated.device.free_bytes().expect("a number");
        assert_eq!(free_bytes, simulated.device.total_bytes() - 3 * PAGE);
    });
}

#[test]
fn bad_sizes_are_refused_before_the_driver_is_asked() {
    let simulated = Simulated::default();
    for (bytes, expected) in [
        (0, VmmError::ZeroSize { what: SIZE }),
        (
            1,
            VmmError::Misaligned {
                what: SIZE,
                value: 1,
                required: PAGE,
            },
        ),
        (
            usize::MAX,
            VmmError::Misaligned {
                what: SIZE,
                value: usize::MAX,
                required: PAGE,
            },
        ),
    ] {
        let plain = simulated.unchanged(|| PhysicalMemory::new(&simulated.device, bytes));
        assert_eq!(plain.expect_err("a bad size"), expected);
        let exportable =
            simulated.unchanged(|| PhysicalMemory::exportable(&simulated.device, bytes));
        assert_eq!(exportable.expect_err("a bad size"), expected);
    }
    assert_eq!(simulated.simulator.calls(DriverFunction::cuMemCreate), 0);
}

#[test]
fn more_than_the_device_has_is_the_drivers_out_of_memory() {
    let simulated = Simulated::new(SimConfig::new().memory_bytes(4 * PAGE));
    let held = PhysicalMemory::new(&simulated.device, 3 * PAGE).expect("memory");
    for bytes in [2 * PAGE, 5 * PAGE, usize::MAX - (PAGE - 1)] {
        let outcome = simulated.unchanged(|| PhysicalMemory::new(&simulated.device, bytes));
        let error = outcome.expect_err("more than is left");
        assert_eq!(error, failure!(cuMemCreate, CUDA_ERROR_OUT_OF_MEMORY));
        assert!(error.is_out_of_memory() && error.is_retryable() && !error.is_permanent());
        assert_eq!(
            error.shortfall_bytes(),
            0,
            "the driver does not say how much"
        );
    }
    drop(held);
    PhysicalMemory::new(&simulated.device, 4 * PAGE).expect("all of it");
}

#[test]
fn into_raw_keeps_the_memory_and_from_raw_releases_it() {
    let simulated = Simulated::default();
    simulated.unchanged(|| {
        let memory = PhysicalMemory::new(&simulated.device, PAGE).expect("memory");
        let expected = memory.handle();
        let handle = memory.into_raw();
        assert_eq!(handle, expected);
        assert_eq!(simulated.books().handles, 1);
        // SAFETY: the handle above, with its size; its one reference has no owner now.
        let again = unsafe { PhysicalMemory::from_raw(&simulated.device, handle, PAGE) };
        assert_eq!((again.handle(), again.bytes()), (expected, PAGE));
        again.close().expect("released");
    });
}

#[test]
fn a_close_that_fails_hands_the_memory_back_and_a_second_works() {
    let simulated = Simulated::default();
    simulated.unchanged(|| {
        let memory = PhysicalMemory::new(&simulated.device, PAGE).expect("memory");
        let handle = memory.handle();
        simulated.simulator.inject(Fault::nth_of(
            DriverFunction::cuMemRelease,
            1,
            CUDA_ERROR_INVALID_VALUE,
        ));
        let refused = memory.close().expect_err("the driver refuses once");
        assert_eq!(
            refused.error,
            failure!(cuMemRelease, CUDA_ERROR_INVALID_VALUE)
        );
        assert_eq!(refused.object.handle(), handle);
        assert_eq!(simulated.books().physical_bytes, PAGE);
        assert_eq!(simulated.device.quarantined_bytes(), 0, "it has an owner");
        refused.object.close().expect("released at the second try");
    });
}

#[test]
fn a_drop_that_fails_puts_the_memory_into_quarantine() {
    let simulated = Simulated::default();
    simulated.unchanged(|| {
        let memory = PhysicalMemory::new(&simulated.device, 2 * PAGE).expect("memory");
        simulated.simulator.inject(Fault::always(
            DriverFunction::cuMemRelease,
            CUDA_ERROR_OUT_OF_MEMORY,
        ));
        drop(memory);
        assert_eq!(simulated.device.quarantined_bytes(), 2 * PAGE);
        assert_eq!(simulated.device.quarantined_address_bytes(), 0);
        assert_eq!(simulated.device.retry_quarantine(), 0);
        assert_eq!(simulated.device.quarantined_bytes(), 2 * PAGE);
        assert_eq!(simulated.books().physical_bytes, 2 * PAGE);
        simulated.simulator.clear_faults();
        assert_eq!(simulated.device.retry_quarantine(), 2 * PAGE);
        assert_eq!(simulated.device.quarantined_bytes(), 0);
    });
}
