//! `Models`: what it refuses, which account is charged, and that guarantees and ceilings hold.

mod common;

#[path = "shared/bad_input.rs"]
mod bad_input;
#[path = "shared/ceiling.rs"]
mod ceiling;
#[path = "shared/fairness.rs"]
mod fairness;
#[path = "shared/life_cycle.rs"]
mod life_cycle;
#[path = "shared/no_worker.rs"]
mod no_worker;
#[path = "shared/others.rs"]
mod others;
#[path = "shared/pressure.rs"]
mod pressure;
#[path = "shared/quota.rs"]
mod quota;
#[path = "shared/random.rs"]
mod random;
#[path = "shared/relief.rs"]
mod relief;
#[path = "shared/waiting.rs"]
mod waiting;

use common::{ModelOptions, Models, PAGE, Simulated, failure, manual};
use cuda_vmm::sim::{Books, SimConfig};
use cuda_vmm::{
    Account, Device, EngineOptions, EngineStats, MemoryParts, PoolOptions, PoolStats, Quota,
    SharedPoolOptions, Stream, VirtualMemoryPool, VmmError,
};
use std::sync::Arc;
use std::time::Duration;

const LIMIT: usize = 8 * PAGE;
const CAPACITY: usize = 16 * PAGE;

fn pool(device: &Device, options: EngineOptions) -> Models {
    let options = SharedPoolOptions::new().engine(options);
    Models::with_options(device, options).expect("a pool")
}

/// A pool with a limit of eight pages and two models of sixteen pages of addresses.
struct Fixture {
    simulated: Simulated,
    pool: Models,
}

type Snapshot = (Vec<String>, Vec<Option<PoolStats>>, EngineStats, Books);

impl Fixture {
    fn new() -> Self {
        let simulated = Simulated::default();
        let pool = pool(&simulated.device, manual().limit_bytes(LIMIT));
        for model in ["a", "b"] {
            pool.register_model(model, CAPACITY).expect("addresses");
        }
        Self { simulated, pool }
    }

    fn snapshot(&self) -> Snapshot {
        let models = self.pool.models();
        let stats = models.iter().map(|model| self.pool.model_stats(model));
        let stats = stats.collect();
        (models, stats, self.pool.stats(), self.simulated.books())
    }

    /// Does something that must fail and change nothing.
    #[track_caller]
    fn refused<T: core::fmt::Debug>(
        &self,
        act: impl FnOnce(&Models) -> Result<T, VmmError>,
    ) -> VmmError {
        let before = self.snapshot();
        let outcome = act(&self.pool);
        assert_eq!(self.snapshot(), before);
        outcome.expect_err("a bad argument")
    }
}

fn unknown(model: &str) -> VmmError {
    VmmError::ModelNotFound {
        model: model.to_owned(),
    }
}

#[test]
fn a_limit_above_the_device_is_reported_as_given() {
    let simulated = Simulated::new(SimConfig::new().memory_bytes(4 * PAGE));
    let pool = Models::new(&simulated.device, 1 << 50).expect("a pool");
    assert_eq!(pool.limit_bytes(), 1 << 50);
    assert_eq!(pool.stats().limit_bytes, 1 << 50);
    assert_eq!(pool.page_bytes(), PAGE);
    pool.register_model("a", CAPACITY).expect("addresses");
    let error = pool
        .allocate_for_model("a", 5 * PAGE)
        .expect_err("more than the device has");
    assert_eq!(error, failure!(cuMemCreate, CUDA_ERROR_OUT_OF_MEMORY));
    assert_eq!(pool.stats().committed_bytes, 0);
}

#[test]
fn a_model_allocates_many_times_at_the_lowest_aligned_addresses() {
    let fixture = Fixture::new();
    let pool = &fixture.pool;
    let base = pool.model_base_address("a").expect("registered");
    let at = || (pool.allocate_for_model("a", 100).expect("room") - base) as usize;
    assert_eq!([at(), at(), at()], [0, 256, 512]);
    pool.deallocate_for_model("a", 256, 100).expect("live");
    assert_eq!(at(), 256, "the gap is used again");
    let address = pool
        .allocate_for_model_at("a", 3 * PAGE + 7, 9)
        .expect("room");
    assert_eq!(address, base + (3 * PAGE + 7) as u64);
    let stats = pool.model_stats("a").expect("registered");
    assert_eq!((stats.live_bytes, stats.live_pages), (309, 2));
    assert_eq!(
        pool.model("a").expect("registered").physical_memory_usage(),
        2 * PAGE
    );
}

