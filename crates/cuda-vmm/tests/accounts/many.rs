//! Memory of several ranges at once, all or none.

use super::{LIMIT_PAGES, account, asked, blocks, engine, expect_sums, range};
use crate::common::{Gate, PAGE, Simulated, manual};
use cuda_vmm::sim::{Fault, SimConfig};
use cuda_vmm::sys::{CUDA_ERROR_OPERATING_SYSTEM, DriverFunction};
use cuda_vmm::{Engine, EngineOptions, PoolOptions, Quota, Stream, VirtualMemoryPool, VmmError};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

#[test]
fn parts_of_several_pools_are_all_served_or_none() {
    let (_simulated, engine) = engine(manual());
    let model = account(&engine, "model", Quota::new());
    let (keys, values) = (range(&model), range(&model));
    keys.allocate(0, 10).expect("room");
    let parts = [
        (&values, 0, 3 * PAGE),
        (&keys, 10, PAGE),
        (&keys, 5 * PAGE, 1),
        (&keys, PAGE + 10, PAGE),
    ];
    let backed = model.try_allocate_many(&parts).expect("seven pages");
    assert_eq!(engine.stats().committed_bytes, 7 * PAGE);
    assert!(keys.is_mapped(0, 2 * PAGE + 10) && values.is_mapped(0, 3 * PAGE));
    drop(backed);
    assert!(keys.is_mapped(0, 10) && !keys.is_mapped(10, 1) && !values.is_mapped(0, 1));
    engine.step();
    model.try_allocate_many(&parts).expect("parked").keep();
    assert!(keys.is_mapped(0, 2 * PAGE + 10) && keys.is_mapped(5 * PAGE, 1));
    // Two pages are asked for, and one is left.
    let more = [(&keys, 20 * PAGE, 1), (&values, 20 * PAGE, 1)];
    assert_eq!(asked(model.try_allocate_many(&more).map(drop)), 2);
    assert!(!keys.is_mapped(20 * PAGE, 1) && !values.is_mapped(20 * PAGE, 1));
    assert_eq!(engine.stats().committed_bytes, 7 * PAGE);
    model.try_allocate_many(&[]).expect("nothing").keep();
    expect_sums(&engine);
}

#[test]
fn parts_may_share_pages_in_any_order() {
    let (_simulated, engine) = engine(manual());
    let model = account(&engine, "model", Quota::new());
    let pool = range(&model);
    for _ in 0..3 {
        // Five pieces in three pages, the third between two of the others.
        let parts = [
            (&pool, 2 * PAGE + 7, 9),
            (&pool, 0, 5),
            (&pool, 10, PAGE),
            (&pool, PAGE + 20, 3),
            (&pool, PAGE + 30, PAGE),
        ];
        let backed = model.try_allocate_many(&parts[1..]).expect("room");
        assert_eq!(pool.stats().live_pages, 3);
        drop(backed);
        let backed = model.try_allocate_many(&parts[..4]).expect("room");
        assert_eq!(pool.stats().live_bytes, 9 + 5 + PAGE + 3);
        drop(backed);
        assert_eq!(pool.stats().live_bytes, 0);
        engine.step();
        expect_sums(&engine);
    }
}

#[test]
fn what_a_caller_has_freed_itself_does_not_keep_the_other_parts() {
    let (_simulated, engine) = engine(manual());
    let model = account(&engine, "model", Quota::new());
    let pool = range(&model);
    let parts = [(&pool, 0, PAGE), (&pool, 2 * PAGE, PAGE)];
    let backed = model.try_allocate_many(&parts).expect("room");
    pool.deallocate(0, PAGE).expect("live");
    drop(backed);
    assert_eq!(pool.stats().live_bytes, 0);
}

