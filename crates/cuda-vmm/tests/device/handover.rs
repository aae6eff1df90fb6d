//! Whatever way memory takes from one range to another, the other finds nothing of what the first
//! wrote.
//!
//! Memory that the engine keeps is overwritten by the engine. Memory that goes back to the driver
//! is made anew by the driver, and that this is clean is the driver's doing: CUDA does not promise
//! it, so these cases are where it would show.

use crate::common::{Gate, Models, manual, under_test, with_context};
use crate::{case, fill, page};
use core::ffi::{c_int, c_void};
use cuda_vmm::pool::blocks::{BlockBacking, ElementSize, LayerSpec, TensorSpec};
use cuda_vmm::sim::Fault;
use cuda_vmm::sys::{
    CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, CUDA_ERROR_OPERATING_SYSTEM, CUDA_SUCCESS,
    DriverFunction,
};
use cuda_vmm::{
    Access, Device, Engine, EngineOptions, Mapping, PhysicalMemory, PoolOptions, Reservation,
    SharedPoolOptions, Stream, VirtualMemoryPool,
};
use std::os::fd::AsFd;
use std::sync::Arc;

/// What the first owner writes, in every byte.
const PATTERN: u8 = 0xA7;
/// So many bytes in a row are no chance.
const RUN: usize = 16;
/// All that there is.
const PAGES: usize = 4;

/// Whether the pattern is anywhere in these bytes.
fn holds_pattern(stream: &Stream, address: u64, bytes: usize) -> bool {
    let mut read = vec![0; bytes];
    // SAFETY: callers pass memory that is mapped.
    unsafe { stream.read(address, &mut read) }.expect("read");
    read.chunks(RUN)
        .any(|run| run.iter().all(|byte| *byte == PATTERN))
}

/// Two ranges of one engine with memory for one of them.
struct Hands {
    stream: Stream,
    donor: VirtualMemoryPool,
    receiver: VirtualMemoryPool,
    engine: Engine,
}

impl Hands {
    fn new(device: &Device, options: EngineOptions) -> Self {
        Self::with(device, options, PoolOptions::new(), page())
    }

    fn with(
        device: &Device,
        options: EngineOptions,
        receives: PoolOptions,
        page_bytes: usize,
    ) -> Self {
        let options = options.limit_bytes(PAGES * page());
        let engine = Engine::new(device, options).expect("an engine");
        let bytes = 4 * PAGES * page();
        let donor = VirtualMemoryPool::on_engine(&engine, bytes, page()).expect("a pool");
        let receiver = VirtualMemoryPool::with_options(&engine, bytes, page_bytes, receives);
        let hands = Self {
            stream: Stream::new(device).expect("a stream"),
            receiver: receiver.expect("a pool"),
            donor,
            engine,
        };
        for pool in [&hands.donor, &hands.receiver] {
            pool.use_stream(&hands.stream).expect("of this device");
        }
        hands
    }

    /// Writes the pattern to all there is.
    fn write(&self) {
        let address = self.donor.allocate(0, PAGES * page()).expect("room");
        fill(&self.stream, address, PAGES * page(), PATTERN);
        assert!(holds_pattern(&self.stream, address, PAGES * page()));
    }

    /// Frees all of it, and has the engine do with it what it does.
    fn free(&self) {
        self.donor.deallocate(0, PAGES * page()).expect("live");
        self.settle();
    }

    fn settle(&self) {
        for _ in 0..4 {
            let done = self.engine.device().synchronize();
            done.expect("nothing is in the way");
            self.engine.step();
        }
    }

    /// The receiver takes all that there is, and reads each byte.
    #[track_caller]
    fn receive(&self) {
        let address = self.receiver.allocate(0, PAGES * page()).expect("room");
        let found = holds_pattern(&self.stream, address, PAGES * page());
        assert!(!found, "what another range wrote is still there");
    }
}

fn cached() -> EngineOptions {
    manual().chunk_bytes_max(0).cache_bytes_max(PAGES * page())
}

fn parked() -> EngineOptions {
    manual().chunk_bytes_max(0).park_bytes_max(PAGES * page())
}

