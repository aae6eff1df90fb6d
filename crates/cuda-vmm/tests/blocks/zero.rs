//! Blocks that are zeroed when they are backed anew.

use crate::common::{Gate, Simulated, manual, turn, with_context};
use crate::fixture::{PAGE, Shapes};
use cuda_vmm::pool::blocks::{BlockBacking, BlockError, BlockOptions};
use cuda_vmm::sim::{Fault, SimConfig};
use cuda_vmm::sys::{
    CU_STREAM_CAPTURE_MODE_RELAXED, CUDA_ERROR_OPERATING_SYSTEM, CUDA_SUCCESS, DriverFunction,
};
use cuda_vmm::{CaptureGuard, Engine, Quota, Stream, VmmError};

const BLOCKS: usize = 24;

struct Zeroed {
    backing: BlockBacking,
    engine: Engine,
    stream: Stream,
    simulated: Simulated,
}

impl Zeroed {
    fn new(shapes: Shapes) -> Self {
        let simulated = Simulated::new(SimConfig::new().granularity_bytes(PAGE));
        let stream = Stream::new(&simulated.device).expect("a stream");
        // Pages stay mapped, so that the next blocks in them find what others left.
        let options = manual().park_bytes_max(1 << 20);
        let engine = Engine::new(&simulated.device, options).expect("an engine");
        let account = engine.account("model", Quota::new()).expect("an account");
        let options = BlockOptions::new().zero_on_back(&stream);
        let backing = BlockBacking::with_options(&account, shapes.spec(), BLOCKS, PAGE, options)
            .expect("one");
        Self {
            backing,
            engine,
            stream,
            simulated,
        }
    }

    /// Fills a block with a byte in each tensor, on the stream.
    fn fill(&self, block: usize, byte: u8) {
        for tensor in self.backing.tensors() {
            let address = tensor.base_address() + (block * tensor.block_bytes()) as u64;
            // SAFETY: the block is backed, and pages wait for the stream before they go.
            unsafe { self.stream.memset(address, byte, tensor.block_bytes()) }.expect("queued");
        }
    }

    /// Fails unless each byte of a block is this one in each tensor.
    #[track_caller]
    fn expect(&self, block: usize, byte: u8) {
        for tensor in self.backing.tensors() {
            let mut bytes = vec![!byte; tensor.block_bytes()];
            let address = tensor.base_address() + (block * tensor.block_bytes()) as u64;
            // SAFETY: the block is backed.
            unsafe { self.stream.read(address, &mut bytes) }.expect("mapped");
            assert!(bytes.iter().all(|found| *found == byte), "block {block}");
        }
    }

    fn settle(&self) {
        self.simulated.device.synchronize().expect("done");
        self.engine.step();
    }
}

#[test]
fn blocks_that_are_backed_anew_are_zero_and_others_keep_what_they_hold() {
    let _turn = turn();
    for shapes in Shapes::ALL {
        let zeroed = Zeroed::new(shapes);
        zeroed.backing.back(0..BLOCKS).expect("room");
        for block in 0..BLOCKS {
            zeroed.expect(block, 0);
            zeroed.fill(block, 7);
        }
        // Pages that empty, which are parked and taken back, and pages that neighbours keep.
        let leaves = |block: &usize| *block < 12 || block.is_multiple_of(3);
        zeroed
            .backing
            .unback((0..BLOCKS).filter(leaves))
            .expect("backed");
        zeroed.settle();
        zeroed.backing.try_reserve(3..6).expect("room").keep();
        zeroed.backing.back(0..BLOCKS).expect("room");
        for block in 0..BLOCKS {
            zeroed.expect(block, if leaves(&block) { 0 } else { 7 });
        }
        zeroed.backing.back(0..BLOCKS).expect("backed already");
        zeroed.fill(2, 9);
        zeroed.backing.back([2]).expect("backed already");
        zeroed.expect(2, 9);
    }
}

#[test]
fn zeros_come_after_earlier_work_and_memory_waits_for_them() {
    let _turn = turn();
    let zeroed = Zeroed::new(Shapes::Vectors);
    let other = Stream::new(&zeroed.simulated.device).expect("a stream");
    zeroed.backing.use_stream(&other).expect("of this device");
    zeroed.backing.back(0..BLOCKS).expect("room");
    zeroed.simulated.device.synchronize().expect("done");
    // What a user still does with a block, on another stream.
    let gate = Gate::close(&zeroed.simulated.device, other.raw());
    for tensor in zeroed.backing.tensors() {
        // SAFETY: the block is backed, and its page waits for the stream before it goes.
        unsafe { other.memset(tensor.base_address(), 7, tensor.block_bytes()) }.expect("queued");
    }
    zeroed.backing.unback(0..BLOCKS).expect("backed");
    zeroed.backing.back(0..BLOCKS).expect("taken back");
    // The zeros wait for that, and what is given up now waits for the zeros. The stream stays
    // named.
    zeroed
        .backing
        .forget_stream(&zeroed.stream)
        .expect("of this device");
    zeroed.backing.unback(4..BLOCKS).expect("backed");
    let report = zeroed.engine.step();
    assert_eq!(report.retired_bytes, 0);
    assert!(gate.is_closed());
    gate.open();
    zeroed.expect(0, 0);
    zeroed.settle();
    assert!(!zeroed.simulated.simulator.is_poisoned(0));
}

