//! Every noun and both pools are made and given back over and over, in all the ways in which they
//! can end; what the process and the device hold is the same afterwards.
//!
//! The environment chooses the driver, the devices and the page (`common/under_test.rs`).

mod common;

use common::{Gate, Models, PATIENCE, UnderTest, manual, turn, under_test, with_context};
use core::ptr::null_mut;
use cuda_vmm::sim::Fault;
use cuda_vmm::sys::{CUDA_ERROR_OPERATING_SYSTEM, CUDA_SUCCESS, DriverFunction};
use cuda_vmm::{
    Access, Device, Engine, EngineOptions, HostStore, HostStoreOptions, Mapping, PhysicalMemory,
    Reservation, Result, SharedPoolOptions, Stream, VirtualMemoryPool,
};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

fn page() -> usize {
    under_test().page_bytes
}

/// How often everything is done: less often where pages are large and take long to write.
fn round_count() -> usize {
    ((128 << 20) / page()).clamp(5, 50)
}

/// Does something once to warm the driver, and then many times without anything staying behind, on
/// each device.
#[track_caller]
fn rounds(act: impl Fn(&Device)) {
    let under_test = under_test();
    let _turn = turn();
    under_test.devices.iter().for_each(&act);
    under_test.unchanged_here(|| {
        for _ in 0..round_count() {
            under_test.devices.iter().for_each(&act);
        }
    });
}

fn mapping(device: &Device, memory: PhysicalMemory) -> Result<Mapping> {
    let reservation = Arc::new(Reservation::new(device, 4 * page())?);
    let access = [(device.clone(), Access::ReadWrite)];
    Mapping::new(&reservation, page(), &Arc::new(memory), &access)
}

/// A pool with pages live, freed, freed under work, and freed and taken back.
fn used(engine: &Engine, stream: &Stream) -> Result<VirtualMemoryPool> {
    let pool = VirtualMemoryPool::on_engine(engine, 64 * page(), page())?;
    pool.use_stream(stream)?;
    let address = pool.allocate(page() / 2, 6 * page())?;
    // SAFETY: live now, and the pool keeps the memory mapped until the stream is past this.
    unsafe { stream.memset(address, 1, page()) }?;
    pool.deallocate(page() / 2, 2 * page())?;
    pool.allocate(32 * page(), page())?;
    let _ = pool.try_allocate(page() / 2, page());
    pool.deallocate(4 * page(), page())?;
    Ok(pool)
}

fn options() -> EngineOptions {
    EngineOptions::new()
        .limit_bytes(32 * page())
        .park_bytes_max(2 * page())
        .cache_bytes_max(4 * page())
        .chunk_bytes_max(4 * page())
}

/// Bytes given back, a trim, a lowered limit, and bytes that outlive their store.
#[test]
fn host_stores_that_end_in_every_way() {
    const UNIT: usize = 2 << 20;
    rounds(|device| {
        let options = HostStoreOptions::new().piece_bytes(UNIT).threads(2);
        let store = HostStore::with_options(device, 4 * UNIT, options).expect("a store");
        let kept = store.reserve(UNIT).expect("room");
        drop(store.reserve(3 * UNIT).expect("room"));
        assert_eq!(store.trim(), Ok(3 * UNIT));
        drop(store.reserve(3 * UNIT).expect("room"));
        store.set_limit_bytes(2 * UNIT).expect("this process");
        store.reserve(2 * UNIT).expect_err("above the limit");
        drop(store);
        drop(kept);
    });
}

/// What the driver refuses to unregister is kept, and goes when it is tried again.
#[test]
fn host_memory_that_the_driver_refuses_to_take_back() {
    rounds(|device| {
        let store = HostStore::new(device, 2 << 20).expect("a store");
        drop(store.reserve(1).expect("room"));
        let interposer = &under_test().interposer;
        let refusal = CUDA_ERROR_OPERATING_SYSTEM;
        interposer.inject(Fault::nth_of(
            DriverFunction::cuMemHostUnregister,
            1,
            refusal,
        ));
        drop(store);
        assert_eq!(device.quarantined_host_bytes(), 2 << 20);
        device.retry_quarantine();
        assert_eq!(device.quarantined_host_bytes(), 0);
    });
}

#[test]
fn nouns_that_are_closed_or_dropped() {
    rounds(|device| {
        let memory = PhysicalMemory::new(device, page()).expect("memory");
        let mapped = mapping(device, memory).expect("mapped");
        let memory = mapped.memory().clone();
        mapped.close().expect("unmapped");
        Arc::into_inner(memory)
            .expect("the last")
            .close()
            .expect("released");
        Reservation::new(device, page())
            .expect("addresses")
            .close()
            .expect("freed");

        let stream = Stream::new(device).expect("a stream");
        let fence = stream.record().expect("a fence");
        let memory = PhysicalMemory::new(device, page()).expect("memory");
        drop(mapping(device, memory).expect("mapped"));
        drop((stream, fence));
    });
}

#[test]
fn memory_that_is_exported_and_imported() {
    rounds(|device| {
        let memory = PhysicalMemory::exportable(device, page()).expect("memory");
        let descriptor = memory.export().expect("a descriptor");
        let exported = mapping(device, memory).expect("mapped");
        // SAFETY: exported just now, with this size and on this device.
        let imported = unsafe { PhysicalMemory::import(device, descriptor.as_fd(), page()) };
        let imported = mapping(device, imported.expect("imported")).expect("mapped");
        drop((exported, imported));
    });
}

