//! Ranges of one account share memory, and let it go at the same time.

use crate::books::{Books, PAGE, books};
use crate::explore::explore;
use crate::world::{World, assert_adds_up, insist, settle, write};
use cuda_vmm::sys::{CUDA_ERROR_OPERATING_SYSTEM, DriverFunction};
use cuda_vmm::{
    Account, Engine, EngineOptions, PoolOptions, Quota, Shared, VirtualMemoryPool, VmmError,
    WorkerMode,
};
use shuttle::rand::{Rng, thread_rng};
use shuttle::thread;
use std::sync::Arc;

/// Pages that are shared, in chunks of two.
const PAGES: usize = 16;

/// An account with ranges, the first of which has all its pages live.
fn ranges<const RANGES: usize>(
    world: &World,
    limit_pages: usize,
    mode: WorkerMode,
) -> (Account, [Arc<VirtualMemoryPool>; RANGES]) {
    let options = EngineOptions::new().chunk_bytes_max(2 * PAGE).worker(mode);
    let engine = world.engine_with(limit_pages, options);
    let account = engine.account("model", Quota::new()).expect("a new name");
    let ranges = [(); RANGES].map(|()| {
        let (bytes, options) = (PAGES * PAGE, PoolOptions::new());
        let range = VirtualMemoryPool::on_account(&account, bytes, PAGE, options);
        Arc::new(range.expect("addresses"))
    });
    ranges[0].allocate(0, PAGES * PAGE).expect("room");
    (account, ranges)
}

fn share(account: &Account, from: &VirtualMemoryPool, to: &VirtualMemoryPool, pages: usize) {
    let shared = account.share_many(&[(from, to, 0, pages * PAGE)]);
    shared.map(Shared::keep).expect("no call fails");
}

/// What one range alone has is shared no more. The device finishes what it does meanwhile.
fn expect_nothing_shared(engine: &Engine) {
    let mut patience = 1_000;
    while engine.stats().parts.shared_bytes > 0 {
        assert!(patience > 0, "{}", engine.stats());
        patience -= 1;
        engine.step();
        thread::yield_now();
    }
}

/// Two owners free what they share at once, while a third range needs it.
fn both_let_go(mode: WorkerMode) {
    let world = World::new(true);
    let (account, [first, second, third]) = ranges(&world, PAGES + 1, mode);
    share(&account, &first, &second, PAGES);
    let stream = world.stream();
    first.use_stream(&stream).expect("same device");
    second.use_stream(&stream).expect("same device");
    // Reads of both, as far as the books tell.
    write(&stream, first.base_address(), PAGES * PAGE);
    write(&stream, second.base_address(), PAGES * PAGE);
    let engine = account.engine().clone();
    let frees = |range: Arc<VirtualMemoryPool>| {
        let engine = engine.clone();
        thread::spawn(move || {
            range.deallocate(0, 3 * PAGE).expect("live");
            assert_adds_up(&engine);
            range
                .deallocate(3 * PAGE, (PAGES - 3) * PAGE)
                .expect("live");
        })
    };
    let freeing = [frees(first.clone()), frees(second.clone())];
    insist(&third, 0, PAGE);
    let address = insist(&third, PAGE, 2 * PAGE);
    write(&stream, address, 2 * PAGE);
    for thread in freeing {
        thread.join().expect("no thread fails");
    }
    // What was shared is not taken back, but its addresses are free again.
    insist(&second, PAGE, PAGE);
    stream.synchronize().expect("no call fails");
    third.deallocate(0, 3 * PAGE).expect("live");
    second.deallocate(PAGE, PAGE).expect("live");
    settle(&engine, mode);
    drop((first, second, third, account, engine, stream));
    world.end();
}

