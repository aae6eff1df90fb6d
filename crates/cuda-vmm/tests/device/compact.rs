//! Slack of chunks of several pages goes back to the device, and bytes stay what and where they
//! are.

use crate::common::manual;
use crate::{case, page};
use cuda_vmm::{Device, DriverKind, Engine, EngineOptions, Stream, VirtualMemoryPool};

const PAGES: usize = 64;
/// Pages of a chunk: an eighth of what is asked for.
const CHUNK: usize = 8;

/// What a page holds: other bytes in each, repeated at a length that no page is a multiple of.
fn pattern(at: usize) -> Vec<u8> {
    let byte = |index: usize| (at * 131 + index * 7 + index / 251) as u8;
    let once: Vec<u8> = (0..4099).map(byte).collect();
    let mut whole = once.repeat(page().div_ceil(once.len()));
    whole.truncate(page());
    whole
}

/// A pool of which every other page was freed; what is left has its pattern.
fn sparse(device: &Device, stream: &Stream, options: EngineOptions) -> (Engine, VirtualMemoryPool) {
    let page = page();
    let engine = Engine::new(device, options.chunk_bytes_max(CHUNK * page)).expect("an engine");
    let pool = VirtualMemoryPool::on_engine(&engine, PAGES * page, page).expect("a pool");
    pool.use_stream(stream).expect("of this device");
    let base = pool.allocate(0, PAGES * page).expect("room");
    for at in 0..PAGES {
        // SAFETY: the page is live.
        unsafe { stream.write(base + (at * page) as u64, &pattern(at)) }.expect("written");
    }
    for at in (1..PAGES).step_by(2) {
        pool.deallocate(at * page, page).expect("live");
    }
    assert_eq!(
        pool.stats().committed_bytes,
        PAGES * page,
        "all of it slack"
    );
    (engine, pool)
}

fn check(stream: &Stream, pool: &VirtualMemoryPool) {
    let mut bytes = vec![0; page()];
    for at in (0..PAGES).step_by(2) {
        let address = pool.base_address() + (at * page()) as u64;
        // SAFETY: the page is live.
        unsafe { stream.read(address, &mut bytes) }.expect("mapped");
        assert!(bytes == pattern(at), "page {at} holds other bytes");
    }
}

#[test]
fn every_other_page_of_large_chunks_goes_back() {
    case(|device| {
        let page = page();
        let stream = Stream::new(device).expect("a stream");
        let (engine, mut pool) = sparse(device, &stream, manual());
        let before = device.free_bytes().expect("a number");
        let planned = pool.compact_report();
        let report = pool.compact().expect("room");
        assert_eq!(report, planned);
        assert_eq!(report.moved_bytes, PAGES / 2 * page);
        assert_eq!(report.returned_bytes, PAGES / 2 * page);
        assert_eq!(pool.stats().committed_bytes, PAGES / 2 * page);
        assert_eq!(engine.stats().parts.slack_bytes, 0);
        let after = device.free_bytes().expect("a number");
        // A real driver may take some of it for tables of its own.
        match device.driver().kind() {
            DriverKind::Simulated => assert_eq!(after, before + PAGES / 2 * page),
            DriverKind::Real => assert!(after > before, "{before} before, {after} after"),
        }
        check(&stream, &pool);
        // The freed pages can be had again, beside the moved ones.
        let address = pool.allocate(page, page).expect("room");
        // SAFETY: the page is live.
        unsafe { stream.memset(address, 9, page) }.expect("queued");
        check(&stream, &pool);
        pool.close().expect("closed");
    });
}

#[test]
fn a_kernel_queued_before_is_not_moved_under() {
    case(|device| {
        let page = page();
        let stream = Stream::new(device).expect("a stream");
        let (_engine, mut pool) = sparse(device, &stream, manual());
        let address = |at: usize| pool.base_address() + (at * page) as u64;
        for round in 0..200 {
            // SAFETY: both pages are live, and `compact` waits for the work before it moves them.
            unsafe { stream.copy(address(2), address(2 * (round % 8)), page) }.expect("queued");
        }
        // SAFETY: as above.
        unsafe { stream.copy(address(2), address(4), page) }.expect("queued");
        pool.compact().expect("room");
        let mut bytes = vec![0; page];
        let address = pool.base_address() + 2 * page as u64;
        // SAFETY: the page is live.
        unsafe { stream.read(address, &mut bytes) }.expect("mapped");
        assert!(bytes == pattern(4), "the last copy came before the move");
        pool.close().expect("closed");
    });
}
