//! What an error tells: its code, whether to try again, and its text.

mod common;

use common::{PAGE, Simulated, failure, manual};
use cuda_vmm::sim::SimError;
use cuda_vmm::sys::*;
use cuda_vmm::{
    Access, CloseError, DriverError, Engine, Mapping, PhysicalMemory, QuotaConflict, Reservation,
    Stream, VirtualMemoryPool, VmmError,
};
use std::error::Error;
use std::sync::Arc;

fn driver_error(code: CUresult) -> VmmError {
    VmmError::Driver(DriverError {
        call: DriverFunction::cuMemMap,
        code,
        name: "A_NAME".to_owned(),
    })
}

fn out_of_memory(asked_bytes: usize, free_bytes: usize, limit_bytes: usize) -> VmmError {
    VmmError::OutOfPhysicalMemory {
        asked_bytes,
        free_bytes,
        retiring_bytes: 3,
        reclaimable_bytes: 4,
        limit_bytes,
    }
}

#[test]
fn later_and_never_exclude_each_other_and_say_how_much() {
    let later = out_of_memory(10, 4, 10);
    assert!(later.is_retryable() && !later.is_permanent() && later.is_out_of_memory());
    assert_eq!(later.shortfall_bytes(), 6);
    let never = out_of_memory(11, 4, 10);
    assert!(never.is_permanent() && !never.is_retryable() && never.is_out_of_memory());
    assert_eq!(never.shortfall_bytes(), 0);
    let ready = out_of_memory(3, 4, 10);
    assert_eq!(
        ready.shortfall_bytes(),
        0,
        "fragments, not bytes, are missing"
    );

    let full = driver_error(CUDA_ERROR_OUT_OF_MEMORY);
    assert!(full.is_retryable() && !full.is_permanent() && full.is_out_of_memory());
    assert_eq!(full.shortfall_bytes(), 0, "the driver does not say");
    let quarantined = VmmError::Quarantined {
        offset: 1,
        bytes: 2,
    };
    assert!(quarantined.is_retryable() && !quarantined.is_permanent());
    assert!(!quarantined.is_out_of_memory());
    // An error of the driver's that is not known to last is neither.
    let odd = driver_error(CUDA_ERROR_INVALID_VALUE);
    assert!(!odd.is_retryable() && !odd.is_permanent() && !odd.is_poisoned());
    for error in every_error() {
        assert!(!(error.is_retryable() && error.is_permanent()), "{error:?}");
        assert!(
            error.shortfall_bytes() == 0 || error.is_retryable(),
            "{error:?}"
        );
    }
}

#[test]
fn every_error_is_later_or_never_or_depends_on_the_program() {
    let kinds = |kind: fn(&VmmError) -> bool| -> Vec<String> {
        let of_kind = every_error().into_iter().filter(kind);
        of_kind
            .map(|error| {
                let text = format!("{error:?}");
                let end = text.find(|letter: char| !letter.is_alphanumeric());
                text[..end.unwrap_or(text.len())].to_owned()
            })
            .collect()
    };
    assert_eq!(kinds(VmmError::is_retryable), ["Quarantined"]);
    assert_eq!(
        kinds(|error| !error.is_retryable() && !error.is_permanent()),
        [
            "Driver",
            "Simulator",
            "AlreadyMapped",
            "NotMapped",
            "OutOfVirtualMemory",
            "QuotaUnsatisfiable",
            "Leased",
            "Shared",
            "KeptShared",
            "Asleep",
            "Asleep",
            "Awake",
            "KeptAwake",
            "ModelNotFound",
            "ModelAlreadyRegistered",
            "HostStoreFull",
            "HostMemory",
            "Descriptor"
        ]
    );
    let quota = |what| VmmError::QuotaUnsatisfiable {
        what,
        asked_bytes: 8,
        available_bytes: 4,
    };
    let full = |needed_bytes| VmmError::HostStoreFull {
        needed_bytes,
        in_use_bytes: 6,
        limit_bytes: 8,
    };
    assert!(full(9).is_permanent() && !full(8).is_permanent() && !full(8).is_retryable());
    // It is host memory that is missing, so eviction from the device does not help.
    assert!(!full(8).is_out_of_memory() && full(8).shortfall_bytes() == 0);
    assert!(quota(QuotaConflict::GuaranteeAboveCeiling).is_permanent());
    assert!(quota(QuotaConflict::Headroom).is_permanent());
    assert!(quota(QuotaConflict::LimitBelowGuarantees).is_permanent());
    let of_call = |call, code| {
        VmmError::Driver(DriverError {
            call,
            code,
            name: String::new(),
        })
    };
    let access = of_call(DriverFunction::cuMemSetAccess, CUDA_ERROR_NOT_READY);
    assert!(access.is_retryable() && !access.is_permanent());
    let addresses = of_call(
        DriverFunction::cuMemAddressReserve,
        CUDA_ERROR_OUT_OF_MEMORY,
    );
    assert!(!addresses.is_retryable() && !addresses.is_permanent());
}

