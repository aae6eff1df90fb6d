//! Reservations: what they refuse, and that their addresses come back on every path.

mod common;

use common::{PAGE, Simulated, failure};
use cuda_vmm::sim::Fault;
use cuda_vmm::sys::{CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_OUT_OF_MEMORY, DriverFunction};
use cuda_vmm::{Reservation, VmmError};

const SIZE: &str = "reservation size";

#[test]
fn a_reservation_has_the_size_and_alignment_asked_for_and_gives_them_back() {
    let simulated = Simulated::default();
    simulated.unchanged(|| {
        let reservation = Reservation::with_alignment(&simulated.device, 3 * PAGE, 1 << 30)
            .expect("address space");
        assert_eq!(reservation.bytes(), 3 * PAGE);
        assert!(reservation.address().is_multiple_of(1 << 30));
        assert_eq!(reservation.device(), &simulated.device);
        assert_eq!(simulated.books().reserved_bytes, 3 * PAGE);
        assert_eq!(simulated.books().physical_bytes, 0);
    });
}

#[test]
fn bad_sizes_are_refused_before_the_driver_is_asked() {
    let simulated = Simulated::default();
    for (bytes, expected) in [
        (0, VmmError::ZeroSize { what: SIZE }),
        (
            PAGE + 1,
            VmmError::Misaligned {
                what: SIZE,
                value: PAGE + 1,
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
        let outcome = simulated.unchanged(|| Reservation::new(&simulated.device, bytes));
        assert_eq!(outcome.expect_err("a bad size"), expected);
    }
    let calls = simulated
        .simulator
        .calls(DriverFunction::cuMemAddressReserve);
    assert_eq!(calls, 0);
}

#[test]
fn bad_alignments_are_refused_before_the_driver_is_asked() {
    let simulated = Simulated::default();
    for (alignment, expected) in [
        (0, VmmError::ZeroSize { what: "alignment" }),
        (
            3 * PAGE,
            VmmError::Misaligned {
                what: "alignment",
                value: 3 * PAGE,
                required: 4 * PAGE,
            },
        ),
        (
            usize::MAX,
            VmmError::Misaligned {
                what: "alignment",
                value: usize::MAX,
                required: 1 << 63,
            },
        ),
    ] {
        let outcome =
            simulated.unchanged(|| Reservation::with_alignment(&simulated.device, PAGE, alignment));
        assert_eq!(outcome.expect_err("a bad alignment"), expected);
    }
    let calls = simulated
        .simulator
        .calls(DriverFunction::cuMemAddressReserve);
    assert_eq!(calls, 0);
}

#[test]
fn more_addresses_than_there_are_is_the_drivers_out_of_memory() {
    let simulated = Simulated::default();
    for bytes in [1 << 47, usize::MAX - (PAGE - 1)] {
        let outcome = simulated.unchanged(|| Reservation::new(&simulated.device, bytes));
        let error = outcome.expect_err("too many addresses");
        assert_eq!(
            error,
            failure!(cuMemAddressReserve, CUDA_ERROR_OUT_OF_MEMORY)
        );
        assert!(
            error.is_out_of_memory() && !error.is_retryable(),
            "memory would not help"
        );
    }
    let outcome = simulated
        .unchanged(|| Reservation::with_alignment(&simulated.device, PAGE, 1 << 63).map(drop));
    assert_eq!(
        outcome,
        Err(failure!(cuMemAddressReserve, CUDA_ERROR_OUT_OF_MEMORY))
    );
}

#[test]
fn into_raw_keeps_the_addresses_and_from_raw_frees_them() {
    let simulated = Simulated::default();
    simulated.unchanged(|| {
        let reservation = Reservation::new(&simulated.device, PAGE).expect("address space");
        let expected = reservation.address();
        let (address, bytes) = reservation.into_raw();
        assert_eq!((address, bytes), (expected, PAGE));
        assert_eq!(simulated.books().reservations, 1);
        // SAFETY: the whole of the reservation above, which has no owner now; nothing is mapped in
        // it.
        let again = unsafe { Reservation::from_raw(&simulated.device, address, bytes) };
        assert_eq!((again.address(), again.bytes()), (expected, PAGE));
        again.close().expect("freed");
    });
}

#[test]
fn a_close_that_fails_hands_the_reservation_back_and_a_second_works() {
    let simulated = Simulated::default();
    simulated.unchanged(|| {
        let reservation = Reservation::new(&simulated.device, PAGE).expect("address space");
        let address = reservation.address();
        simulated.simulator.inject(Fault::nth_of(
            DriverFunction::cuMemAddressFree,
            1,
            CUDA_ERROR_INVALID_VALUE,
        ));
        let refused = reservation.close().expect_err("the driver refuses once");
        assert_eq!(
            refused.error,
            failure!(cuMemAddressFree, CUDA_ERROR_INVALID_VALUE)
        );
        assert_eq!(refused.to_string(), refused.error.to_string());
        assert_eq!(refused.object.address(), address);
        assert_eq!(simulated.books().reservations, 1);
        refused.object.close().expect("freed at the second try");
    });
    assert_eq!(simulated.device.quarantined_address_bytes(), 0);
}

#[test]
fn a_drop_that_fails_puts_the_addresses_into_quarantine() {
    let simulated = Simulated::default();
    simulated.unchanged(|| {
        let reservation = Reservation::new(&simulated.device, 2 * PAGE).expect("address space");
        simulated.simulator.inject(Fault::always(
            DriverFunction::cuMemAddressFree,
            CUDA_ERROR_OUT_OF_MEMORY,
        ));
        drop(reservation);
        assert_eq!(simulated.device.quarantined_address_bytes(), 2 * PAGE);
        assert_eq!(simulated.device.quarantined_bytes(), 0, "it has no memory");
        assert_eq!(simulated.device.retry_quarantine(), 0);
        assert_eq!(simulated.device.quarantined_address_bytes(), 2 * PAGE);
        assert_eq!(simulated.books().reservations, 1);
        simulated.simulator.clear_faults();
        assert_eq!(simulated.device.retry_quarantine(), 0);
        assert_eq!(simulated.device.quarantined_address_bytes(), 0);
    });
}
