//! Values near the largest in every public call that takes one: an error, and never a panic.
//!
//! The crate is built with overflow checks in the profile of tests, so that an overflow is a panic.
//! After each call the books add up, and at the end everything goes back.

mod common;

use common::{ModelOptions, Models, PAGE, Simulated, manual};
use core::time::Duration;
use cuda_vmm::pool::blocks::{
    BlockAllocator, BlockBacking, ElementSize, LayerSpec, ReclaimPlan, TensorSpec,
};
use cuda_vmm::sim::SimConfig;
use cuda_vmm::{
    Device, Engine, EngineOptions, Mapping, PhysicalMemory, PoolOptions, Quota, Reservation,
    SharedPoolOptions, Stream, VirtualMemoryPool,
};
use proptest::prelude::*;
use std::sync::Arc;

/// Addresses of each pool.
const CAPACITY: usize = 32 * PAGE;

/// Values around zero, a page, powers of two and the largest.
fn extreme() -> impl Strategy<Value = usize> {
    let base = prop::sample::select(vec![
        0,
        PAGE,
        CAPACITY,
        1 << 40,
        1 << 47,
        1 << 62,
        1 << 63,
        usize::MAX / 3,
        usize::MAX - PAGE,
        usize::MAX,
    ]);
    (base, 0..4usize, any::<bool>()).prop_map(|(base, by, up)| match up {
        true => base.saturating_add(by),
        false => base.saturating_sub(by),
    })
}

/// Mostly values that are of use, so that calls get far.
fn any_size() -> impl Strategy<Value = usize> {
    prop_oneof![
        3 => (0..10usize).prop_map(|pages| pages * PAGE),
        1 => 0..3 * PAGE,
        3 => extreme(),
    ]
}

fn options() -> impl Strategy<Value = EngineOptions> {
    let sizes = [
        extreme(),
        extreme(),
        extreme(),
        extreme(),
        extreme(),
        extreme(),
    ];
    (sizes, 0..64u8).prop_map(|(sizes, given)| {
        let [limit, headroom, park, park_min, cache, chunk] = sizes;
        let is_given = |bit: u8| given & (1 << bit) != 0;
        let mut options = manual();
        if is_given(0) {
            options = options.limit_bytes(limit);
        }
        if is_given(1) {
            options = options.headroom_bytes(headroom);
        }
        if is_given(2) {
            options = options.park_bytes_max(park);
        }
        if is_given(3) {
            options = options.park_bytes_min(park_min);
        }
        if is_given(4) {
            options = options.cache_bytes_max(cache);
        }
        if is_given(5) {
            options = options.chunk_bytes_max(chunk);
        }
        options
    })
}

fn duration(value: usize) -> Duration {
    // Those that would really be waited for are cut short, except where nothing can come.
    match value {
        usize::MAX => Duration::MAX,
        value => Duration::from_nanos((value % 1000) as u64),
    }
}

/// One call with its values.
type Step = (u8, usize, usize, usize);

fn step() -> impl Strategy<Value = Step> {
    (0..24u8, any_size(), any_size(), extreme())
}

fn shared_pool(device: &Device, options: EngineOptions, page: Option<usize>) -> Models {
    let with = |engine, page_bytes| {
        let mut options = SharedPoolOptions::new().engine(engine);
        options.page_bytes = page_bytes;
        options
    };
    let pool = Models::with_options(device, with(options, page));
    let pool = pool.or_else(|_| Models::with_options(device, with(options, None)));
    pool.unwrap_or_else(|_| {
        let options = manual().limit_bytes(usize::MAX).park_bytes_max(usize::MAX);
        Models::with_options(device, with(options, None)).expect("a pool")
    })
}