#[test]
fn a_model_cannot_have_what_the_others_hold_until_they_give_it_back() {
    let fixture = Fixture::new();
    let pool = &fixture.pool;
    pool.allocate_for_model("a", 6 * PAGE).expect("room");
    pool.allocate_for_model("b", PAGE).expect("room");
    let error = fixture.refused(|pool| pool.allocate_for_model("b", 3 * PAGE));
    assert_eq!(
        error,
        VmmError::OutOfPhysicalMemory {
            asked_bytes: 3 * PAGE,
            free_bytes: PAGE,
            retiring_bytes: 0,
            reclaimable_bytes: 0,
            limit_bytes: LIMIT
        }
    );
    assert!(error.is_retryable());
    assert_eq!(error.shortfall_bytes(), 2 * PAGE);
    pool.deallocate_for_model("a", 0, 3 * PAGE).expect("live");
    pool.allocate_for_model("b", 3 * PAGE)
        .expect("what the other gave back");
    // As much as was needed; the rest goes with the next step.
    assert_eq!(pool.stats().committed_bytes, LIMIT);
    pool.engine().step();
    let committed = |model| pool.model_stats(model).expect("registered").committed_bytes;
    assert_eq!((committed("a"), committed("b")), (3 * PAGE, 4 * PAGE));
    assert_eq!(pool.stats().committed_bytes, 7 * PAGE);
    assert_eq!(fixture.simulated.books().physical_bytes, 7 * PAGE);
}

#[test]
fn memory_that_retires_is_named_in_the_error_and_not_waited_for() {
    let fixture = Fixture::new();
    let pool = &fixture.pool;
    let stream = Stream::new(&fixture.simulated.device).expect("a stream");
    let [a, b] = ["a", "b"].map(|model| pool.model(model).expect("registered"));
    a.use_stream(&stream).expect("of this device");
    let address = pool.allocate_for_model("a", LIMIT).expect("room");
    let held = fixture.simulated.hold_work();
    // SAFETY: the pool keeps the memory mapped until the stream is past this.
    unsafe { stream.memset(address, 1, LIMIT) }.expect("queued");
    pool.deallocate_for_model("a", 0, LIMIT).expect("live");
    assert_eq!(
        fixture.refused(|_| b.try_allocate(0, PAGE)),
        VmmError::OutOfPhysicalMemory {
            asked_bytes: PAGE,
            free_bytes: 0,
            retiring_bytes: LIMIT,
            reclaimable_bytes: 0,
            limit_bytes: LIMIT
        }
    );
    drop(held);
    b.allocate(0, PAGE).expect("worth waiting for");
    assert!(!fixture.simulated.simulator.is_poisoned(0));
}

#[test]
fn a_guarantee_holds_and_a_ceiling_too() {
    let simulated = Simulated::default();
    let pool = pool(&simulated.device, manual().limit_bytes(LIMIT));
    let sure = ModelOptions {
        guarantee_bytes: 3 * PAGE,
        ceiling_bytes: Some(4 * PAGE),
        ..ModelOptions::new(CAPACITY)
    };
    pool.register_model_with("sure", sure).expect("it can hold");
    pool.register_model("greedy", CAPACITY).expect("addresses");
    let error = pool
        .allocate_for_model("greedy", 6 * PAGE)
        .expect_err("into the other's guarantee");
    assert_eq!(
        error,
        VmmError::OutOfPhysicalMemory {
            asked_bytes: 6 * PAGE,
            free_bytes: 5 * PAGE,
            retiring_bytes: 0,
            reclaimable_bytes: 0,
            limit_bytes: LIMIT
        }
    );
    assert!(
        error.is_retryable(),
        "a model that leaves gives up its guarantee"
    );
    pool.allocate_for_model("greedy", 5 * PAGE).expect("room");
    pool.allocate_for_model("sure", 3 * PAGE)
        .expect("guaranteed");
    pool.deallocate_for_model("greedy", 0, 5 * PAGE)
        .expect("live");
    let error = pool
        .allocate_for_model("sure", 2 * PAGE)
        .expect_err("above its ceiling");
    assert_eq!(
        error,
        VmmError::OutOfPhysicalMemory {
            asked_bytes: 2 * PAGE,
            free_bytes: 0,
            retiring_bytes: 0,
            reclaimable_bytes: 5 * PAGE,
            limit_bytes: 4 * PAGE
        },
        "what the other holds parked is left alone, since it would not help"
    );
    pool.allocate_for_model("sure", PAGE)
        .expect("up to its ceiling");

    let nothing = ModelOptions {
        ceiling_bytes: Some(0),
        ..ModelOptions::new(CAPACITY)
    };
    pool.register_model_with("none", nothing)
        .expect("addresses");
    let error = pool
        .allocate_for_model("none", 1)
        .expect_err("no room ever");
    assert!(error.is_permanent() && error.is_out_of_memory());
}

