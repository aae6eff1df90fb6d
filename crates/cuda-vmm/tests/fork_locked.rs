//! A process that is forked while another thread holds a lock, each of them in turn.
//!
//! This binary has this one test, so that no other test's thread is in the way.

mod common;

use common::{PAGE, Simulated, manual};
use cuda_vmm::pool::blocks::{BlockAllocator, BlockBacking, ElementSize, LayerSpec, TensorSpec};
use cuda_vmm::sim::SimConfig;
use cuda_vmm::{
    Account, AccountStats, CaptureGuard, CompactReport, Driver, Engine, EngineOptions, Givable,
    HostBytes, HostStore, HostStoreOptions, HostStoreStats, PoolOptions, Quota, SharedMemoryPool,
    Snapshot, StepReport, Stream, VirtualMemoryPool, VmmError, WorkerMode,
};
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// What has a lock, of each kind.
struct Everything {
    simulated: Simulated,
    engine: Engine,
    range: VirtualMemoryPool,
    shared: SharedMemoryPool,
    model: VirtualMemoryPool,
    blocks: BlockAllocator,
    backing: BlockBacking,
    stream: Stream,
    host: HostStore,
    kept: HostBytes,
}

impl Everything {
    fn new() -> Self {
        let simulated = Simulated::default();
        let device = &simulated.device;
        let options = EngineOptions::new().limit_bytes(64 * PAGE);
        let engine = Engine::new(device, options.worker(WorkerMode::Thread)).expect("an engine");
        let range = VirtualMemoryPool::on_engine(&engine, 64 * PAGE, PAGE).expect("a pool");
        range.allocate(0, 2 * PAGE).expect("room");
        let shared = SharedMemoryPool::new(device, 64 * PAGE).expect("a pool");
        let account = shared.register_model("model", Quota::new()).expect("new");
        let model = VirtualMemoryPool::on_account(&account, 64 * PAGE, PAGE, PoolOptions::new());
        let model = model.expect("addresses");
        let backing = || {
            let tensor = TensorSpec::new("k", &[16], ElementSize::new(2).expect("not zero"));
            let spec = LayerSpec::new(vec![tensor.expect("small")]).expect("one");
            let engine = Engine::new(device, manual()).expect("an engine");
            BlockBacking::new(&engine, spec, 64, PAGE).expect("a backing")
        };
        let host = HostStoreOptions::new().piece_bytes(PAGE).threads(2);
        let host = HostStore::with_options(device, 4 * PAGE, host).expect("a store");
        Self {
            kept: host.reserve(PAGE).expect("room"),
            host,
            blocks: BlockAllocator::new(backing()),
            backing: backing(),
            stream: Stream::new(device).expect("a stream"),
            engine,
            range,
            shared,
            model,
            simulated,
        }
    }