#[test]
fn pools_that_are_closed_with_memory_live_and_work_running() {
    rounds(|device| {
        let engine = Engine::new(device, options()).expect("an engine");
        let stream = Stream::new(device).expect("a stream");
        used(&engine, &stream)
            .expect("used")
            .close()
            .expect("closed");
    });
}

#[test]
fn pools_that_are_dropped_on_another_thread_before_the_work_is_done() {
    rounds(|device| {
        let engine = Engine::new(device, options()).expect("an engine");
        let stream = Stream::new(device).expect("a stream");
        let gate = Gate::close(device, stream.raw());
        let pool = used(&engine, &stream).expect("used");
        std::thread::scope(|scope| {
            scope.spawn(|| drop(pool));
            gate.open();
        });
    });
}

#[test]
fn shared_pools_whose_models_are_unregistered_or_not() {
    rounds(|device| {
        let options = SharedPoolOptions::new()
            .engine(options())
            .page_bytes(page());
        let pool = Models::with_options(device, options).expect("a pool");
        for model in ["unregistered", "left"] {
            pool.register_model(model, 16 * page()).expect("a new name");
            pool.allocate_for_model(model, 3 * page()).expect("room");
        }
        pool.unregister_model("unregistered").expect("registered");
    });
}

#[test]
fn calls_that_fail_and_are_retried() {
    rounds(|device| {
        let interposer = &under_test().interposer;
        for refused in [
            DriverFunction::cuMemCreate,
            DriverFunction::cuMemMap,
            DriverFunction::cuMemSetAccess,
            DriverFunction::cuMemUnmap,
            DriverFunction::cuMemRelease,
            DriverFunction::cuMemAddressFree,
            DriverFunction::cuEventCreate,
            DriverFunction::cuEventDestroy,
            DriverFunction::cuStreamDestroy,
        ] {
            interposer.inject(Fault::nth_of(refused, 1, CUDA_ERROR_OPERATING_SYSTEM));
            let engine = Engine::new(device, manual()).expect("an engine");
            let stream = Stream::new(device).expect("a stream");
            // An error for some, and for others retried behind the scenes.
            let _ = used(&engine, &stream);
            drop((engine, stream));
            interposer.clear_faults();
            device.synchronize().expect("done");
            device.retry_quarantine();
        }
    });
}

#[test]
fn graphs_over_pool_memory() {
    rounds(|device| {
        let engine = Engine::new(device, manual()).expect("an engine");
        let stream = Stream::new(device).expect("a stream");
        let pool = VirtualMemoryPool::on_engine(&engine, page(), page()).expect("a pool");
        let address = pool.allocate(0, page()).expect("room");
        let table = *device.driver().table();
        let (mut graph, mut exec) = (null_mut(), null_mut());
        with_context(device, || {
            // SAFETY: the stream is alive, and the places are valid.
            let codes = unsafe {
                [
                    (table.cuStreamBeginCapture)(stream.raw(), 0),
                    (table.cuMemsetD8Async)(address, 1, page(), stream.raw()),
                    (table.cuStreamEndCapture)(stream.raw(), &mut graph),
                    (table.cuGraphInstantiateWithFlags)(&mut exec, graph, 0),
                    (table.cuGraphLaunch)(exec, stream.raw()),
                    (table.cuStreamSynchronize)(stream.raw()),
                    (table.cuGraphExecDestroy)(exec),
                    (table.cuGraphDestroy)(graph),
                ]
            };
            assert_eq!(codes, [CUDA_SUCCESS; 8]);
        });
    });
}

/// The comparison itself: what stays behind is found.
#[test]
fn what_stays_behind_is_found() {
    let UnderTest { interposer, .. } = under_test();
    let device = under_test().device();
    let _turn = turn();
    let finds = |what: &str, leak: &dyn Fn() -> Box<dyn FnOnce()>| {
        let before = under_test().settled();
        let give_back = leak();
        let found = under_test().left_of(&before, Duration::ZERO);
        assert!(
            found.is_some(),
            "{what} stayed behind: {:?}",
            interposer.books()
        );
        give_back();
        let left = under_test().left_of(&before, PATIENCE);
        assert_eq!(left, None, "{what}");
    };
    finds("memory", &|| {
        let memory = PhysicalMemory::new(device, page()).expect("memory");
        Box::new(move || drop(memory))
    });
    finds("a reservation", &|| {
        let reservation = Reservation::new(device, page()).expect("addresses");
        Box::new(move || drop(reservation))
    });
    finds("an event", &|| {
        let fence = Stream::new(device).and_then(|stream| stream.record());
        Box::new(move || drop(fence.expect("a fence")))
    });
    finds("memory in quarantine", &|| {
        let fault = Fault::nth_of(DriverFunction::cuMemRelease, 1, CUDA_ERROR_OPERATING_SYSTEM);
        let memory = PhysicalMemory::new(device, page()).expect("memory");
        interposer.inject(fault);
        drop(memory);
        Box::new(|| {
            device.retry_quarantine();
        })
    });
}