#[test]
fn each_part_is_helped_over_what_is_in_its_way() {
    let (simulated, engine) = engine(manual());
    let model = account(&engine, "model", Quota::new());
    let (keys, values) = (range(&model), range(&model));
    let parts = [
        (&keys, 0, PAGE),
        (&keys, 2 * PAGE, PAGE),
        (&values, 0, PAGE),
    ];
    let free = || {
        for (pool, offset, bytes) in parts {
            pool.deallocate(offset, bytes).expect("live");
        }
        engine.step();
    };
    model.try_allocate_many(&parts).expect("room").keep();
    // The driver refused to take their pages back.
    let refused = Fault::always(DriverFunction::cuMemUnmap, CUDA_ERROR_OPERATING_SYSTEM);
    simulated.simulator.inject(refused);
    free();
    assert_eq!(engine.stats().parts.quarantined_bytes, 3 * PAGE);
    simulated.simulator.clear_faults();
    let served = model.try_allocate_many(&parts);
    served.expect("each is asked for again").keep();
    // The device may still use their pages, which a new stream is made to wait for.
    let [writes, reads] = [(); 2].map(|()| Stream::new(engine.device()).expect("a stream"));
    for pool in [&keys, &values] {
        pool.use_stream(&writes).expect("same device");
        pool.use_stream(&reads).expect("same device");
    }
    simulated.simulator.hold_work();
    // SAFETY: the byte is live, and its page stays mapped until the work has run.
    unsafe { writes.memset(keys.base_address(), 1, 1) }.expect("queued");
    free();
    assert_eq!(engine.stats().parts.retiring_bytes, 3 * PAGE);
    let served = model.try_allocate_many(&parts);
    simulated.simulator.release_work();
    served.expect("the streams follow for each").keep();
}

#[test]
fn bytes_in_pages_with_other_bytes_are_taken_all_or_none() {
    let (_simulated, engine) = engine(manual());
    let model = account(&engine, "model", Quota::new());
    let (keys, values) = (range(&model), range(&model));
    let pools = [&keys, &values];
    for pool in pools {
        pool.allocate(0, 10).expect("room");
    }
    let live = || pools.map(|pool| pool.stats().live_bytes);
    let ask = |parts: &[_]| model.try_allocate_many(parts).map(drop);
    // Either of the two may come first in memory.
    for (free, taken) in [(&keys, &values), (&values, &keys)] {
        let (offset, bytes) = (5, 6);
        let error = VmmError::AlreadyMapped { offset, bytes };
        assert_eq!(ask(&[(free, 10, 5), (taken, offset, bytes)]), Err(error));
        assert_eq!(live(), [10, 10]);
        let more = [(free, 10, 5), (taken, PAGE, 7 * PAGE)];
        assert_eq!(asked(ask(&more)), 7);
        assert_eq!(live(), [10, 10]);
    }
    let both = [(&keys, 10, 5), (&values, 20, 5)];
    let backed = model.try_allocate_many(&both).expect("no page is missing");
    assert_eq!(live(), [15, 15]);
    drop(backed);
    assert_eq!(live(), [10, 10]);
    // What a page was left with by others goes with it.
    values.deallocate(0, 10).expect("live");
    model.try_allocate_many(&both).expect("parked").keep();
    assert_eq!(live(), [15, 5]);
    model.close();
    assert_eq!(ask(&[(&keys, 15, 5)]), Err(VmmError::Closed));
    assert_eq!(live(), [15, 5]);
}

#[test]
fn above_a_lowered_limit_all_parts_are_judged_together() {
    let (_simulated, engine) = engine(manual());
    let [holder, asks] = ["holder", "asks"].map(|name| account(&engine, name, Quota::new()));
    let (held, one, two) = (range(&holder), range(&asks), range(&asks));
    held.allocate(0, 6 * PAGE).expect("room");
    engine.set_limit_bytes(4 * PAGE).expect("no guarantees");
    let parts = [(&one, 0, PAGE), (&one, PAGE, PAGE), (&two, 0, PAGE)];
    assert_eq!(asked(asks.try_allocate_many(&parts).map(drop)), 3);
}

#[test]
fn above_a_lowered_limit_a_page_that_parts_share_counts_once() {
    // Two pages are parked, and one may be used beside what others hold.
    for (second, is_served) in [(10, true), (PAGE, false)] {
        let (_simulated, engine) = engine(manual().park_bytes_max(8 * PAGE));
        let [holder, asks] = ["holder", "asks"].map(|name| account(&engine, name, Quota::new()));
        let (held, pool) = (range(&holder), range(&asks));
        held.allocate(0, 3 * PAGE).expect("room");
        pool.allocate(0, 2 * PAGE).expect("room");
        pool.deallocate(0, 2 * PAGE).expect("live");
        engine.step();
        assert_eq!(engine.stats().parts.parked_bytes, 2 * PAGE);
        engine.set_limit_bytes(4 * PAGE).expect("no guarantees");
        let parts = [(&pool, 0, 5), (&pool, second, 5)];
        let outcome = asks.try_allocate_many(&parts).map(drop);
        assert_eq!(outcome.is_ok(), is_served, "{outcome:?}");
        // Nothing had to be given up for it.
        if is_served {
            assert_eq!(pool.stats().committed_bytes, 2 * PAGE);
        }
    }
}

