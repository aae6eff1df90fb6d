//! A limit that changes while memory is held.

use super::{LIMIT_PAGES, account, asked, blocks, engine, expect_sums, range};
use crate::common::{PAGE, Simulated, manual};
use cuda_vmm::{
    Engine, EngineOptions, Quota, QuotaConflict, SharedMemoryPool, VirtualMemoryPool, VmmError,
};
use std::sync::Arc;
use std::time::Duration;

#[test]
fn what_is_above_a_lowered_limit_is_owed_by_the_lowest_priority_first() {
    let (_simulated, engine) = engine(manual());
    let low = account(&engine, "low", Quota::new().priority(-1));
    let sure = account(&engine, "sure", Quota::new().guarantee_bytes(3 * PAGE));
    let (one, other) = (range(&low), range(&sure));
    one.allocate(0, 3 * PAGE).expect("room");
    other.allocate(0, 5 * PAGE).expect("room");
    let owed = || (low.owed_bytes() / PAGE, sure.owed_bytes() / PAGE);
    assert_eq!(owed(), (0, 0));
    engine
        .set_limit_bytes(6 * PAGE)
        .expect("above the guarantees");
    assert_eq!(engine.limit_bytes(), 6 * PAGE);
    assert_eq!(owed(), (2, 0));
    engine
        .set_limit_bytes(4 * PAGE)
        .expect("above the guarantees");
    assert_eq!(owed(), (3, 1));
    // Not below the guarantee.
    engine.set_limit_bytes(3 * PAGE).expect("all guarantees");
    assert_eq!(owed(), (3, 2));
    assert_eq!(asked(one.try_allocate(8 * PAGE, PAGE)), 1);
    assert_eq!(low.available_bytes(), 0);
    // Nothing is taken by force.
    assert!(one.is_mapped(0, 3 * PAGE) && other.is_mapped(0, 5 * PAGE));
    one.deallocate(0, 3 * PAGE).expect("live");
    assert_eq!(owed(), (0, 2), "what was freed counts at once");
    // Above the limit it may not take back what it has freed.
    assert_eq!(asked(one.try_allocate(0, PAGE)), 1);
    while engine.stats().committed_bytes > 5 * PAGE {
        engine.step();
    }
    // Up again.
    engine.set_limit_bytes(LIMIT_PAGES * PAGE).expect("room");
    assert_eq!(owed(), (0, 0));
    one.allocate(0, 3 * PAGE).expect("room");
    expect_sums(&engine);
}

#[test]
fn what_is_spare_above_a_lowered_limit_goes_with_the_next_step() {
    let simulated = Simulated::default();
    let options = manual()
        .limit_bytes(LIMIT_PAGES * PAGE)
        .park_bytes_max(LIMIT_PAGES * PAGE)
        .chunk_bytes_max(0);
    let engine = Engine::new(&simulated.device, options).expect("an engine");
    let pool = VirtualMemoryPool::on_engine(&engine, 64 * PAGE, PAGE).expect("addresses");
    pool.allocate(0, 6 * PAGE).expect("room");
    pool.deallocate(2 * PAGE, 4 * PAGE).expect("live");
    engine.step();
    assert_eq!(engine.stats().parts.parked_bytes, 4 * PAGE);
    engine.set_limit_bytes(3 * PAGE).expect("no guarantees");
    assert_eq!(pool.account().owed_bytes(), 0);
    engine.step();
    assert_eq!(engine.stats().committed_bytes, 3 * PAGE);
    // Within the limit it takes back what is parked.
    pool.allocate(2 * PAGE, 4 * PAGE)
        .expect_err("above the limit");
    let parked = (2..6).find(|page| pool.try_allocate(page * PAGE, PAGE).is_ok());
    assert!(parked.is_some());
    assert_eq!(engine.stats().committed_bytes, 3 * PAGE);
}

#[test]
fn a_limit_that_cannot_hold_is_refused_and_changes_nothing() {
    let (_simulated, engine) = engine(manual());
    let model = account(&engine, "model", Quota::new().guarantee_bytes(2 * PAGE));
    let error = VmmError::QuotaUnsatisfiable {
        what: QuotaConflict::LimitBelowGuarantees,
        asked_bytes: 2 * PAGE,
        available_bytes: 2 * PAGE - 1,
    };
    assert_eq!(engine.set_limit_bytes(2 * PAGE - 1), Err(error.clone()));
    assert!(error.is_permanent());
    let zero = VmmError::ZeroSize { what: "limit" };
    assert_eq!(engine.set_limit_bytes(0), Err(zero));
    assert_eq!(engine.limit_bytes(), LIMIT_PAGES * PAGE);
    assert_eq!(model.available_bytes(), LIMIT_PAGES * PAGE);
}

