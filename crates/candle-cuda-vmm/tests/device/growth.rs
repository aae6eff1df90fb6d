//! Tensors that grow, and earlier views of them.

use crate::common::{GRANULE, UnderTest, open, page, settle_to};
use candle_core::{DType, Device, Error, Tensor};
use candle_cuda_vmm::cuda_vmm::{self, EngineOptions};
use candle_cuda_vmm::{ElasticTensor, TensorPool, TensorPoolOptions, VmmError};

fn options() -> TensorPoolOptions {
    TensorPoolOptions::new()
        .page_bytes(page())
        .reservation_bytes(64 * page())
}

fn pool(test: &UnderTest) -> TensorPool {
    TensorPool::with_options(&test.device, options()).unwrap()
}

/// Makes rows of `columns` consecutive numbers from `first` on.
fn rows(test: &UnderTest, first: usize, count: usize, columns: usize) -> Tensor {
    let numbers: Vec<f32> = numbers(first, count, columns);
    let rows = Tensor::from_vec(numbers, (count, columns), &Device::Cpu).unwrap();
    rows.to_device(&test.device).unwrap()
}

fn numbers(first: usize, count: usize, columns: usize) -> Vec<f32> {
    let numbers = first * columns..(first + count) * columns;
    numbers.map(|number| number as f32).collect()
}

#[track_caller]
fn expect(view: &Tensor, first: usize, count: usize) {
    let columns = view.dims()[1];
    assert_eq!(view.dims(), [count, columns]);
    let found = view.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(found == numbers(first, count, columns), "rows from {first}");
}

/// Lets the engine's worker free retiring memory.
#[track_caller]
fn settle(pool: &TensorPool, bytes_max: usize) {
    settle_to(pool.device(), pool.engine(), bytes_max);
}

/// Returns a number of columns with which three rows take more than one page.
fn wide() -> usize {
    page() / 4 / 3 + 17
}

#[test]
fn rows_stay_where_they_are_while_more_are_appended() {
    let test = open();
    let pool = pool(&test);
    let mut tensor = pool.tensor(wide(), DType::F32).unwrap();
    assert!(tensor.is_empty() && pool.committed_bytes() == 0);
    assert_eq!(tensor.view().unwrap().dims(), [0, wide()]);
    let mut views = Vec::new();
    for len in (0..12).step_by(2) {
        tensor.append(&rows(&test, len, 2, wide())).unwrap();
        views.push(tensor.view().unwrap());
    }
    for (index, view) in views.iter().enumerate() {
        expect(view, 0, 2 * (index + 1));
    }
    expect(&tensor.view_rows(3..7).unwrap(), 3, 4);
    let live_bytes = 12 * tensor.row_bytes();
    let stats = pool.engine().stats();
    assert_eq!(stats.ranges, 1, "they never moved");
    assert!(stats.committed_bytes <= live_bytes + live_bytes / 8 + 2 * page());
}

#[test]
fn a_view_is_a_snapshot_whatever_becomes_of_the_rows() {
    let test = open();
    let pool = pool(&test);
    let ways: [fn(&mut ElasticTensor); 4] = [
        |tensor| tensor.truncate(1).unwrap(),
        |tensor| tensor.shrink(6).unwrap(),
        ElasticTensor::clear,
        |tensor| tensor.release_front(6).unwrap(),
    ];
    for change in ways {
        let mut tensor = pool.tensor(wide(), DType::F32).unwrap();
        tensor.append(&rows(&test, 0, 7, wide())).unwrap();
        let before = tensor.view().unwrap();
        change(&mut tensor);
        let left = tensor.len();
        tensor.append(&rows(&test, 100, 7, wide())).unwrap();
        expect(&before, 0, 7);
        let after = tensor.view().unwrap();
        assert_eq!(after.dims(), [left + 7, wide()]);
        expect(&after.narrow(0, left, 7).unwrap(), 100, 7);
        drop(tensor);
        expect(&before, 0, 7);
        expect(&after.narrow(0, left, 7).unwrap(), 100, 7);
    }
    settle(&pool, 0);
}

#[test]
fn rows_are_written_over_in_place_where_no_view_shows_them() {
    let test = open();
    let pool = pool(&test);
    let mut tensor = pool.tensor(64, DType::F32).unwrap();
    tensor.append(&rows(&test, 0, 10, 64)).unwrap();
    drop(tensor.view().unwrap());
    let ranges = || pool.engine().stats().ranges;
    let before = (ranges(), pool.committed_bytes());
    for _ in 0..100 {
        tensor.append(&rows(&test, 10, 8, 64)).unwrap();
        expect(&tensor.view().unwrap(), 0, 18);
        tensor.truncate(10).unwrap();
    }
    assert_eq!((ranges(), pool.committed_bytes()), before);
}

