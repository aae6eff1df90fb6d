//! Memory that was handed out stays as it is until its token is released, whatever is freed or
//! dropped before.

mod common;
#[path = "lease/random.rs"]
mod random;

use common::{Gate, PAGE, Simulated, manual, with_context};
use cuda_vmm::sim::{Fault, SimConfig};
use cuda_vmm::sys::{CUDA_ERROR_OPERATING_SYSTEM, CUDA_SUCCESS, DriverFunction};
use cuda_vmm::{
    Device, Engine, EngineOptions, LeaseToken, PoolOptions, Stream, VirtualMemoryPool, VmmError,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

struct Fixture {
    simulated: Simulated,
    engine: Engine,
}

impl Fixture {
    fn new(options: EngineOptions) -> Self {
        let simulated = Simulated::default();
        let engine = Engine::new(&simulated.device, options).expect("engine");
        Self { simulated, engine }
    }

    fn manual() -> Self {
        Self::new(manual().limit_bytes(8 * PAGE))
    }

    fn pool(&self) -> VirtualMemoryPool {
        VirtualMemoryPool::on_engine(&self.engine, 16 * PAGE, PAGE).expect("pool")
    }

    /// A step that sees a lease end, and one that sees its fence past, after the stream's work.
    fn settle(&self, stream: &Stream) {
        self.engine.step();
        stream.synchronize().expect("legal work");
        self.engine.step();
    }
}

/// Writes a byte, or reads one back, at an address.
fn write(stream: &Stream, address: u64, byte: u8) {
    // SAFETY: the memory stays mapped until the work has run; that is what is tested.
    unsafe { stream.memset(address, byte, 1) }.expect("queued");
    stream.synchronize().expect("written");
}

fn read(device: &Device, address: u64) -> u8 {
    let mut byte = 0_u8;
    with_context(device, || {
        // SAFETY: the place is one byte long; the address is checked by the driver.
        let code =
            unsafe { (device.driver().table().cuMemcpyDtoH)((&raw mut byte).cast(), address, 1) };
        assert_eq!(code, CUDA_SUCCESS, "cuMemcpyDtoH");
    });
    byte
}

#[test]
fn freed_bytes_stay_as_they_are_until_the_token_is_released() {
    let fixture = Fixture::manual();
    let (pool, stream) = (
        fixture.pool(),
        Stream::new(&fixture.simulated.device).expect("stream"),
    );
    pool.use_stream(&stream).expect("same device");
    let address = pool.allocate(0, 2 * PAGE).expect("room");
    write(&stream, address, 7);
    let token = Arc::new(());
    pool.lease(0, PAGE, token.clone()).expect("live");
    assert!(pool.is_leased(PAGE - 1, 2) && !pool.is_leased(PAGE, PAGE));
    pool.deallocate(0, 2 * PAGE).expect("live");
    fixture.settle(&stream);

    let stats = pool.stats();
    assert_eq!(
        (stats.live_bytes, stats.live_pages, stats.parts.leased_bytes),
        (0, 0, PAGE)
    );
    assert_eq!(
        (stats.committed_bytes, pool.physical_memory_usage()),
        (PAGE, 0)
    );
    assert!(!pool.is_mapped(0, 1));
    assert_eq!(
        pool.allocate(PAGE - 1, 1),
        Err(VmmError::Leased {
            offset: PAGE - 1,
            bytes: 1
        })
    );
    assert_eq!(
        pool.try_allocate(0, PAGE),
        Err(VmmError::Leased {
            offset: 0,
            bytes: PAGE
        })
    );
    assert_eq!(
        pool.deallocate(0, PAGE),
        Err(VmmError::NotMapped {
            offset: 0,
            bytes: PAGE
        })
    );
    assert_eq!(
        pool.lease(0, 1, Arc::new(())),
        Err(VmmError::NotMapped {
            offset: 0,
            bytes: 1
        })
    );
    assert_eq!(read(&fixture.simulated.device, address), 7);

    drop(token);
    assert!(!pool.is_leased(0, PAGE));
    fixture.settle(&stream);
    assert_eq!(fixture.engine.stats().committed_bytes, 0);
    assert_eq!(pool.allocate(0, PAGE), Ok(address), "it can be had again");
}

#[test]
fn a_released_token_says_nothing_of_work_that_is_queued() {
    let fixture = Fixture::manual();
    let (pool, stream) = (
        fixture.pool(),
        Stream::new(&fixture.simulated.device).expect("stream"),
    );
    pool.use_stream(&stream).expect("same device");
    let address = pool.allocate(0, PAGE).expect("room");
    let token = Arc::new(());
    pool.lease(0, PAGE, token.clone()).expect("live");
    pool.deallocate(0, PAGE).expect("live");
    let gate = Gate::close(&fixture.simulated.device, stream.raw());
    // SAFETY: the memory stays mapped until the work has run; that is what is tested.
    unsafe { stream.memset(address, 1, PAGE) }.expect("queued");
    drop(token);
    for _ in 0..3 {
        fixture.engine.step();
        assert_eq!(fixture.engine.stats().parts.retiring_bytes, PAGE);
    }
    gate.open();
    fixture.settle(&stream);
    assert!(!fixture.simulated.simulator.is_poisoned(0));
    assert_eq!(fixture.engine.stats().committed_bytes, 0);
}

#[test]
fn a_page_is_leased_only_where_its_owner_has_nothing_in_it() {
    let fixture = Fixture::manual();
    let pool = fixture.pool();
    pool.allocate(0, 4 * PAGE).expect("room");
    let token = Arc::new(());
    pool.lease(PAGE / 2, 2 * PAGE, token.clone()).expect("live");
    // Of the three leased pages the first stays the owner's in part, and the last in its second
    // half.
    pool.deallocate(PAGE / 4, 2 * PAGE).expect("live");
    let stats = pool.stats();
    assert_eq!(
        (stats.parts.leased_bytes, stats.parts.live_page_bytes),
        (PAGE, 3 * PAGE)
    );
    assert_eq!(stats.live_bytes, 2 * PAGE);
    assert_eq!(
        pool.allocate(PAGE / 4, PAGE / 4),
        Ok(pool.base_address() + (PAGE / 4) as u64)
    );
    pool.deallocate(0, PAGE / 2).expect("live");
    assert_eq!(pool.stats().parts.leased_bytes, 2 * PAGE);
    drop(token);
    fixture.engine.step();
    assert_eq!(pool.stats().parts.leased_bytes, 0);
}

#[test]
fn bytes_stay_until_the_last_of_their_leases_ends() {
    let fixture = Fixture::manual();
    let pool = fixture.pool();
    pool.allocate(0, 4 * PAGE).expect("room");
    let tokens: Vec<_> = (0..3).map(|_| Arc::new(())).collect();
    for (at, token) in tokens.iter().enumerate() {
        pool.lease(at * PAGE, 2 * PAGE, token.clone())
            .expect("live");
    }
    pool.deallocate(0, 4 * PAGE).expect("live");
    let left = [4, 3, 2, 0];
    assert_eq!(pool.stats().parts.leased_bytes, left[0] * PAGE);
    for (token, pages) in tokens.into_iter().zip(&left[1..]) {
        drop(token);
        fixture.engine.step();
        assert_eq!(pool.stats().parts.leased_bytes, pages * PAGE);
    }
}

#[test]
fn leased_memory_outlives_its_pool_and_goes_with_the_last_token() {
    let fixture = Fixture::manual();
    let pool = fixture.pool();
    let (stream, before) = (
        Stream::new(&fixture.simulated.device).expect("stream"),
        fixture.simulated.books(),
    );
    pool.use_stream(&stream).expect("same device");
    let address = pool.allocate(0, 3 * PAGE).expect("room");
    write(&stream, address + PAGE as u64, 9);
    let token = Arc::new(());
    pool.lease(PAGE, PAGE, token.clone()).expect("live");
    drop(pool);
    assert_eq!(read(&fixture.simulated.device, address + PAGE as u64), 9);
    let stats = fixture.engine.stats();
    assert_eq!((stats.parts.leased_bytes, stats.ranges), (PAGE, 1));
    drop(token);
    fixture.settle(&stream);
    let stats = fixture.engine.stats();
    assert_eq!((stats.committed_bytes, stats.ranges), (0, 0));
    let books = fixture.simulated.books();
    assert_eq!(books.mappings, 0);
    assert!(
        books.reservations < before.reservations,
        "its addresses are free"
    );
}

#[test]
fn an_engine_lives_until_its_last_lease() {
    let simulated = Simulated::default();
    let token = Arc::new(());
    let pool = VirtualMemoryPool::new(&simulated.device, 4 * PAGE, PAGE).expect("pool");
    let address = pool.allocate(0, PAGE).expect("room");
    pool.lease(0, PAGE, token.clone()).expect("live");
    drop(pool);
    assert_eq!(
        read(&simulated.device, address),
        read(&simulated.device, address)
    );
    assert_eq!(simulated.books().physical_bytes, PAGE);
    drop(token);
    let patience = Instant::now() + Duration::from_secs(60);
    while simulated.books().physical_bytes + simulated.books().reservations > 0 {
        assert!(
            Instant::now() < patience,
            "its worker gives it back: {:?}",
            simulated.books()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn without_a_worker_an_engine_that_is_short_gives_back_what_another_left_leased() {
    let simulated = Simulated::new(cuda_vmm::sim::SimConfig::new().memory_bytes(4 * PAGE));
    let (token, before) = (Arc::new(()), simulated.books());
    let engine = Engine::new(&simulated.device, manual()).expect("engine");
    let pool = VirtualMemoryPool::on_engine(&engine, 4 * PAGE, PAGE).expect("pool");
    pool.allocate(0, 3 * PAGE).expect("room");
    pool.lease(0, PAGE, token.clone()).expect("live");
    drop((pool, engine));
    assert_eq!(simulated.books().physical_bytes, PAGE);
    let engine = Engine::new(&simulated.device, manual()).expect("engine");
    let other = VirtualMemoryPool::on_engine(&engine, 4 * PAGE, PAGE).expect("pool");
    assert!(other.allocate(0, 4 * PAGE).unwrap_err().is_out_of_memory());
    drop(token);
    other
        .allocate(0, 4 * PAGE)
        .expect("unused memory is given back");
    drop((other, engine));
    assert_eq!(simulated.books(), before);
}

#[test]
fn a_chunk_with_leased_bytes_is_not_moved() {
    let fixture = Fixture::manual();
    let options = PoolOptions::new().single_handle(true);
    let pool = VirtualMemoryPool::with_options(&fixture.engine, 16 * PAGE, PAGE, options);
    let mut pool = pool.expect("pool");
    pool.allocate(0, 4 * PAGE).expect("room");
    let token = Arc::new(());
    pool.lease(0, 1, token.clone()).expect("live");
    pool.deallocate(PAGE, 3 * PAGE).expect("live");
    assert_eq!(pool.compact().expect("nothing to do").returned_bytes, 0);
    assert_eq!(pool.stats().parts.slack_bytes, 3 * PAGE);
    drop(token);
    // What was leased is not freed: the token is looked at when it is asked for.
    assert!(!pool.is_leased(0, 1));
    assert_eq!(pool.compact().expect("moved").returned_bytes, 3 * PAGE);
}

#[test]
fn tokens_are_dropped_without_the_lock() {
    /// Calls the pool when it is dropped.
    #[derive(Debug)]
    struct Calling(Arc<VirtualMemoryPool>, Arc<AtomicBool>);
    impl LeaseToken for Calling {
        fn is_released(&mut self) -> bool {
            true
        }
    }
    impl Drop for Calling {
        fn drop(&mut self) {
            assert_eq!(self.0.stats().capacity_bytes, 16 * PAGE);
            self.1.store(true, Ordering::SeqCst);
        }
    }
    let fixture = Fixture::manual();
    let pool = Arc::new(fixture.pool());
    pool.allocate(0, PAGE).expect("room");
    let uses: [&dyn Fn(); 4] = [
        &|| assert!(!pool.is_leased(0, 1)),
        &|| (0..8).for_each(|_| pool.lease(0, 1, Arc::new(())).expect("live")),
        &|| {
            pool.deallocate(0, 1)
                .and_then(|()| pool.allocate(0, 1).map(drop))
                .expect("live")
        },
        &|| {
            assert!(
                pool.lease(1, 16 * PAGE, Calling(pool.clone(), Arc::default()))
                    .is_err()
            )
        },
    ];
    for act in uses {
        let dropped = Arc::new(AtomicBool::new(false));
        pool.lease(0, 1, Calling(pool.clone(), dropped.clone()))
            .expect("live");
        act();
        let _ = pool.is_leased(0, 1);
        assert!(dropped.load(Ordering::SeqCst));
    }
}

/// The next leases find out those that are over, though no step is taken and nothing is freed.
#[test]
fn released_tokens_do_not_pile_up() {
    #[derive(Debug)]
    struct Released(Arc<AtomicUsize>);
    impl LeaseToken for Released {
        fn is_released(&mut self) -> bool {
            true
        }
    }
    impl Drop for Released {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }
    let fixture = Fixture::manual();
    let pool = fixture.pool();
    pool.allocate(0, PAGE).expect("room");
    let kept = Arc::new(AtomicUsize::new(0));
    for _ in 0..1000 {
        kept.fetch_add(1, Ordering::SeqCst);
        pool.lease(0, 1, Released(kept.clone())).expect("live");
        let kept = kept.load(Ordering::SeqCst);
        assert!(kept <= 16, "{kept} tokens are kept");
    }
}

#[test]
fn bad_input_is_refused_by_its_values() {
    let fixture = Fixture::manual();
    let pool = fixture.pool();
    pool.allocate(0, PAGE).expect("room");
    let capacity_bytes = 16 * PAGE;
    for (offset, bytes, error) in [
        (0, 0, VmmError::ZeroSize { what: "size" }),
        (
            PAGE,
            1,
            VmmError::NotMapped {
                offset: PAGE,
                bytes: 1,
            },
        ),
        (
            0,
            PAGE + 1,
            VmmError::NotMapped {
                offset: 0,
                bytes: PAGE + 1,
            },
        ),
        (
            1,
            capacity_bytes,
            VmmError::OutOfRange {
                offset: 1,
                bytes: capacity_bytes,
                capacity_bytes,
            },
        ),
        (
            usize::MAX,
            2,
            VmmError::Overflow {
                offset: usize::MAX,
                bytes: 2,
            },
        ),
    ] {
        assert_eq!(pool.lease(offset, bytes, Arc::new(())), Err(error));
    }
    assert!(!pool.is_leased(0, usize::MAX));
}

#[test]
fn each_driver_call_of_giving_leased_memory_back_may_fail() {
    for nth in 1.. {
        let fixture = Fixture::manual();
        let pool = fixture.pool();
        pool.allocate(0, 2 * PAGE).expect("room");
        let token = Arc::new(());
        pool.lease(0, PAGE, token.clone()).expect("live");
        pool.deallocate(0, 2 * PAGE).expect("live");
        drop(token);
        let calls = || {
            DriverFunction::ALL
                .iter()
                .map(|call| fixture.simulated.simulator.calls(*call))
                .sum::<u64>()
        };
        let before = calls();
        fixture
            .simulated
            .simulator
            .inject(Fault::nth_call(nth, CUDA_ERROR_OPERATING_SYSTEM));
        fixture.engine.step();
        let made = calls() - before;
        fixture.simulated.simulator.clear_faults();
        for _ in 0..3 {
            let stats = fixture.engine.stats();
            assert_eq!(
                stats.parts.total_bytes(),
                stats.committed_bytes,
                "call {nth}: {stats}"
            );
            fixture.engine.step();
        }
        assert_eq!(fixture.engine.stats().committed_bytes, 0, "call {nth}");
        if made < nth {
            assert!(
                nth > 3,
                "a fence, an unmap and a release are more calls than {made}"
            );
            break;
        }
    }
}

/// Only the engine itself holds it, for the sake of two leases; the first that ends takes nothing
/// from the second.
#[test]
fn an_engine_lives_until_the_last_lease_of_the_last_of_its_pools() {
    let simulated = Simulated::new(cuda_vmm::sim::SimConfig::new().memory_bytes(4 * PAGE));
    let (tokens, before) = ([Arc::new(()), Arc::new(())], simulated.books());
    let engine = Engine::new(&simulated.device, manual()).expect("engine");
    let pools = [(), ()].map(|()| VirtualMemoryPool::on_engine(&engine, PAGE, PAGE).expect("pool"));
    for (pool, token) in pools.iter().zip(&tokens) {
        pool.allocate(0, PAGE).expect("room");
        pool.lease(0, PAGE, token.clone()).expect("live");
    }
    let stream = Stream::new(&simulated.device).expect("stream");
    let address = pools[1].base_address();
    write(&stream, address, 9);
    drop((pools, engine, stream));
    let engine = Engine::new(&simulated.device, manual()).expect("engine");
    let other = VirtualMemoryPool::on_engine(&engine, 4 * PAGE, PAGE).expect("pool");
    let [first, second] = tokens;
    drop(first);
    other.allocate(0, 3 * PAGE).expect("one lease is over");
    assert_eq!(simulated.device.quarantined_bytes(), 0, "it has an owner");
    simulated.device.retry_quarantine();
    assert_eq!(read(&simulated.device, address), 9);
    drop(second);
    other.allocate(3 * PAGE, PAGE).expect("both are over");
    drop((other, engine));
    assert_eq!(simulated.books(), before);
}

#[test]
fn bytes_that_are_freed_after_their_lease_do_not_wait_for_a_step() {
    let fixture = Fixture::manual();
    let pool = fixture.pool();
    pool.allocate(0, PAGE).expect("room");
    let token = Arc::new(());
    pool.lease(0, PAGE, token.clone()).expect("live");
    drop(token);
    pool.deallocate(0, PAGE).expect("live");
    let stats = pool.stats();
    assert_eq!(
        (stats.parts.leased_bytes, stats.parts.retiring_bytes),
        (0, PAGE)
    );
}

/// Until then the engine has had nothing to do, so that it has no thread yet.
#[test]
fn freeing_leased_bytes_wakes_the_worker() {
    let fixture = Fixture::new(EngineOptions::new());
    let pool = fixture.pool();
    pool.allocate(0, PAGE).expect("room");
    let token = Arc::new(());
    pool.lease(0, PAGE, token.clone()).expect("live");
    pool.deallocate(0, PAGE).expect("live");
    drop(token);
    let patience = Instant::now() + Duration::from_secs(60);
    while fixture.engine.stats().committed_bytes > 0 {
        assert!(Instant::now() < patience, "{}", fixture.engine.stats());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A page that was leased and is freed with its lease over, while work that the lease's holder
/// queued is behind a gate, on a stream of this device or another that is not named.
fn freed_after_a_lease(
    devices: usize,
    gated: usize,
    version: i32,
) -> (Simulated, Engine, [Stream; 2], VirtualMemoryPool, Gate) {
    let config = SimConfig::new().devices(devices).driver_version(version);
    let simulated = Simulated::new(config);
    let engine = Engine::new(&simulated.device, manual()).expect("an engine");
    let pool = VirtualMemoryPool::on_engine(&engine, 16 * PAGE, PAGE).expect("a pool");
    let named = Stream::new(&simulated.device).expect("a stream");
    pool.use_stream(&named).expect("of this device");
    pool.allocate(0, PAGE).expect("room");
    let token = Arc::new(());
    pool.lease(0, PAGE, token.clone()).expect("live");
    let device = simulated.driver.device(gated).expect("a device");
    let other = Stream::new(&device).expect("a stream");
    let gate = Gate::close(&device, other.raw());
    gate.wait_until_reached();
    drop(token);
    pool.deallocate(0, PAGE).expect("live");
    (simulated, engine, [named, other], pool, gate)
}

#[test]
fn work_of_a_lease_is_waited_for_on_whichever_stream_of_whichever_device_it_is() {
    for (devices, gated) in [(1, 0), (2, 0), (2, 1), (3, 2)] {
        let (simulated, engine, _streams, _pool, gate) = freed_after_a_lease(devices, gated, 13000);
        for _ in 0..3 {
            let report = engine.step();
            let bytes = (report.drained_bytes, report.retiring_bytes);
            assert_eq!(bytes, (0, PAGE), "{devices} devices, the work on {gated}");
        }
        gate.open();
        let device = simulated.driver.device(gated).expect("a device");
        device.synchronize().expect("done");
        assert_eq!(engine.step().drained_bytes, PAGE);
    }
}

#[test]
fn without_fences_for_contexts_the_work_of_a_lease_is_waited_for_by_a_step() {
    for (devices, gated) in [(1, 0), (2, 1)] {
        let (_simulated, engine, _streams, _pool, gate) =
            freed_after_a_lease(devices, gated, 12000);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                gate.open();
            });
            assert_eq!(engine.step().drained_bytes, PAGE);
            assert!(!gate.is_closed(), "the step waited");
        });
    }
}
