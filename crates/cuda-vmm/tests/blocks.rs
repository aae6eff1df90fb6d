//! Memory behind block tables, on the simulated driver: what is backed, what is in it, and what
//! goes back.

#[path = "blocks/ahead.rs"]
mod ahead;
#[path = "blocks/allocator.rs"]
mod allocator;
#[path = "blocks/bad_input.rs"]
mod bad_input;
mod common;
#[path = "blocks/copies.rs"]
mod copies;
#[path = "blocks/faults.rs"]
mod faults;
#[path = "blocks/fixture.rs"]
mod fixture;
#[path = "blocks/free_lists.rs"]
mod free_lists;
#[path = "blocks/leases.rs"]
mod leases;
#[path = "blocks/prefix_cache.rs"]
mod prefix_cache;
#[path = "blocks/random_operations.rs"]
mod random_operations;
#[path = "blocks/sleep.rs"]
mod sleep;
#[path = "blocks/threads.rs"]
mod threads;
#[path = "blocks/zero.rs"]
mod zero;

use common::{Gate, manual, turn};
use cuda_vmm::sys::DriverFunction;
use cuda_vmm::{LeaseToken, Stream};
use fixture::{Fixture, PAGE, Shapes};

#[test]
fn tensors_have_their_shapes_and_addresses_that_stay() {
    let _turn = turn();
    let mut fixture = Fixture::new(Shapes::Mla, 10, manual());
    let tensors = fixture.backing.tensors();
    let shapes: Vec<_> = tensors.iter().map(|tensor| tensor.shape()).collect();
    assert_eq!(shapes, [vec![10, 3, 512], vec![10, 3, 64]]);
    let names: Vec<_> = tensors.iter().map(|tensor| tensor.name()).collect();
    assert_eq!(names, ["latent", "rope"]);
    let bytes = tensors.iter().map(|tensor| tensor.block_bytes());
    assert!(bytes.eq([3072, 384]), "neither divides a page");
    let addresses = |fixture: &Fixture| -> Vec<u64> {
        let tensors = fixture.backing.tensors().iter();
        tensors.map(|tensor| tensor.base_address()).collect()
    };
    let before = addresses(&fixture);
    fixture.back(0..10);
    fixture.unback(0..10);
    fixture.back(3..5);
    assert_eq!(addresses(&fixture), before);
    fixture.check();
    fixture.end();
}

#[test]
fn memory_is_where_blocks_are_backed() {
    let _turn = turn();
    let mut fixture = Fixture::new(Shapes::Mla, 64, manual());
    assert_eq!(fixture.backing.stats().committed_bytes, 0);
    fixture.back([5, 4, 5]);
    // Bytes 12288..18432 of the first tensor and 1536..2304 of the second.
    let pages = fixture.backing.pages_of(5).expect("there is one");
    assert_eq!(pages, [3..5, 0..1]);
    assert_eq!(fixture.backing.pages_of(4), Ok(vec![3..4, 0..1]));
    let stats = fixture.backing.stats();
    assert_eq!((stats.backed_blocks, stats.block_bytes), (2, 3456));
    assert_eq!(
        (stats.page_bytes, stats.committed_bytes),
        (3 * PAGE, 3 * PAGE)
    );
    assert_eq!(fixture.backing.backed_prefix(), 0);
    fixture.back(0..4);
    assert_eq!(fixture.backing.backed_prefix(), 6);
    fixture.check();
    // A neighbour keeps the page.
    fixture.unback([4]);
    fixture.check();
    assert_eq!(fixture.backing.pages_of(4), Ok(vec![3..4, 0..1]));
    assert!(!fixture.backing.is_backed(4) && fixture.backing.is_backed(5));
    fixture.end();
}

#[test]
fn whatever_the_largest_chunk_of_the_engine_is_a_page_goes_back_alone() {
    let _turn = turn();
    let options = manual().chunk_bytes_max(64 * PAGE);
    let mut fixture = Fixture::new(Shapes::Vectors, 512, options);
    fixture.back(0..512);
    let pages = fixture.backing.stats().page_bytes / PAGE;
    fixture.unback((0..512).filter(|block| block % 64 >= 32));
    fixture.settle();
    let stats = fixture.backing.stats();
    assert_eq!(stats.page_bytes, pages / 2 * PAGE);
    assert_eq!(stats.committed_bytes, stats.page_bytes, "no slack");
    fixture.check();
    fixture.end();
}

