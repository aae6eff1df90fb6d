//! Many threads on one engine: nothing is handed out twice, nothing is lost.

mod common;

use common::Models;
use cuda_vmm::sim::{Books, SimConfig, Simulator};
use cuda_vmm::{Driver, Stream, VirtualMemoryPool, VmmError};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const PAGE: usize = 2 << 20;
const THREADS: usize = 8;

/// Every byte is back at once; the engine itself may end a moment later, with its worker's last
/// step.
fn all_is_back(simulator: &Simulator) {
    let books = simulator.books(0);
    assert_eq!((books.physical_bytes, books.reservations), (0, 0));
    for _ in 0..5_000 {
        if simulator.books(0) == Books::default() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    panic!("left behind: {:?}", simulator.books(0));
}

#[test]
fn threads_that_share_pages_of_one_pool_keep_their_bytes_apart() {
    let driver = Driver::simulated(SimConfig::new()).expect("simulator");
    let simulator = driver.simulator().expect("simulated").clone();
    let device = driver.device(0).expect("device");
    // Each page has a slice for each thread, so every page is shared by all.
    const SLICE: usize = PAGE / THREADS;
    let pool = VirtualMemoryPool::new(&device, 8 * PAGE, PAGE).expect("pool");
    let stream = Stream::new(&device).expect("stream");
    pool.use_stream(&stream).expect("same device");
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (pool, stream) = (&pool, &stream);
            scope.spawn(move || {
                let mut random = SmallRng::seed_from_u64(thread as u64);
                let mut held = [None; 8];
                for round in 0..150u32 {
                    let page = random.random_range(0..8);
                    let offset = page * PAGE + thread * SLICE;
                    match held[page] {
                        None => {
                            let address = pool.allocate(offset, SLICE).expect("there is room");
                            let mark = (round % 251) as u8 ^ thread as u8;
                            // SAFETY: these bytes are live and this thread's own.
                            unsafe { stream.memset(address, mark, 64) }.expect("queued");
                            held[page] = Some((address, mark));
                        }
                        Some((address, mark)) => {
                            let mut seen = [0; 64];
                            // SAFETY: as above.
                            unsafe { stream.read(address, &mut seen) }.expect("legal");
                            assert_eq!(seen, [mark; 64], "thread {thread}, round {round}");
                            pool.deallocate(offset, SLICE).expect("live");
                            held[page] = None;
                        }
                    }
                }
            });
        }
    });
    let stats = pool.engine().stats();
    assert_eq!(stats.parts.total_bytes(), stats.committed_bytes);
    assert!(!simulator.is_poisoned(0));
    drop((pool, stream, device, driver));
    all_is_back(&simulator);
}

#[test]
fn models_that_compete_for_one_limit_never_pass_it_and_all_finish() {
    let driver = Driver::simulated(SimConfig::new().unbacked()).expect("simulator");
    let simulator = driver.simulator().expect("simulated").clone();
    let device = driver.device(0).expect("device");
    const LIMIT: usize = 6 * PAGE;
    let pool = Models::new(&device, LIMIT).expect("pool");
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let pool = pool.clone();
            scope.spawn(move || {
                let model = format!("model {thread}");
                let mut random = SmallRng::seed_from_u64(thread as u64);
                let mut done = 0;
                pool.register_model(&model, 64 * PAGE).expect("a new name");
                while done < 100 {
                    let bytes = random.random_range(1..3 * PAGE);
                    match pool.allocate_for_model(&model, bytes) {
                        Ok(address) => {
                            done += 1;
                            let stats = pool.stats();
                            assert_eq!(stats.parts.total_bytes(), stats.committed_bytes, "{stats}");
                            assert!(stats.committed_bytes <= LIMIT, "{stats}");
                            pool.deallocate_for_model_address(&model, address, bytes)
                                .expect("live");
                        }
                        Err(error) => assert!(error.is_retryable(), "{error}"),
                    }
                }
                pool.unregister_model(&model).expect("registered");
            });
        }
    });
    assert_eq!(pool.models(), Vec::<String>::new());
    assert_eq!(pool.stats().committed_bytes, 0);
    drop((pool, device, driver));
    all_is_back(&simulator);
}

#[test]
fn a_handle_of_a_model_that_is_gone_gets_no_memory_and_frees_what_is_live() {
    let driver = Driver::simulated(SimConfig::new().unbacked()).expect("simulator");
    let device = driver.device(0).expect("device");
    let pool = Models::new(&device, 8 * PAGE).expect("pool");
    pool.register_model("gone", 8 * PAGE).expect("a new name");
    let handle = pool.model("gone").expect("registered");
    handle.allocate(0, PAGE).expect("room");
    pool.unregister_model("gone").expect("registered");
    assert_eq!(handle.allocate(PAGE, PAGE), Err(VmmError::Closed));
    assert!(handle.is_mapped(0, PAGE));
    assert_eq!(handle.stats().committed_bytes, PAGE);
    handle.deallocate(0, PAGE).expect("live");
    assert_eq!(handle.allocate(0, PAGE), Err(VmmError::Closed));
    assert!(!handle.is_mapped(0, PAGE));
    pool.trim().expect("nothing is in its way");
    assert_eq!(handle.stats().committed_bytes, 0);
    assert_eq!(pool.stats().committed_bytes, 0);
}
