//! Blocks that sleep: the same blocks are backed afterwards, with the same bytes, and nothing
//! touches them meanwhile.

use crate::common::{manual, turn};
use crate::fixture::{Fixture, Shapes};
use cuda_vmm::pool::blocks::BlockAllocator;
use cuda_vmm::sim::Fault;
use cuda_vmm::sys::CUDA_ERROR_OPERATING_SYSTEM;
use cuda_vmm::{HostStore, HostStoreOptions, Keep, Result, VmmError, WakeOptions};

const UNIT: usize = 2 << 20;

fn store(fixture: &Fixture) -> HostStore {
    let options = HostStoreOptions::new().piece_bytes(UNIT).threads(1);
    let store = HostStore::with_options(&fixture.simulated.device, 32 * UNIT, options);
    store.expect("whole pieces")
}

fn fixture(shapes: Shapes) -> Fixture {
    let mut fixture = Fixture::new(shapes, 24, manual());
    fixture
        .backing
        .use_stream(&fixture.stream)
        .expect("of this device");
    fixture.back(2..12);
    fixture.unback(4..6);
    fixture.settle();
    fixture
}

#[track_caller]
fn expect_asleep<T: core::fmt::Debug>(outcome: Result<T>) {
    let error = outcome.expect_err("asleep");
    let VmmError::Asleep {
        asleep_bytes,
        is_changing: false,
    } = error
    else {
        panic!("{error:?}");
    };
    assert!(asleep_bytes > 0);
}

#[test]
fn the_same_blocks_have_the_same_bytes_after_a_sleep() {
    let _turn = turn();
    for shapes in Shapes::ALL {
        let mut fixture = fixture(shapes);
        let store = store(&fixture);
        for keep in [
            Keep::Host(&store),
            Keep::Constant(&store),
            Keep::Constant(&store),
        ] {
            let before = fixture.backing.stats();
            fixture.backing.sleep(keep).expect("nothing uses them");
            assert!(fixture.backing.is_asleep());
            assert_eq!(fixture.engine.stats().committed_bytes, 0, "{shapes:?}");
            fixture.backing.wake(&WakeOptions::new()).expect("room");
            assert!(!fixture.backing.is_asleep());
            assert_eq!(fixture.backing.stats(), before);
            fixture.check();
        }
        // They are used as before.
        fixture.back([0, 5, 20]);
        fixture.unback([3]);
        fixture.check();
        drop(store);
        fixture.end();
    }
}

#[test]
fn nothing_touches_blocks_that_sleep() {
    let _turn = turn();
    let fixture = fixture(Shapes::Rows);
    let (store, backing) = (store(&fixture), &fixture.backing);
    let plan = backing.reclaim_candidates(1, |_| Some(1.));
    let allocator = BlockAllocator::new(backing.clone());
    backing
        .sleep(Keep::Host(&store))
        .expect("nothing uses them");
    fixture.simulated.unchanged(|| {
        expect_asleep(backing.sleep(Keep::Nothing));
        expect_asleep(backing.back([2]));
        expect_asleep(backing.back([4]));
        expect_asleep(backing.try_reserve([2]));
        expect_asleep(backing.unback([2]));
        expect_asleep(backing.pin([2]));
        expect_asleep(backing.hold());
        expect_asleep(backing.commit(&plan, &fixture.stream));
        expect_asleep(allocator.allocate(1));
    });
    assert_eq!(allocator.allocated(), 0);
    backing.wake(&WakeOptions::new()).expect("room");
    let awake = backing.wake(&WakeOptions::new());
    assert!(matches!(awake, Err(VmmError::Awake { .. })), "{awake:?}");
    fixture.check();
    drop((allocator, store));
    fixture.end();
}

#[test]
fn what_uses_blocks_keeps_them_awake() {
    let _turn = turn();
    let fixture = fixture(Shapes::Rows);
    let (store, backing) = (store(&fixture), &fixture.backing);
    let refused = |by: &str| {
        let refused = backing.sleep(Keep::Host(&store)).expect_err(by);
        assert!(
            matches!(refused, VmmError::KeptAwake { by: found, .. } if found == by),
            "{refused:?}"
        );
        assert!(!backing.is_asleep());
    };
    let hold = backing.hold().expect("awake");
    refused("a launch");
    drop(hold);
    let pin = backing.pin([2]).expect("backed");
    refused("a pin");
    drop(pin);
    let held = fixture.simulated.hold_work();
    let tensor = &backing.tensors()[0];
    let block = tensor.base_address() + (2 * tensor.block_bytes()) as u64;
    // SAFETY: the block is backed until the stream was synchronised.
    unsafe { fixture.stream.memset(block, 0, 1) }.expect("queued");
    refused("queued work");
    drop(held);
    fixture.stream.synchronize().expect("done");
    backing.sleep(Keep::Nothing).expect("nothing uses them");
    backing.wake(&WakeOptions::new()).expect("room");
    drop(store);
}

#[test]
fn whatever_fails_blocks_are_asleep_or_awake_as_they_were() {
    let _turn = turn();
    for wakes in [false, true] {
        for nth in 1.. {
            let fixture = fixture(Shapes::Mla);
            let (store, backing) = (store(&fixture), &fixture.backing);
            if wakes {
                backing.sleep(Keep::Host(&store)).expect("nothing fails");
            }
            let simulator = &fixture.simulated.simulator;
            simulator.inject(Fault::nth_call(nth, CUDA_ERROR_OPERATING_SYSTEM));
            let outcome = match wakes {
                true => backing.wake(&WakeOptions::new()),
                false => backing.sleep(Keep::Host(&store)).map(drop),
            };
            simulator.clear_faults();
            assert_eq!(backing.is_asleep(), wakes == outcome.is_err(), "call {nth}");
            fixture.settle();
            fixture.simulated.device.retry_quarantine();
            fixture.settle();
            if backing.is_asleep() {
                backing.wake(&WakeOptions::new()).expect("nothing fails");
            }
            fixture.check();
            drop(store);
            if outcome.is_ok() {
                assert!(nth > 10, "only {nth} calls could fail");
                break;
            }
        }
    }
}