#[test]
fn memory_stays_until_the_last_view_is_dropped_whichever_goes_first() {
    let test = open();
    for order in 0..6 {
        let pool = pool(&test);
        let engine = pool.engine().clone();
        let mut tensor = pool.tensor(wide(), DType::F32).unwrap();
        tensor.append(&rows(&test, 0, 5, wide())).unwrap();
        let view = tensor.view().unwrap();
        let part = view.narrow(0, 2, 3).unwrap();
        let (mut pool, mut tensor, mut view) = (Some(pool), Some(tensor), Some(view));
        // All orders of three.
        let first = order % 3;
        let second = (first + 1 + order / 3) % 3;
        for which in [first, second, 3 - first - second] {
            match which {
                0 => drop(pool.take()),
                1 => drop(tensor.take()),
                _ => drop(view.take()),
            }
            expect(&part, 2, 3);
        }
        let elsewhere = std::thread::spawn(move || drop(part));
        elsewhere.join().unwrap();
        settle_to(&test.device, &engine, 0);
    }
}

#[test]
fn a_window_that_slides_takes_memory_for_the_window_only() {
    let test = open();
    let pages = 16;
    let options = options().reservation_bytes(pages * page());
    let pool = TensorPool::with_options(&test.device, options).unwrap();
    let mut tensor = pool.tensor(wide(), DType::F32).unwrap();
    let window = 9;
    let window_bytes = (window + 1) * tensor.row_bytes();
    // Three times through the addresses.
    let steps = 3 * pages * page() / tensor.row_bytes();
    for step in 0..steps {
        tensor.append(&rows(&test, step, 1, wide())).unwrap();
        if tensor.len() > window {
            tensor.release_front(1).unwrap();
        }
        if step % 16 == 0 {
            let first = (step + 1).saturating_sub(window);
            expect(&tensor.view().unwrap(), first, tensor.len());
            // Freed memory may be retiring, and a window that moves to new addresses exists twice.
            settle(&pool, 2 * window_bytes + window_bytes / 4 + 4 * page());
        }
    }
}

#[test]
fn every_type_that_candle_computes_with_grows() {
    let test = open();
    let pool = pool(&test);
    for dtype in [
        DType::U8,
        DType::U32,
        DType::I16,
        DType::I32,
        DType::I64,
        DType::BF16,
        DType::F16,
        DType::F32,
        DType::F64,
        DType::F8E4M3,
    ] {
        let numbers = Tensor::new(&[[1_f32, 2., 3.], [4., 5., 6.]], &Device::Cpu).unwrap();
        let source = numbers.to_dtype(dtype).unwrap();
        let mut tensor = pool.tensor(3, dtype).unwrap();
        tensor
            .append(&source.to_device(&test.device).unwrap())
            .unwrap();
        tensor.grow(1).unwrap();
        let there = tensor.view().unwrap().to_device(&Device::Cpu).unwrap();
        let there = there
            .to_dtype(DType::F32)
            .unwrap()
            .to_vec2::<f32>()
            .unwrap();
        let expected = [[1., 2., 3.], [4., 5., 6.], [0.; 3]];
        assert_eq!(there, expected, "{dtype:?}");
    }
    for dtype in [DType::F6E2M3, DType::F6E3M2, DType::F4, DType::F8E8M0] {
        assert!(matches!(
            pool.tensor(3, dtype).map(drop),
            Err(VmmError::CandleError(Error::UnsupportedDTypeForOp(given, "elastic-tensor"))) if given == dtype
        ));
    }
}

#[test]
fn a_copy_owns_its_memory() {
    let test = open();
    let pool = pool(&test);
    let mut tensor = pool.tensor(wide(), DType::F32).unwrap();
    tensor.append(&rows(&test, 0, 4, wide())).unwrap();
    let (copy, mut clone) = (tensor.to_owned().unwrap(), tensor.try_clone().unwrap());
    tensor.truncate(1).unwrap();
    tensor.append(&rows(&test, 50, 3, wide())).unwrap();
    clone.append(&rows(&test, 4, 1, wide())).unwrap();
    expect(&copy, 0, 4);
    expect(&clone.view().unwrap(), 0, 5);
    drop((tensor, clone));
    settle(&pool, 0);
    expect(&copy, 0, 4);
}

