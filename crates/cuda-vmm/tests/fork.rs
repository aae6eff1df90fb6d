//! A process forked from the one that opened the driver.
//!
//! This binary has this one test, so that no other test's thread holds a lock when it forks.

mod common;

use common::{PAGE, Simulated, manual};
use cuda_vmm::sim::Books;
use cuda_vmm::{
    Access, Arriving, Device, Engine, Fence, HostBytes, HostStore, HostStoreStats, Keep, Mapping,
    PhysicalMemory, PoolOptions, Quota, Reservation, SharedMemoryPool, StepReport, Stream,
    VirtualMemoryPool, VmmError, WakeOptions, WorkerMode,
};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

/// One of everything that calls the driver when it is dropped.
struct Everything {
    simulated: Simulated,
    reservation: Reservation,
    memory: PhysicalMemory,
    mapping: Mapping,
    stream: Stream,
    fence: Fence,
    pools: Vec<(Engine, VirtualMemoryPool)>,
    shared: SharedMemoryPool,
    model: VirtualMemoryPool,
    /// It sleeps, and the host has its contents.
    asleep: VirtualMemoryPool,
    /// The contents of a pool that was woken.
    arriving: (VirtualMemoryPool, Arriving),
    host: HostStore,
    kept: HostBytes,
    /// Where the memory of the host store is.
    pinned: usize,
    /// The last owners of another simulated driver, one of whose streams has a thread.
    lonely: (Stream, Mapping),
}

/// A stream that has had work, and the memory that it was about.
fn busy(device: &Device) -> (Stream, Mapping) {
    let place = Reservation::new(device, PAGE).expect("address space");
    let memory = PhysicalMemory::new(device, PAGE).expect("memory");
    let access = [(device.clone(), Access::ReadWrite)];
    let mapping = Mapping::new(&Arc::new(place), 0, &Arc::new(memory), &access).expect("mapped");
    let stream = Stream::new(device).expect("a stream");
    // SAFETY: the mapping is writable and outlives the work.
    unsafe { stream.memset(mapping.address(), 0, PAGE) }.expect("queued");
    stream.synchronize().expect("done");
    (stream, mapping)
}

impl Everything {
    fn new() -> Self {
        let simulated = Simulated::default();
        let device = &simulated.device;
        let (stream, mapping) = busy(device);
        let pool = |mode| {
            let options = manual().limit_bytes(4 * PAGE).worker(mode);
            let engine = Engine::new(device, options).expect("an engine");
            let pool = VirtualMemoryPool::on_engine(&engine, 8 * PAGE, PAGE).expect("a pool");
            pool.allocate(0, 2 * PAGE).expect("room");
            (engine, pool)
        };
        let pools = vec![pool(WorkerMode::Manual), pool(WorkerMode::Thread)];
        // The second engine's thread exists, and is not copied by a fork.
        let (engine, pool) = &pools[1];
        pool.deallocate(PAGE, PAGE).expect("live");
        while engine.stats().committed_bytes > PAGE {
            std::thread::yield_now();
        }
        pools[0].1.deallocate(PAGE, PAGE).expect("live");
        let shared = SharedMemoryPool::new(device, 4 * PAGE).expect("a pool");
        let account = shared.register_model("one", Quota::new()).expect("new");
        let model = VirtualMemoryPool::on_account(&account, 4 * PAGE, PAGE, PoolOptions::new());
        let model = model.expect("addresses");
        model.allocate(0, PAGE).expect("room");
        let host = HostStore::new(device, 4 * PAGE).expect("a store");
        let asleep = || {
            let mut pool = VirtualMemoryPool::new(device, PAGE, PAGE).expect("a pool");
            pool.allocate(0, PAGE).expect("room");
            pool.sleep(Keep::Host(&host)).expect("idle");
            pool
        };
        let woken = asleep();
        let arriving = woken.wake_streaming(&WakeOptions::new()).expect("room");
        Self {
            asleep: asleep(),
            arriving: (woken, arriving),
            kept: host.reserve(PAGE).expect("room"),
            pinned: not_inherited(),
            host,
            reservation: Reservation::new(device, PAGE).expect("address space"),
            memory: PhysicalMemory::new(device, PAGE).expect("memory"),
            mapping,
            fence: stream.record().expect("a fence"),
            stream,
            pools,
            shared,
            model,
            lonely: busy(&Simulated::default().device),
            simulated,
        }
    }

