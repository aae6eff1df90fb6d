//! What others do while a chunk moves.

use crate::common::{Simulated, turn};
use crate::fixture::{CHUNK, Fixture, PAGE, PAGES, config};
use crate::roomy;
use cuda_vmm::sys::{CUdeviceptr, CUresult, CUstream, DriverTable};
use cuda_vmm::{Driver, Stream, VirtualMemoryPool};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// The driver whose copies wait.
static TABLE: Mutex<Option<DriverTable>> = Mutex::new(None);
/// Copies that were asked for.
static COPIES: AtomicUsize = AtomicUsize::new(0);
static LET_THROUGH: AtomicBool = AtomicBool::new(false);

/// A `cuMemcpyDtoDAsync` that does not return before it is let through.
unsafe extern "C" fn waiting_copy(
    target: CUdeviceptr,
    source: CUdeviceptr,
    bytes: usize,
    stream: CUstream,
) -> CUresult {
    COPIES.fetch_add(1, Ordering::SeqCst);
    while !LET_THROUGH.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
    let table = *TABLE.lock().unwrap_or_else(PoisonError::into_inner);
    let copy = table.expect("set before the first copy").cuMemcpyDtoDAsync;
    // SAFETY: the caller's arguments, for the function that it meant.
    unsafe { copy(target, source, bytes, stream) }
}

/// Lets all copies through, also when a test fails.
struct Held;

impl Drop for Held {
    fn drop(&mut self) {
        LET_THROUGH.store(true, Ordering::SeqCst);
    }
}

#[test]
fn the_rest_of_the_engine_goes_on_and_leaves_it_alone() {
    let _turn = turn();
    let Simulated {
        driver, simulator, ..
    } = Simulated::new(config());
    let mut table = *driver.table();
    *TABLE.lock().unwrap_or_else(PoisonError::into_inner) = Some(table);
    table.cuMemcpyDtoDAsync = waiting_copy;
    // SAFETY: the simulator, which the fixture keeps, keeps the table valid; the one function that
    // differs calls it.
    let driver = unsafe { Driver::from_table(table, driver.kind()) }.expect("a driver");
    let device = driver.device(0).expect("a device");
    let simulated = Simulated {
        driver,
        simulator,
        device,
    };
    let mut fixture = Fixture::on(simulated, roomy(), true);
    fixture.keep(|page| page.is_multiple_of(2));
    let neighbour = VirtualMemoryPool::on_engine(&fixture.engine, 4 * PAGE, PAGE).expect("a pool");
    let own = Stream::new(&fixture.simulated.device).expect("a stream");
    neighbour.use_stream(&own).expect("of this device");
    let account = fixture.pool.account().clone();
    let (engine, pool) = (&fixture.engine, &mut fixture.pool);
    std::thread::scope(|scope| {
        // In here, so that a failure lets it through before the scope waits for its threads.
        let held = Held;
        let compacting = scope.spawn(move || pool.compact());
        while COPIES.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        let stats = engine.stats();
        assert_eq!(
            stats.parts.filling_bytes,
            CHUNK / 2 * PAGE,
            "held twice: {stats}"
        );
        assert_eq!(stats.parts.live_page_bytes, PAGES / 2 * PAGE, "{stats}");
        assert_eq!(stats.parts.total_bytes(), stats.committed_bytes, "{stats}");
        assert_eq!(account.stats().parts, stats.parts);
        assert_eq!(account.stats().committed_bytes, stats.committed_bytes);
        neighbour.try_allocate(0, 2 * PAGE).expect("room");
        neighbour.deallocate(0, PAGE).expect("live");
        engine.step();
        engine.trim().expect("nothing is in its way");
        assert_eq!(engine.stats().parts.slack_bytes, PAGES / 2 * PAGE);
        assert!(!compacting.is_finished());
        drop(held);
        let report = compacting.join().expect("no panic").expect("room");
        assert_eq!(report.skipped_bytes, 0);
    });
    drop((neighbour, own, account));
    fixture.check();
    fixture.end();
}
