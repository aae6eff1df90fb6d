//! Each argument's refusals, and that they change nothing.

use crate::common::{ModelOptions, Models, PAGE, Simulated, failure, manual};
use crate::{CAPACITY, Fixture, LIMIT, unknown};
use cuda_vmm::sim::Fault;
use cuda_vmm::sys::{CUDA_ERROR_OPERATING_SYSTEM, DriverFunction};
use cuda_vmm::{QuotaConflict, SharedPoolOptions, VmmError};

#[test]
fn a_pool_is_refused_bad_limits_and_pages() {
    let simulated = Simulated::default();
    let outcome = simulated.unchanged(|| Models::new(&simulated.device, 0));
    assert_eq!(
        outcome.expect_err("a bad limit"),
        VmmError::ZeroSize { what: "limit" }
    );
    for page_bytes in [0, 1, PAGE - 1, PAGE / 2, 3 * PAGE, usize::MAX] {
        let options = SharedPoolOptions::new()
            .engine(manual())
            .page_bytes(page_bytes);
        let outcome = simulated.unchanged(|| Models::with_options(&simulated.device, options));
        assert_eq!(
            outcome.expect_err("a bad page"),
            VmmError::InvalidPageSize {
                page_bytes,
                granularity_bytes: PAGE
            }
        );
    }
    let total_bytes = simulated.device.total_bytes();
    let options = SharedPoolOptions::new().engine(manual().headroom_bytes(total_bytes));
    let outcome = simulated.unchanged(|| Models::with_options(&simulated.device, options));
    assert_eq!(
        outcome.expect_err("a bad headroom"),
        VmmError::QuotaUnsatisfiable {
            what: QuotaConflict::Headroom,
            asked_bytes: total_bytes,
            available_bytes: total_bytes
        }
    );
}

#[test]
fn registration_is_refused_duplicates_and_bad_capacities() {
    let fixture = Fixture::new();
    let twice = VmmError::ModelAlreadyRegistered {
        model: "a".to_owned(),
    };
    assert_eq!(
        fixture.refused(|pool| pool.register_model("a", CAPACITY)),
        twice
    );
    assert_eq!(
        fixture.refused(|pool| pool.register_model("a", 0)),
        twice,
        "whatever else is wrong"
    );
    for (capacity_bytes, expected) in [
        (0, VmmError::ZeroSize { what: "capacity" }),
        (
            usize::MAX,
            VmmError::Overflow {
                offset: 0,
                bytes: usize::MAX,
            },
        ),
        (
            1 << 47,
            failure!(cuMemAddressReserve, CUDA_ERROR_OUT_OF_MEMORY),
        ),
    ] {
        let error = fixture.refused(|pool| pool.register_model("c", capacity_bytes));
        assert_eq!(error, expected);
        assert_eq!(fixture.pool.model_base_address("c"), None);
    }
    // Any text is a name, none at all too.
    for name in ["", "A", "ä/β c"] {
        fixture.pool.register_model(name, 1).expect("a new name");
        assert!(fixture.pool.model_base_address(name).is_some());
    }
    assert_eq!(fixture.pool.models(), ["", "A", "a", "b", "ä/β c"]);
}

#[test]
fn registration_is_refused_quotas_that_cannot_hold() {
    let fixture = Fixture::new();
    let options = |guarantee_bytes, ceiling_bytes| ModelOptions {
        guarantee_bytes,
        ceiling_bytes,
        ..ModelOptions::new(CAPACITY)
    };
    assert_eq!(
        fixture.refused(|pool| pool.register_model_with("c", options(2 * PAGE, Some(PAGE)))),
        VmmError::QuotaUnsatisfiable {
            what: QuotaConflict::GuaranteeAboveCeiling,
            asked_bytes: 2 * PAGE,
            available_bytes: PAGE
        }
    );
    for asked_bytes in [LIMIT + 1, usize::MAX] {
        let error =
            fixture.refused(|pool| pool.register_model_with("c", options(asked_bytes, None)));
        assert_eq!(
            error,
            VmmError::QuotaUnsatisfiable {
                what: QuotaConflict::GuaranteeAboveLimit,
                asked_bytes,
                available_bytes: LIMIT
            }
        );
        assert!(error.is_permanent(), "{error}");
    }
    let watermarks = ModelOptions {
        ahead_bytes_min: Some(PAGE),
        ..ModelOptions::new(CAPACITY)
    };
    assert_eq!(
        fixture.refused(|pool| pool.register_model_with("c", watermarks)),
        VmmError::QuotaUnsatisfiable {
            what: QuotaConflict::AheadBytesMin,
            asked_bytes: PAGE,
            available_bytes: 0
        }
    );
    let pool = &fixture.pool;
    pool.allocate_for_model("a", 3 * PAGE).expect("room");
    pool.register_model_with("c", options(4 * PAGE, None))
        .expect("it can hold");
    assert_eq!(
        fixture.refused(|pool| pool.register_model_with("d", options(2 * PAGE, None))),
        VmmError::QuotaUnsatisfiable {
            what: QuotaConflict::Guarantee,
            asked_bytes: 2 * PAGE,
            available_bytes: PAGE
        }
    );
    // What a failed registration had promised is free again.
    fixture.simulated.simulator.inject(Fault::nth_of(
        DriverFunction::cuMemAddressReserve,
        1,
        CUDA_ERROR_OPERATING_SYSTEM,
    ));
    assert_eq!(
        fixture.refused(|pool| pool.register_model_with("d", options(PAGE, None))),
        failure!(cuMemAddressReserve, CUDA_ERROR_OPERATING_SYSTEM)
    );
    pool.register_model_with("d", options(PAGE, None))
        .expect("it can hold");
    pool.unregister_model("c").expect("registered");
    pool.register_model_with("e", options(4 * PAGE, None))
        .expect("as before");
}