/// One owner is given memory of its own while another frees, and a third is made to share.
fn private_meanwhile(mode: WorkerMode, fails: Option<DriverFunction>) {
    let world = World::new(true);
    let (account, [first, second, third]) = ranges(&world, PAGES + 4, mode);
    share(&account, &first, &second, 4);
    let engine = account.engine().clone();
    let freeing = {
        let (first, engine) = (first.clone(), engine.clone());
        thread::spawn(move || {
            first.deallocate(0, PAGE).expect("live");
            assert_adds_up(&engine);
            first.deallocate(PAGE, (PAGES - 1) * PAGE).expect("live");
            assert_adds_up(&engine);
        })
    };
    let sharing = {
        let (account, second, third) = (account.clone(), second.clone(), third.clone());
        thread::spawn(move || {
            // The chunk may move meanwhile, and is then not shared.
            let shared = account.share_many(&[(&second, &third, 0, 4 * PAGE)]);
            assert!(shared.is_ok() || fails.is_some(), "{shared:?}");
            assert_adds_up(account.engine());
            drop(shared);
        })
    };
    if let Some(call) = fails {
        // Of the new memory, or of the old in its place again, or of another range's.
        let after = thread_rng().gen_range(0..3);
        books(|books| books.fail(call, after, CUDA_ERROR_OPERATING_SYSTEM));
    }
    // SAFETY: nothing is launched.
    let moved = unsafe { second.make_private_by_ref(0, 3 * PAGE) };
    match moved {
        Ok(bytes) => assert!(bytes <= 4 * PAGE, "{bytes}"),
        Err(error) => assert!(error.is_retryable() || fails.is_some(), "{error}"),
    }
    assert_adds_up(&engine);
    for thread in [freeing, sharing] {
        thread.join().expect("no thread fails");
    }
    books(Books::fail_no_more);
    expect_nothing_shared(&engine);
    second.deallocate(0, 4 * PAGE).expect("live");
    settle(&engine, mode);
    drop((first, second, third, account, engine));
    world.end();
}

/// The range that has the memory is closed while another is made to share it.
fn source_goes(mode: WorkerMode) {
    let world = World::new(true);
    let (account, [first, second]) = ranges(&world, PAGES, mode);
    let engine = account.engine().clone();
    let sharing = {
        let (account, first, second) = (account.clone(), first.clone(), second.clone());
        thread::spawn(move || {
            let shared = account.share_many(&[(&first, &second, 0, PAGES * PAGE)]);
            match shared {
                Ok(shared) => shared.keep(),
                Err(error) => assert!(matches!(error, VmmError::NotMapped { .. }), "{error}"),
            }
        })
    };
    for page in [0, 3, 4, 5] {
        first.deallocate(page * PAGE, PAGE).expect("live");
    }
    drop(first);
    assert_adds_up(&engine);
    sharing.join().expect("no thread fails");
    expect_nothing_shared(&engine);
    let live_bytes = second.stats().live_bytes;
    assert!(live_bytes.is_multiple_of(2 * PAGE));
    drop(second);
    settle(&engine, mode);
    drop((account, engine));
    world.end();
}

#[test]
fn two_owners_let_go_at_once() {
    explore(|| both_let_go(WorkerMode::Thread));
    explore(|| both_let_go(WorkerMode::Manual));
}

#[test]
fn an_owner_is_made_private_while_others_free_and_share() {
    explore(|| private_meanwhile(WorkerMode::Thread, None));
    explore(|| private_meanwhile(WorkerMode::Manual, None));
}

#[test]
fn a_move_fails_while_others_free_and_share() {
    let calls = [
        DriverFunction::cuMemMap,
        DriverFunction::cuMemSetAccess,
        DriverFunction::cuMemUnmap,
    ];
    for call in calls {
        explore(move || private_meanwhile(WorkerMode::Manual, Some(call)));
    }
}

#[test]
fn the_source_goes_while_it_is_shared() {
    explore(|| source_goes(WorkerMode::Thread));
    explore(|| source_goes(WorkerMode::Manual));
}
