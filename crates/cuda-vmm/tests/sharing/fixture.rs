//! Pools of one account in chunks of several pages, with bytes that are remembered.

use crate::common::Simulated;
use core::ops::Range;
use cuda_vmm::sim::{Books, SimConfig};
use cuda_vmm::{
    Account, Engine, EngineOptions, PoolOptions, Quota, Result, Shared, Stream, VirtualMemoryPool,
};
use std::collections::BTreeMap;

/// Small, so that every byte can be read often.
pub const PAGE: usize = 4096;
/// Addresses of each pool in pages.
pub const PAGES: usize = 64;
/// Pages of a chunk.
pub const CHUNK: usize = 4;

pub struct Fixture {
    pub pools: Vec<VirtualMemoryPool>,
    pub account: Account,
    pub engine: Engine,
    /// Named for all pools; writes and reads.
    pub stream: Stream,
    /// What each live page of each pool holds, by the number with which it was written.
    pub contents: Vec<BTreeMap<usize, u64>>,
    /// The number of the next write.
    next: u64,
    pub simulated: Simulated,
}

/// The bytes of a page that was written with this number.
fn bytes_of(number: u64) -> Vec<u8> {
    let byte = |at: usize| (number as usize * 131 + at * 7 + at / 251) as u8;
    (0..PAGE).map(byte).collect()
}

impl Fixture {
    pub fn new(options: EngineOptions, pools: usize) -> Self {
        Self::with_ahead(options, pools, 0)
    }

    /// The same with memory made ahead.
    pub fn with_ahead(options: EngineOptions, pools: usize, ahead_bytes: usize) -> Self {
        let simulated = Simulated::new(SimConfig::new().granularity_bytes(PAGE));
        let options = options.chunk_bytes_max(CHUNK * PAGE);
        let engine = Engine::new(&simulated.device, options).expect("an engine");
        let account = engine.account("model", Quota::new()).expect("no guarantee");
        let stream = Stream::new(&simulated.device).expect("a stream");
        let mut fixture = Self {
            pools: Vec::new(),
            contents: Vec::new(),
            account,
            engine,
            stream,
            next: 0,
            simulated,
        };
        for _ in 0..pools {
            fixture.open(PoolOptions::new().ahead_bytes_max(ahead_bytes));
        }
        fixture
    }

    /// Opens another pool.
    pub fn open(&mut self, options: PoolOptions) {
        let pool = VirtualMemoryPool::on_account(&self.account, PAGES * PAGE, PAGE, options);
        let pool = pool.expect("addresses");
        pool.use_stream(&self.stream).expect("of this device");
        self.pools.push(pool);
        self.contents.push(BTreeMap::new());
    }

    /// Closes a pool, and opens another in its place.
    pub fn close(&mut self, pool: usize) {
        self.open(PoolOptions::new());
        self.contents.swap_remove(pool);
        let closed = self.pools.swap_remove(pool);
        closed.close().expect("nothing is refused");
    }

    pub fn address(&self, pool: usize, page: usize) -> u64 {
        self.pools[pool].base_address() + (page * PAGE) as u64
    }

    /// Takes pages and writes something of their own to each. In a pool without chunks these are
    /// chunks of [`CHUNK`] pages: an eighth of what is asked for, most of which goes again.
    pub fn take(&mut self, pool: usize, pages: Range<usize>) {
        let taken = &self.pools[pool];
        if taken.stats().chunks > 0 {
            self.try_take(pool, pages).expect("room");
            return;
        }
        let limit_bytes = self.engine.limit_bytes();
        self.engine.set_limit_bytes(1 << 30).expect("no guarantees");
        taken.allocate(0, 8 * CHUNK * PAGE).expect("room");
        for page in (0..8 * CHUNK).filter(|page| !pages.contains(page)) {
            taken.deallocate(page * PAGE, PAGE).expect("live");
        }
        self.settle();
        // What the step overwrites retires until that is past.
        self.simulated.device.synchronize().expect("done");
        self.engine.trim().expect("no call fails");
        self.engine
            .set_limit_bytes(limit_bytes)
            .expect("no guarantees");
        self.write(pool, pages);
    }

    /// Takes pages by one call, and writes something of their own to each.
    pub fn try_take(&mut self, pool: usize, pages: Range<usize>) -> Result<()> {
        let (offset, bytes) = (pages.start * PAGE, pages.len() * PAGE);
        self.pools[pool].allocate(offset, bytes)?;
        self.write(pool, pages);
        Ok(())
    }

    /// Writes something of their own to live pages that are not shared.
    pub fn write(&mut self, pool: usize, pages: Range<usize>) {
        for page in pages {
            let number = self.next;
            self.next += 1;
            // SAFETY: the page is live.
            unsafe {
                self.stream
                    .write(self.address(pool, page), &bytes_of(number))
            }
            .expect("written");
            self.contents[pool].insert(page, number);
        }
    }

