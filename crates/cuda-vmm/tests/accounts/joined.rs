//! Ranges and block tables that are charged to one account.

use super::{LIMIT_PAGES, account, asked, blocks, engine, expect_sums, range};
use crate::common::{PAGE, manual};
use cuda_vmm::{Quota, SharedMemoryPool, VirtualMemoryPool, VmmError};
use std::sync::Arc;

#[test]
fn ranges_and_blocks_share_the_ceiling_of_their_account() {
    let (_simulated, engine) = engine(manual());
    let model = account(&engine, "model", Quota::new().ceiling_bytes(5 * PAGE));
    let (one, other, table) = (range(&model), range(&model), blocks(&model, 64));
    one.allocate(0, 2 * PAGE).expect("room");
    table.back([0, 1]).expect("room");
    assert_eq!(asked(other.try_allocate(0, 2 * PAGE)), 2);
    other.allocate(0, PAGE).expect("room");
    assert_eq!(asked(table.try_back([2])), 2, "a page of each tensor");
    assert_eq!(model.available_bytes(), 0);
    // What one part of the account has parked, another takes.
    one.deallocate(0, 2 * PAGE).expect("live");
    engine.step();
    assert_eq!(model.available_bytes(), 2 * PAGE);
    table.back([2, 3]).expect("room");
    let snapshot = expect_sums(&engine);
    let [seen] = &snapshot.accounts[..] else {
        panic!("{snapshot:?}");
    };
    assert_eq!((seen.name.as_str(), seen.stats.ranges), ("model", 4));
    assert_eq!(seen.stats.committed_bytes, 5 * PAGE);
    assert_eq!(seen.stats.parts.live_page_bytes, 5 * PAGE);
    assert_eq!(snapshot.others.total_bytes(), 0);
    drop((one, other, table));
    assert_eq!(engine.stats().committed_bytes, 0);
    let gone = &engine.snapshot().accounts[0];
    assert_eq!((gone.stats.ranges, gone.counters.refusals), (0, 2));
}

#[test]
fn a_guarantee_holds_for_whatever_its_account_holds() {
    let (_simulated, engine) = engine(manual());
    let sure = account(&engine, "sure", Quota::new().guarantee_bytes(4 * PAGE));
    let other = account(&engine, "other", Quota::new());
    let greedy = range(&other);
    greedy.allocate(0, 4 * PAGE).expect("room");
    assert_eq!(asked(greedy.allocate(4 * PAGE, PAGE)), 1);
    let (table, own) = (blocks(&sure, 8), range(&sure));
    table.back([0, 1]).expect("within the guarantee");
    own.allocate(0, 2 * PAGE).expect("within the guarantee");
    assert_eq!(asked(own.try_allocate(2 * PAGE, PAGE)), 1);
    assert_eq!(other.owed_bytes(), PAGE);
    assert_eq!(sure.owed_bytes(), 0, "it holds what it is guaranteed");
}

#[test]
fn the_account_that_came_with_a_pool_outlives_it() {
    let (_simulated, engine) = engine(manual());
    let first = VirtualMemoryPool::on_engine(&engine, PAGE, PAGE).expect("addresses");
    let model = first.account().clone();
    model
        .set_quota(Quota::new().guarantee_bytes(2 * PAGE))
        .expect("room");
    first.allocate(0, PAGE).expect("room");
    first.close().expect("nothing runs");
    let second = range(&model);
    second.allocate(0, 2 * PAGE).expect("guaranteed");
    assert_eq!(model.stats().ranges, 1);
    drop(second);
    assert_eq!(engine.snapshot().accounts.len(), 1);
    drop(model);
    assert_eq!(engine.snapshot().accounts.len(), 0);
}

#[test]
fn what_is_owed_and_given_back_is_the_accounts() {
    let (_simulated, engine) = engine(manual().park_bytes_max(LIMIT_PAGES * PAGE));
    let low = account(&engine, "low", Quota::new().priority(-1));
    let high = account(&engine, "high", Quota::new());
    let (one, two, table) = (range(&low), range(&low), blocks(&low, 8));
    one.allocate(0, 3 * PAGE).expect("room");
    two.allocate(0, 3 * PAGE).expect("room");
    table.back([0, 1]).expect("room");
    let wanted = range(&high);
    assert_eq!(asked(wanted.try_allocate(0, 5 * PAGE)), 5);
    assert_eq!(low.owed_bytes(), 5 * PAGE);
    let givable = low.givable();
    assert_eq!(givable.trimmed_bytes, 0);
    assert_eq!(givable.reclaimable_bytes, 2 * PAGE);
    one.deallocate(0, 3 * PAGE).expect("live");
    assert_eq!(low.owed_bytes(), 2 * PAGE, "what was freed counts at once");
    engine.step();
    assert_eq!(low.givable().trimmed_bytes, 3 * PAGE);
    assert_eq!(low.give_back(), Ok(3 * PAGE));
    let plan = table.reclaim_candidates(2 * PAGE, |_| Some(0.0));
    let stream = cuda_vmm::Stream::new(engine.device()).expect("a stream");
    table.commit(&plan, &stream).expect("it is true");
    engine.step();
    wanted.allocate(0, 5 * PAGE).expect("given back");
    assert_eq!(low.owed_bytes(), 0);
    expect_sums(&engine);
}

