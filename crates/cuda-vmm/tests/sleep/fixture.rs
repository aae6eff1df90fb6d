//! Pools with bytes that are remembered, asleep or not, and a host store.

use crate::common::Simulated;
use core::ops::Range;
use cuda_vmm::sim::{Books, SimConfig};
use cuda_vmm::{
    Account, Engine, EngineOptions, HostStore, HostStoreOptions, Keep, PoolOptions, Quota, Result,
    Slept, Stream, VirtualMemoryPool,
};
use std::collections::BTreeMap;

/// Small, so that every byte can be read often.
pub const PAGE: usize = 4096;
/// Addresses of each pool in pages.
pub const PAGES: usize = 64;
/// The unit of the host store.
pub const UNIT: usize = 2 << 20;

pub struct Fixture {
    pub pools: Vec<VirtualMemoryPool>,
    pub engine: Engine,
    /// Named for all pools; writes and reads.
    pub stream: Stream,
    /// What each live page of each pool holds, by the number with which it was written.
    pub contents: Vec<BTreeMap<usize, u64>>,
    pub store: HostStore,
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
    /// With a pool for each number, on the account of that name.
    pub fn new(options: EngineOptions, accounts: &[usize]) -> Self {
        Self::with_ahead(options, accounts, 0)
    }

    /// The same with memory made ahead.
    pub fn with_ahead(options: EngineOptions, accounts: &[usize], ahead_bytes: usize) -> Self {
        let simulated = Simulated::new(SimConfig::new().granularity_bytes(PAGE));
        let engine = Engine::new(&simulated.device, options).expect("an engine");
        let stream = Stream::new(&simulated.device).expect("a stream");
        let options = HostStoreOptions::new().piece_bytes(UNIT).threads(1);
        let store = HostStore::with_options(&simulated.device, 16 * UNIT, options);
        let mut opened: BTreeMap<usize, Account> = BTreeMap::new();
        let pools: Vec<_> = (accounts.iter())
            .map(|number| {
                let open = || engine.account(&number.to_string(), Quota::new());
                let account = opened
                    .entry(*number)
                    .or_insert_with(|| open().expect("no guarantee"));
                let options = PoolOptions::new().ahead_bytes_max(ahead_bytes);
                let pool = VirtualMemoryPool::on_account(account, PAGES * PAGE, PAGE, options);
                let pool = pool.expect("addresses");
                pool.use_stream(&stream).expect("of this device");
                pool
            })
            .collect();
        Self {
            contents: vec![BTreeMap::new(); pools.len()],
            pools,
            engine,
            stream,
            store: store.expect("whole pieces"),
            next: 0,
            simulated,
        }
    }

    pub fn account(&self, pool: usize) -> &Account {
        self.pools[pool].account()
    }

    pub fn address(&self, pool: usize, page: usize) -> u64 {
        self.pools[pool].base_address() + (page * PAGE) as u64
    }

    /// Takes pages by one call, and writes something of their own to each.
    pub fn take(&mut self, pool: usize, pages: Range<usize>) {
        self.try_take(pool, pages).expect("room");
    }

    pub fn try_take(&mut self, pool: usize, pages: Range<usize>) -> Result<()> {
        let (offset, bytes) = (pages.start * PAGE, pages.len() * PAGE);
        self.pools[pool].allocate(offset, bytes)?;
        self.write(pool, pages);
        Ok(())
    }

    /// Writes something of their own to live pages.
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

    pub fn free(&mut self, pool: usize, pages: Range<usize>) {
        let (offset, bytes) = (pages.start * PAGE, pages.len() * PAGE);
        self.pools[pool].deallocate(offset, bytes).expect("live");
        self.contents[pool].retain(|page, _| !pages.contains(page));
    }

    /// Puts a pool to sleep, and keeps its contents.
    pub fn sleep(&mut self, pool: usize) -> Result<Slept> {
        self.pools[pool].sleep(Keep::Host(&self.store))
    }

    /// Closes a pool.
    pub fn close(&mut self, pool: usize) {
        self.contents.swap_remove(pool);
        let closed = self.pools.swap_remove(pool);
        closed.close().expect("nothing is refused");
    }

    /// Waits until what can go back by itself has.
    pub fn settle(&self) {
        self.simulated.device.synchronize().expect("done");
        self.engine.step();
    }

    /// Reads every live byte of every pool that is awake, and holds the books against the driver's
    /// and the store's.
    #[track_caller]
    pub fn check(&self) {
        for (pool, contents) in self.contents.iter().enumerate() {
            let stats = self.pools[pool].stats();
            if self.pools[pool].is_asleep() {
                assert_eq!(stats.asleep_bytes, contents.len() * PAGE, "{stats}");
                assert_eq!((stats.live_pages, stats.chunks), (0, 0), "{stats}");
                continue;
            }
            assert_eq!(stats.live_pages, contents.len(), "pool {pool}: {stats}");
            assert_eq!(stats.asleep_bytes, 0, "pool {pool}: {stats}");
            for (page, number) in contents {
                let mut bytes = vec![0; PAGE];
                // SAFETY: the page is live.
                unsafe { self.stream.read(self.address(pool, *page), &mut bytes) }.expect("mapped");
                assert!(bytes == bytes_of(*number), "page {page} of pool {pool}");
            }
        }
        self.check_books();
        let (stats, store) = (self.engine.stats(), self.store.stats());
        assert_eq!(stats.host_bytes, store.in_use_bytes, "{stats}, {store}");
    }

    /// Every byte that the driver counts is counted once.
    #[track_caller]
    pub fn check_books(&self) {
        let stats = self.engine.stats();
        assert_eq!(stats.parts.total_bytes(), stats.committed_bytes, "{stats}");
        let held = stats.committed_bytes + self.simulated.device.quarantined_bytes();
        let books = self.simulated.books();
        assert_eq!(held, books.physical_bytes, "{stats}");
        let store = self.store.stats();
        let held = store.registered_bytes + self.simulated.device.quarantined_host_bytes();
        assert_eq!(held, books.host_registered_bytes, "{store}");
    }

    /// Ends everything, and fails unless the driver has all of it back.
    #[track_caller]
    pub fn end(self) {
        let Self {
            pools,
            engine,
            stream,
            contents: _,
            store,
            next: _,
            simulated,
        } = self;
        let Simulated {
            driver,
            simulator,
            device,
        } = simulated;
        drop((pools, engine, stream, store, device, driver));
        assert_eq!(simulator.books(0), Books::default());
    }
}
