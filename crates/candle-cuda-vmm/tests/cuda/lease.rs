//! Tensors over memory of a pool. Candle must not notice how they are freed.

use crate::common::open;
use crate::streams::expect_given_back;
use candle_core::cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::cuda_vmm::CaptureGuard;
use candle_cuda_vmm::{ElasticTensor, TensorPool};

/// Makes a tensor of two rows, and returns its numbers.
fn two_rows(device: &Device) -> (TensorPool, ElasticTensor, [[f32; 3]; 2]) {
    let pool = TensorPool::new(device).unwrap();
    let mut tensor = pool.tensor(3, DType::F32).unwrap();
    let numbers = [[1., 2., 3.], [4., 5., 6.]];
    let rows = Tensor::new(&numbers, &Device::Cpu).unwrap();
    tensor.append(&rows.to_device(device).unwrap()).unwrap();
    (pool, tensor, numbers)
}

/// Returns the error that Candle's next call would return, which only a lease can have caused.
#[track_caller]
fn expect_candle_undisturbed(device: &Device) {
    let candle = device.as_cuda_device().unwrap();
    assert!(candle.cuda_stream().context().check_err().is_ok());
    let values = Tensor::new(&[3u8, 1, 4], device).and_then(|tensor| tensor.to_vec1::<u8>());
    assert_eq!(values.unwrap(), [3, 1, 4]);
}

#[test]
fn dropping_one_view_disturbs_neither_another_nor_candle() {
    let test = open();
    let (_pool, tensor, numbers) = two_rows(&test.device);
    for _ in 0..20 {
        // Views of some rows have leases of their own. Views of all rows share one.
        let views = [0..1, 1..2, 0..2].map(|rows| tensor.view_rows(rows).unwrap());
        let [dropped, read, all] = views;
        drop(dropped);
        expect_candle_undisturbed(&test.device);
        assert_eq!(read.to_vec2::<f32>().unwrap(), numbers[1..]);
        drop(read);
        expect_candle_undisturbed(&test.device);
        assert_eq!(all.to_vec2::<f32>().unwrap(), numbers);
    }
}

#[test]
fn views_dropped_on_other_threads_come_back() {
    let test = open();
    let (_pool, tensor, numbers) = two_rows(&test.device);
    for _ in 0..10 {
        let views = (0..16).map(|row| tensor.view_rows(row % 2..row % 2 + 1).unwrap());
        let views: Vec<_> = views.collect();
        std::thread::scope(|scope| {
            for view in views {
                scope.spawn(move || drop(view));
            }
        });
        expect_candle_undisturbed(&test.device);
    }
    assert_eq!(tensor.view().unwrap().to_vec2::<f32>().unwrap(), numbers);
}

#[test]
fn a_view_that_is_dropped_during_a_capture_leaves_the_capture_alone() {
    let test = open();
    let (pool, tensor, numbers) = two_rows(&test.device);
    let stream = test.device.as_cuda_device().unwrap().cuda_stream();
    for mode in [
        CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL,
        CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
        CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED,
    ] {
        // It has its own lease, so its memory is freed.
        let view = tensor.view_rows(0..1).unwrap();
        test.device.synchronize().unwrap();
        let guard = CaptureGuard::new();
        stream.begin_capture(mode).unwrap();
        drop(view);
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        stream
            .end_capture(flags)
            .unwrap_or_else(|error| panic!("{mode:?}: {error}"));
        drop(guard);
        expect_candle_undisturbed(&test.device);
        assert_eq!(tensor.view().unwrap().to_vec2::<f32>().unwrap(), numbers);
    }
    let engine = pool.engine().clone();
    drop((tensor, pool));
    test.device.synchronize().unwrap();
    expect_given_back(&engine);
}

#[test]
fn an_owned_copy_outlives_everything() {
    let test = open();
    let (pool, tensor, numbers) = two_rows(&test.device);
    let owned = tensor.to_owned().unwrap();
    drop((tensor, pool));
    expect_candle_undisturbed(&test.device);
    assert_eq!(owned.to_vec2::<f32>().unwrap(), numbers);
    drop(owned);
    expect_candle_undisturbed(&test.device);
}

#[test]
fn candles_copy_of_a_view_holds_the_lease_and_hears_once_of_the_refused_free() {
    let test = open();
    let (pool, tensor, numbers) = two_rows(&test.device);
    let copy_of_part = tensor.view_rows(1..2).unwrap().copy().unwrap();
    let copy_of_all = tensor.view().unwrap().copy().unwrap();
    expect_candle_undisturbed(&test.device);
    // It is on the stream object of the view, whose free was refused, but has its own memory.
    assert!(copy_of_part.to_vec2::<f32>().is_err());
    assert_eq!(copy_of_part.to_vec2::<f32>().unwrap(), numbers[1..]);
    // Views of all rows are parts of one tensor, which is freed with the rows.
    assert_eq!(copy_of_all.to_vec2::<f32>().unwrap(), numbers);
    drop((tensor, pool));
    assert!(copy_of_all.to_vec2::<f32>().is_err());
    assert_eq!(copy_of_all.to_vec2::<f32>().unwrap(), numbers);
    assert_eq!(copy_of_part.to_vec2::<f32>().unwrap(), numbers[1..]);
    drop((copy_of_part, copy_of_all));
    expect_candle_undisturbed(&test.device);
}

#[test]
fn a_pool_serves_a_tensor_of_its_own_device_only() {
    let test = open();
    let (_pool, mut tensor, numbers) = two_rows(&test.device);
    for other in test.all() {
        let rows = Tensor::zeros((1, 3), DType::F32, &other).unwrap();
        let same = other.location() == test.device.location();
        assert_eq!(tensor.append(&rows).is_ok(), same);
    }
    tensor.truncate(2).unwrap();
    assert_eq!(tensor.view().unwrap().to_vec2::<f32>().unwrap(), numbers);
}

#[test]
fn tensors_of_blocks_come_and_go_without_candle_noticing() {
    let test = open();
    let pool = TensorPool::new(&test.device).unwrap();
    let blocks = pool.blocks(1 << 16, [("k", (16, 64), DType::F16)]).unwrap();
    for backed in [0, 1, 1000] {
        blocks.back(0..backed).unwrap();
        // SAFETY: nothing touches a block.
        let reserved = unsafe { blocks.reserved_tensors() }.unwrap();
        assert_eq!(reserved[0].dims(), [1 << 16, 16, 64]);
        let prefix = blocks.prefix("k").unwrap();
        // The first page may have memory or not, so a whole tensor may have memory in part only.
        for tensor in [reserved[0].clone(), prefix.clone()] {
            drop(tensor);
            expect_candle_undisturbed(&test.device);
        }
        drop(reserved);
        expect_candle_undisturbed(&test.device);
        let elsewhere = std::thread::spawn(move || drop(prefix));
        elsewhere.join().unwrap();
        expect_candle_undisturbed(&test.device);
    }
    // The memory of a prefix outlives the blocks.
    let prefix = blocks.prefix("k").unwrap();
    let engine = blocks.engine().clone();
    drop((blocks, pool));
    expect_candle_undisturbed(&test.device);
    drop(prefix);
    expect_candle_undisturbed(&test.device);
    test.device.synchronize().unwrap();
    expect_given_back(&engine);
}