#[test]
fn bad_parts_are_refused_with_the_values() {
    let (_simulated, engine) = engine(manual());
    let (model, other) = (
        account(&engine, "model", Quota::new()),
        account(&engine, "other", Quota::new()),
    );
    let (own, foreign) = (range(&model), range(&other));
    own.allocate(PAGE, 4).expect("room");
    let ask = |parts: &[_]| model.try_allocate_many(parts).map(drop);
    let error = VmmError::ForeignAccount {
        expected: "model".into(),
        found: "other".into(),
    };
    assert_eq!(ask(&[(&own, 0, 1), (&foreign, 0, 1)]), Err(error));
    let error = VmmError::AlreadyMapped {
        offset: 4,
        bytes: 2,
    };
    assert_eq!(ask(&[(&own, 4, 2), (&own, 0, 5)]), Err(error));
    let error = VmmError::AlreadyMapped {
        offset: PAGE,
        bytes: 9,
    };
    assert_eq!(ask(&[(&own, 0, 1), (&own, PAGE, 9)]), Err(error));
    let error = VmmError::ZeroSize { what: "size" };
    assert_eq!(ask(&[(&own, 0, 0)]), Err(error));
    let outside = ask(&[(&own, 0, 1), (&own, 64 * PAGE, 1)]);
    assert!(matches!(outside, Err(VmmError::OutOfRange { .. })));
    let overflow = ask(&[(&own, usize::MAX, 2)]);
    assert!(matches!(overflow, Err(VmmError::Overflow { .. })));
    assert_eq!(own.stats().live_bytes, 4);
    assert_eq!(foreign.stats().live_bytes, 0);
}

#[test]
fn what_can_never_be_had_is_said_to_be_so() {
    let (_simulated, engine) = engine(manual());
    let model = account(&engine, "model", Quota::new().ceiling_bytes(3 * PAGE));
    let (one, other) = (range(&model), range(&model));
    let parts = [(&one, 0, 2 * PAGE), (&other, 0, 2 * PAGE)];
    let waited = model.allocate_many_timeout(&parts, Duration::from_secs(60));
    let error = waited.map(drop).expect_err("more than its ceiling");
    assert!(error.is_permanent(), "{error}");
    let VmmError::OutOfPhysicalMemory {
        asked_bytes,
        limit_bytes,
        ..
    } = error
    else {
        panic!("{error}");
    };
    assert_eq!((asked_bytes, limit_bytes), (4 * PAGE, 3 * PAGE));
    let table = blocks(&model, 64);
    let error = table.try_reserve(0..4).map(drop).expect_err("four pages");
    assert!(error.is_permanent(), "{error}");
    assert_eq!(table.stats().backed_blocks, 0);
}

#[test]
fn a_call_with_a_time_limit_is_served_when_all_of_it_is_there() {
    let (_simulated, engine) = engine(EngineOptions::new());
    let busy = account(&engine, "busy", Quota::new());
    let model = account(&engine, "model", Quota::new().priority(1));
    let (held, one, other) = (range(&busy), range(&model), range(&model));
    let table = blocks(&model, 8);
    held.allocate(0, LIMIT_PAGES * PAGE).expect("room");
    let ask = |timeout| {
        let parts = [(&one, 0, 2 * PAGE), (&other, 0, 2 * PAGE)];
        let backed = model.allocate_many_timeout(&parts, timeout);
        backed.map(cuda_vmm::Backed::keep)
    };
    assert_eq!(asked(ask(Duration::from_millis(5))), 4);
    assert_eq!(asked(table.back_timeout([0], Duration::from_millis(5))), 2);
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| ask(Duration::from_secs(60)));
        while busy.owed_bytes() < 4 * PAGE {
            std::thread::yield_now();
        }
        held.deallocate(0, 2 * PAGE).expect("live");
        std::thread::sleep(Duration::from_millis(20));
        assert!(!waits.is_finished(), "half of it is not enough");
        held.deallocate(2 * PAGE, 2 * PAGE).expect("live");
        waits.join().expect("no panic").expect("served");
        let waits = scope.spawn(|| table.back_timeout([0, 1], Duration::from_secs(60)));
        while busy.owed_bytes() < 2 * PAGE {
            std::thread::yield_now();
        }
        held.deallocate(4 * PAGE, 2 * PAGE).expect("live");
        waits.join().expect("no panic").expect("served");
    });
    assert!(table.is_backed(0) && table.is_backed(1));
    expect_sums(&engine);
}