#[test]
fn blocks_that_an_allocator_has_handed_out_cannot_be_given() {
    let (_simulated, engine) = engine(manual());
    let model = account(&engine, "model", Quota::new());
    let allocator = cuda_vmm::pool::blocks::BlockAllocator::new(blocks(&model, 8));
    let first = allocator.allocate(2).expect("room");
    let second = allocator.allocate(2).expect("room");
    assert_eq!(model.givable().reclaimable_bytes, 0);
    allocator.free(first).expect("handed out");
    assert_eq!(model.givable().reclaimable_bytes, 2 * PAGE);
    allocator.free(second).expect("handed out");
    assert_eq!(model.givable().reclaimable_bytes, 4 * PAGE);
    let pin = allocator.backing().pin([0]).expect("backed");
    assert_eq!(model.givable().reclaimable_bytes, 2 * PAGE);
    drop((allocator, pin));
    assert_eq!(model.givable().reclaimable_bytes, 0);
}

#[test]
fn leased_memory_is_what_an_account_could_give_later() {
    let (_simulated, engine) = engine(manual());
    let model = account(&engine, "model", Quota::new());
    let pool = range(&model);
    pool.allocate(0, 2 * PAGE).expect("room");
    let token = Arc::new(());
    pool.lease(0, PAGE, token.clone()).expect("live");
    pool.deallocate(0, 2 * PAGE).expect("live");
    assert_eq!(model.givable().leased_bytes, PAGE);
    drop(token);
    engine.step();
    engine.step();
    assert_eq!(model.givable().leased_bytes, 0);
}

#[test]
fn a_closed_account_gets_no_memory_and_keeps_what_is_live() {
    let (simulated, engine) = engine(manual());
    let shared = account(&engine, "other", Quota::new());
    let model = account(&engine, "model", Quota::new().guarantee_bytes(2 * PAGE));
    let (pool, table) = (range(&model), blocks(&model, 8));
    pool.allocate(0, 2 * PAGE + 1).expect("room");
    table.back([0]).expect("room");
    model.close();
    model.close();
    assert_eq!(pool.allocate(4 * PAGE, PAGE), Err(VmmError::Closed));
    let there = pool.allocate(2 * PAGE + 1, 1);
    assert_eq!(there, Err(VmmError::Closed), "also in a page that is there");
    assert_eq!(table.back([1]), Err(VmmError::Closed));
    assert!(!table.is_backed(1));
    let made = VirtualMemoryPool::on_account(&model, PAGE, PAGE, Default::default());
    assert_eq!(made.map(drop), Err(VmmError::Closed));
    assert_eq!(model.quota(), Err(VmmError::Closed));
    assert_eq!(model.set_quota(Quota::new()), Err(VmmError::Closed));
    assert_eq!((model.available_bytes(), model.owed_bytes()), (0, 0));
    let snapshot = expect_sums(&engine);
    assert_eq!(snapshot.accounts.len(), 1, "the other one");
    assert_eq!(snapshot.others.live_page_bytes, 5 * PAGE);
    // The name and the guarantee can be had again.
    assert_eq!(shared.available_bytes(), 3 * PAGE);
    let again = account(&engine, "model", Quota::new().guarantee_bytes(3 * PAGE));
    // What is live can be freed, and goes.
    pool.deallocate(0, PAGE).expect("live");
    while engine.stats().committed_bytes > 4 * PAGE {
        engine.step();
    }
    assert!(pool.is_mapped(PAGE, PAGE + 1) && table.is_backed(0));
    drop((pool, table, again));
    assert_eq!(engine.stats().committed_bytes, 0);
    assert_eq!(simulated.books().physical_bytes, 0);
}

#[test]
fn a_model_that_is_unregistered_is_a_closed_account() {
    let (simulated, _engine) = engine(manual());
    let shared = SharedMemoryPool::new(&simulated.device, 4 * PAGE).expect("a pool");
    let model = shared.register_model("a", Quota::new()).expect("new");
    let twice = shared.register_model("a", Quota::new()).map(drop);
    let error = VmmError::ModelAlreadyRegistered { model: "a".into() };
    assert_eq!(twice, Err(error));
    assert_eq!(shared.model("a"), Ok(model.clone()));
    let pool = range(&model);
    pool.allocate(0, PAGE).expect("room");
    shared.unregister_model("a").expect("registered");
    let missing = VmmError::ModelNotFound { model: "a".into() };
    assert_eq!(shared.unregister_model("a"), Err(missing.clone()));
    assert_eq!(shared.model("a").map(drop), Err(missing));
    assert_eq!(pool.allocate(PAGE, PAGE), Err(VmmError::Closed));
    assert_eq!(shared.snapshot().others.live_page_bytes, PAGE);
    let next = shared.register_model("a", Quota::new()).expect("new again");
    // A model that its handle closes can be registered again too.
    next.close();
    shared.register_model("a", Quota::new()).expect("closed");
    assert_eq!(shared.models(), ["a"]);
}

#[test]
fn an_account_lives_as_long_as_what_is_charged_to_it() {
    let (_simulated, engine) = engine(manual());
    let model = account(&engine, "model", Quota::new().guarantee_bytes(3 * PAGE));
    let pool = range(&model);
    drop(model);
    let other = account(&engine, "other", Quota::new());
    assert_eq!(other.available_bytes(), (LIMIT_PAGES - 3) * PAGE);
    assert_eq!(pool.account().name(), "model");
    drop(pool);
    assert_eq!(other.available_bytes(), LIMIT_PAGES * PAGE);
    // A pool that is made alone has an account of its own.
    let alone = VirtualMemoryPool::on_engine(&engine, PAGE, PAGE).expect("addresses");
    assert!(alone.account().name().starts_with('#'));
    alone.allocate(0, 1).expect("room");
    assert_eq!(expect_sums(&engine).others.total_bytes(), 0);
}