#[test]
fn a_poisoned_context_is_told_from_a_refusal() {
    for code in [
        CUDA_ERROR_DEINITIALIZED,
        CUDA_ERROR_ECC_UNCORRECTABLE,
        CUDA_ERROR_ILLEGAL_ADDRESS,
        CUDA_ERROR_LAUNCH_TIMEOUT,
        CUDA_ERROR_CONTEXT_IS_DESTROYED,
        CUDA_ERROR_ASSERT,
        CUDA_ERROR_HARDWARE_STACK_ERROR,
        CUDA_ERROR_ILLEGAL_INSTRUCTION,
        CUDA_ERROR_MISALIGNED_ADDRESS,
        CUDA_ERROR_INVALID_ADDRESS_SPACE,
        CUDA_ERROR_INVALID_PC,
        CUDA_ERROR_LAUNCH_FAILED,
    ] {
        let error = driver_error(code);
        assert!(error.is_poisoned() && error.is_permanent() && !error.is_retryable());
        assert_eq!(error.driver_code(), Some(code));
    }
    for code in [
        CUDA_ERROR_INVALID_VALUE,
        CUDA_ERROR_OUT_OF_MEMORY,
        CUDA_ERROR_NOT_READY,
        CUDA_ERROR_NOT_SUPPORTED,
        CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
        // One that no header names.
        987_654,
    ] {
        let error = driver_error(code);
        assert!(!error.is_poisoned() && !error.is_permanent(), "{code}");
        assert_eq!(error.driver_code(), Some(code), "codes stay as they are");
    }
    assert_eq!(VmmError::Closed.driver_code(), None);
}

#[test]
fn a_code_that_the_driver_cannot_name_stays_representable() {
    let simulated = Simulated::default();
    simulated.simulator.inject(cuda_vmm::sim::Fault::nth_of(
        DriverFunction::cuMemCreate,
        1,
        987_654,
    ));
    let error = PhysicalMemory::new(&simulated.device, PAGE).expect_err("refused");
    assert_eq!(
        error,
        VmmError::Driver(DriverError {
            call: DriverFunction::cuMemCreate,
            code: 987_654,
            name: "unknown error".to_owned()
        })
    );
    assert_eq!(
        error.to_string(),
        "cuMemCreate failed with unknown error (987654)"
    );
}

