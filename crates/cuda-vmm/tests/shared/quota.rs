//! Quotas that change while models run.

use crate::common::{ModelOptions, Models, PAGE, Simulated, manual};
use crate::{CAPACITY, Fixture, LIMIT, pool, unknown};
use cuda_vmm::{Quota, QuotaConflict, VmmError};

fn pages(guarantee: usize, ceiling: usize) -> Quota {
    Quota::new()
        .guarantee_bytes(guarantee * PAGE)
        .ceiling_bytes(ceiling * PAGE)
}

#[test]
fn a_quota_is_what_was_registered_and_then_what_was_set() {
    let fixture = Fixture::new();
    let pool = &fixture.pool;
    assert_eq!(pool.quota("a"), Some(Quota::new()));
    assert_eq!(pool.quota("c"), None);
    let options = ModelOptions {
        guarantee_bytes: PAGE,
        ceiling_bytes: Some(2 * PAGE),
        priority: -3,
        ..ModelOptions::new(CAPACITY)
    };
    pool.register_model_with("c", options).expect("it can hold");
    assert_eq!(pool.quota("c"), Some(pages(1, 2).priority(-3)));
    let quota = pages(3, 5).priority(i32::MAX);
    pool.set_quota("c", quota).expect("it can hold");
    assert_eq!(pool.quota("c"), Some(quota));
    pool.unregister_model("c").expect("registered");
    assert_eq!(pool.quota("c"), None);
}

#[test]
fn quotas_that_cannot_hold_are_refused_and_change_nothing() {
    let fixture = Fixture::new();
    let pool = &fixture.pool;
    pool.set_quota("a", pages(2, 4)).expect("it can hold");
    pool.allocate_for_model("b", 5 * PAGE).expect("room");
    for (model, quota, expected) in [
        ("c", pages(0, 1), unknown("c")),
        (
            "a",
            pages(4, 8),
            VmmError::QuotaUnsatisfiable {
                what: QuotaConflict::Guarantee,
                asked_bytes: 4 * PAGE,
                available_bytes: 3 * PAGE,
            },
        ),
        (
            "a",
            pages(3, 2),
            VmmError::QuotaUnsatisfiable {
                what: QuotaConflict::GuaranteeAboveCeiling,
                asked_bytes: 3 * PAGE,
                available_bytes: 2 * PAGE,
            },
        ),
        (
            "b",
            pages(7, 8),
            VmmError::QuotaUnsatisfiable {
                what: QuotaConflict::Guarantee,
                asked_bytes: 7 * PAGE,
                available_bytes: 6 * PAGE,
            },
        ),
    ] {
        let quotas = || ["a", "b"].map(|model| pool.quota(model));
        let before = quotas();
        assert_eq!(
            fixture.refused(|pool| pool.set_quota(model, quota)),
            expected
        );
        assert_eq!(quotas(), before);
    }
    // What it holds counts towards what it is guaranteed.
    pool.set_quota("b", pages(6, 8)).expect("five are held");
    pool.set_quota("a", pages(0, 8)).expect("downwards");
    pool.set_quota("b", pages(8, 8)).expect("all there is");
    pool.allocate_for_model("b", 3 * PAGE).expect("guaranteed");
}

#[test]
fn a_raised_guarantee_holds_and_a_lowered_one_is_for_others() {
    let fixture = Fixture::new();
    let pool = &fixture.pool;
    pool.set_quota("a", pages(6, 8)).expect("it can hold");
    let error = fixture.refused(|pool| pool.allocate_for_model("b", 3 * PAGE));
    assert!(error.is_retryable() && !error.is_permanent(), "{error}");
    assert_eq!(pool.model_owed_bytes("a"), Some(0), "no model can help");
    pool.set_quota("a", pages(5, 8)).expect("downwards");
    pool.allocate_for_model("b", 3 * PAGE).expect("room");
    pool.allocate_for_model("a", 5 * PAGE).expect("guaranteed");
}

#[test]
fn a_model_above_a_lowered_ceiling_owes_the_rest_and_gets_no_more() {
    let fixture = Fixture::new();
    let pool = &fixture.pool;
    let a = pool.model("a").expect("registered");
    a.allocate(0, 6 * PAGE).expect("room");
    assert_eq!(a.account().owed_bytes(), 0);
    pool.set_quota("a", pages(1, 4))
        .expect("below what is held");
    assert_eq!(a.account().owed_bytes(), 2 * PAGE);
    assert_eq!(pool.model_owed_bytes("a"), Some(2 * PAGE));
    assert_eq!(pool.model_owed_bytes("b"), Some(0));
    let error = fixture.refused(|pool| pool.allocate_for_model("a", 1));
    assert!(error.is_out_of_memory(), "{error}");
    // Freed is given back, though the device may still use it.
    a.deallocate(0, PAGE).expect("live");
    assert_eq!(a.account().owed_bytes(), PAGE);
    pool.set_quota("a", pages(1, 5)).expect("upwards");
    assert_eq!(a.account().owed_bytes(), 0);
    pool.set_quota("a", pages(0, 0))
        .expect("below what is held");
    assert_eq!(a.account().owed_bytes(), 5 * PAGE);
    a.deallocate(PAGE, 5 * PAGE).expect("live");
    assert_eq!(a.account().owed_bytes(), 0);
}