#[test]
fn an_unregistered_model_gives_everything_back_with_its_range() {
    let fixture = Fixture::new();
    let pool = &fixture.pool;
    pool.unregister_model("b").expect("registered");
    fixture.simulated.unchanged(|| {
        pool.register_model("b", CAPACITY).expect("addresses");
        pool.allocate_for_model("b", 3 * PAGE).expect("room");
        pool.unregister_model("b").expect("registered");
        assert_eq!(pool.models(), ["a"]);
        assert_eq!(pool.unregister_model("b"), Err(unknown("b")));
        assert_eq!(fixture.simulated.books().physical_bytes, 0);
    });
    pool.register_model("b", PAGE)
        .expect("the name is free again");
    pool.allocate_for_model("b", PAGE).expect("room");
}

/// What an open account has and a closed one has not.
#[track_caller]
fn assert_closed(account: &Account) {
    assert_eq!(account.quota(), Err(VmmError::Closed));
    assert_eq!(account.set_quota(Quota::new()), Err(VmmError::Closed));
    assert_eq!((account.owed_bytes(), account.available_bytes()), (0, 0));
    let range = VirtualMemoryPool::on_account(account, CAPACITY, PAGE, PoolOptions::new());
    assert_eq!(range.map(drop), Err(VmmError::Closed));
}

#[test]
fn a_range_of_an_unregistered_model_gets_nothing_and_keeps_what_is_live() {
    let fixture = Fixture::new();
    let (pool, simulated) = (&fixture.pool, &fixture.simulated);
    pool.unregister_model("b").expect("registered");
    simulated.unchanged(|| {
        let guaranteed = ModelOptions {
            guarantee_bytes: 5 * PAGE,
            ..ModelOptions::new(CAPACITY)
        };
        pool.register_model_with("b", guaranteed)
            .expect("it can hold");
        let handle = pool.model("b").expect("registered");
        let address = handle.allocate(0, 3 * PAGE - 8).expect("room");
        pool.unregister_model("b").expect("registered");
        assert_eq!(pool.models(), ["a"]);
        assert_eq!(pool.unregister_model("b"), Err(unknown("b")));

        simulated.unchanged(|| {
            assert_closed(handle.account());
            assert_eq!(handle.allocate(4 * PAGE, PAGE), Err(VmmError::Closed));
            assert_eq!(handle.try_allocate(4 * PAGE, PAGE), Err(VmmError::Closed));
            assert_eq!(handle.allocate_anywhere(PAGE, 1), Err(VmmError::Closed));
            let waits = handle.allocate_timeout(4 * PAGE, PAGE, Duration::MAX);
            assert_eq!(waits, Err(VmmError::Closed));
            // Also bytes of a page that is there.
            assert_eq!(handle.allocate(3 * PAGE - 8, 8), Err(VmmError::Closed));
        });

        // What is live is as it was, and on no open account.
        assert!(handle.is_mapped(0, 3 * PAGE - 8));
        let live = |pages| {
            let mut parts = MemoryParts::default();
            parts.live_page_bytes = pages * PAGE;
            parts
        };
        let names = |snapshot: &cuda_vmm::Snapshot| -> Vec<String> {
            let accounts = snapshot.accounts.iter();
            accounts.map(|account| account.name.clone()).collect()
        };
        let snapshot = pool.snapshot();
        assert_eq!(names(&snapshot), ["a"]);
        assert_eq!(snapshot.others, live(3));
        assert_eq!(simulated.books().physical_bytes, 3 * PAGE);
        let stream = Stream::new(&simulated.device).expect("a stream");
        handle.use_stream(&stream).expect("of this device");
        // SAFETY: the bytes are live.
        unsafe { stream.memset(address, 1, PAGE) }.expect("queued");
        stream.synchronize().expect("done");

        // It gave up its guarantee. A new model may have its name, and what it frees.
        let error = pool
            .allocate_for_model("a", 6 * PAGE)
            .expect_err("3 are live");
        assert_eq!(error.shortfall_bytes(), PAGE);
        pool.register_model("b", CAPACITY).expect("a new name");
        assert_eq!(names(&pool.snapshot()), ["a", "b"]);
        handle.deallocate(0, PAGE).expect("live");
        assert_eq!(
            handle.deallocate(0, PAGE),
            Err(VmmError::NotMapped {
                offset: 0,
                bytes: PAGE
            })
        );
        assert_eq!(handle.allocate(0, PAGE), Err(VmmError::Closed));
        pool.allocate_for_model("a", 6 * PAGE).expect("one is free");
        let snapshot = pool.snapshot();
        assert_eq!(snapshot.others, live(2));
        assert_eq!(snapshot.engine.parts, live(8));
        pool.deallocate_for_model("a", 0, 6 * PAGE).expect("live");
        pool.engine().step();
        pool.unregister_model("b").expect("registered");

        let expected = {
            let mut expected = PoolStats::default();
            (expected.capacity_bytes, expected.page_bytes) = (CAPACITY, PAGE);
            (expected.live_bytes, expected.live_pages) = (2 * PAGE - 8, 2);
            (expected.committed_bytes, expected.chunks) = (2 * PAGE, 2);
            expected.parts = live(2);
            // The page that was freed, and the rest behind what is live.
            expected.unused_bytes = CAPACITY - (2 * PAGE - 8);
            expected.largest_unused_run_bytes = CAPACITY - (3 * PAGE - 8);
            expected
        };
        assert_eq!(handle.stats(), expected);
        assert_eq!(handle.trim(), Ok(0));
        assert_eq!(Arc::strong_count(&handle), 1);
        drop(handle);
        assert_eq!(pool.stats().committed_bytes, 0);
        drop(stream);
    });
}