#[test]
fn a_plan_that_moves_copies_in_every_tensor_and_empties_pages() {
    let _turn = turn();
    for shapes in Shapes::ALL {
        let mut fixture = Fixture::new(shapes, 256, manual());
        fixture.back(0..256);
        // Every fourth block is in use.
        let in_use = |block: usize| block.is_multiple_of(4);
        let cost = |block| if in_use(block) { None } else { Some(0.0) };
        let plan = (fixture.backing).reclaim_candidates_with_moves(usize::MAX, 1.0, cost);
        assert!(!plan.moves().is_empty() && !plan.is_enough(), "{shapes:?}");
        let before = fixture.backing.stats();
        fixture.commit(&plan);
        fixture.settle();
        let after = fixture.backing.stats();
        assert_eq!(
            before.committed_bytes - after.committed_bytes,
            plan.freed_bytes()
        );
        // A quarter of the blocks, and at most a page more at either end of it for each tensor.
        let tensors = fixture.backing.tensors().len();
        let least = 64 * after.block_bytes;
        assert!(
            after.committed_bytes <= least + 2 * tensors * PAGE,
            "{shapes:?}: {after}"
        );
        fixture.check();
        fixture.end();
    }
}

#[test]
fn a_plan_keeps_what_is_pinned_and_evicts_no_more_than_it_must() {
    let _turn = turn();
    let mut fixture = Fixture::new(Shapes::Vectors, 64, manual());
    fixture.back(0..64);
    let pin = fixture.backing.pin([3, 40]).expect("backed");
    assert!(pin.blocks().eq([3, 40]));
    let plan = fixture.backing.reclaim_candidates(4 * PAGE, |_| Some(1.0));
    assert!(plan.is_enough());
    // Sixteen blocks a page, in each of two tensors.
    assert_eq!((plan.freed_bytes(), plan.evicted().len()), (4 * PAGE, 32));
    assert!(plan.evicted().iter().all(|block| ![3, 40].contains(block)));
    assert_eq!(plan.cost(), 32.0);
    let all = fixture
        .backing
        .reclaim_candidates(usize::MAX, |_| Some(1.0));
    assert_eq!(
        (all.freed_bytes(), all.asked_bytes()),
        (4 * PAGE, usize::MAX)
    );
    let none = fixture.backing.reclaim_candidates(0, |_| Some(1.0));
    assert!(none.is_empty() && none.is_enough());
    let dear = fixture
        .backing
        .reclaim_candidates(1, |_| Some(f64::INFINITY));
    assert!(dear.is_empty() && !dear.is_enough());
    drop(pin);
    assert_eq!(fixture.backing.stats().pinned_blocks, 0);
    let all = fixture
        .backing
        .reclaim_candidates(usize::MAX, |_| Some(f64::NEG_INFINITY));
    assert!(all.is_empty(), "no finite number");
    let all = fixture
        .backing
        .reclaim_candidates(usize::MAX, |_| Some(-1.0));
    assert_eq!((all.freed_bytes(), all.cost()), (8 * PAGE, 0.0));
    fixture.commit(&all);
    fixture.settle();
    assert_eq!(fixture.backing.stats().committed_bytes, 0);
    fixture.end();
}

#[test]
fn a_pin_keeps_the_memory_of_a_backing_that_is_gone() {
    let _turn = turn();
    let mut fixture = Fixture::new(Shapes::Vectors, 16, manual());
    fixture.back(0..16);
    let pin = fixture.backing.pin(2..4).expect("backed");
    let address = fixture.backing.tensors()[0].base_address() + 2 * 256;
    let expected = fixture.contents[&(0, 2)].clone();
    let Fixture {
        backing,
        engine,
        stream,
        simulated,
        ..
    } = fixture;
    drop((backing, engine));
    let mut bytes = vec![0; expected.len()];
    // SAFETY: the block is pinned.
    unsafe { stream.read(address, &mut bytes) }.expect("mapped");
    assert_eq!(bytes, expected);
    drop(pin);
    assert_eq!(simulated.books().physical_bytes, 0);
    assert_eq!(simulated.books().reservations, 0);
}