#[test]
fn what_is_parked_above_a_lowered_ceiling_goes_with_the_next_step() {
    let simulated = Simulated::default();
    let options = manual().limit_bytes(LIMIT).park_bytes_max(LIMIT);
    let pool = pool(&simulated.device, options);
    pool.register_model("a", CAPACITY).expect("addresses");
    pool.allocate_for_model("a", 6 * PAGE).expect("room");
    pool.deallocate_for_model("a", 0, 4 * PAGE).expect("live");
    pool.engine().step();
    let stats = || pool.model_stats("a").expect("registered");
    assert_eq!(stats().parts.parked_bytes, 4 * PAGE);
    pool.set_quota("a", pages(0, 3))
        .expect("below what is held");
    assert_eq!(pool.model_owed_bytes("a"), Some(0), "no model need choose");
    assert_eq!(pool.engine().step().drained_bytes, 3 * PAGE);
    assert_eq!(
        (stats().parts.parked_bytes, stats().committed_bytes),
        (PAGE, 3 * PAGE)
    );
    assert_eq!(pool.engine().step().drained_bytes, 0);
}

#[test]
fn what_others_have_parked_is_given_up_for_a_guarantee() {
    let simulated = Simulated::default();
    let options = manual().limit_bytes(LIMIT).park_bytes_max(LIMIT);
    let pool = pool(&simulated.device, options);
    for model in ["a", "b"] {
        pool.register_model(model, CAPACITY).expect("addresses");
    }
    pool.allocate_for_model("a", 8 * PAGE).expect("room");
    pool.deallocate_for_model("a", 0, 6 * PAGE).expect("live");
    let error = pool.set_quota("b", pages(7, 8)).expect_err("two are live");
    assert_eq!(
        error,
        VmmError::QuotaUnsatisfiable {
            what: QuotaConflict::Guarantee,
            asked_bytes: 7 * PAGE,
            available_bytes: 0
        }
    );
    assert_eq!(
        pool.stats().parts.parked_bytes,
        6 * PAGE,
        "it would not have helped"
    );
    pool.set_quota("b", pages(2, 8)).expect("six are parked");
    assert_eq!(
        pool.stats().parts.parked_bytes,
        4 * PAGE,
        "as much as was needed"
    );
    let options = ModelOptions {
        guarantee_bytes: 4 * PAGE,
        ..ModelOptions::new(CAPACITY)
    };
    pool.register_model_with("c", options)
        .expect("four are parked");
    pool.allocate_for_model("c", 4 * PAGE).expect("guaranteed");
    pool.allocate_for_model("b", 2 * PAGE).expect("guaranteed");
}

/// A pool whose model `a` has memory made ahead beside what it holds, and another model.
fn made_ahead(simulated: &Simulated, live_pages: usize, ahead_pages: usize) -> Models {
    let pool = pool(&simulated.device, manual().limit_bytes(LIMIT));
    let ahead = ModelOptions {
        ahead_bytes_max: ahead_pages * PAGE,
        ..ModelOptions::new(CAPACITY)
    };
    pool.register_model_with("a", ahead).expect("addresses");
    pool.register_model("b", CAPACITY).expect("addresses");
    pool.allocate_for_model_at("a", 0, live_pages * PAGE)
        .expect("room");
    assert_eq!(pool.engine().step().prefetched_bytes, ahead_pages * PAGE);
    pool
}

#[test]
fn what_was_made_ahead_above_a_lowered_ceiling_goes_with_the_next_step() {
    let simulated = Simulated::default();
    let pool = made_ahead(&simulated, 3, 2);
    pool.set_quota("a", pages(0, 4))
        .expect("below what is held");
    assert_eq!(pool.engine().step().drained_bytes, PAGE);
    let stats = pool.model_stats("a").expect("registered");
    assert_eq!(
        (stats.parts.ahead_bytes, stats.committed_bytes),
        (PAGE, 4 * PAGE)
    );
}

#[test]
fn what_was_made_ahead_is_given_up_for_a_guarantee() {
    let simulated = Simulated::default();
    let pool = made_ahead(&simulated, 5, 2);
    pool.set_quota("b", pages(2, 16))
        .expect("one page is spare");
    pool.allocate_for_model("b", 2 * PAGE).expect("guaranteed");
}