#[test]
fn a_range_finds_its_own_bytes_again_so_others_would_be_found_too() {
    case(|device| {
        let hands = Hands::new(device, parked());
        hands.write();
        hands.free();
        assert_eq!(hands.engine.stats().parts.parked_bytes, PAGES * page());
        let address = hands.donor.allocate(0, PAGES * page()).expect("parked");
        assert!(holds_pattern(&hands.stream, address, PAGES * page()));
    });
}

#[test]
fn parked_memory_that_is_given_up_for_another() {
    case(|device| {
        let hands = Hands::new(device, parked());
        hands.write();
        hands.free();
        assert_eq!(hands.engine.stats().parts.parked_bytes, PAGES * page());
        hands.receive();
        assert_eq!(hands.engine.stats().parts.parked_bytes, 0);
    });
}

#[test]
fn memory_that_waited_in_the_cache() {
    case(|device| {
        let hands = Hands::new(device, cached());
        hands.write();
        hands.free();
        assert_eq!(hands.engine.stats().parts.cached_bytes, PAGES * page());
        under_test().interposer.start_trace();
        hands.receive();
        let calls = under_test().interposer.take_trace();
        assert!(!calls.contains(&DriverFunction::cuMemCreate), "the same");
    });
}

#[test]
fn memory_of_the_cache_whose_mapping_failed_on_the_way() {
    case(|device| {
        let hands = Hands::new(device, cached());
        hands.write();
        hands.free();
        let refused = DriverFunction::cuMemSetAccess;
        let fault = Fault::nth_of(refused, 3, CUDA_ERROR_OPERATING_SYSTEM);
        under_test().interposer.inject(fault);
        let outcome = hands.receiver.allocate(PAGES * page(), PAGES * page());
        assert!(outcome.is_err_and(|error| error.driver_code().is_some()));
        assert_eq!(hands.engine.stats().parts.cached_bytes, PAGES * page());
        hands.receive();
    });
}

/// The zeros are queued, or written; the owner takes the memory back and writes to it again.
#[test]
fn memory_that_its_owner_took_back_while_it_was_overwritten() {
    case(|device| {
        let hands = Hands::new(device, cached());
        hands.write();
        hands.donor.deallocate(0, PAGES * page()).expect("live");
        hands.stream.synchronize().expect("done");
        hands.engine.step();
        let retiring_bytes = hands.engine.stats().parts.retiring_bytes;
        assert_eq!(retiring_bytes, PAGES * page(), "being overwritten");
        hands.write();
        hands.free();
        assert_eq!(hands.engine.stats().parts.cached_bytes, PAGES * page());
        hands.receive();
    });
}

/// The owner's writes are still queued when it frees.
#[test]
fn memory_that_was_written_to_after_it_was_freed() {
    case(|device| {
        let hands = Hands::new(device, cached());
        let address = hands.donor.allocate(0, PAGES * page()).expect("room");
        let gate = Gate::close(device, hands.stream.raw());
        // SAFETY: the pool keeps the memory mapped until the stream is past this.
        unsafe { (hands.stream).memset(address, PATTERN, PAGES * page()) }.expect("queued");
        hands.donor.deallocate(0, PAGES * page()).expect("live");
        hands.engine.step();
        assert_eq!(hands.engine.stats().parts.cached_bytes, 0);
        gate.open();
        hands.settle();
        assert_eq!(hands.engine.stats().parts.cached_bytes, PAGES * page());
        hands.receive();
    });
}

#[test]
fn memory_of_a_pool_that_is_dropped() {
    case(|device| {
        for options in [parked(), cached()] {
            let hands = Hands::new(device, options);
            hands.write();
            let Hands {
                stream,
                donor,
                receiver,
                engine,
            } = hands;
            drop(donor);
            let address = receiver.allocate(0, PAGES * page()).expect("room");
            assert!(!holds_pattern(&stream, address, PAGES * page()));
            drop((receiver, engine));
            // Another engine on the device.
            let pool = VirtualMemoryPool::new(device, PAGES * page(), page()).expect("a pool");
            let address = pool.allocate(0, PAGES * page()).expect("room");
            assert!(!holds_pattern(&stream, address, PAGES * page()));
        }
    });
}