#[test]
fn what_moves_away_stays_mapped_until_the_copies_have_run() {
    let _turn = turn();
    for named in [false, true] {
        let mut fixture = Fixture::new(Shapes::Vectors, 32, manual());
        let other = Stream::new(&fixture.simulated.device).expect("a stream");
        if named {
            // Not the one that will copy.
            fixture.backing.use_stream(&other).expect("of this device");
        }
        fixture.back(0..32);
        let gate = Gate::close(&fixture.simulated.device, fixture.stream.raw());
        gate.wait_until_reached();
        // One block in the second page is in use, and none in the first but the first.
        let cost = |block| (![0, 20].contains(&block)).then_some(0.0);
        let plan = fixture.backing.reclaim_candidates_with_moves(1, 1.0, cost);
        assert_eq!(plan.moves().len(), 1);
        fixture.commit(&plan);
        fixture.engine.step();
        let committed_bytes = fixture.backing.stats().committed_bytes;
        assert_eq!(committed_bytes, 4 * PAGE, "copies are queued");
        assert!(gate.is_closed());
        gate.open();
        fixture.settle();
        assert_eq!(fixture.backing.stats().committed_bytes, 2 * PAGE);
        fixture.check();
        drop((gate, other));
        fixture.end();
    }
}

#[test]
fn backing_what_was_given_up_waits_and_trying_does_not() {
    let _turn = turn();
    let mut fixture = Fixture::new(Shapes::Vectors, 32, manual().limit_bytes(4 * PAGE));
    // No stream is named, so that none can wait in its place.
    fixture.back(0..32);
    let gate = Gate::close(&fixture.simulated.device, fixture.stream.raw());
    gate.wait_until_reached();
    fixture.unback(0..16);
    let error = fixture
        .backing
        .try_back([0])
        .expect_err("the device is not past it");
    assert!(error.is_retryable(), "{error}");
    assert!(!fixture.backing.is_backed(0));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| fixture.backing.back([0]));
        gate.open();
        assert_eq!(waiting.join().expect("no panic"), Ok(()));
    });
    fixture.fill(0);
    fixture.check();
    fixture.end();
}

#[test]
fn blocks_that_are_given_up_retire_behind_one_event_for_all_tensors() {
    let _turn = turn();
    let mut fixture = Fixture::new(Shapes::Rows, 64, manual());
    let simulator = fixture.simulated.simulator.clone();
    let records = |fixture: &mut Fixture, blocks: core::ops::Range<usize>| {
        fixture.back(blocks.clone());
        simulator.start_trace();
        fixture.unback(blocks);
        let trace = simulator.take_trace().into_iter();
        let records = [
            DriverFunction::cuEventRecord,
            DriverFunction::cuCtxRecordEvent,
        ];
        let records: Vec<_> = trace.filter(|call| records.contains(call)).collect();
        fixture.settle();
        assert_eq!(fixture.backing.stats().committed_bytes, 0);
        records
    };
    assert_eq!(
        records(&mut fixture, 0..64),
        [DriverFunction::cuCtxRecordEvent]
    );
    let stream = fixture.stream.clone();
    fixture.backing.use_stream(&stream).expect("of this device");
    assert_eq!(
        records(&mut fixture, 3..40),
        [DriverFunction::cuEventRecord]
    );
    // Memory that was leased waits for more than that of the other tensors.
    fixture.back([0]);
    fixture.backing.lease(2, 0..1, Released).expect("backed");
    fixture.unback([0]);
    fixture.settle();
    let leased = [
        DriverFunction::cuEventRecord,
        DriverFunction::cuCtxRecordEvent,
        DriverFunction::cuEventRecord,
    ];
    assert_eq!(records(&mut fixture, 0..64), leased);
    drop(stream);
    fixture.end();
}

#[derive(Debug)]
struct Released;

impl LeaseToken for Released {
    fn is_released(&mut self) -> bool {
        true
    }
}