#[test]
fn after_an_illegal_access_every_call_of_the_context_says_so() {
    let simulated = Simulated::default();
    let device = &simulated.device;
    let stream = Stream::new(device).expect("a stream");
    let before = stream.record().expect("a fence");
    let engine = Engine::new(device, manual()).expect("an engine");
    let pool = VirtualMemoryPool::on_engine(&engine, 4 * PAGE, PAGE).expect("a pool");
    pool.allocate(0, 2 * PAGE).expect("room");
    let reservation = Arc::new(Reservation::new(device, PAGE).expect("address space"));
    let memory = Arc::new(PhysicalMemory::new(device, PAGE).expect("memory"));
    let access = [(device.clone(), Access::ReadWrite)];
    let mapping = Mapping::new(&reservation, 0, &memory, &access).expect("mapped");

    // Work that is queued, and then loses the memory that it is about.
    let held = simulated.hold_work();
    // SAFETY: meant to be an illegal access, which the simulator reports and does not carry out.
    unsafe { stream.memset(mapping.address(), 1, PAGE) }.expect("queued");
    mapping.close().expect("unmapping waits for nothing");
    drop(held);

    let error = stream.synchronize().expect_err("an illegal access");
    assert_eq!(
        error,
        failure!(cuStreamSynchronize, CUDA_ERROR_ILLEGAL_ADDRESS)
    );
    assert!(error.is_poisoned() && error.is_permanent() && !error.is_retryable());
    assert!(simulated.simulator.is_poisoned(0));
    for outcome in [
        device.synchronize(),
        device.free_bytes().map(drop),
        before.wait(),
        before.is_complete().map(drop),
        stream.record().map(drop),
        Stream::new(device).map(drop),
    ] {
        assert!(outcome.expect_err("poisoned").is_poisoned());
    }
    // Nothing runs any more, so everything that was in use is free of the device.
    pool.deallocate(0, PAGE).expect("live");
    engine.step();
    assert_eq!(engine.stats().committed_bytes, PAGE);
    pool.close().expect("the calls on memory need no context");
    drop((stream, before, memory, reservation, engine));
    let books = simulated.books();
    assert_eq!((books.physical_bytes, books.reservations), (0, 0));
    assert_eq!((books.streams, books.events), (0, 0));
}

