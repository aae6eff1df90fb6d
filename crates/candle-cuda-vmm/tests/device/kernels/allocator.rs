//! The allocator that prefers backed blocks, with contents that move.

use crate::common::{open, page};
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::{TensorPool, TensorPoolOptions};

#[test]
fn an_allocator_hands_out_backed_blocks_and_moves_their_contents() {
    let test = open();
    let options = TensorPoolOptions::new().page_bytes(page());
    let pool = TensorPool::with_options(&test.device, options).unwrap();
    let blocks = pool.blocks(64, [("k", (page() / 4,), DType::U8)]).unwrap();
    let allocator = blocks.allocator();
    let tables: Vec<_> = (0..4).map(|_| allocator.allocate(3).unwrap()).collect();
    assert_eq!(allocator.allocated(), 12);
    assert!(
        tables
            .iter()
            .flatten()
            .all(|block| blocks.is_backed(*block))
    );
    let fill = |block: usize| {
        let bytes = vec![block as u8 + 1; page() / 4];
        let bytes = Tensor::from_vec(bytes, (1, page() / 4), &Device::Cpu).unwrap();
        let bytes = bytes.to_device(&test.device).unwrap();
        let prefix = blocks.prefix("k").unwrap();
        prefix.slice_set(&bytes, 0, block).unwrap();
    };
    tables.iter().flatten().for_each(|block| fill(*block));
    // One block of each table stays, so that pages empty only if blocks move.
    for table in &tables {
        allocator.free(table[..2].to_vec()).unwrap();
    }
    let plan = allocator.reclaim_candidates_with_moves(usize::MAX, 1.0, |_| None);
    assert!(!plan.moves().is_empty(), "{plan:?}");
    allocator.commit(&plan).unwrap();
    for table in &tables {
        let moved = plan.moves().iter().find(|(from, _)| *from == table[2]);
        let now = moved.map_or(table[2], |(_, to)| *to);
        assert!(allocator.blocks().is_backed(now));
        // SAFETY: this reads one backed block, by a copy on Candle's stream.
        let all = unsafe { blocks.reserved_tensors() }.unwrap();
        let block = all[0].narrow(0, now, 1).unwrap();
        let bytes = block.force_contiguous().unwrap();
        let bytes = bytes.flatten_all().unwrap().to_vec1::<u8>().unwrap();
        assert_eq!(bytes, vec![table[2] as u8 + 1; page() / 4]);
    }
    assert_eq!(allocator.allocated(), 4);
    assert_eq!(blocks.account().name(), pool.account().name());
}
