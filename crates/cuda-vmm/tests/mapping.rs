//! Mappings: what they refuse, that a failed one leaves nothing, and which devices may touch the
//! memory.

mod common;

use common::{PAGE, Simulated, failure, manual};
use cuda_vmm::sim::{Fault, SimConfig};
use cuda_vmm::sys::{
    CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_NOT_READY, CUDA_ERROR_OUT_OF_MEMORY, DriverFunction,
};
use cuda_vmm::{
    Access, Device, Engine, Mapping, PhysicalMemory, Reservation, Stream, VirtualMemoryPool,
    VmmError,
};
use std::sync::Arc;

/// Addresses for four pages and memory for one.
fn nouns(device: &Device) -> (Arc<Reservation>, Arc<PhysicalMemory>) {
    (
        Arc::new(Reservation::new(device, 4 * PAGE).expect("address space")),
        Arc::new(PhysicalMemory::new(device, PAGE).expect("memory")),
    )
}

fn fill(stream: &Stream, mapping: &Mapping, value: u8) {
    // SAFETY: the mapping is writable and outlives the work, which is waited for.
    unsafe { stream.memset(mapping.address(), value, mapping.bytes()) }.expect("queued");
    stream.synchronize().expect("done");
}

fn last_byte(stream: &Stream, mapping: &Mapping) -> u8 {
    let mut byte = [0];
    // SAFETY: the address is the last one of the mapping, which is readable.
    unsafe { stream.read(mapping.address() + mapping.bytes() as u64 - 1, &mut byte) }
        .expect("read");
    byte[0]
}

#[test]
fn a_mapping_keeps_its_addresses_and_its_memory_alive() {
    let simulated = Simulated::default();
    let device = &simulated.device;
    let stream = Stream::new(device).expect("a stream");
    simulated.unchanged(|| {
        let (reservation, memory) = nouns(device);
        let full_access = [(device.clone(), Access::ReadWrite)];
        let mapping = Mapping::new(&reservation, 2 * PAGE, &memory, &full_access).expect("mapped");
        let base = reservation.address();
        assert!(Arc::ptr_eq(mapping.reservation(), &reservation));
        assert!(Arc::ptr_eq(mapping.memory(), &memory));
        drop((reservation, memory));
        assert_eq!(mapping.address(), base + 2 * PAGE as u64);
        assert_eq!((mapping.offset(), mapping.bytes()), (2 * PAGE, PAGE));
        assert_eq!(simulated.books().mapped_bytes, PAGE);
        fill(&stream, &mapping, 7);
        assert_eq!(last_byte(&stream, &mapping), 7);
    });
}

#[test]
fn bad_arguments_are_refused_and_nothing_is_mapped() {
    let simulated = Simulated::default();
    let other = Simulated::default();
    let (reservation, memory) = nouns(&simulated.device);
    let (foreign_reservation, foreign_memory) = nouns(&other.device);
    let full_access = [(simulated.device.clone(), Access::ReadWrite)];
    let refuse = |reservation: &Arc<_>, offset, memory: &Arc<_>, access: &[_]| {
        other.unchanged(|| {
            simulated.unchanged(|| {
                Mapping::new(reservation, offset, memory, access).expect_err("a bad argument")
            })
        })
    };
    assert_eq!(
        refuse(&reservation, usize::MAX, &memory, &full_access),
        VmmError::Overflow {
            offset: usize::MAX,
            bytes: PAGE
        }
    );
    assert_eq!(
        refuse(&reservation, 4 * PAGE, &memory, &full_access),
        VmmError::OutOfRange {
            offset: 4 * PAGE,
            bytes: PAGE,
            capacity_bytes: 4 * PAGE
        }
    );
    assert_eq!(
        refuse(&reservation, 4096, &memory, &full_access),
        VmmError::Misaligned {
            what: "mapping offset",
            value: 4096,
            required: PAGE
        }
    );
    assert_eq!(
        refuse(&reservation, 0, &memory, &[]),
        VmmError::ZeroSize {
            what: "list of devices with access"
        }
    );
    assert_eq!(
        refuse(&reservation, 0, &foreign_memory, &full_access),
        VmmError::WrongDriver
    );
    assert_eq!(
        refuse(&foreign_reservation, 0, &memory, &full_access),
        VmmError::WrongDriver
    );
    let foreign = [(other.device.clone(), Access::ReadWrite)];
    assert_eq!(
        refuse(&reservation, 0, &memory, &foreign),
        VmmError::WrongDriver
    );
    let mapping = Mapping::new(&reservation, PAGE, &memory, &full_access).expect("mapped");
    assert_eq!(
        refuse(&reservation, PAGE, &memory, &full_access),
        failure!(cuMemMap, CUDA_ERROR_INVALID_VALUE)
    );
    drop(mapping);
}

