//! Several device objects, each with a stream of its own: of one GPU, and of others. A gate blocks
//! the other stream while memory is freed or overwritten, so that its work on that memory is still
//! queued. If the free does not wait for that stream, the work accesses freed memory and makes the
//! context unusable.

use crate::common::{UnderTest, open, page};
use crate::gate::Gate;
use candle_core::{DType, Device, DeviceLocation, Tensor};
use candle_cuda_vmm::cuda_vmm::Engine;
use candle_cuda_vmm::{ElasticTensor, TensorPool};

/// Elements of a row. Four rows are a page.
fn width() -> usize {
    page() / 16
}

/// Makes rows whose elements are the row's number.
pub fn rows(first: usize, count: usize, device: &Device) -> Tensor {
    let numbers: Vec<_> = (first..first + count)
        .flat_map(|row| std::iter::repeat_n(row as f32, width()))
        .collect();
    Tensor::from_vec(numbers, (count, width()), &Device::Cpu)
        .and_then(|tensor| tensor.to_device(device))
        .unwrap()
}

#[track_caller]
fn expect_rows(tensor: &Tensor, expected: &[usize]) {
    let found = tensor.to_vec2::<f32>().unwrap();
    assert_eq!(found.len(), expected.len());
    for (row, expected) in found.iter().zip(expected) {
        let expected = *expected as f32;
        assert!(row.iter().all(|element| *element == expected), "{expected}");
    }
}

/// Makes another device object, with its own stream, for each GPU under test. The first is for the
/// pool's GPU.
fn others(test: &UnderTest) -> Vec<Device> {
    let all = test.all();
    let ordinals = all.iter().rev().map(|device| match device.location() {
        DeviceLocation::Cuda { gpu_id } => gpu_id,
        other => panic!("{other:?}"),
    });
    ordinals
        .map(|ordinal| Device::new_cuda_with_stream(ordinal).unwrap())
        .collect()
}

pub fn beside(test: &UnderTest) -> Device {
    others(test).remove(0)
}

/// Makes a tensor of four rows on the device under test.
pub fn four_rows(test: &UnderTest) -> (Engine, TensorPool, ElasticTensor) {
    let pool = TensorPool::new(&test.device).unwrap();
    let mut tensor = pool.tensor(width(), DType::F32).unwrap();
    tensor.append(&rows(0, 4, &test.device)).unwrap();
    test.device.synchronize().unwrap();
    (pool.engine().clone(), pool, tensor)
}

/// Checks that both streams complete their work without error.
#[track_caller]
pub fn expect_sound(devices: [&Device; 2]) {
    for device in devices {
        device.synchronize().unwrap();
    }
}

/// Gives a stream that does not wait for the gate time to run.
fn time_to_go_wrong() {
    std::thread::sleep(std::time::Duration::from_millis(50));
}

/// Runs the engine's steps, and returns how many bytes are still held.
pub fn after_steps(engine: &Engine) -> usize {
    for _ in 0..3 {
        engine.step();
    }
    engine.stats().committed_bytes
}