/// Blocks no longer wait for later work on a stream that was forgotten, and still wait for the
/// stream that zeroes, which cannot be.
#[test]
fn any_stream_but_the_one_that_zeroes_is_forgotten() {
    let _turn = turn();
    let zeroed = Zeroed::new(Shapes::Vectors);
    let other = Stream::new(&zeroed.simulated.device).expect("a stream");
    zeroed.backing.use_stream(&other).expect("of this device");
    // Frees all blocks behind work on a stream that was forgotten before.
    let is_waited_for = |forgotten: &Stream| {
        zeroed.backing.back(0..BLOCKS).expect("room");
        zeroed.settle();
        let forget = zeroed.backing.forget_stream(forgotten);
        forget.expect("of this device");
        let gate = Gate::close(&zeroed.simulated.device, forgotten.raw());
        zeroed.backing.unback(0..BLOCKS).expect("backed");
        let report = zeroed.engine.step();
        assert!(gate.is_closed());
        gate.open();
        zeroed.settle();
        report.retired_bytes == 0
    };
    assert!(is_waited_for(&zeroed.stream));
    assert!(!is_waited_for(&other));
}

#[test]
fn nothing_is_backed_while_the_stream_is_captured() {
    let _turn = turn();
    let zeroed = Zeroed::new(Shapes::Vectors);
    zeroed.backing.back(0..2).expect("room");
    let table = *zeroed.simulated.device.driver().table();
    let guard = CaptureGuard::new();
    // SAFETY: the stream is alive.
    let code = with_context(&zeroed.simulated.device, || unsafe {
        (table.cuStreamBeginCapture)(zeroed.stream.raw(), CU_STREAM_CAPTURE_MODE_RELAXED)
    });
    assert_eq!(code, CUDA_SUCCESS);
    let before = zeroed.engine.stats();
    let error = VmmError::Block(BlockError::CapturingZeros { blocks: 3 });
    assert!(!error.is_permanent() && !error.is_retryable());
    assert_eq!(zeroed.backing.back([0, 5, 4, 5, 9]), Err(error));
    assert_eq!(zeroed.backing.back([0, 1]), Ok(()), "they are backed");
    assert_eq!(zeroed.engine.stats(), before);
    let mut graph = core::ptr::null_mut();
    // SAFETY: the stream is alive, and `graph` a valid place.
    let code = with_context(&zeroed.simulated.device, || unsafe {
        (table.cuStreamEndCapture)(zeroed.stream.raw(), &mut graph)
    });
    assert_eq!(code, CUDA_SUCCESS);
    drop(guard);
    zeroed.backing.back([5]).expect("room");
    zeroed.expect(5, 0);
}

#[test]
fn every_call_fails_in_turn_and_then_none_is_backed() {
    let _turn = turn();
    let mut calls = 1;
    let mut nth = 0;
    while nth <= calls {
        let zeroed = Zeroed::new(Shapes::Mla);
        zeroed.backing.back(2..12).expect("room");
        (2..12).for_each(|block| zeroed.fill(block, 7));
        zeroed.simulated.device.synchronize().expect("done");
        let simulator = &zeroed.simulated.simulator;
        simulator.start_trace();
        if nth > 0 {
            simulator.inject(Fault::nth_call(nth, CUDA_ERROR_OPERATING_SYSTEM));
        }
        let outcome = zeroed.backing.back([0, 1, 2, 12, 13, 20]);
        let trace = simulator.take_trace();
        simulator.clear_faults();
        if nth == 0 {
            calls = trace.len() as u64;
            let zeros = trace
                .iter()
                .filter(|call| **call == DriverFunction::cuMemsetD8Async);
            assert_eq!(zeros.count(), 3 * 2, "runs and tensors");
        }
        let newly = [0, 1, 12, 13, 20];
        for block in newly {
            assert_eq!(zeroed.backing.is_backed(block), outcome.is_ok(), "{nth}");
        }
        (2..12).for_each(|block| zeroed.expect(block, 7));
        for _ in 0..3 {
            zeroed.settle();
        }
        let stats = zeroed.engine.stats();
        assert_eq!(stats.parts.total_bytes(), stats.committed_bytes, "{stats}");
        assert_eq!(stats.parts.quarantined_bytes, 0, "{stats}");
        assert_eq!(
            stats.parts.live_page_bytes,
            zeroed.backing.stats().page_bytes
        );
        zeroed.backing.back(0..BLOCKS).expect("room");
        newly.iter().for_each(|block| zeroed.expect(*block, 0));
        nth += 1;
    }
    assert!(calls > 10, "{calls}");
}
