//! Errors of the core, and what they become here.

use candle_cuda_vmm::VmmError;
use candle_cuda_vmm::cuda_vmm::{DriverError, VmmError as Core, sys};

fn driver(code: sys::CUresult) -> VmmError {
    VmmError::from(Core::Driver(DriverError {
        call: sys::DriverFunction::cuMemCreate,
        code,
        name: "A_NAME".to_owned(),
    }))
}

#[test]
fn each_core_error_becomes_the_variant_that_says_the_same() {
    let pairs: Vec<(Core, VmmError)> = vec![
        (
            Core::OutOfVirtualMemory {
                asked_bytes: 8,
                largest_free_bytes: 4,
            },
            VmmError::OutOfVirtualMemory {
                requested: 8,
                available: 4,
            },
        ),
        (
            Core::OutOfPhysicalMemory {
                asked_bytes: 8,
                free_bytes: 4,
                retiring_bytes: 2,
                reclaimable_bytes: 1,
                limit_bytes: 16,
            },
            VmmError::OutOfPhysicalMemory {
                requested: 8,
                available: 4,
            },
        ),
        (
            Core::OutOfRange {
                offset: 1,
                bytes: 2,
                capacity_bytes: 2,
            },
            VmmError::InvalidOffset {
                offset: 1,
                size: 2,
                capacity: 2,
            },
        ),
        (
            Core::Overflow {
                offset: usize::MAX,
                bytes: 1,
            },
            VmmError::InvalidOffset {
                offset: usize::MAX,
                size: 1,
                capacity: usize::MAX,
            },
        ),
        (
            Core::Misaligned {
                what: "a size",
                value: 3,
                required: 2,
            },
            VmmError::InvalidAlignment {
                actual: 3,
                required: 2,
            },
        ),
        (
            Core::AlreadyMapped {
                offset: 1,
                bytes: 2,
            },
            VmmError::AlreadyMapped { offset: 1, size: 2 },
        ),
        (
            Core::NotMapped {
                offset: 1,
                bytes: 2,
            },
            VmmError::NotMapped { offset: 1, size: 2 },
        ),
        (
            Core::InvalidPageSize {
                page_bytes: 3,
                granularity_bytes: 2,
            },
            VmmError::InvalidPageSize(3),
        ),
        (
            Core::UnsupportedDevice { ordinal: 0 },
            VmmError::UnsupportedDevice,
        ),
        (
            Core::ModelNotFound {
                model: "a".to_owned(),
            },
            VmmError::ModelNotFound("a".to_owned()),
        ),
        (
            Core::ModelAlreadyRegistered {
                model: "a".to_owned(),
            },
            VmmError::ModelAlreadyExists("a".to_owned()),
        ),
    ];
    for (core, expected) in pairs {
        assert_eq!(
            format!("{:?}", VmmError::from(core)),
            format!("{expected:?}")
        );
    }
    for core in [
        Core::ZeroSize { what: "size" },
        Core::WrongDriver,
        Core::Forked,
        Core::InvalidDevice {
            ordinal: 1,
            count: 1,
        },
    ] {
        match VmmError::from(core.clone()) {
            VmmError::Vmm(carried) => assert_eq!(carried, core),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn driver_errors_keep_call_and_code() {
    let error = driver(12345);
    assert_eq!(error.driver_code(), Some(12345));
    let text = error.to_string();
    assert!(
        text.contains("cuMemCreate") && text.contains("12345") && text.contains("A_NAME"),
        "{text}"
    );
    assert_eq!(VmmError::UnsupportedDevice.driver_code(), None);
}

#[test]
fn predicates_say_what_to_do() {
    // Out of memory, later, never, poisoned, bytes to wait for.
    let say = |error: &VmmError| {
        (
            error.is_out_of_memory(),
            error.is_later(),
            error.is_never(),
            error.is_poisoned(),
            error.later_bytes(),
        )
    };
    let out = VmmError::OutOfPhysicalMemory {
        requested: 8,
        available: 3,
    };
    assert_eq!(say(&out), (true, true, false, false, 5));
    let device_is_full = driver(sys::CUDA_ERROR_OUT_OF_MEMORY);
    assert_eq!(say(&device_is_full), (true, true, false, false, 0));
    let illegal = driver(sys::CUDA_ERROR_ILLEGAL_ADDRESS);
    assert_eq!(say(&illegal), (false, false, true, true, 0));
    let quarantined = VmmError::from(Core::Quarantined {
        offset: 0,
        bytes: 1,
    });
    assert_eq!(say(&quarantined), (false, true, false, false, 0));
    for never in [
        VmmError::OutOfVirtualMemory {
            requested: 8,
            available: 3,
        },
        VmmError::InvalidOffset {
            offset: 0,
            size: 1,
            capacity: 0,
        },
        VmmError::MappingFailed(String::new()),
        VmmError::UnmappingFailed(String::new()),
        VmmError::InvalidAlignment {
            actual: 1,
            required: 2,
        },
        VmmError::AlreadyMapped { offset: 0, size: 1 },
        VmmError::NotMapped { offset: 0, size: 1 },
        VmmError::InvalidPageSize(1),
        VmmError::UnsupportedDevice,
        VmmError::ModelNotFound(String::new()),
        VmmError::ModelAlreadyExists(String::new()),
    ] {
        assert_eq!(say(&never), (false, false, true, false, 0), "{never:?}");
    }
    for unknown in [
        VmmError::cuda("words"),
        VmmError::other("words"),
        VmmError::from(candle_core::Error::msg("words")),
    ] {
        assert_eq!(
            say(&unknown),
            (false, false, false, false, 0),
            "{unknown:?}"
        );
    }
}

#[test]
fn messages_name_the_values() {
    let text = |error: VmmError| error.to_string();
    let offset = text(VmmError::InvalidOffset {
        offset: 11,
        size: 22,
        capacity: 33,
    });
    assert!(
        ["11", "22", "33"]
            .iter()
            .all(|value| offset.contains(value))
    );
    let memory = text(VmmError::OutOfPhysicalMemory {
        requested: 11,
        available: 22,
    });
    assert!(["11", "22"].iter().all(|value| memory.contains(value)));
    assert!(text(VmmError::InvalidPageSize(11)).contains("11"));
    assert!(text(VmmError::ModelNotFound("gpt2".to_owned())).contains("gpt2"));
    assert_eq!(text(VmmError::other("as it is")), "as it is");
}