#[test]
fn set_access_refuses_an_empty_list_and_strangers() {
    let simulated = Simulated::default();
    let other = Simulated::default();
    let (reservation, memory) = nouns(&simulated.device);
    let full_access = [(simulated.device.clone(), Access::ReadWrite)];
    let mapping = Mapping::new(&reservation, 0, &memory, &full_access).expect("mapped");
    simulated.unchanged(|| {
        assert_eq!(
            mapping.set_access(&[]),
            Err(VmmError::ZeroSize {
                what: "list of devices with access"
            })
        );
        let strangers = [
            (simulated.device.clone(), Access::None),
            (other.device.clone(), Access::Read),
        ];
        assert_eq!(mapping.set_access(&strangers), Err(VmmError::WrongDriver));
    });
    // The first of the two was not carried out either.
    let stream = Stream::new(&simulated.device).expect("a stream");
    fill(&stream, &mapping, 3);
    assert_eq!(last_byte(&stream, &mapping), 3);
}

#[test]
fn a_refusal_of_each_call_leaves_nothing_mapped() {
    let simulated = Simulated::default();
    let (reservation, memory) = nouns(&simulated.device);
    let full_access = [(simulated.device.clone(), Access::ReadWrite)];
    for (call, expected) in [
        (
            DriverFunction::cuMemMap,
            failure!(cuMemMap, CUDA_ERROR_OUT_OF_MEMORY),
        ),
        (
            DriverFunction::cuMemSetAccess,
            failure!(cuMemSetAccess, CUDA_ERROR_OUT_OF_MEMORY),
        ),
    ] {
        let fault = Fault::nth_of(call, 1, CUDA_ERROR_OUT_OF_MEMORY);
        simulated.simulator.inject(fault);
        let outcome = simulated.unchanged(|| Mapping::new(&reservation, 0, &memory, &full_access));
        assert_eq!(outcome.expect_err("refused"), expected);
        assert_eq!(Arc::strong_count(&memory), 1);
        assert_eq!(Arc::strong_count(&reservation), 1);
    }
    Mapping::new(&reservation, 0, &memory, &full_access).expect("nothing is in the way");
}

#[test]
fn what_the_undo_cannot_unmap_is_in_quarantine_and_comes_back() {
    let simulated = Simulated::default();
    simulated.unchanged(|| {
        let (reservation, memory) = nouns(&simulated.device);
        let full_access = [(simulated.device.clone(), Access::ReadWrite)];
        for (call, code) in [
            (DriverFunction::cuMemSetAccess, CUDA_ERROR_OUT_OF_MEMORY),
            (DriverFunction::cuMemUnmap, CUDA_ERROR_INVALID_VALUE),
        ] {
            simulated.simulator.inject(Fault::always(call, code));
        }
        let outcome = Mapping::new(&reservation, PAGE, &memory, &full_access);
        assert_eq!(
            outcome.expect_err("refused"),
            failure!(cuMemSetAccess, CUDA_ERROR_OUT_OF_MEMORY),
            "the first error, not that of the undo"
        );
        drop((reservation, memory));
        assert_eq!(simulated.device.quarantined_bytes(), PAGE);
        assert_eq!(simulated.books().mapped_bytes, PAGE);
        assert_eq!(simulated.books().physical_bytes, PAGE);
        assert_eq!(simulated.device.retry_quarantine(), 0);
        simulated.simulator.clear_faults();
        assert_eq!(simulated.device.retry_quarantine(), PAGE);
        assert_eq!(simulated.device.quarantined_bytes(), 0);
    });
}

#[test]
fn a_close_that_fails_hands_the_mapping_back_in_place() {
    let simulated = Simulated::default();
    let stream = Stream::new(&simulated.device).expect("a stream");
    simulated.unchanged(|| {
        let (reservation, memory) = nouns(&simulated.device);
        let full_access = [(simulated.device.clone(), Access::ReadWrite)];
        let mapping = Mapping::new(&reservation, 0, &memory, &full_access).expect("mapped");
        simulated.simulator.inject(Fault::nth_of(
            DriverFunction::cuMemUnmap,
            1,
            CUDA_ERROR_INVALID_VALUE,
        ));
        let refused = mapping.close().expect_err("the driver refuses once");
        assert_eq!(
            refused.error,
            failure!(cuMemUnmap, CUDA_ERROR_INVALID_VALUE)
        );
        fill(&stream, &refused.object, 9);
        assert_eq!(last_byte(&stream, &refused.object), 9);
        refused.object.close().expect("unmapped at the second try");
        assert_eq!(simulated.books().mappings, 0);
        assert_eq!(Arc::strong_count(&memory), 1);
    });
}

