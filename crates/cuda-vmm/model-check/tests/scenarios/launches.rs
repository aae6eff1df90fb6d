//! Launches over blocks, while another thread gives blocks up.

use crate::books::PAGE;
use crate::explore::explore;
use crate::world::{World, assert_adds_up, write};
use cuda_vmm::pool::blocks::{BlockBacking, ElementSize, LayerSpec, TensorSpec};
use cuda_vmm::{Engine, Stream, WorkerMode};
use shuttle::thread;

/// Blocks of a page each, in one tensor.
fn blocks(engine: &Engine, stream: &Stream, count: usize) -> BlockBacking {
    let size = ElementSize::new(1).expect("a size");
    let tensor = TensorSpec::new("k", &[PAGE], size).expect("a tensor");
    let spec = LayerSpec::new([tensor]).expect("a specification");
    let backing = BlockBacking::new(engine, spec, count, PAGE).expect("no call fails");
    backing.use_stream(stream).expect("same device");
    backing
}

/// Launches work on blocks that are there, as often as it finds them. Returns the generations.
fn launch(backing: &BlockBacking, stream: &Stream, named: &[usize]) -> Vec<u64> {
    let mut generations = Vec::new();
    for _ in 0..2 {
        let hold = backing.hold().expect("not forked");
        generations.push(hold.generation());
        if hold
            .find_missing(named.iter().copied())
            .expect("not forked")
            .is_none()
        {
            // A launch takes its time.
            (0..16).for_each(|_| thread::yield_now());
            for block in named {
                let base = backing.tensors()[0].base_address();
                write(stream, base + (block * PAGE) as u64, PAGE);
            }
        }
    }
    generations
}

/// What is launched over blocks that were there runs on mapped memory, whichever way they go.
fn blocks_go_while_work_is_launched(by_plan: bool, mode: WorkerMode) {
    let world = World::new(true);
    let engine = world.engine(3, mode);
    let stream = world.stream();
    let backing = blocks(&engine, &stream, 3);
    backing.back(0..3).expect("room");
    let launching = thread::spawn({
        let (backing, stream) = (backing.clone(), stream.clone());
        move || launch(&backing, &stream, &[0, 1])
    });
    match by_plan {
        true => {
            let plan = backing.reclaim_candidates(usize::MAX, |_| Some(0.0));
            backing
                .commit(&plan, &stream)
                .expect("nothing uses the blocks");
        }
        false => backing.unback([1]).expect("backed"),
    }
    // The memory is unmapped when the device has finished with it.
    while engine.stats().committed_bytes == 3 * PAGE {
        engine.step();
        thread::yield_now();
    }
    backing.back([1]).expect("room");
    assert_adds_up(&engine);
    let generations = launching.join().expect("no thread fails");
    assert!(
        generations.is_sorted() && generations[1] <= 1,
        "{generations:?}"
    );
    drop((backing, stream, engine));
    world.end();
}

#[test]
fn a_block_is_given_up_while_work_is_launched() {
    explore(|| blocks_go_while_work_is_launched(false, WorkerMode::Thread));
}

#[test]
fn a_plan_is_committed_while_work_is_launched() {
    explore(|| blocks_go_while_work_is_launched(true, WorkerMode::Thread));
}

#[test]
fn a_block_is_given_up_while_work_is_launched_without_a_worker() {
    explore(|| blocks_go_while_work_is_launched(false, WorkerMode::Manual));
}
