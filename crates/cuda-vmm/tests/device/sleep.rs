//! Pools that give up their memory, and have it again with what was in it.

use crate::common::manual;
use crate::{case, page};
use cuda_vmm::{
    Device, DriverKind, Engine, HostStore, HostStoreOptions, Keep, Stream, VirtualMemoryPool,
    WakeOptions,
};

const PAGES: usize = 32;

/// What a page holds: other bytes in each, repeated at a length that no page is a multiple of.
fn pattern(at: usize) -> Vec<u8> {
    let byte = |index: usize| (at * 131 + index * 7 + index / 251) as u8;
    let once: Vec<u8> = (0..4099).map(byte).collect();
    let mut whole = once.repeat(page().div_ceil(once.len()));
    whole.truncate(page());
    whole
}

/// Every page but each fifth is live.
fn live() -> impl Iterator<Item = usize> {
    (0..PAGES).filter(|at| at % 5 != 0)
}

fn filled(device: &Device, stream: &Stream) -> (Engine, VirtualMemoryPool) {
    let page = page();
    let engine = Engine::new(device, manual()).expect("an engine");
    let pool = VirtualMemoryPool::on_engine(&engine, PAGES * page, page).expect("a pool");
    pool.use_stream(stream).expect("of this device");
    for at in live() {
        let address = pool.allocate(at * page, page).expect("room");
        // SAFETY: the page is live.
        unsafe { stream.write(address, &pattern(at)) }.expect("written");
    }
    (engine, pool)
}

/// A store with room for all pages.
fn store(device: &Device) -> HostStore {
    let bytes = (PAGES * page()).next_multiple_of(2 << 20);
    let options = HostStoreOptions::new().piece_bytes(8 << 20);
    HostStore::with_options(device, bytes, options).expect("whole pieces")
}

fn check(stream: &Stream, pool: &VirtualMemoryPool) {
    let mut bytes = vec![0; page()];
    for at in live() {
        let address = pool.base_address() + (at * page()) as u64;
        // SAFETY: the page is live.
        unsafe { stream.read(address, &mut bytes) }.expect("mapped");
        assert!(bytes == pattern(at), "page {at} holds other bytes");
    }
}

#[test]
fn contents_come_back_from_the_host_and_a_copy_is_used_again() {
    case(|device| {
        let stream = Stream::new(device).expect("a stream");
        let (engine, mut pool) = filled(device, &stream);
        let store = store(device);
        let live_bytes = live().count() * page();
        for copied_bytes in [live_bytes, 0, 0] {
            let before = device.free_bytes().expect("a number");
            let slept = pool.sleep(Keep::Constant(&store)).expect("idle");
            assert_eq!(slept.copied_bytes, copied_bytes);
            assert_eq!(slept.given_bytes, live_bytes);
            assert_eq!(engine.stats().committed_bytes, 0);
            let after = device.free_bytes().expect("a number");
            // A real driver may keep some of it for tables of its own.
            match device.driver().kind() {
                DriverKind::Simulated => assert_eq!(after, before + live_bytes),
                DriverKind::Real => assert!(after > before, "{before} before, {after} after"),
            }
            pool.wake().expect("room");
            check(&stream, &pool);
        }
        pool.close().expect("closed");
        drop(store);
    });
}

#[test]
fn contents_that_stream_are_there_behind_their_fences() {
    case(|device| {
        let page = page();
        let stream = Stream::new(device).expect("a stream");
        let (_engine, mut pool) = filled(device, &stream);
        let store = store(device);
        pool.sleep(Keep::Host(&store)).expect("idle");
        // The last pages first, and slowly enough that the first are on their way meanwhile.
        let options = WakeOptions::new()
            .first([30 * page..PAGES * page, 26 * page..30 * page])
            .bytes_per_second(64 * page as u64);
        let arriving = pool.wake_streaming(&options).expect("room");
        let used = Stream::new(device).expect("a stream");
        for at in live().collect::<Vec<_>>().into_iter().rev() {
            let (offset, address) = (at * page, pool.base_address() + (at * page) as u64);
            arriving
                .order_stream(&used, &pool, offset, page)
                .expect("a fence");
            let mut bytes = vec![0; page];
            // SAFETY: the page is live.
            unsafe { used.read(address, &mut bytes) }.expect("mapped");
            assert!(bytes == pattern(at), "page {at} holds other bytes");
        }
        arriving.finish().expect("no call fails");
        check(&stream, &pool);
        pool.close().expect("closed");
        drop(store);
    });
}

#[test]
fn memory_that_was_given_up_is_anothers_meanwhile() {
    case(|device| {
        let page = page();
        let stream = Stream::new(device).expect("a stream");
        let (engine, mut pool) = filled(device, &stream);
        let store = store(device);
        pool.sleep(Keep::Host(&store)).expect("idle");
        let other = VirtualMemoryPool::on_engine(&engine, PAGES * page, page).expect("a pool");
        other.use_stream(&stream).expect("of this device");
        let address = other.allocate(0, PAGES * page).expect("room");
        // SAFETY: the pages are live, and the work ends before they go.
        unsafe { stream.memset(address, 0xEE, PAGES * page) }.expect("queued");
        other.deallocate(0, PAGES * page).expect("live");
        pool.wake().expect("room");
        check(&stream, &pool);
        other.close().expect("closed");
        pool.close().expect("closed");
        drop(store);
    });
}
