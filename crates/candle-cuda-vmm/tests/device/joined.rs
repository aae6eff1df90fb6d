//! Models of one shared pool: ranges, tensors, caches and blocks are charged to their accounts.

use crate::common::{UnderTest, open, page, settle_to};
use crate::refused;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::cuda_vmm::VmmError as Core;
use candle_cuda_vmm::{
    ElasticTensor, Quota, Result, SharedMemoryPool, TensorPool, TensorPoolOptions, VmmError,
};

const LIMIT_PAGES: usize = 12;

fn options() -> TensorPoolOptions {
    TensorPoolOptions::new()
        .page_bytes(page())
        .reservation_bytes(64 * page())
}

/// A shared pool with a limit of twelve pages, and the models of these quotas.
fn models<const COUNT: usize>(
    test: &UnderTest,
    quotas: [(&str, Quota); COUNT],
) -> (SharedMemoryPool, [TensorPool; COUNT]) {
    let limit = LIMIT_PAGES * page();
    let mut shared = SharedMemoryPool::new(limit, test.device.clone()).unwrap();
    let pools = quotas.map(|(name, quota)| {
        let model = shared.register_model_with(name, 64 * page(), quota);
        model.unwrap();
        shared.tensor_pool(name, options()).unwrap()
    });
    (shared, pools)
}

/// A tensor with rows of a page each.
fn tensor(pool: &TensorPool, rows: usize) -> Result<ElasticTensor> {
    let mut tensor = pool.tensor(page(), DType::U8)?;
    tensor.reserve(rows)?;
    Ok(tensor)
}

/// Lets the shared pool give back until it holds at most so many pages.
#[track_caller]
fn settle(test: &UnderTest, shared: &SharedMemoryPool, pages: usize) {
    settle_to(&test.device, shared.core().engine(), pages * page());
}

#[test]
fn tensors_caches_and_blocks_of_models_share_one_limit() {
    let test = open();
    let quota = Quota::new().guarantee_bytes(4 * page());
    let (mut shared, [sure, other]) = models(&test, [("sure", quota), ("other", Quota::new())]);
    let held = tensor(&other, 8).unwrap();
    // The rest is kept for the other model, whatever asks for it.
    refused!(
        tensor(&other, 1),
        VmmError::Vmm(Core::OutOfPhysicalMemory { .. })
    );
    let entries = || {
        [
            ("k", (page() / 4,), DType::U8),
            ("v", (page() / 4,), DType::U8),
        ]
    };
    let table = other.blocks(16, entries()).unwrap();
    refused!(
        table.back([0]),
        VmmError::Vmm(Core::OutOfPhysicalMemory { .. })
    );
    refused!(
        shared.allocate_for_model("other", 1),
        VmmError::OutOfPhysicalMemory { .. }
    );
    let own_table = sure.blocks(16, entries()).unwrap();
    own_table.back(0..4).unwrap();
    let token = Tensor::zeros((1, 1, 1, page()), DType::U8, &Device::Cpu).unwrap();
    let token = token.to_device(&test.device).unwrap();
    let mut cache = sure.kv_cache(2, 64);
    cache.append(&token, &token).unwrap();
    assert_eq!(sure.committed_bytes(), 4 * page());
    refused!(
        cache.append(&token, &token).map_err(VmmError::from),
        VmmError::Vmm(Core::OutOfPhysicalMemory { .. })
    );
    assert_eq!(cache.current_seq_len(), 1);
    // What the model wants more, the other owes as far as it holds more.
    let owed = shared.model("other").unwrap().owed_bytes();
    assert!(owed > 0, "{owed}");
    let snapshot = shared.core().snapshot();
    let names: Vec<_> = snapshot
        .accounts
        .iter()
        .map(|it| it.name.as_str())
        .collect();
    assert_eq!(names, ["other", "sure"]);
    let committed = snapshot.accounts.iter().map(|it| it.stats.committed_bytes);
    assert_eq!(committed.sum::<usize>(), snapshot.engine.committed_bytes);
    drop((held, table));
    settle(&test, &shared, 4);
    cache.append(&token, &token).unwrap();
    shared.unregister_model("other").unwrap();
    drop((own_table, cache, sure, other));
    settle(&test, &shared, 0);
}

#[test]
fn an_account_that_is_closed_keeps_its_tensors() {
    let test = open();
    let (mut shared, [pool]) = models(&test, [("a", Quota::new())]);
    let mut rows = pool.tensor(page() / 2, DType::U8).unwrap();
    rows.grow(3).unwrap();
    let view = rows.view().unwrap();
    shared.unregister_model("a").unwrap();
    refused!(rows.grow(2), VmmError::Vmm(Core::Closed));
    refused!(tensor(&pool, 1), VmmError::Vmm(Core::Closed));
    refused!(
        TensorPool::on_account(&test.device, pool.account(), options()),
        VmmError::Vmm(Core::Closed)
    );
    refused!(
        shared.tensor_pool("a", options()),
        VmmError::ModelNotFound(_)
    );
    assert_eq!(rows.len(), 3);
    assert_eq!(rows.to_owned().unwrap().dims(), [3, page() / 2]);
    assert_eq!(shared.core().snapshot().others.live_page_bytes, 2 * page());
    rows.truncate(1).unwrap();
    drop((rows, view));
    settle(&test, &shared, 0);
}

#[test]
fn an_account_of_another_device_is_refused() {
    let test = open();
    let driver = candle_cuda_vmm::cuda_vmm::sim::SimConfig::new();
    let driver = candle_cuda_vmm::Driver::simulated(driver).unwrap();
    let engine = candle_cuda_vmm::EngineOptions::new();
    let engine = candle_cuda_vmm::Engine::new(&driver.device(0).unwrap(), engine).unwrap();
    let account = engine.own_account().unwrap();
    refused!(
        TensorPool::on_account(&test.device, &account, options()),
        VmmError::Vmm(Core::WrongDriver)
    );
}

#[test]
fn tensors_of_two_accounts_are_not_reserved_together() {
    let test = open();
    let (_shared, [one, other]) = models(&test, [("a", Quota::new()), ("b", Quota::new())]);
    let mut first = tensor(&one, 1).unwrap();
    let mut second = tensor(&other, 1).unwrap();
    // For one row there is memory already.
    for rows in [2, 1] {
        let mixed = ElasticTensor::reserve_together(&mut [&mut first, &mut second], rows);
        match mixed {
            Err(VmmError::Vmm(Core::ForeignAccount { expected, found })) => {
                assert_eq!((&*expected, &*found), ("a", "b"));
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(
        first.allocated_bytes() + second.allocated_bytes(),
        2 * page()
    );
    assert_eq!(one.committed_bytes() + other.committed_bytes(), 2 * page());
}

#[test]
fn a_pool_alone_has_an_account_of_its_own() {
    let test = open();
    let limit = candle_cuda_vmm::EngineOptions::new().limit_bytes(3 * page());
    let pool = TensorPool::with_options(&test.device, options().engine(limit)).unwrap();
    assert_eq!(pool.account().available_bytes(), 3 * page());
    let held = tensor(&pool, 2).unwrap();
    assert_eq!(pool.account().available_bytes(), page());
    refused!(
        tensor(&pool, 2),
        VmmError::Vmm(Core::OutOfPhysicalMemory { .. })
    );
    pool.engine().set_limit_bytes(page()).unwrap();
    assert_eq!(pool.account().owed_bytes(), page());
    drop(held);
    test.device.synchronize().unwrap();
    while pool.committed_bytes() > page() {
        pool.engine().step();
    }
    assert_eq!(pool.account().owed_bytes(), 0);
}