#[test]
fn blocks_that_are_not_kept_are_given_up_again() {
    let (_simulated, engine) = engine(manual());
    let model = account(&engine, "model", Quota::new());
    let table = blocks(&model, 64);
    table.back([1]).expect("room");
    let backed = table.try_reserve([0, 1, 2, 2]).expect("room");
    assert_eq!(backed.newly_backed().collect::<Vec<_>>(), [0, 2]);
    drop(backed);
    let is_backed = |blocks: [usize; 4]| blocks.map(|block| table.is_backed(block));
    assert_eq!(is_backed([0, 1, 2, 3]), [false, true, false, false]);
    table.try_reserve([0, 2]).expect("room").keep();
    assert_eq!(is_backed([0, 1, 2, 3]), [true, true, true, false]);
    // What others use meanwhile stays.
    let backed = table.try_reserve([3, 4, 5]).expect("room");
    table.back([3]).expect("backed");
    let pin = table.pin([4]).expect("backed");
    drop(backed);
    let backed: Vec<_> = (3..6).map(|block| table.is_backed(block)).collect();
    assert_eq!(backed, [true, true, false]);
    drop(pin);
    // Three pages of each tensor are backed, and one is left.
    assert_eq!(asked(table.try_reserve(6..10).map(drop)), 4);
    assert_eq!(table.stats().backed_blocks, 5);
    expect_sums(&engine);
}

#[test]
fn of_two_models_that_want_what_one_can_have_one_is_served() {
    // 2 GiB each of 2.5, in blocks of a megabyte of two tensors that lie apart. Pages of 16 MiB are
    // fewer, and so more races.
    const BLOCKS: usize = 1024;
    const BLOCK: usize = 1 << 20;
    // Every other page is full, and the rest are bare.
    const PER_PAGE: usize = 8 * PAGE / BLOCK;
    let simulated = Simulated::new(SimConfig::new().unbacked());
    let options = EngineOptions::new().limit_bytes(5 << 29).park_bytes_max(0);
    let engine = Engine::new(&simulated.device, options).expect("an engine");
    let models = ["one", "other"].map(|name| account(&engine, name, Quota::new()));
    let tables = models.each_ref().map(|model| {
        let element = cuda_vmm::pool::blocks::ElementSize::new(BLOCK).expect("not zero");
        let tensor = |name| cuda_vmm::pool::blocks::TensorSpec::new(name, &[1], element);
        let tensors = ["k", "v"].map(|name| tensor(name).expect("small"));
        let spec = cuda_vmm::pool::blocks::LayerSpec::new(tensors).expect("two names");
        let backing = cuda_vmm::pool::blocks::BlockBacking::on_account;
        backing(model, spec, 2 * BLOCKS, 8 * PAGE).expect("addresses")
    });
    for race in 0..1000 {
        let start = Barrier::new(2);
        let served = std::thread::scope(|scope| {
            let race = |table: &cuda_vmm::pool::blocks::BlockBacking| {
                start.wait();
                let batch = (0..BLOCKS).map(|block| 2 * block - block % PER_PAGE);
                let served = table.try_back(batch.clone());
                match &served {
                    Ok(()) => assert_eq!(table.stats().backed_blocks, BLOCKS),
                    Err(error) => {
                        assert!(error.is_retryable(), "{error}");
                        assert_eq!(table.stats().backed_blocks, 0);
                    }
                }
                start.wait();
                if served.is_ok() {
                    table.unback(batch).expect("backed");
                }
                served.is_ok()
            };
            let threads = tables
                .each_ref()
                .map(|table| scope.spawn(move || race(table)));
            threads.map(|thread| thread.join().expect("no panic"))
        });
        assert!(served[0] != served[1], "race {race}: {served:?}");
        while engine.stats().committed_bytes > 0 {
            engine.step();
        }
    }
}