/// Takes a step; whatever comes of it is no panic.
fn take(pool: &Models, stream: &Stream, step: Step) {
    let (call, first, second, third) = step;
    let name = if third % 2 == 0 { "a" } else { "b" };
    let model = || pool.model(name);
    let Ok(mut model) = model() else {
        let registered = pool.register_model_with(
            name,
            ModelOptions {
                capacity_bytes: if call % 2 == 0 { CAPACITY } else { first },
                guarantee_bytes: if call % 3 == 0 { second } else { 0 },
                ceiling_bytes: (call % 5 == 0).then_some(third),
                priority: if call % 7 == 0 { i32::MIN } else { i32::MAX },
                ahead_bytes_max: if call % 4 == 0 { third } else { 0 },
                ahead_bytes_min: (call % 8 == 0).then_some(first),
            },
        );
        let _ = registered.or_else(|_| pool.register_model(name, CAPACITY));
        return;
    };
    match call {
        0 => drop(model.allocate(first, second)),
        1 => drop(model.try_allocate(first, second)),
        2 => drop(model.allocate_anywhere(first, second)),
        3 => {
            // Never for long: a wait that cannot end would be one for ever.
            let timeout = match pool.stats().limit_bytes {
                usize::MAX if first < PAGE => duration(third),
                _ => duration(third % 1000),
            };
            if timeout < Duration::MAX {
                drop(model.allocate_timeout(first, second, timeout));
                drop(model.allocate_anywhere_timeout(second, first, timeout));
                drop(pool.allocate_for_model_timeout(name, second, timeout));
            }
        }
        4 => drop(model.deallocate(first, second)),
        5 => drop(model.deallocate_many(&[(first, second), (second, first), (third, third)])),
        6 => drop(model.lease(first, second, Arc::new(()))),
        7 => drop(model.pin_for_graph(first, second)),
        8 => drop((
            model.is_leased(first, second),
            model.is_mapped(second, third),
        )),
        9 => drop(pool.allocate_for_model(name, first)),
        10 => drop(pool.allocate_for_model_at(name, first, second)),
        11 => drop(pool.deallocate_for_model(name, first, second)),
        12 => drop(pool.deallocate_for_model_address(name, first as u64, second)),
        13 | 14 => {
            let mut quota = Quota::new().guarantee_bytes(if call == 13 { first } else { 0 });
            quota.ceiling_bytes = (third % 2 == 0).then_some(second);
            quota.priority = if first % 2 == 0 { i32::MIN } else { i32::MAX };
            drop(pool.set_quota(name, quota));
        }
        15 => drop(pool.relieve(first)),
        16 => drop(pool.engine().trim_to(first)),
        17 => drop(model.account().give_back()),
        18 => drop(pool.unregister_model(name)),
        19 => drop(model.use_stream(stream)),
        20 => {
            // No handle may live meanwhile.
            drop(model);
            drop(pool.compact_model(name));
            model = pool.model(name).expect("registered");
        }
        21 => drop(pool.trim()),
        _ => drop(pool.engine().step()),
    }
    let stats = pool.stats();
    assert_eq!(stats.parts.total_bytes(), stats.committed_bytes, "{step:?}");
    let snapshot = pool.snapshot();
    let _ = (snapshot.prometheus().len(), model.account().owed_bytes());
    let _ = (
        format!("{} {}", stats, model.stats()),
        model.compact_report(),
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn pools_with_extreme_options_and_calls(
        options in options(),
        page in prop_oneof![Just(None), extreme().prop_map(Some)],
        steps in prop::collection::vec(step(), 1..40),
    ) {
        let simulated = Simulated::new(SimConfig::new().unbacked());
        simulated.unchanged(|| {
            let pool = shared_pool(&simulated.device, options, page);
            let stream = Stream::new(&simulated.device).expect("a stream");
            for step in steps {
                take(&pool, &stream, step);
            }
            drop(pool);
        });
        prop_assert_eq!(simulated.device.quarantined_bytes(), 0);
    }

    #[test]
    fn ranges_of_extreme_sizes(
        options in options(), capacity in any_size(), page in any_size(), ahead in extreme(), low in extreme(),
        offset in any_size(), bytes in any_size(),
    ) {
        let simulated = Simulated::new(SimConfig::new().unbacked());
        let device = &simulated.device;
        simulated.unchanged(|| {
            drop(VirtualMemoryPool::new(device, capacity, page));
            drop(Models::new(device, capacity));
            let Ok(engine) = Engine::new(device, options) else {
                return;
            };
            for single in [true, false] {
                for (capacity, page) in [(capacity, page), (capacity, PAGE), (1 << 40, 1 << 30)] {
                    let options = PoolOptions::new().ahead_bytes_max(ahead).single_handle(single);
                    for options in [options, options.ahead_bytes_min(low)] {
                        let pool = VirtualMemoryPool::with_options(&engine, capacity, page, options);
                        let Ok(pool) = pool else {
                            continue;
                        };
                        let _ = pool.allocate(offset, bytes);
                        let _ = pool.allocate_anywhere(1, bytes.max(1));
                        let _ = pool.allocate_anywhere(1, bytes.max(1));
                        // What is made ahead could be all the memory there is, a page at a time.
                        if ahead < 1 << 30 || capacity <= CAPACITY {
                            engine.step();
                        }
                        let _ = pool.deallocate(offset, bytes);
                    }
                }
            }
            drop(engine.trim());
        });
    }

    #[test]
    fn nouns_of_extreme_sizes(bytes in any_size(), alignment in any_size(), offset in any_size()) {
        let simulated = Simulated::new(SimConfig::new().unbacked());
        let device = &simulated.device;
        simulated.unchanged(|| {
            drop(PhysicalMemory::new(device, bytes));
            drop(PhysicalMemory::exportable(device, bytes));
            drop(Reservation::new(device, bytes));
            drop(Reservation::with_alignment(device, bytes, alignment));
            let memory = Arc::new(PhysicalMemory::new(device, PAGE).expect("memory"));
            let reservation = Arc::new(Reservation::new(device, 2 * PAGE).expect("addresses"));
            drop(Mapping::new(&reservation, offset, &memory, &[]));
            let access = [(device.clone(), cuda_vmm::Access::Read)];
            drop(Mapping::new(&reservation, offset, &memory, &access));
        });
    }

    #[test]
    fn blocks_of_extreme_shapes_and_counts(
        shape in prop::collection::vec(prop_oneof![1..9usize, extreme()], 0..4),
        element in prop_oneof![1..9usize, extreme()],
        // As many as the host can count, or far more.
        blocks in prop_oneof![1..40usize, extreme().prop_filter("large", |blocks| *blocks > 1 << 39)],
        page in prop_oneof![3 => Just(PAGE), 1 => extreme()],
        ids in prop::collection::vec(prop_oneof![0..40usize, extreme()], 1..5),
        bytes in any_size(),
    ) {
        let simulated = Simulated::new(SimConfig::new().unbacked());
        simulated.unchanged(|| {
            let engine = Engine::new(&simulated.device, manual().limit_bytes(usize::MAX));
            let engine = engine.expect("an engine");
            let Ok(element) = ElementSize::new(element) else {
                return;
            };
            let spec = TensorSpec::new("a", &shape, element);
            let Ok(spec) = spec.and_then(|tensor| LayerSpec::new([tensor])) else {
                return;
            };
            let Ok(backing) = BlockBacking::new(&engine, spec, blocks, page) else {
                return;
            };
            let stream = Stream::new(&simulated.device).expect("a stream");
            for id in &ids {
                let _ = (backing.back([*id]), backing.try_back([*id]), backing.pages_of(*id));
                let _ = (backing.pin([*id]), backing.is_backed(*id), backing.unback([*id]));
                let _ = backing.lease(*id, *id..usize::MAX, Arc::new(()));
                let _ = backing.lease(0, 0..*id, Arc::new(()));
            }
            let _ = backing.back(ids.iter().copied());
            // What follows looks at each page.
            if backing.tensors()[0].capacity_bytes() > 1 << 36 {
                return;
            }
            let costs: [fn(usize) -> Option<f64>; 2] = [|_| Some(f64::MAX), |_| Some(0.0)];
            for cost in costs {
                let plans: [ReclaimPlan; 2] = [
                    backing.reclaim_candidates(bytes, cost),
                    backing.reclaim_candidates_with_moves(bytes, 0.5, cost),
                ];
                for plan in plans {
                    let _ = backing.commit(&plan, &stream);
                }
            }
            let allocator = BlockAllocator::new(backing);
            for id in ids {
                let _ = (allocator.allocate(id), allocator.try_allocate(id), allocator.free([id]));
                let _ = allocator.is_allocated(id);
            }
            let _ = allocator.reclaim_candidates(bytes, |_| Some(1.0));
        });
    }

    #[test]
    fn simulators_of_extreme_sizes(memory in any_size(), granularity in any_size(), bytes in any_size()) {
        let config = SimConfig::new().unbacked().memory_bytes(memory);
        for config in [config.clone(), config.granularity_bytes(granularity)] {
            let Ok(driver) = cuda_vmm::Driver::simulated(config) else {
                continue;
            };
            let device = driver.device(0).expect("the device");
            drop(VirtualMemoryPool::new(&device, bytes, device.granularity_bytes()));
            drop(Reservation::new(&device, bytes));
            drop(PhysicalMemory::new(&device, bytes));
            let _ = device.free_bytes();
        }
    }
}

#[test]
fn a_wait_may_be_as_long_as_there_is() {
    let simulated = Simulated::default();
    let pool = Models::new(&simulated.device, usize::MAX).expect("a pool");
    pool.register_model("a", CAPACITY).expect("addresses");
    let model = pool.model("a").expect("registered");
    for (page, timeout) in [Duration::MAX, Duration::MAX - Duration::from_nanos(1)]
        .into_iter()
        .enumerate()
    {
        model
            .allocate_timeout(page * PAGE, PAGE, timeout)
            .expect("room");
    }
}

#[test]
fn pressure_with_a_limit_near_the_largest() {
    for limit in [usize::MAX, usize::MAX - 1, usize::MAX - PAGE] {
        let simulated = Simulated::default();
        let pool = Models::new(&simulated.device, limit).expect("a pool");
        for name in ["a", "b"] {
            pool.register_model(name, CAPACITY).expect("addresses");
            pool.allocate_for_model_at(name, 0, 8 * PAGE).expect("room");
        }
        let quota = Quota::new().ceiling_bytes(2 * PAGE);
        pool.set_quota("a", quota).expect("no guarantee");
        assert_eq!(pool.model_owed_bytes("a"), Some(6 * PAGE));
        pool.allocate_for_model_at("b", 8 * PAGE, 8 * PAGE)
            .expect("room");
        let a = pool.model("a").expect("registered");
        a.try_allocate(8 * PAGE, PAGE)
            .expect_err("above its ceiling");
        let quota = Quota::new().guarantee_bytes(limit - 24 * PAGE);
        let outcome = pool.set_quota("b", quota);
        assert!(outcome.is_ok(), "{outcome:?}");
        assert_eq!(pool.model_owed_bytes("b"), Some(0));
    }
}