    /// What another thread does meanwhile, which holds a lock for much of its time.
    fn busy(&self, what: usize) -> Option<Box<dyn Fn() + Send + Sync + '_>> {
        let device = &self.simulated.device;
        Some(match what {
            0 => Box::new(|| {
                self.shared
                    .register_model("other", Quota::new())
                    .expect("new");
                self.shared.unregister_model("other").expect("there");
            }),
            1 => Box::new(|| drop(self.shared.models())),
            2 => Box::new(|| _ = device.quarantined_bytes()),
            3 => Box::new(|| device.set_make_room(None)),
            4 => Box::new(|| drop(CaptureGuard::new())),
            5 => Box::new(|| _ = self.engine.stats()),
            6 => Box::new(|| _ = self.range.is_mapped(0, PAGE)),
            7 => Box::new(|| self.range.account().set_owed_waker(None)),
            8 => Box::new(|| drop(self.simulated.driver.device(0))),
            9 => Box::new(|| _ = self.backing.backed_prefix()),
            10 => Box::new(|| _ = self.blocks.allocated()),
            11 => Box::new(|| {
                let engine = Engine::new(device, manual()).expect("an engine");
                drop(engine);
            }),
            12 => Box::new(|| drop(Driver::simulated(SimConfig::new()))),
            13 => Box::new(|| drop(Driver::cuda())),
            14 => Box::new(|| self.range.account().set_memory_waker(None)),
            15 => Box::new(|| _ = self.blocks.backing().account().givable()),
            16 => Box::new(|| drop(self.range.account().demand())),
            17 => Box::new(|| {
                drop(self.host.reserve(PAGE).expect("room"));
                self.host.trim().expect("no call fails");
            }),
            18 => Box::new(|| _ = self.host.stats()),
            _ => return None,
        })
    }

    /// In the child: everything returns at once, `Forked` or what is documented.
    fn check(&self) {
        fn forked<T>(outcome: Result<T, VmmError>) {
            assert_eq!(outcome.map(|_| ()), Err(VmmError::Forked));
        }
        let device = &self.simulated.device;
        forked(self.simulated.driver.device(0));
        assert_eq!(device.quarantined_bytes(), 0);
        assert_eq!(device.quarantined_address_bytes(), 0);
        assert_eq!(device.quarantined_host_bytes(), 0);
        forked(self.host.reserve(PAGE));
        forked(self.host.trim());
        forked(self.host.set_limit_bytes(0));
        forked(self.kept.read(0, &mut [0]));
        assert_eq!(self.host.stats(), HostStoreStats::default());
        assert_eq!(device.retry_quarantine(), 0);
        device.set_make_room(None);
        device.set_make_room(Some(Arc::new(|_| {})));
        forked(device.synchronize());
        // It counts for this process alone.
        drop((CaptureGuard::new(), CaptureGuard::default()));
        forked(Engine::new(device, EngineOptions::new()));
        let engine = &self.engine;
        assert_eq!(engine.stats().committed_bytes, 0);
        assert_eq!(engine.counters().ranges.allocations, 0);
        assert_eq!(engine.snapshot().accounts, Snapshot::default().accounts);
        assert_eq!(engine.step(), StepReport::default());
        forked(engine.trim());
        forked(engine.trim_to(0));
        assert_eq!(engine.relieve(PAGE), 0);
        forked(VirtualMemoryPool::new(device, PAGE, PAGE));
        forked(engine.account("new", Quota::new()));
        forked(engine.own_account());
        forked(engine.set_limit_bytes(PAGE));
        for range in [&self.range, &self.model] {
            self.check_range(range);
            self.check_account(range.account());
        }
        self.check_account(self.backing.account());
        self.check_account(self.blocks.backing().account());
        self.check_shared();
        self.check_blocks();
        let own = Driver::simulated(SimConfig::new()).expect("one of its own");
        own.device(0).expect("its device");
    }

    fn check_range(&self, range: &VirtualMemoryPool) {
        fn forked<T>(outcome: Result<T, VmmError>) {
            assert_eq!(outcome.map(|_| ()), Err(VmmError::Forked));
        }
        forked(range.allocate(2 * PAGE, PAGE));
        forked(range.try_allocate(2 * PAGE, PAGE));
        forked(range.allocate_anywhere(PAGE, 1));
        forked(range.allocate_timeout(2 * PAGE, PAGE, Duration::MAX));
        forked(range.allocate_anywhere_timeout(PAGE, 1, Duration::MAX));
        forked(range.deallocate(0, PAGE));
        forked(range.deallocate_many(&[(0, PAGE)]));
        forked(range.use_stream(&self.stream));
        forked(range.forget_stream(&self.stream));
        forked(range.pin_for_graph(0, PAGE));
        forked(range.lease(0, PAGE, Arc::new(())));
        forked(range.trim());
        assert!(!range.is_leased(0, PAGE) && !range.is_mapped(0, PAGE));
        assert_eq!(range.physical_memory_usage(), 0);
        assert_eq!(range.stats().committed_bytes, 0);
        assert_eq!(range.counters().allocations, 0);
        assert_eq!(range.compact_report(), CompactReport::default());
        let account = range.account();
        forked(account.try_allocate_many(&[(range, 2 * PAGE, PAGE)]));
        forked(account.allocate_many(&[(range, 2 * PAGE, PAGE)]));
        forked(account.allocate_many_timeout(&[(range, 2 * PAGE, PAGE)], Duration::MAX));
        let mut context = Context::from_waker(Waker::noop());
        match pin!(range.allocate_async(2 * PAGE, PAGE)).poll(&mut context) {
            Poll::Ready(outcome) => forked(outcome),
            Poll::Pending => panic!("nothing wakes it"),
        }
    }

    fn check_account(&self, account: &Account) {
        fn forked<T>(outcome: Result<T, VmmError>) {
            assert_eq!(outcome.map(|_| ()), Err(VmmError::Forked));
        }
        forked(account.quota());
        forked(account.set_quota(Quota::new()));
        forked(account.give_back());
        let range = VirtualMemoryPool::on_account(account, PAGE, PAGE, PoolOptions::new());
        forked(range);
        assert_eq!(account.givable(), Givable::default());
        assert_eq!((account.owed_bytes(), account.available_bytes()), (0, 0));
        assert_eq!(account.withdraw(), 0);
        assert_eq!(account.stats(), AccountStats::default());
        assert_eq!(account.committed_bytes(), 0);
        drop(account.demand());
        account.set_owed_waker(None);
        account.set_memory_waker(None);
        account.close();
        assert!(!account.name().is_empty());
    }

    fn check_shared(&self) {
        fn forked<T>(outcome: Result<T, VmmError>) {
            assert_eq!(outcome.map(|_| ()), Err(VmmError::Forked));
        }
        let (shared, model) = (&self.shared, "model");
        forked(shared.register_model("new", Quota::new()));
        forked(shared.unregister_model(model));
        forked(shared.model(model));
        forked(shared.set_limit_bytes(PAGE));
        forked(shared.trim());
        assert!(shared.models().is_empty() && shared.snapshot().accounts.is_empty());
        assert_eq!(
            (shared.stats().committed_bytes, shared.relieve(PAGE)),
            (0, 0)
        );
    }

    fn check_blocks(&self) {
        fn forked<T>(outcome: Result<T, VmmError>) {
            assert_eq!(outcome.map(|_| ()), Err(VmmError::Forked));
        }
        let backing = &self.backing;
        forked(backing.back([0]));
        forked(backing.try_back([0]));
        forked(backing.unback([0]));
        forked(backing.pin([0]));
        forked(backing.lease(0, 0..1, Arc::new(())));
        forked(backing.use_stream(&self.stream));
        forked(backing.forget_stream(&self.stream));
        assert!(!backing.is_backed(0) && backing.backed_prefix() == 0);
        let plan = backing.reclaim_candidates(PAGE, |_| Some(1.0));
        assert!(plan.is_empty());
        assert!(
            backing
                .reclaim_candidates_with_moves(PAGE, 1.0, |_| None)
                .is_empty()
        );
        forked(backing.commit(&plan, &self.stream));
        assert_eq!(backing.stats().backed_blocks, 0);
        let blocks = &self.blocks;
        forked(blocks.allocate(1));
        forked(blocks.try_allocate(1));
        forked(blocks.free([0]));
        assert!(blocks.allocated() == 0 && !blocks.is_allocated(0));
        let plan = blocks.reclaim_candidates(PAGE, |_| Some(1.0));
        assert!(plan.is_empty());
        forked(blocks.commit(&plan, &self.stream));
    }
}