#[test]
fn parts_whose_pages_are_there_take_no_call_and_one_that_is_missing_disturbs_none() {
    let (simulated, engine) = engine(manual().park_bytes_max(LIMIT_PAGES * PAGE));
    let model = account(&engine, "model", Quota::new());
    let pools = [range(&model), range(&model), range(&model)];
    let parts = [0, 1, 2].map(|at| (&pools[at], at * PAGE, 2 * PAGE));
    let park = |backed| {
        drop(backed);
        engine.step();
        engine.stats().parts.parked_bytes / PAGE
    };
    for missing in 0..3 {
        engine.trim().expect("given back");
        let most = (0..3).filter(|at| *at != missing);
        let most: Vec<_> = most.map(|at| parts[at]).collect();
        assert_eq!(park(model.try_allocate_many(&most).expect("room")), 4);
        simulated.simulator.start_trace();
        let backed = model.try_allocate_many(&parts).expect("room");
        let trace = simulated.simulator.take_trace();
        let made = trace
            .iter()
            .filter(|call| **call == DriverFunction::cuMemCreate);
        assert_eq!(made.count(), 2);
        let records = [
            DriverFunction::cuEventRecord,
            DriverFunction::cuCtxRecordEvent,
        ];
        assert!(
            !trace.iter().any(|call| records.contains(call)),
            "{trace:?}"
        );
        assert_eq!(park(backed), 6);
        simulated.simulator.start_trace();
        let backed = model.try_allocate_many(&parts).expect("there");
        assert_eq!(simulated.simulator.take_trace(), []);
        assert_eq!(engine.stats().parts.parked_bytes, 0);
        assert_eq!(park(backed), 6);
        expect_sums(&engine);
    }
    // A part of which some is live is refused, and the others are as they were.
    pools[1].allocate(2 * PAGE, 1).expect("there");
    let refused = model.try_allocate_many(&parts).map(drop);
    let (offset, bytes) = (PAGE, 2 * PAGE);
    assert_eq!(refused, Err(VmmError::AlreadyMapped { offset, bytes }));
    assert_eq!(engine.stats().parts.parked_bytes, 5 * PAGE);
}

#[test]
fn parts_that_are_there_are_taken_beside_an_allocation_elsewhere() {
    const PAGES: usize = 4096;
    for _ in 0..10 {
        let simulated = Simulated::new(SimConfig::new().granularity_bytes(PAGE).unbacked());
        let options = manual().park_bytes_max(1 << 30).chunk_bytes_max(PAGE);
        let engine = Engine::new(&simulated.device, options).expect("an engine");
        let model = account(&engine, "model", Quota::new());
        let open = |_| {
            let options = PoolOptions::new();
            VirtualMemoryPool::on_account(&model, PAGES * PAGE, PAGE, options).expect("a pool")
        };
        let pools = [0, 1].map(open);
        for pool in &pools {
            pool.allocate(0, PAGE).expect("room");
            pool.deallocate(0, PAGE).expect("live");
        }
        simulated.device.synchronize().expect("done");
        engine.step();
        // Without a named stream, pages that retire now come back only when this is past.
        let stream = Stream::new(&simulated.device).expect("a stream");
        let gate = Gate::close(&simulated.device, stream.raw());
        gate.wait_until_reached();
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            for pool in &pools {
                let is_over = &is_over;
                scope.spawn(move || {
                    let mut pages = (1..PAGES).take_while(|_| !is_over.load(Ordering::SeqCst));
                    pages.try_for_each(|page| pool.try_allocate(page * PAGE, PAGE).map(drop))
                });
            }
            while pools[1].stats().live_pages < 5 {
                thread::yield_now();
            }
            let parts = [(&pools[0], 0, PAGE), (&pools[1], 0, PAGE)];
            let backed = model.try_allocate_many(&parts);
            is_over.store(true, Ordering::SeqCst);
            backed.expect("both are parked").keep();
        });
        gate.open();
        simulated.device.synchronize().expect("done");
    }
}
