//! A process that is forked while another thread holds a lock, each of them in turn.
//!
//! This binary has this one test, so that no other test's thread is in the way.

mod common;

use common::{PAGE, Simulated, manual};
use cuda_vmm::pool::blocks::{BlockAllocator, BlockBacking, ElementSize, LayerSpec, TensorSpec};
use cuda_vmm::sim::SimConfig;
use cuda_vmm::{
    CaptureGuard, CompactReport, Driver, Engine, EngineOptions, ModelOptions, ModelQuota,
    SharedMemoryPool, Snapshot, StepReport, Stream, VirtualMemoryPool, VmmError, WorkerMode,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// What has a lock, of each kind.
struct Everything {
    simulated: Simulated,
    engine: Engine,
    range: VirtualMemoryPool,
    shared: SharedMemoryPool,
    blocks: BlockAllocator,
    backing: BlockBacking,
    stream: Stream,
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
        shared.register_model("model", PAGE).expect("addresses");
        let backing = || {
            let tensor = TensorSpec::new("k", &[16], ElementSize::new(2).expect("not zero"));
            let spec = LayerSpec::new(vec![tensor.expect("small")]).expect("one");
            let engine = Engine::new(device, manual()).expect("an engine");
            BlockBacking::new(&engine, spec, 64, PAGE).expect("a backing")
        };
        Self {
            blocks: BlockAllocator::new(backing()),
            backing: backing(),
            stream: Stream::new(device).expect("a stream"),
            engine,
            range,
            shared,
            simulated,
        }
    }

    /// What another thread does meanwhile, which holds a lock for much of its time.
    fn busy(&self, what: usize) -> Option<Box<dyn Fn() + Send + Sync + '_>> {
        let device = &self.simulated.device;
        Some(match what {
            0 => Box::new(|| {
                self.shared.register_model("other", PAGE).expect("new");
                self.shared.unregister_model("other").expect("there");
            }),
            1 => Box::new(|| drop(self.shared.models())),
            2 => Box::new(|| _ = device.quarantined_bytes()),
            3 => Box::new(|| device.set_make_room(None)),
            4 => Box::new(|| drop(CaptureGuard::new())),
            5 => Box::new(|| _ = self.engine.stats()),
            6 => Box::new(|| _ = self.range.is_mapped(0, PAGE)),
            7 => Box::new(|| self.range.set_owed_waker(None)),
            8 => Box::new(|| drop(self.simulated.driver.device(0))),
            9 => Box::new(|| _ = self.backing.backed_prefix()),
            10 => Box::new(|| _ = self.blocks.allocated()),
            11 => Box::new(|| {
                let engine = Engine::new(device, manual()).expect("an engine");
                drop(engine);
            }),
            12 => Box::new(|| drop(Driver::simulated(SimConfig::new()))),
            13 => Box::new(|| drop(Driver::cuda())),
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
        assert_eq!(engine.snapshot().models, Snapshot::default().models);
        assert_eq!(engine.step(), StepReport::default());
        forked(engine.trim());
        forked(engine.trim_to(0));
        assert_eq!(engine.relieve(PAGE), 0);
        forked(VirtualMemoryPool::new(device, PAGE, PAGE));
        self.check_range(&self.range);
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
        forked(range.give_back());
        assert!(!range.is_leased(0, PAGE) && !range.is_mapped(0, PAGE));
        assert_eq!(range.physical_memory_usage(), 0);
        assert_eq!(range.stats().committed_bytes, 0);
        assert_eq!(range.counters().allocations, 0);
        assert_eq!(range.compact_report(), CompactReport::default());
        assert_eq!(range.owed_bytes(), 0);
        range.set_owed_waker(None);
    }

    fn check_shared(&self) {
        fn forked<T>(outcome: Result<T, VmmError>) {
            assert_eq!(outcome.map(|_| ()), Err(VmmError::Forked));
        }
        let (shared, model, at_most) = (&self.shared, "model", Duration::MAX);
        forked(shared.register_model("new", PAGE));
        forked(shared.register_model_with("new", ModelOptions::new(PAGE)));
        forked(shared.unregister_model(model));
        forked(shared.model(model));
        forked(shared.allocate_for_model(model, PAGE));
        forked(shared.allocate_for_model_at(model, 0, PAGE));
        forked(shared.allocate_for_model_timeout(model, PAGE, at_most));
        forked(shared.deallocate_for_model(model, 0, PAGE));
        forked(shared.deallocate_for_model_address(model, 0, PAGE));
        forked(shared.set_quota(model, ModelQuota::new()));
        forked(shared.trim());
        // SAFETY: nothing is launched here.
        forked(unsafe { shared.compact_model(model) });
        assert_eq!(shared.model_base_address(model), None);
        assert!(shared.model_stats(model).is_none() && shared.quota(model).is_none());
        assert!(shared.model_compact_report(model).is_none());
        assert_eq!(shared.model_owed_bytes(model), None);
        assert!(shared.models().is_empty() && shared.snapshot().models.is_empty());
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
            assert_eq!(what, 14, "all of them");
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