    /// Queues a read of a live page, which leaves it as it is.
    pub fn touch(&self, pool: usize, page: usize) {
        let address = self.address(pool, page);
        // SAFETY: the page is live, and stays mapped until the work has run, which is what is
        // tested.
        unsafe { self.stream.copy(address, address, PAGE) }.expect("queued");
    }

    pub fn free(&mut self, pool: usize, pages: Range<usize>) {
        let (offset, bytes) = (pages.start * PAGE, pages.len() * PAGE);
        self.pools[pool].deallocate(offset, bytes).expect("live");
        self.contents[pool].retain(|page, _| !pages.contains(page));
    }

    /// Shares pages; returns the offset and the bytes of each run that is left.
    pub fn share(&mut self, from: usize, to: usize, pages: Range<usize>) -> Vec<(usize, usize)> {
        let rest = {
            let shared = self.try_share(from, to, pages.clone()).expect("it can");
            let rest = shared.rest().iter();
            let rest: Vec<_> = rest.map(|(_, offset, bytes)| (*offset, *bytes)).collect();
            shared.keep();
            rest
        };
        let is_left = |page: usize| {
            let mut left = rest.iter();
            left.any(|(offset, bytes)| (*offset..offset + bytes).contains(&(page * PAGE)))
        };
        for page in pages.filter(|page| !is_left(*page)) {
            let number = self.contents[from][&page];
            self.contents[to].insert(page, number);
        }
        rest
    }

    pub fn try_share(&self, from: usize, to: usize, pages: Range<usize>) -> Result<Shared<'_>> {
        let (offset, bytes) = (pages.start * PAGE, pages.len() * PAGE);
        let part = (&self.pools[from], &self.pools[to], offset, bytes);
        self.account.share_many(&[part])
    }

    /// Waits until what can go back by itself has.
    pub fn settle(&self) {
        self.simulated.device.synchronize().expect("done");
        self.engine.step();
    }

    /// Reads every live byte of every pool, and holds the books against the driver's.
    #[track_caller]
    pub fn check(&self) {
        for (pool, contents) in self.contents.iter().enumerate() {
            for (page, number) in contents {
                let mut bytes = vec![0; PAGE];
                // SAFETY: the page is live.
                unsafe { self.stream.read(self.address(pool, *page), &mut bytes) }.expect("mapped");
                assert!(bytes == bytes_of(*number), "page {page} of pool {pool}");
            }
            let stats = self.pools[pool].stats();
            assert_eq!(stats.live_pages, contents.len(), "pool {pool}: {stats}");
        }
        self.check_books();
    }

    /// Every byte that the driver counts is counted once, and the parts of the pools and of what is
    /// in none make up the account.
    #[track_caller]
    pub fn check_books(&self) {
        let snapshot = self.engine.snapshot();
        let stats = snapshot.engine;
        assert_eq!(stats.parts.total_bytes(), stats.committed_bytes, "{stats}");
        let held = stats.committed_bytes + self.simulated.device.quarantined_bytes();
        assert_eq!(held, self.simulated.books().physical_bytes, "{stats}");
        let [account] = &snapshot.accounts[..] else {
            panic!("one account is open");
        };
        let account = account.stats;
        assert_eq!(account.parts.total_bytes(), account.committed_bytes);
        assert_eq!(account.parts + snapshot.others, stats.parts, "{stats}");
        let mut parts = account.parts;
        for pool in &self.pools {
            let stats = pool.stats();
            assert_eq!(stats.parts.total_bytes(), stats.committed_bytes, "{stats}");
            assert_eq!(stats.parts.shared_bytes, 0, "{stats}");
            parts = parts - stats.parts;
        }
        // What is left is shared, or retires or is in quarantine as such.
        let left = parts.shared_bytes + parts.retiring_bytes + parts.quarantined_bytes;
        assert_eq!(parts.total_bytes(), left, "{parts}");
        let mapped: usize = self
            .pools
            .iter()
            .map(|pool| pool.stats().shared_bytes)
            .sum();
        // The pools of the fixture are the only ones, unless some were closed.
        assert!(mapped >= 2 * parts.shared_bytes || stats.ranges > self.pools.len());
    }

    /// Ends everything, and fails unless the driver has all of it back.
    #[track_caller]
    pub fn end(self) {
        let Self {
            pools,
            account,
            engine,
            stream,
            contents: _,
            next: _,
            simulated,
        } = self;
        let Simulated {
            driver,
            simulator,
            device,
        } = simulated;
        drop((pools, account, engine, stream, device, driver));
        assert_eq!(simulator.books(0), Books::default());
    }
}
