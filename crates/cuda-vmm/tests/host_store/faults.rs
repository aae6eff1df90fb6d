//! What the driver refuses: whatever fails, nothing is lost, and nothing is unmapped that is still
//! registered. `tests/faults.rs` fails every call in turn.

use crate::{Fixture, UNIT, failure};
use cuda_vmm::sim::Fault;
use cuda_vmm::sys::{CUDA_ERROR_OPERATING_SYSTEM, CUDA_ERROR_OUT_OF_MEMORY, DriverFunction};

const REGISTER: DriverFunction = DriverFunction::cuMemHostRegister;
const UNREGISTER: DriverFunction = DriverFunction::cuMemHostUnregister;

#[test]
fn a_registration_that_fails_in_the_middle_undoes_those_before() {
    for nth in 1..=3 {
        let fixture = Fixture::new(8);
        let one = fixture.reserve(1);
        let simulator = &fixture.simulated.simulator;
        simulator.inject(Fault::nth_of(REGISTER, nth, CUDA_ERROR_OUT_OF_MEMORY));
        let refused = fixture.store.reserve(7 * UNIT).expect_err("a fault");
        assert_eq!(
            refused,
            failure!(cuMemHostRegister, CUDA_ERROR_OUT_OF_MEMORY)
        );
        assert_eq!(fixture.calls(UNREGISTER), nth - 1);
        fixture.expect(1, 2, 1);
        // Now it works.
        let seven = fixture.reserve(7);
        fixture.expect(8, 8, 4);
        drop((one, seven));
    }
}

#[test]
fn what_cannot_be_undone_stays_in_the_store_and_is_used() {
    let fixture = Fixture::new(8);
    let simulator = &fixture.simulated.simulator;
    simulator.inject(Fault::nth_of(REGISTER, 3, CUDA_ERROR_OUT_OF_MEMORY));
    simulator.inject(Fault::nth_of(UNREGISTER, 2, CUDA_ERROR_OPERATING_SYSTEM));
    let refused = fixture.store.reserve(8 * UNIT).expect_err("a fault");
    assert_eq!(
        refused,
        failure!(cuMemHostRegister, CUDA_ERROR_OUT_OF_MEMORY)
    );
    fixture.expect(0, 2, 1);
    let two = fixture.reserve(2);
    fixture.expect(2, 2, 1);
    let six = fixture.reserve(6);
    drop((two, six));
    assert_eq!(fixture.store.trim(), Ok(8 * UNIT));
    fixture.expect(0, 0, 0);
}

#[test]
fn a_trim_that_is_refused_says_so_and_gives_back_the_rest() {
    let fixture = Fixture::new(6);
    drop(fixture.reserve(6));
    let simulator = &fixture.simulated.simulator;
    simulator.inject(Fault::nth_of(UNREGISTER, 2, CUDA_ERROR_OPERATING_SYSTEM));
    let refused = failure!(cuMemHostUnregister, CUDA_ERROR_OPERATING_SYSTEM);
    assert_eq!(fixture.store.trim(), Err(refused));
    fixture.expect(0, 2, 1);
    let mut bytes = fixture.reserve(2);
    bytes.write(0, &[1; 2 * UNIT]).expect("still mapped");
    drop(bytes);
    assert_eq!(fixture.store.trim(), Ok(2 * UNIT));
    fixture.expect(0, 0, 0);
}

#[test]
fn a_lowered_limit_that_the_driver_refuses_is_tried_again() {
    let fixture = Fixture::new(6);
    let (one, two) = (fixture.reserve(2), fixture.reserve(2));
    drop(fixture.reserve(2));
    let simulator = &fixture.simulated.simulator;
    simulator.inject(Fault::always(UNREGISTER, CUDA_ERROR_OPERATING_SYSTEM));
    fixture.store.set_limit_bytes(0).expect("it is set");
    drop(one);
    fixture.expect(2, 6, 3);
    assert_eq!(fixture.store.stats().limit_bytes, 0);
    simulator.clear_faults();
    drop(two);
    fixture.expect(0, 0, 0);
}

#[test]
fn memory_that_stays_registered_when_the_store_ends_is_kept_and_tried_again() {
    let Fixture { store, simulated } = Fixture::new(4);
    let simulator = &simulated.simulator;
    drop(store.reserve(4 * UNIT).expect("room"));
    simulator.inject(Fault::always(UNREGISTER, CUDA_ERROR_OPERATING_SYSTEM));
    drop(store);
    let device = &simulated.device;
    assert_eq!(device.quarantined_host_bytes(), 4 * UNIT);
    // It is no memory of the device.
    assert_eq!(device.quarantined_bytes(), 0);
    assert_eq!(simulated.books().host_registered_bytes, 4 * UNIT);
    device.retry_quarantine();
    assert_eq!(device.quarantined_host_bytes(), 4 * UNIT);
    simulator.clear_faults();
    device.retry_quarantine();
    assert_eq!(device.quarantined_host_bytes(), 0);
    assert_eq!(simulated.books().host_registered_bytes, 0);
}

#[test]
fn a_poisoned_context_ends_the_store_without_a_word() {
    let Fixture { store, simulated } = Fixture::new(4);
    let mut bytes = store.reserve(4 * UNIT).expect("room");
    bytes.write(0, b"kept").expect("within");
    let poisoned = cuda_vmm::sys::CUDA_ERROR_ILLEGAL_ADDRESS;
    simulated
        .simulator
        .inject(Fault::always(UNREGISTER, poisoned));
    store.trim().expect("nothing to give back");
    // The host's memory is no worse for it.
    let mut word = [0; 4];
    bytes.read(0, &mut word).expect("within");
    assert_eq!(&word, b"kept");
    drop(bytes);
    let refused = store.trim().expect_err("poisoned");
    assert!(refused.is_poisoned());
    drop(store);
    assert_eq!(simulated.device.quarantined_host_bytes(), 0);
}
