//! An account that closes in the middle of a call that shares.

use crate::common::{Simulated, manual};
use crate::fixture::PAGE;
use cuda_vmm::sim::SimConfig;
use cuda_vmm::{Account, Engine, PoolOptions, Quota, VirtualMemoryPool, VmmError};
use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Wake, Waker};

/// Closes an account when it is woken and the pool has live bytes.
struct Closes(Mutex<Option<Account>>, Arc<VirtualMemoryPool>);

impl Wake for Closes {
    fn wake(self: Arc<Self>) {
        let is_time = self.1.stats().live_bytes > 0;
        // Not with the lock: closing wakes again.
        let account = self.0.lock().expect("no panic").take_if(|_| is_time);
        if let Some(account) = account {
            account.close();
        }
    }
}

/// More chunks than are made live under one hold of the lock. The first of them do not lie at the
/// beginning of the pool.
#[test]
fn what_is_live_by_then_is_freed_again() {
    const CHUNKS: usize = 200;
    let simulated = Simulated::new(SimConfig::new().granularity_bytes(PAGE).unbacked());
    let options = manual().chunk_bytes_max(PAGE).limit_bytes(CHUNKS * PAGE);
    let engine = Engine::new(&simulated.device, options).expect("an engine");
    let account = |name| engine.account(name, Quota::new()).expect("an account");
    let range = |account: &Account| {
        let options = PoolOptions::new();
        VirtualMemoryPool::on_account(account, CHUNKS * PAGE, PAGE, options).expect("addresses")
    };
    let model = account("model");
    let (source, target) = (range(&model), Arc::new(range(&model)));
    source.allocate(0, CHUNKS * PAGE).expect("room");
    // A task that waits is woken at each change, on the thread that shares.
    let other = range(&account("other"));
    let closes = Closes(Mutex::new(Some(model.clone())), target.clone());
    let waker = Waker::from(Arc::new(closes));
    let mut waits = pin!(other.allocate_async(0, PAGE));
    let polled = waits.as_mut().poll(&mut Context::from_waker(&waker));
    assert!(polled.is_pending());
    let before = simulated.books();
    let part = (&source, &*target, 10 * PAGE, (CHUNKS - 10) * PAGE);
    let shared = model.share_many(&[part]).map(drop);
    assert_eq!(shared, Err(VmmError::Closed));
    assert_eq!(target.stats().live_bytes, 0);
    simulated.device.synchronize().expect("done");
    engine.step();
    assert_eq!(simulated.books(), before);
}