#[test]
fn a_drop_that_fails_puts_the_mapping_into_quarantine() {
    let simulated = Simulated::default();
    simulated.unchanged(|| {
        let (reservation, memory) = nouns(&simulated.device);
        let full_access = [(simulated.device.clone(), Access::ReadWrite)];
        let mapping = Mapping::new(&reservation, 0, &memory, &full_access).expect("mapped");
        drop((reservation, memory));
        simulated.simulator.inject(Fault::always(
            DriverFunction::cuMemUnmap,
            CUDA_ERROR_INVALID_VALUE,
        ));
        drop(mapping);
        assert_eq!(simulated.device.quarantined_bytes(), PAGE);
        assert_eq!(simulated.books().mappings, 1);
        simulated.simulator.clear_faults();
        assert_eq!(simulated.device.retry_quarantine(), PAGE);
        assert_eq!(simulated.device.quarantined_bytes(), 0);
        assert_eq!(simulated.device.quarantined_address_bytes(), 0);
    });
}

#[test]
fn one_memory_at_two_addresses_has_the_same_bytes() {
    let simulated = Simulated::default();
    let stream = Stream::new(&simulated.device).expect("a stream");
    simulated.unchanged(|| {
        let (reservation, memory) = nouns(&simulated.device);
        let full_access = [(simulated.device.clone(), Access::ReadWrite)];
        let first = Mapping::new(&reservation, 0, &memory, &full_access).expect("mapped");
        let second = Mapping::new(&reservation, 3 * PAGE, &memory, &full_access).expect("mapped");
        let books = simulated.books();
        assert_eq!((books.physical_bytes, books.mapped_bytes), (PAGE, 2 * PAGE));
        fill(&stream, &first, 41);
        assert_eq!(last_byte(&stream, &second), 41);
        fill(&stream, &second, 42);
        assert_eq!(last_byte(&stream, &first), 42);
        drop(first);
        assert_eq!(last_byte(&stream, &second), 42);
    });
}

#[test]
fn each_device_may_do_what_it_was_given_and_no_more() {
    let simulated = Simulated::new(SimConfig::new().devices(3));
    let owner = &simulated.device;
    let reader = simulated.driver.device(1).expect("a second device");
    let stranger = simulated.driver.device(2).expect("a third device");
    let (reservation, memory) = nouns(owner);
    let access = [
        (owner.clone(), Access::ReadWrite),
        (reader.clone(), Access::Read),
    ];
    let mapping = Mapping::new(&reservation, 0, &memory, &access).expect("mapped");
    let stream = Stream::new(owner).expect("a stream");
    fill(&stream, &mapping, 5);
    let peer = Stream::new(&reader).expect("a stream of the second device");
    assert_eq!(last_byte(&peer, &mapping), 5);

    // The second device gets what the owner has, later; then both lose a right, and keep the rest.
    mapping
        .set_access(&[(reader.clone(), Access::ReadWrite)])
        .expect("set");
    fill(&peer, &mapping, 6);
    assert_eq!(last_byte(&stream, &mapping), 6, "the owner kept its own");
    let access = [
        (reader.clone(), Access::Read),
        (owner.clone(), Access::Read),
    ];
    mapping.set_access(&access).expect("set");
    assert_eq!(last_byte(&stream, &mapping), 6);
    assert!(!simulated.simulator.is_poisoned(0) && !simulated.simulator.is_poisoned(1));

    let third = Stream::new(&stranger).expect("a stream of the third device");
    for (stream, why) in [(&peer, "it may only read"), (&third, "it was never named")] {
        // SAFETY: the driver refuses what the device may not do.
        let outcome = unsafe { stream.memset(mapping.address(), 1, PAGE) };
        let refused = failure!(cuMemsetD8Async, CUDA_ERROR_INVALID_VALUE);
        assert_eq!(outcome, Err(refused), "{why}");
    }
    assert_eq!(last_byte(&stream, &mapping), 6, "nothing was changed");

    // What was allowed when it was queued and is not when it runs is an illegal access.
    mapping
        .set_access(&[(reader.clone(), Access::ReadWrite)])
        .expect("set");
    let held = simulated.hold_work();
    // SAFETY: meant to be an illegal access, which the simulator reports and does not carry out.
    unsafe { peer.memset(mapping.address(), 1, PAGE) }.expect("queued");
    mapping
        .set_access(&[(reader.clone(), Access::Read)])
        .expect("set");
    drop(held);
    assert_eq!(
        peer.synchronize(),
        Err(failure!(cuStreamSynchronize, CUDA_ERROR_ILLEGAL_ADDRESS))
    );
    assert!(simulated.simulator.is_poisoned(1), "the reader wrote");
    assert!(!simulated.simulator.is_poisoned(0) && !simulated.simulator.is_poisoned(2));
    assert_eq!(last_byte(&stream, &mapping), 6, "and changed nothing");
}

