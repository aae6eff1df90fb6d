//! Errors of the core, and their conversion to errors of this crate.

use candle_core::{Context, Error};
use candle_cuda_vmm::VmmError;
use candle_cuda_vmm::cuda_vmm::{DriverError, VmmError as Core, sys};

fn driver(code: sys::CUresult) -> VmmError {
    VmmError::from(Core::Driver(DriverError {
        call: sys::DriverFunction::cuMemCreate,
        code,
        name: "A_NAME".to_owned(),
    }))
}

fn out_of_memory() -> Core {
    Core::OutOfPhysicalMemory {
        asked_bytes: 8,
        free_bytes: 4,
        retiring_bytes: 2,
        reclaimable_bytes: 1,
        limit_bytes: 16,
    }
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
            VmmError::Vmm(out_of_memory()),
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
        let error = VmmError::from(core.clone());
        assert_eq!(format!("{error:?}"), format!("{expected:?}"));
        assert_eq!(error.is_retryable(), core.is_retryable(), "{core:?}");
        assert_eq!(error.is_permanent(), core.is_permanent(), "{core:?}");
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
            error.is_retryable(),
            error.is_permanent(),
            error.is_poisoned(),
            error.shortfall_bytes(),
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
        VmmError::InvalidPageSize(1),
        VmmError::InvalidAttention {
            option: "window",
            value: 0.,
        },
        VmmError::MissingLengths,
        VmmError::InvalidSpan {
            span: 0,
            queries: 2,
            keys: 1,
        },
        VmmError::UnsupportedHead {
            dim: 300,
            value_dim: 1,
            dtype: candle_core::DType::F16,
        },
        VmmError::UnsupportedBlockSize { size: 8 },
        VmmError::DifferentStrides {
            sequence: 1,
            strides: vec![1],
            expected: vec![2],
        },
        VmmError::BeyondPlan {
            heads: 2,
            heads_max: 1,
        },
        VmmError::PlanOnAnotherDevice,
        VmmError::NoAttentionKernels,
        VmmError::UnsupportedDevice,
    ] {
        assert_eq!(say(&never), (false, false, true, false, 0), "{never:?}");
    }
    for depends in [
        VmmError::OutOfVirtualMemory {
            requested: 8,
            available: 3,
        },
        VmmError::AlreadyMapped { offset: 0, size: 1 },
        VmmError::NotMapped { offset: 0, size: 1 },
        VmmError::ModelNotFound(String::new()),
        VmmError::ModelAlreadyExists(String::new()),
        VmmError::UnknownShape { layer: 0 },
        VmmError::LengthBeyondCapacity {
            sequence: 0,
            length: 2,
            capacity: 1,
        },
        VmmError::RowBeyondCapacity {
            token: 0,
            sequence: 0,
            row: 1,
            capacity: 1,
        },
        VmmError::UnknownSequence {
            sequence: 1,
            batch: 1,
        },
        VmmError::UnknownPosition {
            token: 0,
            position: 1,
            positions_max: 1,
        },
        VmmError::cuda("words"),
        VmmError::other("words"),
        VmmError::from(candle_core::Error::msg("words")),
    ] {
        assert_eq!(
            say(&depends),
            (false, false, false, false, 0),
            "{depends:?}"
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
    assert!(text(VmmError::UnknownShape { layer: 11 }).contains("11"));
    let (layer, layers) = (11, 7);
    let layer = text(VmmError::UnknownLayer { layer, layers });
    assert!(layer.contains("11") && layer.contains('7'));
    let (option, value) = ("soft cap", -11.5);
    let attention = text(VmmError::InvalidAttention { option, value });
    assert!(
        ["soft cap", "-11.5"]
            .iter()
            .all(|part| attention.contains(part))
    );
    let length = text(VmmError::LengthBeyondCapacity {
        sequence: 11,
        length: 22,
        capacity: 7,
    });
    assert!(["11", "22", "7"].iter().all(|part| length.contains(part)));
    let head = text(VmmError::UnsupportedHead {
        dim: 11,
        value_dim: 22,
        dtype: candle_core::DType::BF16,
    });
    assert!(["11", "22", "BF16"].iter().all(|part| head.contains(part)));
    assert_eq!(text(VmmError::other("as it is")), "as it is");
}

/// A model's error, with a source.
#[derive(Debug, thiserror::Error)]
#[error("layer {layer} failed")]
struct LayerFailed<E: std::error::Error + 'static> {
    layer: usize,
    #[source]
    source: E,
}

/// All ways in which models and Candle wrap an error.
fn wrapped(error: impl Fn() -> Error) -> Vec<Error> {
    let failed = |source| LayerFailed { layer: 3, source };
    vec![
        error(),
        error().bt(),
        error().with_path("model.safetensors"),
        error().context("layer 3"),
        error().bt().context("layer 3").bt().context("the model"),
        Err::<(), _>(error()).context("layer 3").unwrap_err(),
        Err::<(), _>(failed(error())).context("step").unwrap_err(),
        Error::from(VmmError::from(error())).context("once more"),
    ]
}

#[test]
fn an_error_of_this_crate_is_found_in_one_of_candles() {
    for error in wrapped(|| VmmError::from(out_of_memory()).into()) {
        let found = VmmError::find(&error).unwrap_or_else(|| panic!("{error:?}"));
        assert!(
            matches!(found, VmmError::Vmm(core) if *core == out_of_memory()),
            "{found:?}"
        );
        let shortage = found.shortage().expect("memory ran out");
        assert_eq!((shortage.requested_bytes, shortage.available_bytes), (8, 4));
        assert_eq!(shortage.retiring_bytes, Some(2));
        assert_eq!(shortage.reclaimable_bytes, Some(1));
        assert_eq!(shortage.limit_bytes, Some(16));
        let text = error.to_string();
        assert!(text.contains("2 retiring"), "{text}");
        // The wrapping error answers the same questions as the one inside.
        let error = VmmError::from(error);
        assert!(error.is_out_of_memory() && error.is_retryable() && !error.is_permanent());
        assert_eq!(
            (error.shortfall_bytes(), error.shortage()),
            (4, Some(shortage))
        );
    }
    for error in wrapped(|| driver(sys::CUDA_ERROR_ILLEGAL_ADDRESS).into()) {
        let error = VmmError::from(error);
        assert!(error.is_poisoned() && error.is_permanent(), "{error:?}");
        assert_eq!(error.driver_code(), Some(sys::CUDA_ERROR_ILLEGAL_ADDRESS));
    }
    for error in wrapped(|| Error::msg("words")) {
        assert!(VmmError::find(&error).is_none(), "{error:?}");
    }
}

#[test]
fn an_error_that_went_through_candle_comes_back_as_it_was() {
    let error = VmmError::from(Error::from(VmmError::from(out_of_memory())));
    assert!(
        matches!(&error, VmmError::Vmm(core) if *core == out_of_memory()),
        "{error:?}"
    );
    let error = Error::from(VmmError::from(Error::msg("words")));
    assert!(!matches!(error, Error::WrappedContext { .. }), "{error:?}");
}

#[test]
fn the_shortage_of_0_1_1_knows_what_it_knew() {
    let error = VmmError::OutOfPhysicalMemory {
        requested: 8,
        available: 3,
    };
    let shortage = error.shortage().expect("memory ran out");
    assert_eq!((shortage.requested_bytes, shortage.available_bytes), (8, 3));
    assert_eq!(
        (shortage.retiring_bytes, shortage.limit_bytes),
        (None, None)
    );
    assert!(VmmError::other("words").shortage().is_none());
}
