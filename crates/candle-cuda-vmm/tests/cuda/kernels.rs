//! Tests that launch kernels, and so run on GPUs only: `cargo xtask test --cuda` skips this module
//! by name.

#[cfg(feature = "attention")]
mod decode;
mod relief;

use crate::common::{open, page};
use crate::gate::Gate;
use crate::streams::{after_steps, beside, expect_given_back, expect_sound, four_rows, rows};
use crate::token::{Page, Token};
use candle_core::cuda::cudarc::driver::sys::{
    CUgraphInstantiate_flags, CUstreamCaptureMode, cuDeviceGraphMemTrim,
};
use candle_core::{DType, Tensor};
use candle_cuda_vmm::TensorPool;
use candle_cuda_vmm::cuda_vmm::CaptureGuard;

#[test]
fn candle_computes_on_memory_of_a_pool() {
    let memory = Page::new();
    let numbers: Vec<f32> = (0..1024u16).map(f32::from).collect();
    let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_ne_bytes()).collect();
    memory.write(&bytes);
    let token = Token::new(&memory.candle);
    let tensor = memory.tensor::<f32>(&token, numbers.len());
    let computed = tensor.affine(2.0, 1.0).unwrap().to_vec1::<f32>().unwrap();
    let expected: Vec<f32> = numbers.iter().map(|number| 2.0 * number + 1.0).collect();
    assert_eq!(computed, expected);
    // In-place writes change the memory of the pool.
    let halves = Tensor::new(&[0.5f32, 1.5], tensor.device()).unwrap();
    tensor.slice_set(&halves, 0, 10).unwrap();
    let written = tensor.to_vec1::<f32>().unwrap();
    assert_eq!(written[9..13], [9.0, 0.5, 1.5, 12.0]);
}

/// Makes blocks of one page each.
const BLOCKS: usize = 64;

/// Captures a step once, and replays it while blocks are backed and freed. Only the table says what
/// it reads.
#[test]
fn a_captured_graph_reads_by_its_table_while_blocks_come_and_go() {
    let mut test = open();
    let candle = test.device.as_cuda_device().unwrap().clone();
    // SAFETY: all work is on Candle's one stream, so no events are needed. Events would refer to
    // work outside of the capture.
    unsafe { candle.disable_event_tracking() };
    let stream = candle.cuda_stream();
    let width = page() / size_of::<f32>();
    let step = |k: &Tensor, table: &Tensor, out: &Tensor| {
        let found = k.index_select(table, 0).unwrap();
        out.slice_set(&found, 0, 0).unwrap();
    };
    let zeros = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, &test.device).unwrap();
    let table = Tensor::zeros(2, DType::U32, &test.device).unwrap();
    // Runs once before the capture, so that kernels are loaded and their parameters are on the
    // device, where Candle keeps them.
    let cached = candle.enable_cuda_graph_htod_cache();
    step(&zeros((BLOCKS, width)), &table, &zeros((2, width)));
    drop(table);
    test.begin_again();

    let pool = TensorPool::new(&test.device).unwrap();
    let blocks = pool.blocks(BLOCKS, [("k", width, DType::F32)]).unwrap();
    // SAFETY: only backed blocks are read and written, on Candle's stream.
    let k = unsafe { blocks.reserved_tensors() }.unwrap().remove(0);
    let table = Tensor::zeros(2, DType::U32, &test.device).unwrap();
    let out = Tensor::zeros((2, width), DType::F32, &test.device).unwrap();
    let write = |block: usize| {
        let number = Tensor::new(block as f32, &test.device).unwrap();
        let block_of = number
            .broadcast_as((1, width))
            .unwrap()
            .contiguous()
            .unwrap();
        k.slice_set(&block_of, 0, block).unwrap();
    };
    let tell = |read: [usize; 2]| {
        blocks.check_table(read).unwrap();
        let ids = Tensor::new(&read.map(|block| block as u32), &test.device).unwrap();
        table.slice_set(&ids, 0, 0).unwrap();
    };

    blocks.back([0, 3]).unwrap();
    [0, 3].into_iter().for_each(write);
    tell([3, 0]);
    test.device.synchronize().unwrap();
    let guard = CaptureGuard::new();
    let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    stream.begin_capture(mode).unwrap();
    step(&k, &table, &out);
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream
        .end_capture(flags)
        .unwrap()
        .expect("work was captured");
    drop((guard, cached));

    let expect = |read: [usize; 2]| {
        let nothing = Tensor::zeros((2, width), DType::F32, &test.device).unwrap();
        out.slice_set(&nothing, 0, 0).unwrap();
        graph.launch().unwrap();
        let found = [0, 1].map(|row| {
            let ends = out.narrow(0, row, 1).unwrap();
            let ends = [0, width - 1].map(|at| ends.narrow(1, at, 1).unwrap());
            ends.map(|end| end.sum_all().unwrap().to_scalar::<f32>().unwrap())
        });
        assert_eq!(found, read.map(|block| [block as f32; 2]));
    };
    expect([3, 0]);
    // The tables have grown, and name other blocks.
    blocks.back([50, 63]).unwrap();
    [50, 63].into_iter().for_each(write);
    tell([63, 50]);
    expect([63, 50]);
    // Blocks that no table names are freed; pinned ones stay.
    let pin = blocks.pin_for_graph([63, 50]).unwrap();
    blocks.unback([0, 3]).unwrap();
    test.device.synchronize().unwrap();
    pool.trim().unwrap();
    assert!(!blocks.is_backed(0) && blocks.is_backed(63));
    expect([63, 50]);
    drop(pin);
    // The same addresses again, with other memory.
    blocks.back([0]).unwrap();
    write(0);
    tell([0, 50]);
    expect([0, 50]);
    // The driver keeps the graph's allocations until it is told to free them.
    drop(graph);
    test.device.synchronize().unwrap();
    // SAFETY: Candle has opened the device.
    let trimmed = unsafe { cuDeviceGraphMemTrim(stream.context().cu_device()) };
    trimmed.result().unwrap();
}

#[test]
fn rows_that_another_device_object_writes_into_a_view_stay_mapped_until_it_has() {
    let test = open();
    let other = beside(&test);
    let (engine, _pool, mut tensor) = four_rows(&test);
    let come = rows(8, 1, &other);
    // A kernel's first launch waits for the whole context, and so for the gate.
    tensor.view().unwrap().slice_set(&come, 0, 2).unwrap();
    other.synchronize().unwrap();
    let gate = Gate::close(&other);
    let view = tensor.view().unwrap();
    // Candle queues the copy on the source's stream.
    view.slice_set(&come, 0, 2).unwrap();
    drop((view, come));
    let held = engine.stats().committed_bytes;
    tensor.clear();
    assert_eq!(after_steps(&engine), held);
    gate.open();
    expect_sound([&test.device, &other]);
    expect_given_back(&engine);
}