struct SetAtEnd<'a>(&'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// How often the process forks beside each: enough that each lock is held in some of the children.
const FORKS: usize = 40;
const FINE: i32 = 40;

#[test]
fn a_process_forked_under_a_lock_never_waits_for_it() {
    let mut everything = Some(Everything::new());
    for what in 0.. {
        let all = everything.as_ref().expect("taken in children only");
        let Some(act) = all.busy(what) else {
            assert_eq!(what, 19, "all of them");
            break;
        };
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Also if something fails, so that this ends.
            let _over = SetAtEnd(&is_over);
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    act();
                }
            });
            for _ in 0..FORKS {
                // SAFETY: the child calls what is under test, and allocates.
                let status = unsafe {
                    common::in_a_child(|| {
                        all.check();
                        FINE
                    })
                };
                assert_eq!(status, FINE, "beside {what}");
            }
        });
    }
    // Drops under a lock: of all there is, in the child.
    for _ in 0..FORKS {
        let device = everything.as_ref().expect("there").simulated.device.clone();
        let range = everything.as_ref().expect("there").range.engine().clone();
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Also if something fails, so that this ends.
            let _over = SetAtEnd(&is_over);
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    drop((
                        device.quarantined_bytes(),
                        range.stats(),
                        CaptureGuard::new(),
                    ));
                }
            });
            // SAFETY: as above.
            let status = unsafe {
                common::in_a_child(|| {
                    drop(everything.take());
                    FINE
                })
            };
            assert_eq!(status, FINE);
        });
    }
}