#[test]
fn an_unknown_model_is_named_by_every_call() {
    let fixture = Fixture::new();
    let model = "unknown";
    type Call = fn(&Models, &str) -> Result<u64, VmmError>;
    let calls: [Call; 7] = [
        |pool, model| pool.allocate_for_model(model, PAGE),
        |pool, model| pool.allocate_for_model(model, 0),
        |pool, model| pool.allocate_for_model_at(model, 0, PAGE),
        |pool, model| pool.deallocate_for_model(model, 0, PAGE).map(|()| 0),
        |pool, model| {
            pool.deallocate_for_model_address(model, 0, PAGE)
                .map(|()| 0)
        },
        |pool, model| pool.unregister_model(model).map(|()| 0),
        |pool, model| pool.model(model).map(|pool| pool.base_address()),
    ];
    for call in calls {
        let error = fixture.refused(|pool| call(pool, model));
        assert_eq!(error, unknown(model));
        assert!(
            !error.is_retryable() && !error.is_permanent(),
            "it may be registered"
        );
    }
    assert_eq!(fixture.pool.model_base_address(model), None);
    assert_eq!(fixture.pool.model_stats(model), None);
}

#[test]
fn allocations_for_a_model_are_refused_bad_extents() {
    let fixture = Fixture::new();
    fixture.pool.allocate_for_model("a", PAGE).expect("room");
    for (bytes, expected) in [
        (0, VmmError::ZeroSize { what: "size" }),
        (
            CAPACITY,
            VmmError::OutOfVirtualMemory {
                asked_bytes: CAPACITY,
                largest_free_bytes: CAPACITY - PAGE,
            },
        ),
        (
            usize::MAX,
            VmmError::OutOfVirtualMemory {
                asked_bytes: usize::MAX,
                largest_free_bytes: CAPACITY - PAGE,
            },
        ),
    ] {
        let error = fixture.refused(|pool| pool.allocate_for_model("a", bytes));
        assert_eq!(error, expected);
    }
    for (offset, bytes, expected) in [
        (PAGE, 0, VmmError::ZeroSize { what: "size" }),
        (
            usize::MAX,
            2,
            VmmError::Overflow {
                offset: usize::MAX,
                bytes: 2,
            },
        ),
        (
            CAPACITY,
            1,
            VmmError::OutOfRange {
                offset: CAPACITY,
                bytes: 1,
                capacity_bytes: CAPACITY,
            },
        ),
        (
            PAGE - 1,
            2,
            VmmError::AlreadyMapped {
                offset: PAGE - 1,
                bytes: 2,
            },
        ),
    ] {
        let error = fixture.refused(|pool| pool.allocate_for_model_at("a", offset, bytes));
        assert_eq!(error, expected);
    }
}

#[test]
fn deallocations_for_a_model_are_refused_what_is_not_its_own() {
    let fixture = Fixture::new();
    let pool = &fixture.pool;
    let address = pool.allocate_for_model("a", PAGE).expect("room");
    let others = pool.allocate_for_model("b", PAGE).expect("room");
    let base = pool.model_base_address("a").expect("registered");
    for (offset, bytes, expected) in [
        (0, 0, VmmError::ZeroSize { what: "size" }),
        (
            1,
            usize::MAX,
            VmmError::Overflow {
                offset: 1,
                bytes: usize::MAX,
            },
        ),
        (
            CAPACITY - 1,
            2,
            VmmError::OutOfRange {
                offset: CAPACITY - 1,
                bytes: 2,
                capacity_bytes: CAPACITY,
            },
        ),
        (
            1,
            PAGE,
            VmmError::NotMapped {
                offset: 1,
                bytes: PAGE,
            },
        ),
    ] {
        let error = fixture.refused(|pool| pool.deallocate_for_model("a", offset, bytes));
        assert_eq!(error, expected);
        let error = fixture
            .refused(|pool| pool.deallocate_for_model_address("a", base + offset as u64, bytes));
        assert_eq!(error, expected, "by address");
    }
    assert_eq!(
        fixture.refused(|pool| pool.deallocate_for_model_address("a", base - 1, 1)),
        VmmError::NotMapped {
            offset: 0,
            bytes: 1
        },
        "below the model's range"
    );
    let error = fixture.refused(|pool| pool.deallocate_for_model_address("a", others, PAGE));
    assert!(
        matches!(
            error,
            VmmError::NotMapped { .. } | VmmError::OutOfRange { .. } | VmmError::Overflow { .. }
        ),
        "another model's address: {error:?}"
    );
    assert!(
        fixture
            .refused(|pool| pool.deallocate_for_model_address("a", u64::MAX, PAGE))
            .is_permanent()
    );
    pool.deallocate_for_model_address("a", address, PAGE)
        .expect("its own");
}
