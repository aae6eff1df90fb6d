//! Ranges that sleep and wake, beside bare copies of the same bytes.

use crate::bare::{Pinned, Plain};
use crate::machine::Machine;
use anyhow::Result;
use cuda_vmm::{EngineOptions, HostStore, HostStoreOptions, Keep, VirtualMemoryPool, WakeOptions};
use cuda_vmm_benches::{Outcome, Sides, noted_calls, time};
use std::cell::RefCell;
use std::thread;
use std::time::{Duration, Instant};

/// Into so many parts of one length a model is cut, which come in their order.
const LAYERS: usize = 32;
/// How long a model has slept that wakes. Right after a sleep the driver still clears the memory that
/// it got back.
const REST: Duration = Duration::from_millis(100);
/// How often each side is measured: a round moves sixfold what sleeps.
const ROUNDS: usize = 5;

/// A range that is awake between any two measurements.
struct Sleeper<'a> {
    pool: RefCell<VirtualMemoryPool>,
    store: &'a HostStore,
    machine: &'a Machine,
    bytes: usize,
}

impl Sleeper<'_> {
    fn sleep(&self, keep: Keep<'_>) -> Result<Duration> {
        let mut pool = self.pool.borrow_mut();
        Ok(time(|| pool.sleep(keep))?.1)
    }

    fn wake(&self) -> Result<Duration> {
        Ok(time(|| self.pool.borrow().wake())?.1)
    }

    /// The time until a stream is past the contents of the first layer, so long after the sleep.
    fn first_layer(&self, asleep: Duration) -> Result<Duration> {
        self.sleep(Keep::Host(self.store))?;
        thread::sleep(asleep);
        let (pool, stream) = (self.pool.borrow(), &self.machine.stream);
        let layer_bytes = self.bytes / LAYERS;
        let layers = (0..LAYERS).map(|layer| layer * layer_bytes..(layer + 1) * layer_bytes);
        let options = WakeOptions::new().first(layers);
        let started = Instant::now();
        let arriving = pool.wake_streaming(&options)?;
        arriving.order_stream(stream, &pool, 0, layer_bytes)?;
        stream.synchronize()?;
        let elapsed = started.elapsed();
        arriving.finish()?;
        Ok(elapsed)
    }
}

/// A range as large as the weights of an 8B model in 16 bits.
pub fn measure(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let wanted_bytes = if machine.is_real() {
        16 << 30
    } else {
        64 << 20
    };
    let bytes = machine.fitting(wanted_bytes, 0.3, LAYERS * machine.page_bytes)?;
    let store = HostStore::new(&machine.device, bytes)?;
    // As weights have.
    let pool = machine.pool(EngineOptions::new().chunk_bytes_max(1 << 30), bytes)?;
    let address = pool.allocate(0, bytes)?;
    // SAFETY: the bytes are live, and stay so until the stream was synchronised.
    unsafe { machine.stream.memset(address, 1, bytes) }?;
    machine.stream.synchronize()?;
    let plain = Plain::new(&machine.device, bytes)?;
    let pinned = Pinned::new(&machine.device, bytes)?;
    let sleeper = &Sleeper {
        pool: RefCell::new(pool),
        store: &store,
        machine,
        bytes,
    };
    let mut sides = Sides::default();
    sides.add("copy in", || {
        pinned.copy(&machine.stream, plain.address(), true)
    });
    sides.add("wake", || {
        sleeper.sleep(Keep::Host(&store))?;
        sleeper.wake()
    });
    sides.add("copy out", || {
        pinned.copy(&machine.stream, plain.address(), false)
    });
    sides.add("sleep", || {
        let elapsed = sleeper.sleep(Keep::Host(&store))?;
        sleeper.wake()?;
        Ok(elapsed)
    });
    sides.add("sleep, copy kept", || {
        sleeper.sleep(Keep::Constant(&store))?;
        sleeper.wake()?;
        let elapsed = sleeper.sleep(Keep::Constant(&store))?;
        sleeper.wake()?;
        Ok(elapsed)
    });
    sides.add("first layer, at once", || {
        sleeper.first_layer(Duration::ZERO)
    });
    sides.add("first layer", || sleeper.first_layer(REST));
    sides.add("wake, nothing kept", || {
        sleeper.sleep(Keep::Nothing)?;
        sleeper.wake()
    });
    for side in ["wake", "sleep", "sleep, copy kept", "first layer"] {
        outcome.note(side, format!("{bytes} bytes"));
    }
    // Each side has its turn, however long they take.
    outcome.measure(sides, &machine.settings.patient(8), ROUNDS)
}

/// What pinning costs, and what it costs again.
pub fn pinned(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    const GIB: usize = 1 << 30;
    // A store rounds to its pieces.
    let bytes = if machine.is_real() { GIB } else { 8 << 20 };
    let options = HostStoreOptions::new();
    let options = match machine.is_real() {
        true => options,
        false => options.piece_bytes(bytes),
    };
    let device = machine.noted.device();
    let mut sides = Sides::default();
    sides.add("pinned, first", || {
        let store = HostStore::with_options(device, bytes, options)?;
        let (reserved, elapsed) = time(|| store.reserve(bytes))?;
        drop(reserved);
        Ok(elapsed)
    });
    outcome.measure(sides, &machine.settings, ROUNDS)?;
    let store = HostStore::with_options(device, bytes, options)?;
    drop(store.reserve(bytes)?);
    let (again, calls) = noted_calls(|| store.reserve(bytes));
    again?;
    outcome.count("pinned, again", calls.len() as f64);
    outcome.note("pinned, first", format!("{bytes} bytes"));
    Ok(())
}
