//! Positions in caches whose front was released.

use crate::common::layouts::Layout;
use crate::common::open;
use crate::refused;
use candle_core::{DType, Tensor};
use candle_cuda_vmm::kv_cache::{KvCache, KvCacheFactory};
use candle_cuda_vmm::{TensorPool, VmmError};

#[test]
fn layers_of_different_lengths_have_one_position() {
    let test = open();
    for layout in Layout::BOTH {
        let pool = TensorPool::new(&test.device).unwrap();
        let sequence = layout.sequence(&pool, 3, [(1, 2, 4); 2], DType::F32);
        let sequence = sequence.unwrap();
        let mut layers: Vec<_> = (0..3)
            .map(|layer| sequence.layer(layer, 2, 64).unwrap())
            .collect();
        assert_eq!(sequence.position(), 0);
        let tokens = Tensor::zeros((1, 2, 9, 4), DType::F32, &test.device).unwrap();
        for layer in &mut layers {
            layer.append(&tokens, &tokens).unwrap();
        }
        layers[1].release_front(6).unwrap();
        assert_eq!((sequence.len(), sequence.position()), (3, 9));
        // The second layer has no token before position 6, so none changes.
        refused!(sequence.truncate_to_position(5), VmmError::CandleError(_));
        refused!(sequence.truncate_to_position(10), VmmError::CandleError(_));
        let lens = || -> Vec<_> { layers.iter().map(KvCache::current_seq_len).collect() };
        assert_eq!(lens(), [9, 3, 9]);
        sequence.truncate_to_position(7).unwrap();
        assert_eq!((lens(), sequence.position()), (vec![7, 1, 7], 7));
        sequence.truncate_to_position(6).unwrap();
        assert_eq!((lens(), sequence.position()), (vec![6, 0, 6], 6));
        sequence.reset();
        assert_eq!(sequence.position(), 0);
    }
}

#[test]
fn a_clone_has_the_position_too() {
    let test = open();
    let pool = TensorPool::new(&test.device).unwrap();
    let mut cache = pool.kv_cache(2, 64);
    let tokens = Tensor::zeros((1, 2, 5, 4), DType::F32, &test.device).unwrap();
    cache.append(&tokens, &tokens).unwrap();
    cache.release_front(5).unwrap();
    let mut clone = cache.try_clone().unwrap();
    assert_eq!((clone.current_seq_len(), clone.position()), (0, 5));
    clone.append(&tokens, &tokens).unwrap();
    assert_eq!((clone.position(), cache.position()), (10, 5));
    assert_eq!(clone.k_cache().position(), 10);
    clone.reset();
    assert_eq!(clone.position(), 0);
}
