//! Rows of a batch without a sequence: their length is 0.

use super::{allowed, assert_close, has_attention, numbers};
use crate::common::open;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::attention::{DecodePlan, GqaOptions, KvBatch, Mask, Slots, decode, write};

const QUERY_HEADS: usize = 6;
const KV_HEADS: usize = 2;
const DIM: usize = 64;
/// A block that there is not.
const NONE: u32 = u32::MAX;

/// K and V in blocks of 16 tokens.
struct Memory(Tensor, Tensor);

impl Memory {
    fn copy(&self) -> Self {
        Self(self.0.copy().unwrap(), self.1.copy().unwrap())
    }

    fn batch<const N: usize>(&self, tables: &[[u32; 2]; N], lengths: &[u32]) -> KvBatch {
        let device = self.0.device();
        let tables = Tensor::new(tables, device).unwrap();
        let lengths = Tensor::new(lengths, device).unwrap();
        let kv = KvBatch::blocks(&self.0, &self.1, &tables).unwrap();
        kv.lengths(&lengths).unwrap()
    }

    fn numbers(&self) -> [Vec<f32>; 2] {
        [numbers(&self.0), numbers(&self.1)]
    }
}

fn random(shape: (usize, usize, usize), dtype: DType, device: &Device) -> Tensor {
    let numbers = Tensor::randn(0f32, 1., shape, device).unwrap();
    numbers.to_dtype(dtype).unwrap()
}

#[test]
fn rows_without_a_sequence_touch_nothing_and_give_zeros() {
    let test = open();
    if !has_attention(&test) {
        return;
    }
    let device = &test.device;
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let blocks = |_| {
            let blocks = random((8 * 16, KV_HEADS, DIM), dtype, device);
            blocks.reshape((8, 16, KV_HEADS, DIM)).unwrap()
        };
        let [k, v] = [0, 1].map(blocks);
        let with_none = Memory(k, v);
        let without = with_none.copy();
        let before = with_none.numbers();
        let new =
            [QUERY_HEADS, KV_HEADS, KV_HEADS].map(|heads| random((4, heads, DIM), dtype, device));
        let [q, new_k, new_v] = &new;
        let plan = DecodePlan::new(device, 4, QUERY_HEADS).unwrap();
        for mask in [Mask::None, Mask::Window(5)] {
            let options = GqaOptions::new(0.125).mask(mask);
            let kv = with_none.batch(&[[NONE; 2]; 4], &[0; 4]);
            write(q, new_k, new_v, None, &kv, Slots::Last).unwrap();
            let nothing = decode(q, &kv, &options, &plan).unwrap();
            assert_eq!(numbers(&nothing), [0.; 4 * QUERY_HEADS * DIM], "{dtype:?}");
            if mask == Mask::None {
                assert_eq!(with_none.numbers(), before, "{dtype:?}");
            }

            let tables = [[NONE; 2], [3, 1], [NONE; 2], [5, 6]];
            let kv = with_none.batch(&tables, &[0, 9, 0, 30]);
            let rotated = write(q, new_k, new_v, None, &kv, Slots::Last).unwrap();
            let ours = decode(&rotated, &kv, &options, &plan).unwrap();
            let there = Tensor::new(&[1u32, 3], device).unwrap();
            let [q, new_k, new_v] = new
                .each_ref()
                .map(|all| all.index_select(&there, 0).unwrap());
            let kv = without.batch(&[tables[1], tables[3]], &[9, 30]);
            write(&q, &new_k, &new_v, None, &kv, Slots::Last).unwrap();
            let expected = decode(&q, &kv, &options, &plan).unwrap();
            assert_eq!(with_none.numbers(), without.numbers(), "{dtype:?}");
            assert_ne!(with_none.numbers(), before, "{dtype:?}");
            let own = numbers(&ours.index_select(&there, 0).unwrap());
            let expected: Vec<_> = numbers(&expected).into_iter().map(f64::from).collect();
            assert_close(&own, &expected, allowed(dtype), &format!("{dtype:?}"));
            for row in [0, 2] {
                let zeros = numbers(&ours.get(row).unwrap());
                assert_eq!(zeros, [0.; QUERY_HEADS * DIM], "{dtype:?}");
            }
        }
    }
}
