//! Pools on a device as large as it is.

use crate::common::{Models, manual};
use crate::{case, ends, fill, page, pool};
use cuda_vmm::sim::SimConfig;
use cuda_vmm::sys::CUDA_ERROR_OUT_OF_MEMORY;
use cuda_vmm::{
    Driver, DriverKind, Engine, SharedPoolOptions, Stream, VirtualMemoryPool, VmmError,
};

const GIB: usize = 1 << 30;

#[test]
fn what_a_stream_writes_while_the_pool_grows_is_read_back() {
    const PAGES: usize = 12;
    case(|device| {
        let page = page();
        let stream = Stream::new(device).expect("a stream");
        let (_engine, pool) = pool(device, PAGES);
        pool.use_stream(&stream).expect("of this device");
        for at in 0..PAGES {
            let address = pool.allocate(at * page, page).expect("room");
            assert_eq!(address, pool.base_address() + (at * page) as u64);
            // SAFETY: live until the pool is closed, which waits for the stream.
            unsafe { stream.memset(address, at as u8 + 1, page) }.expect("queued");
        }
        for at in 0..PAGES {
            let address = pool.base_address() + (at * page) as u64;
            assert_eq!(ends(&stream, address, page), [at as u8 + 1; 2], "page {at}");
        }
        // A copy across every boundary between pages sees one range.
        let half = PAGES / 2 * page;
        let (low, high) = (pool.base_address(), pool.base_address() + half as u64);
        // SAFETY: both halves are live until the work is waited for.
        unsafe { stream.copy(low, high, half) }.expect("queued");
        for at in 0..PAGES / 2 {
            let address = pool.base_address() + (at * page) as u64;
            let expected = (at + PAGES / 2) as u8 + 1;
            assert_eq!(ends(&stream, address, page), [expected; 2], "page {at}");
        }
        pool.close().expect("closed");
    });
}

#[test]
fn a_reservation_of_128_gib_with_one_gib_behind_it() {
    case(|device| {
        let before = device.free_bytes().expect("a number");
        let pool = VirtualMemoryPool::new(device, 128 * GIB, page()).expect("addresses");
        assert_eq!(device.free_bytes(), Ok(before), "addresses cost no memory");
        let stream = Stream::new(device).expect("a stream");
        pool.use_stream(&stream).expect("of this device");
        let address = pool.allocate(100 * GIB, GIB).expect("room");
        assert_eq!(address, pool.base_address() + 100 * GIB as u64);
        assert_eq!(pool.physical_memory_usage(), GIB);
        assert_eq!(pool.stats().committed_bytes, GIB);
        let free_bytes = device.free_bytes().expect("a number");
        assert!(
            free_bytes <= before - GIB,
            "{before} bytes free before, {free_bytes} after"
        );
        for at in [0, GIB - (1 << 20)] {
            fill(&stream, address + at as u64, 1 << 20, 61);
            assert_eq!(ends(&stream, address + at as u64, 1 << 20), [61; 2]);
        }
        pool.deallocate(100 * GIB, GIB).expect("live");
        assert_eq!(pool.physical_memory_usage(), 0);
        pool.close().expect("closed");
    });
}

#[test]
fn two_models_under_a_limit_of_32_gib() {
    case(|device| {
        let options = SharedPoolOptions::new()
            .engine(manual().limit_bytes(32 * GIB).chunk_bytes_max(128 << 20))
            .page_bytes(page());
        let pool = Models::with_options(device, options).expect("a pool");
        for model in ["first", "second"] {
            pool.register_model(model, 64 * GIB).expect("addresses");
        }
        pool.allocate_for_model("first", 20 * GIB).expect("room");
        let first = pool.model_base_address("first").expect("registered");
        pool.allocate_for_model("second", 8 * GIB).expect("room");
        pool.allocate_for_model("second", 4 * GIB).expect("room");
        let error = pool
            .allocate_for_model("second", GIB)
            .expect_err("the limit");
        assert_eq!(
            error,
            VmmError::OutOfPhysicalMemory {
                asked_bytes: GIB,
                free_bytes: 0,
                retiring_bytes: 0,
                reclaimable_bytes: 0,
                limit_bytes: 32 * GIB
            }
        );
        assert!(error.is_retryable());
        assert_eq!(error.shortfall_bytes(), GIB);
        assert_eq!(pool.stats().committed_bytes, 32 * GIB);
        pool.deallocate_for_model_address("first", first + 16 * GIB as u64, 4 * GIB)
            .expect("live");
        pool.allocate_for_model("second", GIB)
            .expect("what the first gave back");
        let live = |model| pool.model_stats(model).expect("registered").live_bytes;
        assert_eq!((live("first"), live("second")), (16 * GIB, 13 * GIB));
        assert!(pool.stats().committed_bytes <= 32 * GIB);
        for model in pool.models() {
            pool.unregister_model(&model).expect("closed");
        }
        assert_eq!(pool.stats().committed_bytes, 0);
    });
}

#[test]
fn a_device_that_is_really_full_refuses_and_loses_nothing() {
    case(|device| {
        // The simulated device is a smaller one, to be full sooner.
        let device = match device.driver().kind() {
            DriverKind::Real => device.clone(),
            DriverKind::Simulated => {
                let config = SimConfig::new()
                    .memory_bytes(5 * GIB + GIB / 2)
                    .granularity_bytes(device.granularity_bytes());
                let driver = Driver::simulated(config).expect("a simulator");
                driver.device(0).expect("a device")
            }
        };
        let before = device.free_bytes().expect("a number");
        let options = manual().limit_bytes(1 << 46).chunk_bytes_max(128 << 20);
        let engine = Engine::new(&device, options).expect("an engine");
        let page = page();
        let pool = VirtualMemoryPool::on_engine(&engine, 1 << 40, page).expect("addresses");
        let mut live = 0;
        let error = loop {
            match pool.allocate(live, GIB) {
                Ok(_) => live += GIB,
                Err(error) => break error,
            }
            assert!(live <= before, "more than there was");
        };
        assert_eq!(
            error.driver_code(),
            Some(CUDA_ERROR_OUT_OF_MEMORY),
            "{error}"
        );
        assert!(error.is_out_of_memory() && error.is_retryable());
        assert!(before - live < 2 * GIB, "{live} of {before} bytes were had");
        let stats = engine.stats();
        assert_eq!(stats.parts.live_page_bytes, live);
        assert_eq!(stats.committed_bytes, live);
        assert_eq!(stats.parts.total_bytes(), live);
        assert_eq!(pool.physical_memory_usage(), live);
        assert!(!pool.is_mapped(live, 1));
        let full = device.free_bytes().expect("a number");
        let again = pool.allocate(live, GIB).expect_err("still full");
        assert_eq!(again.driver_code(), Some(CUDA_ERROR_OUT_OF_MEMORY));
        assert_eq!(engine.stats(), stats, "unchanged by the failed call");
        assert_eq!(device.free_bytes(), Ok(full));
        pool.deallocate(0, live).expect("live");
        device.synchronize().expect("done");
        engine.step();
        assert_eq!(engine.stats().committed_bytes, 0);
        pool.close().expect("closed");
        drop(engine);
        assert_eq!(device.quarantined_bytes(), 0);
        if device.driver().kind() == DriverKind::Simulated {
            assert_eq!(device.free_bytes(), Ok(before));
        }
    });
}
