//! Block tables whose driver calls fail.

use crate::bench::Bench;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::{TensorPool, TensorPoolOptions};

const BLOCKS: usize = 64;
/// Sixteen of them fill a page.
const BLOCK: (usize, usize) = (64, 512);

#[test]
fn a_plan_is_carried_out_or_nothing_has_changed() {
    let bench = Bench::new();
    let pool = TensorPool::with_options(&Device::Cpu, TensorPoolOptions::new()).unwrap();
    let entries = [("k", BLOCK, DType::F32), ("v", BLOCK, DType::F32)];
    let blocks = pool.blocks(BLOCKS, entries).unwrap();
    let allocator = blocks.allocator();
    let table = allocator.allocate(40).unwrap();
    let prefix = blocks.prefix("v").unwrap();
    for block in &table {
        let marked = Tensor::full(*block as f32, (1, BLOCK.0, BLOCK.1), &Device::Cpu).unwrap();
        prefix.slice_set(&marked, 0, *block).unwrap();
    }
    drop(prefix);
    // One block in use keeps each of the last two pages.
    let freed = table
        .iter()
        .copied()
        .filter(|block| ![0, 17, 35].contains(block));
    allocator.free(freed).unwrap();
    let plan = allocator.reclaim_candidates_with_moves(usize::MAX, 1.0, |_| None);
    assert!(
        !plan.moves().is_empty() && !plan.evicted().is_empty(),
        "{plan:?}"
    );
    let before = blocks.stats();
    let (calls, ()) = bench.fail_each_call(
        || allocator.commit(&plan),
        |call| {
            assert_eq!(blocks.stats(), before, "call {call}");
            for block in [0, 17, 35] {
                assert!(blocks.is_backed(block), "call {call}: block {block}");
            }
            assert_eq!(allocator.allocated(), 3, "call {call}");
        },
    );
    assert!(calls > 0, "no call was made");
    let prefix = blocks.prefix("v").unwrap();
    for (from, to) in plan.moves() {
        let block = prefix.narrow(0, *to, 1).unwrap().flatten_all().unwrap();
        let all = block.to_vec1::<f32>().unwrap();
        assert!(all.iter().all(|it| *it == *from as f32), "{from} to {to}");
        allocator.free([*to]).unwrap();
    }
}