/// One of each, with its text.
fn texts() -> Vec<(VmmError, &'static str)> {
    let model = || "m\"1".to_owned();
    vec![
        (driver_error(7), "cuMemMap failed with A_NAME (7)"),
        (
            VmmError::Load(LoadError::SymbolMissing {
                path: "lib.so".into(),
                symbol: "cuGetProcAddress",
            }),
            "lib.so has no symbol cuGetProcAddress; the driver must be 11.4 or newer",
        ),
        (
            VmmError::Simulator(SimError::TooMany { limit: 64 }),
            "64 simulated drivers are alive in this process, which is the limit",
        ),
        (
            VmmError::UnsupportedDevice { ordinal: 3 },
            "device 3 does not support virtual memory management",
        ),
        (
            VmmError::InvalidDevice {
                ordinal: 3,
                count: 2,
            },
            "no device 3: the driver reports 2",
        ),
        (
            VmmError::ZeroSize { what: "capacity" },
            "capacity must not be zero",
        ),
        (
            VmmError::Overflow {
                offset: 1,
                bytes: 2,
            },
            "offset 1 plus 2 bytes overflows",
        ),
        (
            VmmError::Misaligned {
                what: "alignment",
                value: 3,
                required: 4,
            },
            "alignment 3 is not a multiple of 4",
        ),
        (
            VmmError::InvalidPageSize {
                page_bytes: 5,
                granularity_bytes: 8,
            },
            "page size 5 is not a power of two of at least the granularity 8",
        ),
        (
            VmmError::OutOfRange {
                offset: 1,
                bytes: 2,
                capacity_bytes: 2,
            },
            "offset 1 plus 2 bytes exceeds the capacity of 2 bytes",
        ),
        (
            VmmError::AlreadyMapped {
                offset: 1,
                bytes: 2,
            },
            "some of the 2 bytes at offset 1 are allocated already",
        ),
        (
            VmmError::NotMapped {
                offset: 1,
                bytes: 2,
            },
            "some of the 2 bytes at offset 1 are not allocated",
        ),
        (
            out_of_memory(10, 2, 9),
            "out of physical memory: 10 bytes asked, 2 free of 9; 3 retiring, 4 reclaimable",
        ),
        (
            VmmError::OutOfVirtualMemory {
                asked_bytes: 8,
                largest_free_bytes: 4,
            },
            "out of address space: 8 bytes asked, the largest unused run has 4",
        ),
        (
            VmmError::QuotaUnsatisfiable {
                what: QuotaConflict::Guarantee,
                asked_bytes: 8,
                available_bytes: 4,
            },
            "guarantee: 8 bytes asked, at most 4 possible",
        ),
        (
            VmmError::Quarantined {
                offset: 1,
                bytes: 2,
            },
            "the 2 bytes at offset 1 touch quarantined memory",
        ),
        (
            VmmError::Leased {
                offset: 1,
                bytes: 2,
            },
            "some of the 2 bytes at offset 1 are leased",
        ),
        (
            VmmError::Shared {
                offset: 1,
                bytes: 2,
            },
            "some of the 2 bytes at offset 1 lie in memory that is shared",
        ),
        (
            VmmError::KeptShared {
                offset: 1,
                bytes: 2,
                by: "a pin",
            },
            "the shared memory behind the 2 bytes at offset 1 is kept by a pin",
        ),
        (
            VmmError::Asleep {
                asleep_bytes: 2,
                is_changing: false,
            },
            "the range is asleep, with 2 bytes",
        ),
        (
            VmmError::Asleep {
                asleep_bytes: 2,
                is_changing: true,
            },
            "the range is asleep or about to be, with 2 bytes",
        ),
        (
            VmmError::Awake { live_bytes: 3 },
            "the range is awake, with 3 live bytes",
        ),
        (
            VmmError::KeptAwake {
                offset: 1,
                bytes: 2,
                by: "a pin",
            },
            "the 2 bytes at offset 1 are kept awake by a pin",
        ),
        (
            VmmError::WrongPageSize {
                expected_bytes: 2,
                found_bytes: 4,
            },
            "expected pages of 2 bytes, found pages of 4 bytes",
        ),
        (
            VmmError::SingleHandle,
            "a range with a single handle behind each allocation shares no memory",
        ),
        (
            VmmError::ModelNotFound { model: model() },
            r#"no model named "m\"1""#,
        ),
        (
            VmmError::ModelAlreadyRegistered { model: model() },
            r#"a model named "m\"1" is registered already"#,
        ),
        (
            VmmError::ForeignAccount {
                expected: "chat".into(),
                found: "#2".into(),
            },
            r##"expected memory of the account "chat", found memory of "#2""##,
        ),
        (
            VmmError::QuotaUnsatisfiable {
                what: QuotaConflict::LimitBelowGuarantees,
                asked_bytes: 8,
                available_bytes: 4,
            },
            "guarantees above a new limit: 8 bytes asked, at most 4 possible",
        ),
        (
            VmmError::WrongDevice {
                expected: 0,
                found: 1,
            },
            "expected device 0, found device 1",
        ),
        (
            VmmError::WrongDriver,
            "the objects belong to different drivers",
        ),
        (VmmError::Closed, "the range or its account is closed"),
        (
            VmmError::Forked,
            "the driver was opened before fork; it cannot be used in the child",
        ),
        (
            VmmError::HostStoreFull {
                needed_bytes: 4,
                in_use_bytes: 6,
                limit_bytes: 8,
            },
            "the host store is full: 4 bytes needed, 6 in use of 8",
        ),
        (
            VmmError::HostMemory {
                call: "mmap",
                bytes: 4,
                reason: "no more".into(),
            },
            "mmap of 4 bytes of host memory failed: no more",
        ),
        (
            VmmError::Descriptor {
                descriptor: 0,
                reason: "no more".to_owned(),
            },
            "file descriptor 0 could not be duplicated: no more",
        ),
    ]
}

fn every_error() -> Vec<VmmError> {
    texts().into_iter().map(|(error, _)| error).collect()
}

#[test]
fn every_text_names_the_values() {
    for (error, text) in texts() {
        assert_eq!(error.to_string(), text);
        assert_eq!(error.clone(), error);
    }
}

#[test]
fn a_failed_close_is_an_error_with_a_source() {
    let failure = CloseError {
        error: VmmError::Closed,
        object: 7,
    };
    assert_eq!(failure.to_string(), "the range or its account is closed");
    let source = failure.source().expect("the error");
    assert_eq!(source.to_string(), "the range or its account is closed");
    assert_eq!(VmmError::from(failure), VmmError::Closed);
}
