//! Decode steps that are captured.

use crate::common::open;
use candle_core::cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::attention::{DecodePlan, GqaOptions, KvBatch, decode, decode_into};
use candle_cuda_vmm::cuda_vmm::CaptureGuard;

const BLOCK: usize = 16;
const BLOCKS: usize = 600;
const HEADS: (usize, usize, usize) = (8, 2, 64);

fn random(shape: &[usize], device: &Device) -> Tensor {
    let made = Tensor::randn(0f32, 1., shape, device).unwrap();
    made.to_dtype(DType::F16).unwrap()
}

fn bits(tensor: &Tensor) -> Vec<u16> {
    let numbers = tensor
        .flatten_all()
        .unwrap()
        .to_vec1::<half::f16>()
        .unwrap();
    numbers.into_iter().map(half::f16::to_bits).collect()
}

/// A launch stays right while lengths and tables change, and gives the bits of one that was not
/// captured.
#[test]
fn a_captured_step_follows_lengths_and_tables_and_has_the_same_bits() {
    let test = open();
    let device = &test.device;
    let candle = device.as_cuda_device().unwrap().clone();
    // SAFETY: all work is on Candle's one stream, so no events are needed.
    unsafe { candle.disable_event_tracking() };
    let stream = candle.cuda_stream();
    let (query_heads, kv_heads, dim) = HEADS;
    let blocks = [BLOCKS, BLOCK, kv_heads, dim];
    let (k, v) = (random(&blocks, device), random(&blocks, device));
    let tables = Tensor::zeros((2, BLOCKS / 2), DType::U32, device).unwrap();
    let lengths = Tensor::ones(2, DType::U32, device).unwrap();
    let kv = KvBatch::blocks(&k, &v, &tables).unwrap();
    let kv = kv.lengths(&lengths).unwrap();
    let plan = DecodePlan::new(device, 2, query_heads).unwrap();
    let options = GqaOptions::new(0.125);
    let q = random(&[2, query_heads, dim], device);
    let output = q.zeros_like().unwrap();
    decode_into(&q, &kv, &options, &plan, &output).unwrap();
    device.synchronize().unwrap();

    let guard = CaptureGuard::new();
    let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    stream.begin_capture(mode).unwrap();
    // Two in a row, of which the second begins while the first one ends.
    for _ in 0..2 {
        decode_into(&q, &kv, &options, &plan, &output).unwrap();
    }
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream
        .end_capture(flags)
        .unwrap()
        .expect("work was captured");
    drop(guard);

    for (turn, now) in [[1, 17], [4800, 4800], [33, 4000], [700, 1]]
        .iter()
        .enumerate()
    {
        // Each table is a permutation of its half of the blocks.
        let table = (0..BLOCKS)
            .map(|at| ((at * 7 + turn) % (BLOCKS / 2) + at / (BLOCKS / 2) * BLOCKS / 2) as u32);
        let table = Tensor::from_iter(table, device).unwrap();
        tables
            .slice_set(&table.reshape((2, BLOCKS / 2)).unwrap(), 0, 0)
            .unwrap();
        let now = Tensor::new(&now.map(|length: u32| length), device).unwrap();
        lengths.slice_set(&now, 0, 0).unwrap();
        let eager = decode(&q, &kv, &options, &plan).unwrap();
        output
            .const_set(candle_core::scalar::Scalar::zero(DType::F16))
            .unwrap();
        for _ in 0..3 {
            graph.launch().unwrap();
        }
        assert_eq!(bits(&output), bits(&eager), "turn {turn}");
    }
}
