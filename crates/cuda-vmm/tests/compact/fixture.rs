//! A pool in chunks of several pages, with bytes that are remembered.

use crate::common::Simulated;
use core::ops::Range;
use cuda_vmm::sim::{Books, SimConfig};
use cuda_vmm::{Engine, EngineOptions, Stream, VirtualMemoryPool};
use std::collections::BTreeMap;

/// Small, so that every byte can be read often.
pub const PAGE: usize = 4096;
/// Pages of the pool, all of them taken at first.
pub const PAGES: usize = 64;
/// Pages of a chunk: an eighth of the pool.
pub const CHUNK: usize = 8;

/// The simulated driver of most tests.
pub fn config() -> SimConfig {
    SimConfig::new().granularity_bytes(PAGE)
}

pub struct Fixture {
    pub pool: VirtualMemoryPool,
    pub engine: Engine,
    /// Writes and reads; whether it is named for the pool is the test's choice.
    pub stream: Stream,
    /// What each live page holds.
    pub contents: BTreeMap<usize, Vec<u8>>,
    pub simulated: Simulated,
}

impl Fixture {
    /// A pool whose every page is live and written.
    pub fn new(options: EngineOptions, named: bool) -> Self {
        Self::on(Simulated::new(config()), options, named)
    }

    /// The same on a driver of the caller's.
    pub fn on(simulated: Simulated, options: EngineOptions, named: bool) -> Self {
        let options = options.chunk_bytes_max(CHUNK * PAGE);
        let engine = Engine::new(&simulated.device, options).expect("an engine");
        let pool = VirtualMemoryPool::on_engine(&engine, PAGES * PAGE, PAGE).expect("a pool");
        let stream = Stream::new(&simulated.device).expect("a stream");
        if named {
            pool.use_stream(&stream).expect("of this device");
        }
        let mut fixture = Self {
            pool,
            engine,
            stream,
            contents: BTreeMap::new(),
            simulated,
        };
        fixture.take(0..PAGES);
        assert_eq!(fixture.pool.stats().chunks, PAGES / CHUNK);
        fixture
    }

    /// Takes pages and writes something of their own to each.
    pub fn take(&mut self, pages: Range<usize>) {
        let bytes = pages.len() * PAGE;
        let taken = self.pool.allocate(pages.start * PAGE, bytes);
        assert_eq!(taken, Ok(self.address(pages.start)));
        for page in pages {
            let byte = |at: usize| (page * 131 + at * 7 + at / 251) as u8;
            let bytes: Vec<_> = (0..PAGE).map(byte).collect();
            // SAFETY: the page is live.
            unsafe { self.stream.write(self.address(page), &bytes) }.expect("written");
            self.contents.insert(page, bytes);
        }
    }

    /// Frees all pages but these, and waits until what can go back by itself has.
    pub fn keep(&mut self, kept: impl Fn(usize) -> bool) {
        for page in 0..PAGES {
            if !kept(page) && self.contents.remove(&page).is_some() {
                self.pool.deallocate(page * PAGE, PAGE).expect("live");
            }
        }
        self.simulated.device.synchronize().expect("done");
        self.engine.step();
    }

    /// Ends everything, and fails unless the driver has all of it back.
    #[track_caller]
    pub fn end(self) {
        let Simulated {
            driver,
            simulator,
            device,
        } = self.simulated;
        drop((self.pool, self.engine, self.stream, device, driver));
        assert_eq!(simulator.books(0), Books::default());
    }

    pub fn address(&self, page: usize) -> u64 {
        self.pool.base_address() + (page * PAGE) as u64
    }

    /// Reads every live byte, and holds the books against the driver's.
    #[track_caller]
    pub fn check(&self) {
        for (page, expected) in &self.contents {
            let mut bytes = vec![0; PAGE];
            // SAFETY: the page is live.
            unsafe { self.stream.read(self.address(*page), &mut bytes) }.expect("mapped");
            assert!(bytes == *expected, "page {page} holds other bytes");
        }
        self.check_books();
        let stats = self.pool.stats();
        assert_eq!(stats.live_pages, self.contents.len());
        assert_eq!(stats.parts.live_page_bytes, self.contents.len() * PAGE);
    }

    /// Every byte that the driver counts is counted once, in some part.
    #[track_caller]
    pub fn check_books(&self) {
        let stats = self.engine.stats();
        assert_eq!(stats.parts.total_bytes(), stats.committed_bytes, "{stats}");
        let held = stats.committed_bytes + self.simulated.device.quarantined_bytes();
        assert_eq!(held, self.simulated.books().physical_bytes, "{stats}");
        let pool = self.pool.stats();
        let parts = pool.parts.live_page_bytes
            + pool.parts.slack_bytes
            + pool.parts.filling_bytes
            + pool.parts.retiring_bytes
            + pool.parts.parked_bytes
            + pool.parts.quarantined_bytes;
        assert_eq!(parts, pool.committed_bytes, "{pool}");
    }
}