#[test]
fn memory_of_a_model_that_is_unregistered() {
    case(|device| {
        for engine in [parked(), cached()] {
            let options = SharedPoolOptions::new()
                .engine(engine.limit_bytes(PAGES * page()))
                .page_bytes(page());
            let shared = Models::with_options(device, options).expect("a pool");
            let stream = Stream::new(device).expect("a stream");
            for model in ["first", "second"] {
                let registered = shared.register_model(model, PAGES * page());
                registered.expect("a new name");
            }
            let allocate = |model| shared.allocate_for_model(model, PAGES * page());
            fill(
                &stream,
                allocate("first").expect("room"),
                PAGES * page(),
                PATTERN,
            );
            shared.unregister_model("first").expect("registered");
            let address = allocate("second").expect("room");
            assert!(!holds_pattern(&stream, address, PAGES * page()));
        }
    });
}

#[test]
fn memory_in_chunks_of_another_size() {
    case(|device| {
        let hands = Hands::with(device, cached(), PoolOptions::new(), 2 * page());
        hands.write();
        hands.free();
        assert_eq!(hands.engine.stats().parts.cached_bytes, PAGES * page());
        hands.receive();
    });
}

#[test]
fn memory_that_the_driver_would_not_take_back_at_first() {
    case(|device| {
        // What is in the cache is not mapped.
        for (refused, options) in [
            (DriverFunction::cuMemUnmap, parked()),
            (DriverFunction::cuMemRelease, parked()),
            (DriverFunction::cuMemRelease, cached()),
        ] {
            let hands = Hands::new(device, options);
            hands.write();
            hands.free();
            let fault = Fault::nth_of(refused, 1, CUDA_ERROR_OPERATING_SYSTEM);
            under_test().interposer.inject(fault);
            hands.engine.trim().expect_err("one piece was refused");
            let quarantined_bytes = hands.engine.stats().parts.quarantined_bytes;
            assert_eq!(quarantined_bytes, page(), "{refused}");
            hands.engine.step();
            hands.receive();
        }
    });
}

#[test]
fn memory_that_is_made_ahead() {
    case(|device| {
        let ahead = PoolOptions::new().ahead_bytes_max(2 * page());
        let hands = Hands::with(device, cached(), ahead, page());
        // What was made ahead of the receiver's first allocation is given up for this.
        hands.engine.step();
        hands.write();
        hands.free();
        let address = hands.receiver.allocate(0, page()).expect("room");
        hands.settle();
        assert_eq!(hands.receiver.stats().parts.ahead_bytes, 2 * page());
        hands.receiver.allocate(page(), 2 * page()).expect("ahead");
        assert!(!holds_pattern(&hands.stream, address, 3 * page()));
    });
}

#[test]
fn memory_that_compaction_returns() {
    case(|device| {
        let options = manual()
            .chunk_bytes_max(8 * page())
            .cache_bytes_max(64 * page());
        let engine = Engine::new(device, options.limit_bytes(68 * page())).expect("an engine");
        let pool = || VirtualMemoryPool::on_engine(&engine, 64 * page(), page()).expect("a pool");
        let (mut donor, receiver) = (pool(), pool());
        let stream = Stream::new(device).expect("a stream");
        donor.use_stream(&stream).expect("of this device");
        let address = donor.allocate(0, 64 * page()).expect("room");
        fill(&stream, address, 64 * page(), PATTERN);
        for at in (1..64).step_by(2) {
            donor.deallocate(at * page(), page()).expect("live");
        }
        let report = donor.compact().expect("room");
        assert_eq!(report.returned_bytes, 32 * page());
        for _ in 0..4 {
            device.synchronize().expect("done");
            engine.step();
        }
        let address = receiver
            .allocate(0, 32 * page())
            .expect("what was returned");
        assert!(!holds_pattern(&stream, address, 32 * page()));
    });
}