#[test]
fn a_quota_that_keeps_no_more_is_accepted_above_a_lowered_limit() {
    let (_simulated, engine) = engine(manual());
    let quota = Quota::new().guarantee_bytes(4 * PAGE);
    let (sure, other) = (
        account(&engine, "sure", quota),
        account(&engine, "other", Quota::new()),
    );
    let held = range(&other);
    held.allocate(0, 4 * PAGE).expect("room");
    // Two pages are missing for what is kept.
    engine.set_limit_bytes(6 * PAGE).expect("all guarantees");
    assert_eq!(sure.set_quota(quota.priority(1)), Ok(()));
    let error = VmmError::QuotaUnsatisfiable {
        what: QuotaConflict::Guarantee,
        asked_bytes: 5 * PAGE,
        available_bytes: 2 * PAGE,
    };
    let more = Quota::new().guarantee_bytes(5 * PAGE);
    assert_eq!(sure.set_quota(more), Err(error));
    let less = Quota::new().guarantee_bytes(3 * PAGE);
    assert_eq!(sure.set_quota(less), Ok(()));
    assert_eq!(other.owed_bytes(), PAGE);
}

#[test]
fn a_limit_below_what_is_leased_is_owed_until_the_leases_end() {
    let (_simulated, engine) = engine(manual());
    let model = account(&engine, "model", Quota::new());
    let pool = range(&model);
    pool.allocate(0, 4 * PAGE).expect("room");
    let token = Arc::new(());
    pool.lease(0, 4 * PAGE, token.clone()).expect("live");
    pool.deallocate(0, 4 * PAGE).expect("live");
    engine.set_limit_bytes(PAGE).expect("no guarantees");
    engine.step();
    assert_eq!(engine.stats().parts.leased_bytes, 4 * PAGE);
    assert_eq!(model.owed_bytes(), 3 * PAGE);
    assert_eq!(model.givable().leased_bytes, 4 * PAGE);
    drop(token);
    while engine.stats().committed_bytes > PAGE {
        engine.step();
    }
    assert_eq!(model.owed_bytes(), 0);
    pool.allocate(8 * PAGE, PAGE).expect("within the limit");
}

#[test]
fn a_guarantee_that_a_lowered_limit_leaves_no_room_for_is_owed_by_others() {
    let (_simulated, engine) = engine(manual());
    let sure = account(&engine, "sure", Quota::new().guarantee_bytes(4 * PAGE));
    let other = account(&engine, "other", Quota::new().priority(9));
    let (own, table) = (range(&sure), blocks(&other, 8));
    table.back(0..4).expect("room");
    engine.set_limit_bytes(5 * PAGE).expect("all guarantees");
    assert_eq!(other.owed_bytes(), 3 * PAGE, "whatever its priority");
    own.allocate(0, PAGE).expect("there is room");
    assert_eq!(asked(own.try_allocate(PAGE, 3 * PAGE)), 3);
    table.unback(0..4).expect("backed");
    engine.step();
    own.allocate(PAGE, 3 * PAGE).expect("guaranteed");
    assert_eq!(other.owed_bytes(), 0);
}

#[test]
fn a_limit_that_rises_serves_those_that_wait() {
    let simulated = Simulated::default();
    let shared = SharedMemoryPool::new(&simulated.device, PAGE).expect("a pool");
    let model = shared.register_model("a", Quota::new()).expect("new");
    let pool = range(&model);
    pool.allocate(0, PAGE).expect("room");
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| pool.allocate_timeout(PAGE, 1, Duration::from_secs(60)));
        std::thread::sleep(Duration::from_millis(5));
        shared.set_limit_bytes(2 * PAGE).expect("more");
        waits.join().expect("no panic").expect("served");
    });
    assert_eq!(shared.limit_bytes(), 2 * PAGE);
    let headroom = EngineOptions::new()
        .limit_bytes(4 * PAGE)
        .headroom_bytes(simulated.device.total_bytes() - 2 * PAGE);
    let engine = Engine::new(&simulated.device, headroom).expect("an engine");
    engine.set_limit_bytes(8 * PAGE).expect("more");
    let alone = range(&account(&engine, "a", Quota::new()));
    assert_eq!(
        alone.account().available_bytes(),
        2 * PAGE,
        "the headroom stays"
    );
}
