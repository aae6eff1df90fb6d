//! Tensors and caches on the CPU, whose rows are in Candle's own memory.
#![cfg(feature = "simulator")]

use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::cuda_vmm::{EngineOptions, VmmError as Core, WorkerMode};
use candle_cuda_vmm::device::core_device;
use candle_cuda_vmm::kv_cache::{KvCache, KvCacheFactory, PreallocatedCaches};
use candle_cuda_vmm::{ElasticTensor, Shortage, TensorPool, TensorPoolOptions, VmmError};

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

/// Checks that memory was short, of at least this many bytes.
#[track_caller]
fn expect_shortage<T: std::fmt::Debug>(outcome: Result<T, VmmError>, bytes: usize) -> Shortage {
    let error = outcome.expect_err("there is not so much");
    assert!(error.is_out_of_memory(), "{error:?}");
    let shortage = error.shortage().unwrap();
    assert!(shortage.requested_bytes >= bytes, "{shortage:?}");
    shortage
}

#[test]
fn memory_that_the_device_has_not_is_an_error() {
    let options = TensorPoolOptions::new().reservation_bytes(1 << 46);
    let pool = TensorPool::with_options(&Device::Cpu, options).unwrap();
    let device_bytes = core_device(&Device::Cpu).unwrap().total_bytes();
    for start in [0, 3] {
        let mut tensor = pool.tensor(1024, DType::U8).unwrap();
        tensor.grow(start).unwrap();
        let committed_bytes = pool.committed_bytes();
        for count in [device_bytes / 1024 + 1, (1 << 36) - 8] {
            // A part fits in the page that is there.
            let more_bytes = count * 1024 - committed_bytes;
            let shortage = expect_shortage(tensor.grow(count), more_bytes);
            assert_eq!(shortage.limit_bytes, Some(device_bytes));
            let one = Tensor::zeros((1, 1024), DType::U8, &Device::Cpu).unwrap();
            let many = one.broadcast_as((count, 1024)).unwrap();
            expect_shortage(tensor.append(&many), more_bytes);
            assert_eq!(tensor.len(), start);
            assert_eq!(pool.committed_bytes(), committed_bytes);
        }
        tensor.grow(1).unwrap();
    }
    // One row that needs more than all addresses.
    for bytes in [(1 << 46) + 1, usize::MAX / 2 - 1] {
        let mut wide = pool.tensor(bytes, DType::U8).unwrap();
        let outcome = wide.grow(1);
        assert!(
            matches!(outcome, Err(VmmError::InvalidOffset { .. })),
            "{outcome:?}"
        );
        assert_eq!(wide.len(), 0);
    }
    // Addresses that no driver has.
    let options = TensorPoolOptions::new().reservation_bytes(usize::MAX);
    let pool = TensorPool::with_options(&Device::Cpu, options).unwrap();
    let mut tensor = pool.tensor(1024, DType::U8).unwrap();
    let outcome = tensor.grow(1);
    assert!(
        matches!(outcome, Err(VmmError::InvalidOffset { .. })),
        "{outcome:?}"
    );
    assert_eq!((tensor.len(), pool.committed_bytes()), (0, 0));
}

/// Limits the addresses of this process to `more_bytes` beyond those in use.
#[cfg(target_os = "linux")]
fn limit_addresses(more_bytes: u64) {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split_whitespace().next().unwrap().parse().unwrap();
    // SAFETY: it takes no pointer.
    let page_bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64;
    let bytes = pages * page_bytes + more_bytes;
    let limit = libc::rlimit {
        rlim_cur: bytes,
        rlim_max: bytes,
    };
    // SAFETY: the limit is a valid value, and is read only.
    let outcome = unsafe { libc::setrlimit(libc::RLIMIT_AS, &limit) };
    assert_eq!(outcome, 0, "{}", std::io::Error::last_os_error());
}

#[cfg(target_os = "linux")]
#[test]
fn memory_that_the_host_has_not_is_an_error() {
    const CHILD: &str = "CUDA_VMM_TEST_LIMITED_CHILD";
    const ROW: usize = 1 << 20;
    if std::env::var_os(CHILD).is_none() {
        // The limit would hold for tests that run beside this one.
        let test = "memory_that_the_host_has_not_is_an_error";
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args([test, "--exact", "--nocapture"]).env(CHILD, "1");
        assert!(child.status().unwrap().success());
        return;
    }
    let engine = EngineOptions::new()
        .worker(WorkerMode::Manual)
        .chunk_bytes_max(0);
    let options = TensorPoolOptions::new().engine(engine);
    let pool = TensorPool::with_options(&Device::Cpu, options).unwrap();
    let mut tensor = pool.tensor(ROW, DType::U8).unwrap();
    tensor.grow(3).unwrap();
    let mut cache = pool.kv_cache(0, 2048);
    let token = Tensor::ones((1, ROW), DType::U8, &Device::Cpu).unwrap();
    cache.append(&token, &token).unwrap();
    // It has addresses on the simulated device, and no rows.
    let mut empty = pool.tensor(ROW, DType::U8).unwrap();
    empty.grow(1).unwrap();
    empty.clear();
    pool.engine().step();
    let before = pool.engine().stats();
    limit_addresses(512 << 20);
    // The simulated device has memory for each of these, and the host has not.
    let count = 1024;
    let many = token.broadcast_as((count, ROW)).unwrap();
    let host = |outcome: Result<(), VmmError>| {
        let shortage = expect_shortage(outcome, count * ROW);
        assert_eq!(shortage.limit_bytes, Some(isize::MAX as usize));
        pool.engine().step();
        assert_eq!(pool.engine().stats(), before);
    };
    host(tensor.grow(count));
    host(tensor.append(&many));
    host(empty.grow(count));
    host(KvCache::append(&mut cache, &many, &many).map(drop));
    assert_eq!(
        (tensor.len(), empty.len(), cache.current_seq_len()),
        (3, 0, 1)
    );
    // A part of that is there.
    tensor.grow(64).unwrap();
    assert_eq!(pool.committed_bytes(), before.committed_bytes + 64 * ROW);
}

/// Candle does not tell when a view on the CPU is dropped, so it holds no page.
#[test]
fn a_view_holds_no_page_and_stays_as_it_is() {
    let engine = EngineOptions::new().worker(WorkerMode::Manual);
    let options = TensorPoolOptions::new().engine(engine);
    let pool = TensorPool::with_options(&Device::Cpu, options).unwrap();
    let mut tensor = pool.tensor(4, DType::F32).unwrap();
    tensor.append(&rows(&[1., 2., 3.])).unwrap();
    let view = tensor.view().unwrap();
    // One page, whatever the rows do under the view.
    tensor.truncate(1).unwrap();
    tensor.append(&rows(&[4., 5.])).unwrap();
    let stats = pool.engine().stats();
    assert_eq!((stats.committed_bytes, stats.ranges), (2 << 20, 1));
    expect(&tensor, &[1., 4., 5.]);
    tensor.clear();
    pool.engine().step();
    assert_eq!(pool.committed_bytes(), 0);
    tensor.append(&rows(&[6.; 3])).unwrap();
    let values = view.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(values, [1., 1., 1., 1., 2., 2., 2., 2., 3., 3., 3., 3.]);
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