    /// In the child: every call answers `Forked`, at once.
    fn check_calls(&self) {
        fn forked<T>(outcome: Result<T, VmmError>) {
            assert_eq!(outcome.map(|_| ()), Err(VmmError::Forked));
        }
        let device = &self.simulated.device;
        forked(self.simulated.driver.device_count());
        forked(self.simulated.driver.device(0));
        forked(device.free_bytes());
        forked(device.synchronize());
        forked(Reservation::new(device, self.reservation.bytes()));
        forked(PhysicalMemory::new(device, PAGE));
        forked(PhysicalMemory::exportable(device, PAGE));
        forked(self.memory.export());
        forked(
            self.mapping
                .set_access(&[(device.clone(), Access::ReadWrite)]),
        );
        forked(Stream::new(device));
        forked(self.stream.record());
        forked(self.stream.wait_for(&self.fence));
        forked(self.stream.synchronize());
        // SAFETY: never reaches a device.
        forked(unsafe { self.stream.memset(self.mapping.address(), 0, 1) });
        forked(self.fence.is_complete());
        forked(self.fence.wait());
        forked(self.lonely.0.synchronize());
        let owner = self.lonely.0.device().clone();
        forked(self.lonely.1.set_access(&[(owner, Access::None)]));
        forked(self.host.reserve(PAGE));
        forked(self.host.trim());
        forked(self.host.set_limit_bytes(0));
        forked(HostStore::new(device, PAGE));
        // The child has not inherited the memory: without the check these would fault.
        forked(self.kept.read(0, &mut [0]));
        assert_eq!(self.host.stats(), HostStoreStats::default());
        for (engine, pool) in &self.pools {
            let before = engine.stats();
            forked(pool.allocate(4 * PAGE, PAGE));
            forked(pool.try_allocate(PAGE, PAGE));
            forked(pool.allocate_anywhere(PAGE, 1));
            forked(pool.allocate(PAGE, PAGE));
            forked(pool.deallocate(0, PAGE));
            forked(pool.trim());
            forked(VirtualMemoryPool::on_engine(engine, PAGE, PAGE));
            assert_eq!(engine.step(), StepReport::default());
            assert_eq!(engine.stats(), before);
            // What does not change is told here too.
            let stats = pool.stats();
            let told = (stats.capacity_bytes, stats.page_bytes, stats.live_bytes);
            assert_eq!(told, (pool.capacity_bytes(), pool.page_bytes(), 0));
        }
        let (woken, arriving) = &self.arriving;
        forked(self.asleep.wake());
        forked(self.asleep.forget_copy());
        forked(self.asleep.generation());
        assert!(!self.asleep.is_asleep());
        // SAFETY: never reaches a device.
        forked(unsafe { woken.sleep_shared(Keep::Host(&self.host)) });
        forked(arriving.has_come(woken, 0, PAGE));
        forked(arriving.order_stream(&self.stream, woken, 0, PAGE));
        forked(self.model.allocate(PAGE, PAGE));
        let (account, options) = (self.model.account(), PoolOptions::new());
        forked(VirtualMemoryPool::on_account(account, PAGE, PAGE, options));
        forked(self.shared.register_model("two", Quota::new()));
        forked(self.shared.engine().account("two", Quota::new()));
    }
}

/// What the child found, as its exit status. None of them is what a process ends with by itself.
const FINE: i32 = 40;
const CALLS: i32 = 41;
const DROPS: i32 = 42;

const MEMORY: i32 = 43;

/// The address of the one mapping of this process that its children do not inherit.
fn not_inherited() -> usize {
    let maps = std::fs::read_to_string("/proc/self/smaps").expect("the maps");
    let mut first = "";
    let mut found = Vec::new();
    for line in maps.lines() {
        match line.strip_prefix("VmFlags:") {
            Some(flags) if flags.split(' ').any(|flag| flag == "dc") => found.push(first),
            Some(_) => {}
            None if line.contains('-') && !line.contains("kB") => first = line,
            None => {}
        }
    }
    let [mapping] = found[..] else {
        panic!("{found:?}");
    };
    let address = mapping.split('-').next().expect("an address");
    usize::from_str_radix(address, 16).expect("a number")
}

/// Whether the page at an address is mapped.
fn is_mapped(address: usize) -> bool {
    // SAFETY: asks about one page, which need not be mapped.
    unsafe {
        libc::msync(
            core::ptr::without_provenance_mut(address),
            4096,
            libc::MS_ASYNC,
        ) == 0
    }
}

/// Maps memory of the child's own at an address at which the parent has pinned memory.
fn map_there(address: usize) -> bool {
    let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let place = core::ptr::without_provenance_mut(address);
    // SAFETY: without replacing anything, and of this test alone.
    let mapped = unsafe { libc::mmap(place, 4096, libc::PROT_READ, kind, -1, 0) };
    mapped == place
}

fn child(mut everything: Everything, before: Books) -> i32 {
    assert_eq!(everything.kept.write(0, &[1]), Err(VmmError::Forked));
    let pinned = everything.pinned;
    if is_mapped(pinned) || !map_there(pinned) {
        return MEMORY;
    }
    let checked = std::panic::catch_unwind(AssertUnwindSafe(|| everything.check_calls()));
    if checked.is_err() {
        return CALLS;
    }
    let dropped = std::panic::catch_unwind(AssertUnwindSafe(|| {
        let simulator = everything.simulated.simulator.clone();
        drop(everything);
        assert_eq!(simulator.books(0), before, "dropping called the driver");
        drop(simulator);
    }));
    // Dropping leaves alone what came to the addresses of what was not inherited.
    if !is_mapped(pinned) {
        return MEMORY;
    }
    match dropped {
        Ok(()) => FINE,
        Err(_) => DROPS,
    }
}

#[test]
fn in_a_forked_process_calls_answer_forked_and_drops_do_nothing() {
    let everything = Everything::new();
    let before = everything.simulated.books();
    let mut everything = Some(everything);
    // SAFETY: the child calls what is under test, and allocates.
    let status =
        unsafe { common::in_a_child(|| everything.take().map_or(DROPS, |all| child(all, before))) };
    let everything = everything.expect("taken in the child only");
    assert_eq!(
        status, FINE,
        "{CALLS}: a call, {DROPS}: a drop, {MEMORY}: memory"
    );
    // The parent goes on as if nothing had been.
    assert_eq!(everything.simulated.books(), before);
    everything.pools[0]
        .1
        .allocate(4 * PAGE, PAGE)
        .expect("room");
}
