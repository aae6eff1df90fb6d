//! Block tables whose driver calls fail.

use crate::bench::Bench;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::cuda_vmm::sim::Fault;
use candle_cuda_vmm::cuda_vmm::sys::CUDA_ERROR_UNKNOWN;
use candle_cuda_vmm::{TensorPool, TensorPoolOptions};

const BLOCKS: usize = 64;
/// Sixteen of them fill a page.
const BLOCK: (usize, usize) = (64, 512);
/// One in each page.
const KEPT: [usize; 3] = [0, 17, 35];

/// Carries a plan out while a call of the driver fails. Returns whether it was carried out, and
/// whether a call has failed at all.
fn commit(bench: &Bench, failing_call: u64) -> (bool, bool) {
    let pool = TensorPool::with_options(&Device::Cpu, TensorPoolOptions::new()).unwrap();
    let entries = [("k", BLOCK, DType::F32), ("v", BLOCK, DType::F32)];
    let blocks = pool.blocks(BLOCKS, entries).unwrap();
    let allocator = blocks.allocator();
    let table = allocator.allocate(40).unwrap();
    let marks = blocks.prefix("v").unwrap();
    for block in &table {
        let mark = Tensor::full(*block as f32, (1, BLOCK.0, BLOCK.1), &Device::Cpu).unwrap();
        marks.slice_set(&mark, 0, *block).unwrap();
    }
    let freed = table.into_iter().filter(|block| !KEPT.contains(block));
    allocator.free(freed).unwrap();
    let plan = allocator.reclaim_candidates_with_moves(usize::MAX, 1.0, |_| None);
    assert!(!plan.moves().is_empty() && !plan.evicted().is_empty());

    bench.simulator().start_trace();
    (bench.simulator()).inject(Fault::nth_call(failing_call, CUDA_ERROR_UNKNOWN));
    let committed = allocator.commit(&plan);
    let calls = bench.simulator().take_trace().len() as u64;
    bench.simulator().clear_faults();
    let place = |block: &usize| {
        let mut moves = plan.moves().iter().filter(|_| committed.is_ok());
        moves
            .find_map(|(from, to)| (from == block).then_some(*to))
            .unwrap_or(*block)
    };
    for (block, place) in KEPT.iter().map(|block| (block, place(block))) {
        let what = format!("call {failing_call}: block {block} at {place}");
        let elements = marks.narrow(0, place, 1).unwrap().flatten_all().unwrap();
        let elements = elements.to_vec1::<f32>().unwrap();
        assert!(elements.iter().all(|it| *it == *block as f32), "{what}");
        allocator
            .free([place])
            .unwrap_or_else(|error| panic!("{what}: {error}"));
    }
    assert_eq!(allocator.allocated(), 0, "call {failing_call}");
    (committed.is_ok(), failing_call <= calls)
}

#[test]
fn a_plan_is_carried_out_or_nothing_has_changed() {
    let bench = Bench::new();
    let mut outcomes = Vec::new();
    for call in 1.. {
        let (is_committed, has_failed) = commit(&bench, call);
        if !has_failed {
            assert!(is_committed, "no call has failed");
            break;
        }
        outcomes.push(is_committed);
    }
    assert!(
        outcomes.contains(&true) && outcomes.contains(&false),
        "{outcomes:?}"
    );
}