#[test]
fn what_does_not_fit_is_refused_by_its_values_and_changes_nothing() {
    let test = open();
    let limit = EngineOptions::new().limit_bytes(8 * page());
    let pool = TensorPool::with_options(&test.device, options().engine(limit)).unwrap();
    let mut tensor = pool.tensor(wide(), DType::F32).unwrap();
    tensor.append(&rows(&test, 0, 4, wide())).unwrap();
    let row_bytes = tensor.row_bytes();
    let too_many = tensor.rows_max() - 3;
    let error = tensor.grow(too_many).unwrap_err();
    assert!(
        matches!(error, VmmError::InvalidOffset { offset, size, capacity }
            if offset == 4 * row_bytes && size == too_many * row_bytes && capacity == 64 * page()),
        "{error}"
    );
    assert!(matches!(
        tensor.grow(usize::MAX),
        Err(VmmError::InvalidOffset { .. })
    ));
    let error = tensor.grow(40).unwrap_err();
    assert!(
        matches!(
            error,
            VmmError::Vmm(cuda_vmm::VmmError::OutOfPhysicalMemory { .. })
        ),
        "{error}"
    );
    macro_rules! refused {
        ($outcome:expr, $pattern:pat) => {
            let outcome = $outcome.map(drop);
            assert!(
                matches!(outcome, Err(VmmError::CandleError($pattern))),
                "{outcome:?}"
            );
        };
    }
    let bytes = Tensor::zeros((1, wide()), DType::U8, &test.device).unwrap();
    refused!(
        tensor.append(&bytes),
        Error::DTypeMismatchBinaryOp {
            lhs: DType::F32,
            rhs: DType::U8,
            op: "elastic-append"
        }
    );
    refused!(
        tensor.append(&rows(&test, 0, 1, 5)),
        Error::ShapeMismatchBinaryOp {
            op: "elastic-append",
            ..
        }
    );
    let flat = Tensor::zeros(wide(), DType::F32, &test.device).unwrap();
    refused!(
        tensor.append(&flat),
        Error::UnexpectedNumberOfDims {
            expected: 2,
            got: 1,
            ..
        }
    );
    refused!(
        tensor.truncate(5),
        Error::NarrowInvalidArgs {
            start: 0,
            len: 5,
            ..
        }
    );
    refused!(
        tensor.shrink(5),
        Error::NarrowInvalidArgs {
            start: 0,
            len: 5,
            ..
        }
    );
    refused!(
        tensor.release_front(5),
        Error::NarrowInvalidArgs {
            start: 0,
            len: 5,
            ..
        }
    );
    refused!(
        tensor.view_rows(3..5),
        Error::NarrowInvalidArgs {
            start: 3,
            len: 2,
            ..
        }
    );
    if test.device.is_cuda() {
        let elsewhere = Tensor::zeros((1, wide()), DType::F32, &Device::Cpu).unwrap();
        refused!(
            tensor.append(&elsewhere),
            Error::DeviceMismatchBinaryOp {
                op: "elastic-append",
                ..
            }
        );
    }
    expect(&tensor.view().unwrap(), 0, 4);
    tensor.append(&rows(&test, 4, 1, wide())).unwrap();
    expect(&tensor.view().unwrap(), 0, 5);
}

#[test]
fn pools_that_cannot_be_are_refused() {
    let test = open();
    let with = |options| TensorPool::with_options(&test.device, options).map(drop);
    let zero = |what| VmmError::Vmm(cuda_vmm::VmmError::ZeroSize { what });
    for (options, error) in [
        (options().reservation_bytes(0), zero("reservation")),
        (
            options().engine(EngineOptions::new().limit_bytes(0)),
            zero("limit"),
        ),
    ] {
        assert_eq!(
            format!("{:?}", with(options)),
            format!("{:?}", Err::<(), _>(error))
        );
    }
    let odd = with(options().page_bytes(GRANULE / 2));
    assert!(matches!(odd, Err(VmmError::InvalidPageSize(bytes)) if bytes == GRANULE / 2));
    let pool = pool(&test);
    let row = pool.tensor((3, 0), DType::F32).map(drop);
    assert_eq!(
        format!("{row:?}"),
        format!("{:?}", Err::<(), _>(zero("row")))
    );
    let row = pool.tensor((usize::MAX, 2), DType::F32).map(drop);
    assert!(
        matches!(row, Err(VmmError::InvalidOffset { .. })),
        "{row:?}"
    );
}