#[test]
fn memory_of_blocks_that_were_moved_away() {
    case(|device| {
        let engine = Engine::new(device, cached().limit_bytes(PAGES * page())).expect("an engine");
        let stream = Stream::new(device).expect("a stream");
        let element = ElementSize::new(2).expect("not zero");
        // Two blocks in a page.
        let tensor = TensorSpec::new("k", &[page() / 4], element).expect("a shape");
        let spec = LayerSpec::new([tensor]).expect("a tensor");
        let backing = BlockBacking::new(&engine, spec, 2 * PAGES, page()).expect("a backing");
        backing.use_stream(&stream).expect("of this device");
        backing.back(0..2 * PAGES).expect("room");
        let base = backing.tensors()[0].base_address();
        fill(&stream, base, PAGES * page(), PATTERN);
        // Every other block is in use, and moves beside another of them.
        let cost = |block: usize| (block % 2 == 1).then_some(0.0);
        let plan = backing.reclaim_candidates_with_moves(2 * page(), 1.0, cost);
        assert!(!plan.moves().is_empty() && plan.freed_bytes() >= 2 * page());
        backing.commit(&plan, &stream).expect("true");
        for _ in 0..4 {
            device.synchronize().expect("done");
            engine.step();
        }
        assert!(engine.stats().parts.cached_bytes >= 2 * page());
        let receiver = VirtualMemoryPool::on_engine(&engine, PAGES * page(), page());
        let receiver = receiver.expect("a pool");
        let address = receiver.allocate(0, 2 * page()).expect("room");
        assert!(!holds_pattern(&stream, address, 2 * page()));
    });
}

fn map(device: &Device, memory: PhysicalMemory) -> Mapping {
    let reservation = Reservation::new(device, memory.bytes()).expect("addresses");
    let access = [(device.clone(), Access::ReadWrite)];
    Mapping::new(&Arc::new(reservation), 0, &Arc::new(memory), &access).expect("mapped")
}

/// What the engine does not overwrite comes clean from the driver. CUDA promises that nowhere.
#[test]
fn memory_that_the_driver_had_in_between() {
    case(|device| {
        let stream = Stream::new(device).expect("a stream");
        let make = || map(device, PhysicalMemory::new(device, page()).expect("memory"));
        for _ in 0..PAGES {
            let mapping = make();
            let (address, bytes) = (mapping.address(), mapping.bytes());
            assert!(!holds_pattern(&stream, address, bytes));
            fill(&stream, address, bytes, PATTERN);
            mapping.close().expect("unmapped");
        }
    });
}

/// A pool's memory was not made to be exported, so nothing outside holds what an engine hands on.
#[test]
fn memory_of_a_pool_cannot_be_exported() {
    case(|device| {
        let hands = Hands::new(device, cached());
        hands.write();
        let table = device.driver().table();
        let address = hands.donor.base_address();
        let (mut handle, mut descriptor): (_, c_int) = (0, -1);
        let retained = with_context(device, || {
            let address = core::ptr::without_provenance_mut::<c_void>(address as usize);
            // SAFETY: `handle` is a place for the answer; the address is mapped.
            unsafe { (table.cuMemRetainAllocationHandle)(&mut handle, address) }
        });
        assert_eq!(retained, CUDA_SUCCESS);
        let kind = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
        let exported = with_context(device, || {
            let place = (&raw mut descriptor).cast();
            // SAFETY: for this type of handle the answer is an `int`, for which there is a place.
            unsafe { (table.cuMemExportToShareableHandle)(place, handle, kind, 0) }
        });
        // SAFETY: gives back the reference that was retained, once.
        let released = with_context(device, || unsafe { (table.cuMemRelease)(handle) });
        assert_eq!(released, CUDA_SUCCESS);
        assert_ne!(exported, CUDA_SUCCESS);
    });
}

/// Memory that was exported is released when its owner drops it, whatever has it elsewhere; no
/// engine gets it.
#[test]
fn exported_memory_goes_to_the_driver_and_to_no_range() {
    case(|device| {
        let hands = Hands::new(device, cached());
        let memory = PhysicalMemory::exportable(device, page()).expect("memory");
        let descriptor = memory.export().expect("a descriptor");
        let ours = map(device, memory);
        fill(&hands.stream, ours.address(), page(), PATTERN);
        // SAFETY: this size and device are those of what was exported.
        let theirs = unsafe { PhysicalMemory::import(device, descriptor.as_fd(), page()) };
        let theirs = map(device, theirs.expect("imported"));
        ours.close().expect("unmapped");
        hands.settle();
        let stats = hands.engine.stats();
        assert_eq!((stats.parts.cached_bytes, stats.committed_bytes), (0, 0));
        hands.receive();
        fill(
            &hands.stream,
            hands.receiver.base_address(),
            PAGES * page(),
            1,
        );
        assert!(holds_pattern(&hands.stream, theirs.address(), page()));
    });
}