#[test]
fn dropping_the_last_clone_gives_everything_back() {
    let simulated = Simulated::default();
    simulated.unchanged(|| {
        let pool = pool(&simulated.device, manual().limit_bytes(LIMIT));
        let clone = pool.clone();
        pool.register_model("a", CAPACITY).expect("addresses");
        clone.allocate_for_model("a", 5 * PAGE).expect("room");
        drop(pool);
        assert_eq!(clone.stats().parts.live_page_bytes, 5 * PAGE);
        assert_eq!(clone.engine().stats(), clone.stats());
    });
}

#[test]
fn trim_gives_back_what_is_parked() {
    let simulated = Simulated::default();
    let pool = pool(
        &simulated.device,
        manual().limit_bytes(LIMIT).park_bytes_max(LIMIT),
    );
    pool.register_model("a", CAPACITY).expect("addresses");
    pool.allocate_for_model("a", 4 * PAGE).expect("room");
    pool.deallocate_for_model("a", 0, 3 * PAGE).expect("live");
    pool.engine().step();
    assert_eq!(pool.stats().parts.parked_bytes, 3 * PAGE);
    assert_eq!(pool.trim(), Ok(3 * PAGE));
    assert_eq!(pool.stats().committed_bytes, PAGE);
    assert_eq!(pool.trim(), Ok(0));
}

#[test]
fn a_model_is_compacted_while_others_go_on() {
    let simulated = Simulated::default();
    let options = SharedPoolOptions::new()
        .engine(manual().limit_bytes(80 * PAGE).chunk_bytes_max(4 * PAGE))
        .page_bytes(PAGE);
    let pool = Models::with_options(&simulated.device, options).expect("a pool");
    for model in ["a", "b"] {
        pool.register_model(model, 64 * PAGE).expect("a new name");
        pool.allocate_for_model_at(model, 0, 32 * PAGE)
            .expect("room");
    }
    let stream = Stream::new(&simulated.device).expect("a stream");
    let address = pool.model_base_address("a").expect("registered");
    // SAFETY: the page is live, and written before anything is moved.
    unsafe { stream.write(address + 3 * PAGE as u64, &[7; 64]) }.expect("written");
    for page in (0..32).filter(|page| page % 4 != 3) {
        pool.deallocate_for_model("a", page * PAGE, PAGE)
            .expect("live");
    }
    let planned = pool.model_compact_report("a").expect("registered");
    assert_eq!(
        (planned.moved_bytes, planned.returned_bytes),
        (8 * PAGE, 24 * PAGE)
    );
    let before = pool.stats();
    let report = pool.compact_model("a").expect("room");
    assert_eq!(report, planned);
    assert_eq!(
        pool.stats().committed_bytes,
        before.committed_bytes - 24 * PAGE
    );
    assert_eq!(
        pool.model_stats("a").expect("registered").parts.slack_bytes,
        0
    );
    let mut bytes = [0; 64];
    // SAFETY: the page is live, and nothing runs on it.
    unsafe { stream.read(address + 3 * PAGE as u64, &mut bytes) }.expect("mapped");
    assert_eq!(bytes, [7; 64]);
    let nothing = pool.compact_model("b").expect("nothing to do");
    assert_eq!((nothing.moved_bytes, nothing.returned_bytes), (0, 0));
    assert_eq!(pool.model_compact_report("c"), None);
    let unknown = pool.compact_model("c");
    assert_eq!(unknown, Err(VmmError::ModelNotFound { model: "c".into() }));
}
