//! Threads that share a backing: nothing is handed out twice, nothing is lost, no thread reads
//! another's bytes.

use crate::common::{Gate, manual, turn};
use crate::fixture::{Fixture, PAGE, Shapes};
use cuda_vmm::pool::blocks::{BlockAllocator, BlockError};
use cuda_vmm::{Stream, VmmError};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const THREADS: u64 = 4;

/// Writes a mark to a block in every tensor, or finds it there.
fn mark(fixture: &Fixture, stream: &Stream, block: usize, mark: u8, write: bool) {
    for tensor in fixture.backing.tensors() {
        let bytes = tensor.block_bytes();
        let address = tensor.base_address() + (block * bytes) as u64;
        // SAFETY: the block is this thread's, and backed.
        unsafe {
            if write {
                stream.memset(address, mark, bytes).expect("queued");
            } else {
                let mut seen = vec![0; bytes];
                stream.read(address, &mut seen).expect("mapped");
                assert_eq!(seen, vec![mark; bytes], "block {block}");
            }
        }
    }
}

#[test]
fn threads_allocate_free_and_reclaim_at_once() {
    let _turn = turn();
    let fixture = Fixture::new(Shapes::Mla, 96, manual());
    let allocator = BlockAllocator::new(fixture.backing.clone());
    let committed = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (fixture, allocator) = (&fixture, &allocator);
                scope.spawn(move || {
                    let stream = Stream::new(&fixture.simulated.device).expect("a stream");
                    let mut random = SmallRng::seed_from_u64(thread);
                    let mut held: Vec<(usize, u8)> = Vec::new();
                    let mut committed = 0;
                    for round in 0..200u8 {
                        match random.random_range(0..4) {
                            0 | 1 if held.len() < 16 => {
                                // Its own mark, of this round.
                                let own = round ^ ((thread as u8) << 6);
                                let count = random.random_range(1..5);
                                for block in allocator.allocate(count).expect("enough for all") {
                                    mark(fixture, &stream, block, own, true);
                                    held.push((block, own));
                                }
                            }
                            2 => {
                                let plan = allocator.reclaim_candidates(2 * PAGE, |_| None);
                                match allocator.commit(&plan, &stream) {
                                    Ok(()) => committed += plan.evicted().len(),
                                    Err(VmmError::Block(
                                        BlockError::StalePlan { .. } | BlockError::Pinned { .. },
                                    )) => {}
                                    Err(error) => panic!("{error}"),
                                }
                            }
                            _ => {
                                stream.synchronize().expect("done");
                                for (block, own) in held.split_off(held.len() / 2) {
                                    mark(fixture, &stream, block, own, false);
                                    allocator.free([block]).expect("handed out");
                                }
                            }
                        }
                        for (block, own) in &held {
                            mark(fixture, &stream, *block, *own, false);
                        }
                    }
                    allocator
                        .free(held.into_iter().map(|(block, _)| block))
                        .expect("handed out");
                    committed
                })
            })
            .collect();
        let threads = threads.into_iter();
        threads
            .map(|thread| thread.join().expect("no panic"))
            .sum::<usize>()
    });
    assert!(committed > 0, "no plan was ever carried out");
    assert_eq!(allocator.allocated(), 0);
    assert_eq!(fixture.backing.stats().pinned_blocks, 0);
    let plan = allocator.reclaim_candidates(usize::MAX, |_| None);
    allocator.commit(&plan, &fixture.stream).expect("true");
    fixture.settle();
    fixture.check();
    assert_eq!(fixture.backing.stats().committed_bytes, 0);
    drop(allocator);
    fixture.end();
}

#[test]
fn threads_that_back_the_same_blocks_find_them_backed() {
    let _turn = turn();
    let mut fixture = Fixture::new(Shapes::Rows, 40, manual());
    std::thread::scope(|scope| {
        for thread in 0..THREADS as usize {
            let backing = &fixture.backing;
            scope.spawn(move || {
                for round in 0..40 {
                    let first = (thread + round) % 20;
                    let blocks = first..first + 20;
                    let pin = loop {
                        backing.back(blocks.clone()).expect("room");
                        // Another may have given them up before they were pinned.
                        match backing.pin(blocks.clone()) {
                            Ok(pin) => break pin,
                            Err(VmmError::Block(BlockError::NotBacked { .. })) => {}
                            Err(error) => panic!("{error}"),
                        }
                    };
                    assert!(blocks.clone().all(|block| backing.is_backed(block)));
                    drop(pin);
                    match backing.unback(blocks) {
                        Ok(())
                        | Err(VmmError::Block(
                            BlockError::NotBacked { .. } | BlockError::Pinned { .. },
                        )) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
    });
    assert_eq!(fixture.backing.stats().pinned_blocks, 0);
    let left: Vec<_> = (0..40)
        .filter(|block| fixture.backing.is_backed(*block))
        .collect();
    fixture.back(left);
    fixture.back(0..40);
    fixture.settle();
    fixture.check();
    fixture.end();
}

#[test]
fn a_block_that_another_thread_is_backing_is_waited_for() {
    let _turn = turn();
    let mut fixture = Fixture::new(Shapes::Vectors, 32, manual().limit_bytes(4 * PAGE));
    fixture.back(0..32);
    let gate = Gate::close(&fixture.simulated.device, fixture.stream.raw());
    gate.wait_until_reached();
    fixture.unback(0..16);
    std::thread::scope(|scope| {
        // In here, so that a failure opens it before the scope waits for its threads.
        let gate = gate;
        let backing = &fixture.backing;
        // It waits for memory that retires, and holds the block that is backed meanwhile.
        let backs = scope.spawn(|| backing.back([0, 16]));
        while backing.stats().pinned_blocks == 0 {
            std::thread::yield_now();
        }
        let tries = scope.spawn(|| backing.try_back([0]));
        // Time for it to go wrong in.
        std::thread::sleep(std::time::Duration::from_millis(30));
        assert!(!tries.is_finished(), "the other may have it soon");
        gate.open();
        for outcome in [backs, tries] {
            assert_eq!(outcome.join().expect("no panic"), Ok(()));
        }
    });
    fixture.fill(0);
    fixture.check();
    fixture.end();
}
