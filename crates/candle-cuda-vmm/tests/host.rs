//! Tensors and caches on the CPU, whose memory is Candle's own.
#![cfg(feature = "simulator")]

use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::cuda_vmm::{EngineOptions, VmmError as Core};
use candle_cuda_vmm::kv_cache::{KvCacheFactory, PreallocatedCaches};
use candle_cuda_vmm::{ElasticTensor, TensorPool, TensorPoolOptions, VmmError};

fn rows(numbers: &[f32]) -> Tensor {
    let elements: Vec<f32> = numbers.iter().flat_map(|number| [*number; 4]).collect();
    Tensor::from_vec(elements, (numbers.len(), 4), &Device::Cpu).unwrap()
}

#[track_caller]
fn expect(tensor: &ElasticTensor, numbers: &[f32]) {
    let expected = rows(numbers).flatten_all().unwrap();
    for found in [tensor.view().unwrap(), tensor.to_owned().unwrap()] {
        assert_eq!(
            found.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
            expected.to_vec1::<f32>().unwrap()
        );
    }
}

#[test]
fn views_of_a_tensor_are_appended_to_it() {
    let pool = TensorPool::new(&Device::Cpu).unwrap();
    let mut tensor = pool.tensor(4, DType::F32).unwrap();
    tensor.append(&rows(&[1., 2., 3.])).unwrap();
    let mut expected = vec![1., 2., 3.];
    for step in 0..20 {
        let first = step % expected.len();
        let rows = tensor.view_rows(first..first + 1).unwrap();
        tensor.append(&rows).unwrap();
        expected.push(expected[first]);
        if step % 7 == 0 {
            let all = tensor.view().unwrap();
            tensor.append(&all).unwrap();
            expected.extend_from_within(..);
        }
    }
    expect(&tensor, &expected);
}

#[test]
fn tokens_of_a_cache_are_appended_to_it() {
    let pool = TensorPool::new(&Device::Cpu).unwrap();
    for heads in [1, 2] {
        let mut cache = pool.kv_cache(2, 16);
        let elements: Vec<f32> = (0..heads * 6 * 4).map(|number| number as f32).collect();
        let tokens = Tensor::from_vec(elements, (1, heads, 6, 4), &Device::Cpu).unwrap();
        let (mut k, mut v) = cache.append(&tokens, &tokens).unwrap();
        for step in 0..10 {
            let (one_k, one_v) = (k.narrow(2, step, 1), v.narrow(2, step, 1));
            (k, v) = cache.append(&one_k.unwrap(), &one_v.unwrap()).unwrap();
            for all in [&k, &v] {
                let pair = [step, 6 + step].map(|at| all.narrow(2, at, 1).unwrap());
                let [there, appended] =
                    pair.map(|token| token.flatten_all().unwrap().to_vec1::<f32>().unwrap());
                assert_eq!(there, appended);
            }
        }
    }
}

#[test]
fn rows_that_grow_are_zeros_whatever_was_there() {
    let pool = TensorPool::new(&Device::Cpu).unwrap();
    let mut tensor = pool.tensor(4, DType::F32).unwrap();
    tensor.append(&rows(&[1.; 8])).unwrap();
    tensor.truncate(2).unwrap();
    tensor.grow(3).unwrap();
    expect(&tensor, &[1., 1., 0., 0., 0.]);
    tensor.truncate(3).unwrap();
    tensor.append(&rows(&[2.])).unwrap();
    tensor.grow(40).unwrap();
    let mut expected = vec![1., 1., 0., 2.];
    expected.resize(44, 0.);
    expect(&tensor, &expected);
    // In several pieces.
    let mut tensor = pool.tensor(4, DType::F32).unwrap();
    let count = 300_000;
    tensor
        .append(&rows(&[3.]).broadcast_as((count, 4)).unwrap())
        .unwrap();
    tensor.truncate(1).unwrap();
    tensor.grow(count).unwrap();
    let sum = tensor.view().unwrap().sum_all().unwrap();
    assert_eq!(sum.to_scalar::<f32>().unwrap(), 12.);
}

/// Returns the peak memory of this process, in bytes.
#[cfg(target_os = "linux")]
fn peak_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM"))
        .unwrap();
    let kib: usize = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib << 10
}