#[test]
fn memory_of_another_device_of_the_same_driver_can_be_mapped() {
    let simulated = Simulated::new(SimConfig::new().devices(2));
    let second = simulated.driver.device(1).expect("a second device");
    let (reservation, _) = nouns(&simulated.device);
    let memory = Arc::new(PhysicalMemory::new(&second, PAGE).expect("memory"));
    let access = [(simulated.device.clone(), Access::ReadWrite)];
    let mapping = Mapping::new(&reservation, 0, &memory, &access).expect("mapped");
    let stream = Stream::new(&simulated.device).expect("a stream");
    fill(&stream, &mapping, 8);
    assert_eq!(last_byte(&stream, &mapping), 8);
    assert_eq!(simulated.simulator.books(1).mapped_bytes, PAGE);
    drop((mapping, memory));
    assert_eq!(simulated.simulator.books(1).physical_bytes, 0);
}

/// Lets so many calls that set access answer that the driver is not ready.
fn not_ready(simulated: &Simulated, calls: u64) {
    for nth in 1..=calls {
        let fault = Fault::nth_of(DriverFunction::cuMemSetAccess, nth, CUDA_ERROR_NOT_READY);
        simulated.simulator.inject(fault);
    }
}

#[test]
fn a_driver_that_is_not_ready_to_set_access_is_asked_a_few_times() {
    let simulated = Simulated::default();
    let full_access = [(simulated.device.clone(), Access::ReadWrite)];
    let sets = || simulated.simulator.calls(DriverFunction::cuMemSetAccess);
    simulated.unchanged(|| {
        let (reservation, memory) = nouns(&simulated.device);
        not_ready(&simulated, 4);
        let before = sets();
        let mapping = Mapping::new(&reservation, 0, &memory, &full_access).expect("the fifth time");
        assert_eq!(sets() - before, 5);
        drop(mapping);

        not_ready(&simulated, 5);
        let before = sets();
        let error = Mapping::new(&reservation, 0, &memory, &full_access).expect_err("not for long");
        assert_eq!(error, failure!(cuMemSetAccess, CUDA_ERROR_NOT_READY));
        assert_eq!(sets() - before, 5);
        assert_eq!(simulated.books().mappings, 0, "it is undone");

        // Another refusal is not repeated.
        let fault = Fault::nth_of(DriverFunction::cuMemSetAccess, 1, CUDA_ERROR_INVALID_VALUE);
        simulated.simulator.inject(fault);
        let before = sets();
        Mapping::new(&reservation, 0, &memory, &full_access).expect_err("refused");
        assert_eq!(sets() - before, 1);
    });
}

#[test]
fn an_allocation_goes_on_when_the_driver_is_ready_and_else_is_as_before() {
    let simulated = Simulated::default();
    let engine = Engine::new(&simulated.device, manual()).expect("an engine");
    let pool = VirtualMemoryPool::on_engine(&engine, 8 * PAGE, PAGE).expect("a pool");
    pool.allocate(0, 2 * PAGE).expect("room");
    simulated.unchanged(|| {
        not_ready(&simulated, 2);
        pool.allocate(2 * PAGE, 2 * PAGE)
            .expect("the driver is ready soon");
        pool.deallocate(2 * PAGE, 2 * PAGE).expect("live");
        pool.trim().expect("given back");
        let before = engine.stats();
        let always = Fault::always(DriverFunction::cuMemSetAccess, CUDA_ERROR_NOT_READY);
        simulated.simulator.inject(always);
        let error = pool.allocate(2 * PAGE, 2 * PAGE).expect_err("never ready");
        assert_eq!(error, failure!(cuMemSetAccess, CUDA_ERROR_NOT_READY));
        assert_eq!(engine.stats(), before);
        simulated.simulator.clear_faults();
    });
}
