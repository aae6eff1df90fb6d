//! Accounts: one budget for ranges, blocks and whatever else is charged to them.

mod common;

#[path = "accounts/asking.rs"]
mod asking;
#[path = "accounts/faults.rs"]
mod faults;
#[path = "accounts/futures.rs"]
mod futures;
#[path = "accounts/joined.rs"]
mod joined;
#[path = "accounts/limit.rs"]
mod limit;
#[path = "accounts/many.rs"]
mod many;
#[path = "accounts/random.rs"]
mod random;

use common::{PAGE, Simulated};
use cuda_vmm::pool::blocks::{BlockBacking, ElementSize, LayerSpec, TensorSpec};
use cuda_vmm::{
    Account, Engine, EngineOptions, PoolOptions, Quota, Result, Snapshot, VirtualMemoryPool,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Wake;

const LIMIT_PAGES: usize = 8;

/// A simulated device, and an engine with a limit of eight pages, each with a chunk of its own.
fn engine(options: EngineOptions) -> (Simulated, Engine) {
    let simulated = Simulated::default();
    let options = options.limit_bytes(LIMIT_PAGES * PAGE).chunk_bytes_max(0);
    let engine = Engine::new(&simulated.device, options).expect("an engine");
    (simulated, engine)
}

/// A range of 64 pages of addresses.
fn range(account: &Account) -> VirtualMemoryPool {
    VirtualMemoryPool::on_account(account, 64 * PAGE, PAGE, PoolOptions::new()).expect("addresses")
}

/// Two tensors with blocks of half a page each.
fn blocks(account: &Account, count: usize) -> BlockBacking {
    let half = ElementSize::new(PAGE / 2).expect("not zero");
    let tensors = ["k", "v"].map(|name| TensorSpec::new(name, &[1], half).expect("small"));
    let spec = LayerSpec::new(tensors).expect("different names");
    BlockBacking::on_account(account, spec, count, PAGE).expect("addresses")
}

fn account(engine: &Engine, name: &str, quota: Quota) -> Account {
    engine.account(name, quota).expect("room for its guarantee")
}

/// Asserts that the parts of all accounts and of the rest make up the engine.
#[track_caller]
fn expect_sums(engine: &Engine) -> Snapshot {
    let snapshot = engine.snapshot();
    let accounts = snapshot.accounts.iter();
    let parts = accounts.clone().map(|account| account.stats.parts).sum();
    assert_eq!(snapshot.engine.parts, snapshot.others + parts);
    let total_bytes = snapshot.engine.parts.total_bytes();
    assert_eq!(snapshot.engine.committed_bytes, total_bytes);
    for account in accounts {
        let stats = account.stats;
        let parts_bytes = stats.parts.total_bytes();
        assert_eq!(stats.committed_bytes, parts_bytes, "{}", account.name);
    }
    snapshot
}

/// Counts how often it is woken.
#[derive(Default)]
struct Counts(AtomicUsize);

impl Counts {
    fn woken(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

impl Wake for Counts {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// The bytes asked for, or the error.
fn asked<T>(outcome: Result<T>) -> usize {
    match outcome {
        Err(cuda_vmm::VmmError::OutOfPhysicalMemory { asked_bytes, .. }) => asked_bytes / PAGE,
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("served"),
    }
}