#[cfg(target_os = "linux")]
#[test]
fn growing_writes_no_zeros_a_second_time() {
    const BYTES: usize = 512 << 20;
    let pool = TensorPool::new(&Device::Cpu).unwrap();
    let mut tensor = pool.tensor(1024, DType::U8).unwrap();
    let before = peak_bytes();
    tensor.grow(BYTES / 1024).unwrap();
    assert_eq!(pool.committed_bytes(), BYTES);
    assert!(peak_bytes() - before < BYTES / 2, "fresh memory is zero");
}

/// Checks that the host was short of at least this many bytes.
#[track_caller]
fn expect_shortage<T: std::fmt::Debug>(outcome: Result<T, VmmError>, bytes: usize) {
    let error = outcome.expect_err("no host has so much");
    assert!(error.is_out_of_memory(), "{error:?}");
    let shortage = error.shortage().unwrap();
    assert!(shortage.requested_bytes >= bytes, "{shortage:?}");
    assert_eq!(
        error.is_permanent(),
        bytes > isize::MAX as usize,
        "{error:?}"
    );
}

#[test]
fn memory_that_the_host_has_not_is_an_error() {
    let options = TensorPoolOptions::new().reservation_bytes(usize::MAX);
    let pool = TensorPool::with_options(&Device::Cpu, options).unwrap();
    for start in [0, 3] {
        let mut tensor = pool.tensor(1024, DType::U8).unwrap();
        tensor.grow(start).unwrap();
        let committed_bytes = pool.committed_bytes();
        for count in [1 << 36, usize::MAX / 1024 - 8] {
            expect_shortage(tensor.grow(count), count * 1024);
            let one = Tensor::zeros((1, 1024), DType::U8, &Device::Cpu).unwrap();
            if let Ok(many) = one.broadcast_as((count, 1024)) {
                expect_shortage(tensor.append(&many), count * 1024);
            }
            assert_eq!(tensor.len(), start);
            assert_eq!(pool.committed_bytes(), committed_bytes);
        }
        tensor.grow(1).unwrap();
    }
    // One row that needs nearly all addresses.
    let mut wide = pool.tensor(usize::MAX / 2 - 1, DType::U8).unwrap();
    expect_shortage(wide.grow(1), usize::MAX / 2 - 1);
    expect_shortage(wide.grow(2), 2 * (usize::MAX / 2 - 1));
    assert_eq!(wide.len(), 0);
}

#[test]
fn options_are_refused_as_on_a_gpu() {
    let make = |options| TensorPool::with_options(&Device::Cpu, options);
    for bytes in [0, 1, 3 << 20, 1 << 20, usize::MAX] {
        let outcome = make(TensorPoolOptions::new().page_bytes(bytes));
        assert!(
            matches!(outcome, Err(VmmError::InvalidPageSize(found)) if found == bytes),
            "{outcome:?}"
        );
    }
    for bytes in [2 << 20, 16 << 20] {
        make(TensorPoolOptions::new().page_bytes(bytes)).unwrap();
    }
    let zero = |outcome: Result<TensorPool, VmmError>| {
        assert!(
            matches!(outcome, Err(VmmError::Vmm(Core::ZeroSize { .. }))),
            "{outcome:?}"
        );
    };
    zero(make(TensorPoolOptions::new().reservation_bytes(0)));
    let engine = |engine| make(TensorPoolOptions::new().engine(engine));
    zero(engine(EngineOptions::new().limit_bytes(0)));
    let mut marks = EngineOptions::new();
    (marks.park_bytes_min, marks.park_bytes_max) = (Some(2), 1);
    let mut headroom = EngineOptions::new();
    headroom.headroom_bytes = usize::MAX;
    for options in [marks, headroom] {
        let outcome = engine(options);
        assert!(
            matches!(outcome, Err(VmmError::Vmm(Core::QuotaUnsatisfiable { .. }))),
            "{outcome:?}"
        );
    }
}

#[test]
fn a_preallocated_cache_for_no_tokens_is_refused() {
    let outcome = PreallocatedCaches.layer(0, 2, 0);
    assert!(
        matches!(outcome, Err(VmmError::Vmm(Core::ZeroSize { .. }))),
        "{outcome:?}"
    );
}

#[test]
fn blocks_that_the_host_has_not_are_an_error() {
    let pool = TensorPool::new(&Device::Cpu).unwrap();
    let outcome = pool.blocks(1 << 26, [("k", 1 << 19, DType::U8)]);
    let error = outcome.map(drop).expect_err("32 TiB");
    assert!(error.is_out_of_memory(), "{error:?}");
}