/// Fails unless all memory is freed soon. The engine's own thread may be about to do so.
#[track_caller]
pub fn expect_given_back(engine: &Engine) {
    for _ in 0..5_000 {
        if after_steps(engine) == 0 {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    panic!("{}", engine.stats());
}

#[test]
fn rows_of_another_device_object_are_appended_when_they_are_there() {
    let test = open();
    let other = beside(&test);
    let (_engine, _pool, mut tensor) = four_rows(&test);
    let come = rows(4, 2, &other);
    other.synchronize().unwrap();
    let gate = Gate::close(&other);
    // Dropped before the gate opens, and written after.
    let late = come.copy().unwrap();
    tensor.append(&late).unwrap();
    drop(late);
    let read = tensor.to_owned().unwrap();
    time_to_go_wrong();
    assert!(gate.is_closed(), "only the streams wait");
    gate.open();
    expect_rows(&read, &[0, 1, 2, 3, 4, 5]);
    expect_sound([&test.device, &other]);
}

#[test]
fn tokens_of_another_device_object_are_appended_when_they_are_there() {
    let test = open();
    let other = beside(&test);
    let pool = TensorPool::new(&test.device).unwrap();
    let mut cache = pool.kv_cache(2, 16);
    for token in 0..3 {
        let token = rows(token, 1, &other);
        let token = token.reshape((1, 4, 1, width() / 4)).unwrap();
        other.synchronize().unwrap();
        let gate = Gate::close(&other);
        let late = token.copy().unwrap();
        cache.append(&late, &late).unwrap();
        drop(late);
        let read = [cache.k_cache(), cache.v_cache()]
            .map(|cache| cache.rows().unwrap().to_owned().unwrap());
        time_to_go_wrong();
        gate.open();
        for all in read {
            let tokens = all.dims()[0];
            let all = all.reshape((tokens, width())).unwrap();
            expect_rows(&all, &[0, 1, 2][..tokens]);
        }
    }
    expect_sound([&test.device, &other]);
}

#[test]
fn memory_that_another_stream_still_writes_is_not_given_back() {
    let test = open();
    let other = beside(&test);
    let (engine, _pool, mut tensor) = four_rows(&test);
    let come = rows(4, 2, &other);
    other.synchronize().unwrap();
    let gate = Gate::close(&other);
    tensor.append(&come).unwrap();
    drop(come);
    let held = engine.stats().committed_bytes;
    tensor.clear();
    assert_eq!(after_steps(&engine), held);
    gate.open();
    expect_sound([&test.device, &other]);
    expect_given_back(&engine);
}

#[test]
fn memory_that_another_stream_still_reads_is_not_given_back() {
    let test = open();
    for other in others(&test) {
        let (engine, _pool, mut tensor) = four_rows(&test);
        for is_all in [true, false] {
            let gate = Gate::close(&other);
            let view = match is_all {
                true => tensor.view(),
                false => tensor.view_rows(0..3),
            };
            // The simulated driver copies nothing from one GPU to another.
            let copy = view.unwrap().to_device(&other);
            assert!(copy.is_ok() || other.location() != test.device.location());
            let held = engine.stats().committed_bytes;
            tensor.clear();
            assert_eq!(after_steps(&engine), held, "the copy is to come");
            gate.open();
            expect_sound([&test.device, &other]);
            expect_given_back(&engine);
            if let Ok(copy) = copy {
                expect_rows(&copy, &[0, 1, 2, 3][..copy.dims()[0]]);
            }
            tensor.append(&rows(0, 4, &test.device)).unwrap();
            test.device.synchronize().unwrap();
        }
    }
}

#[test]
fn another_stream_that_was_made_to_wait_reads_what_was_appended() {
    let test = open();
    let other = beside(&test);
    let (_engine, _pool, mut tensor) = four_rows(&test);
    let come = rows(4, 2, &test.device);
    test.device.synchronize().unwrap();
    let gate = Gate::close(&test.device);
    tensor.append(&come).unwrap();
    let [ours, theirs] =
        [&test.device, &other].map(|device| device.as_cuda_device().unwrap().cuda_stream());
    theirs.join(&ours).unwrap();
    let copy = tensor.view().unwrap().to_device(&other).unwrap();
    time_to_go_wrong();
    assert!(gate.is_closed(), "only the streams wait");
    gate.open();
    expect_rows(&copy, &[0, 1, 2, 3, 4, 5]);
    expect_sound([&test.device, &other]);
}

#[test]
fn a_tensor_that_another_stream_still_reads_may_be_dropped() {
    let test = open();
    for other in others(&test) {
        let (_engine, pool, tensor) = four_rows(&test);
        let gate = Gate::close(&other);
        let copy = tensor.view().unwrap().to_device(&other);
        gate.opened_meanwhile(|| drop((tensor, pool)));
        expect_sound([&test.device, &other]);
        if let Ok(copy) = copy {
            expect_rows(&copy, &[0, 1, 2, 3]);
        }
    }
}

#[test]
fn rows_are_not_written_over_while_another_stream_reads_them() {
    let test = open();
    for other in others(&test) {
        let (_engine, _pool, mut tensor) = four_rows(&test);
        let come = rows(7, 3, &test.device);
        test.device.synchronize().unwrap();
        let gate = Gate::close(&other);
        let copy = tensor.view().unwrap().to_device(&other);
        // The view was dropped, so the rows after the first are rewritten in place. If the engine's
        // own thread has not noticed yet, they move, and freeing the old ones waits for the copy.
        gate.opened_meanwhile(|| {
            tensor.truncate(1).unwrap();
            tensor.append(&come).unwrap();
        });
        expect_sound([&test.device, &other]);
        if let Ok(copy) = copy {
            expect_rows(&copy, &[0, 1, 2, 3]);
        }
        expect_rows(&tensor.view().unwrap(), &[0, 7, 8, 9]);
    }
}

#[test]
fn a_prefix_that_another_stream_still_reads_is_not_given_back() {
    let test = open();
    for other in others(&test) {
        let pool = TensorPool::new(&test.device).unwrap();
        let blocks = pool.blocks(64, [("k", width(), DType::F32)]).unwrap();
        blocks.back(0..4).unwrap();
        let prefix = blocks.prefix("k").unwrap();
        let gate = Gate::close(&other);
        let copy = prefix.to_device(&other);
        drop(prefix);
        blocks.unback(0..4).unwrap();
        let engine = blocks.engine().clone();
        let held = engine.stats().committed_bytes;
        assert!(held > 0);
        assert_eq!(after_steps(&engine), held, "the copy is to come");
        gate.open();
        expect_sound([&test.device, &other]);
        expect_given_back(&engine);
        // The view shows memory that was never written.
        drop(copy);
    }
}
