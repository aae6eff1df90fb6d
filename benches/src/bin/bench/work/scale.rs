//! Work that takes no longer beside ten thousand models than beside ten.
//!
//! The driver does nothing, so all of the time is this project's own, on any machine.

use crate::machine::Machine;
use anyhow::{Context, Result, ensure};
use cuda_vmm::{
    Account, Engine, EngineOptions, PoolOptions, Quota, SharedMemoryPool, SharedPoolOptions,
    Stream, VirtualMemoryPool, WorkerMode,
};
use cuda_vmm_benches::{GRANULARITY as PAGE, Outcome, Sides, no_op_driver, time};
use std::fs;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// How many times a sample does what takes less than the clock can tell.
const TIMES: u32 = 32;

/// An engine without a thread, so that no other work is timed.
fn engine(limit_bytes: usize) -> Result<Engine> {
    let device = no_op_driver().device(0)?;
    let options = EngineOptions::new().limit_bytes(limit_bytes);
    let options = options.chunk_bytes_max(0).worker(WorkerMode::Manual);
    Ok(Engine::new(&device, options)?)
}

fn range(account: &Account, pages: usize, stream: &Stream) -> Result<VirtualMemoryPool> {
    let options = PoolOptions::new();
    let range = VirtualMemoryPool::on_account(account, pages * PAGE, PAGE, options)?;
    range.use_stream(stream)?;
    Ok(range)
}

/// Models with a page each and no memory left; the first was refused some.
struct Full {
    models: Vec<VirtualMemoryPool>,
}

impl Full {
    fn new(count: usize) -> Result<Self> {
        let engine = engine(count * PAGE)?;
        let stream = Stream::new(engine.device())?;
        let models = (0..count).map(|number| {
            let account = engine.account(&format!("model {number}"), Quota::new())?;
            let model = range(&account, 2, &stream)?;
            model.allocate(0, PAGE)?;
            Ok(model)
        });
        let models = models.collect::<Result<_>>()?;
        Ok(Self { models })
    }

    /// The mean time in which the last model frees its page and takes it again.
    fn free_and_take(&self) -> Result<Duration> {
        let last = &self.models[self.models.len() - 1];
        let refused = self.models[0].try_allocate(PAGE, PAGE);
        ensure!(refused.is_err(), "there was memory");
        let started = Instant::now();
        for _ in 0..TIMES {
            last.deallocate(0, PAGE)?;
            last.try_allocate(0, PAGE)?;
        }
        let elapsed = started.elapsed();
        ensure!(
            self.models[0].account().withdraw() == PAGE,
            "it was forgotten"
        );
        Ok(elapsed / TIMES)
    }
}

/// A page that a model frees and takes while a refusal of another is remembered.
pub fn remembered(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let (few, some, many) = (Full::new(10)?, Full::new(1_000)?, Full::new(10_000)?);
    let mut sides = Sides::new();
    sides.add("10 models", || few.free_and_take());
    sides.add("1,000 models", || some.free_and_take());
    sides.add("10,000 models", || many.free_and_take());
    outcome.measure(sides, &machine.settings, machine.settings.rounds * 5)
}

/// Ranges that are closed beside others.
pub fn closed(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let beside = |count: usize| {
        let engine = engine(usize::MAX)?;
        let stream = Stream::new(engine.device())?;
        let account = engine.account("model", Quota::new())?;
        let open = move || {
            let range = range(&account, 1, &stream)?;
            range.allocate(0, PAGE)?;
            anyhow::Ok(range)
        };
        let others = (0..count).map(|_| open()).collect::<Result<Vec<_>>>()?;
        anyhow::Ok((others, open))
    };
    let ((_few, open), (_many, open_beside)) = (beside(64)?, beside(4_096)?);
    let close = |open: &dyn Fn() -> Result<VirtualMemoryPool>| {
        let ranges = (0..TIMES).map(|_| open()).collect::<Result<Vec<_>>>()?;
        let ((), elapsed) = time(|| ranges.into_iter().try_for_each(|range| range.close()))?;
        Ok(elapsed / TIMES)
    };
    let mut sides = Sides::new();
    sides.add("beside 64", || close(&open));
    sides.add("beside 4,096", || close(&open_beside));
    outcome.measure(sides, &machine.settings, machine.settings.rounds * 5)
}

/// A sequence of 64 ranges that ends while 64 such sequences are there.
pub fn sequence_ended(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let engine = engine(usize::MAX)?;
    let stream = Stream::new(engine.device())?;
    let account = engine.account("model", Quota::new())?;
    let sequence = || {
        let ranges = (0..64).map(|_| {
            let range = range(&account, 1, &stream)?;
            range.allocate(0, PAGE)?;
            Ok(range)
        });
        ranges.collect::<Result<Vec<_>>>()
    };
    let _others = (0..63).map(|_| sequence()).collect::<Result<Vec<_>>>()?;
    let mut sides = Sides::new();
    sides.add("64 sequences", || {
        let ended = sequence()?;
        let started = Instant::now();
        drop(ended);
        Ok(started.elapsed())
    });
    outcome.measure(sides, &machine.settings, machine.settings.rounds)
}

/// A pool of 10,000 models that is dropped with all of them.
pub fn pool_dropped(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let mut sides = Sides::new();
    sides.add("10,000 models", || {
        let device = no_op_driver().device(0)?;
        let options = EngineOptions::new().worker(WorkerMode::Manual);
        let pool =
            SharedMemoryPool::with_options(&device, SharedPoolOptions::new().engine(options))?;
        let stream = Stream::new(&device)?;
        let models = (0..10_000).map(|number| {
            let account = pool.register_model(&format!("model {number}"), Quota::new())?;
            let model = range(&account, 1, &stream)?;
            model.allocate(0, PAGE)?;
            Ok(model)
        });
        let models = models.collect::<Result<Vec<_>>>()?;
        let started = Instant::now();
        drop((models, pool));
        Ok(started.elapsed())
    });
    outcome.measure(sides, &machine.settings, machine.settings.rounds_min)
}

/// Pages that are freed and retire at once.
const RETIRING: usize = 20_000;

/// A page that is taken back while 20,000 retire.
pub fn taken_back(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let engine = engine(usize::MAX)?;
    let stream = Stream::new(engine.device())?;
    let pool = range(&engine.own_account()?, RETIRING, &stream)?;
    pool.allocate(0, RETIRING * PAGE)?;
    let take = |page: usize| pool.try_allocate(page * PAGE, PAGE);
    let spread = RETIRING / TIMES as usize;
    let mut sides = Sides::new();
    sides.add("20,000 pages", || {
        for page in 0..RETIRING {
            pool.deallocate(page * PAGE, PAGE)?;
        }
        // The first puts what was freed into the engine's queue.
        take(1)?;
        let spread_out = (0..RETIRING).step_by(spread);
        let started = Instant::now();
        for page in spread_out {
            take(page)?;
        }
        let elapsed = started.elapsed();
        let rest = (0..RETIRING).filter(|page| *page != 1 && page % spread != 0);
        rest.map(take).collect::<Result<Vec<_>, _>>()?;
        Ok(elapsed / TIMES)
    });
    outcome.measure(sides, &machine.settings, machine.settings.rounds_min)
}

/// Parts that are freed while they are leased.
const LEASED: usize = 20_000;

/// Leased parts of a range, each with a token of its own, that are freed, and whose leases end.
struct LeasedParts {
    range: VirtualMemoryPool,
    tokens: Vec<Arc<()>>,
}

impl LeasedParts {
    fn new(engine: &Engine, stream: &Stream) -> Result<Self> {
        let range = range(&engine.own_account()?, LEASED, stream)?;
        range.allocate(0, LEASED * PAGE)?;
        let tokens = (0..LEASED).map(|part| {
            let token = Arc::new(());
            range.lease(part * PAGE, PAGE, token.clone())?;
            anyhow::Ok(token)
        });
        let tokens = tokens.collect::<Result<_>>()?;
        Ok(Self { range, tokens })
    }

    fn free(&self) -> Result<()> {
        for part in 0..LEASED {
            self.range.deallocate(part * PAGE, PAGE)?;
        }
        Ok(())
    }
}

/// How long a page of another range takes while the engine's thread lets 20,000 leased parts go.
pub fn leases_end(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let device = no_op_driver().device(0)?;
    let options = EngineOptions::new().limit_bytes(usize::MAX);
    let engine = Engine::new(&device, options.chunk_bytes_max(0))?;
    let stream = Stream::new(&device)?;
    let other = range(&engine.own_account()?, 2, &stream)?;
    let mut samples = Vec::new();
    for _ in 0..machine.settings.rounds_min {
        let mut parts = LeasedParts::new(&engine, &stream)?;
        parts.free()?;
        parts.tokens.clear();
        while engine.stats().parts.leased_bytes > 0 {
            for _ in 0..1_000 {
                let ((), elapsed) = time(|| {
                    other.allocate(0, PAGE)?;
                    other.deallocate(0, PAGE)
                })?;
                samples.push(elapsed.as_nanos() as f64);
            }
        }
    }
    outcome.times("another range", samples);
    // What the thread takes of a core while 20,000 leases are held.
    let parts = LeasedParts::new(&engine, &stream)?;
    parts.free()?;
    let (started, cpu) = (Instant::now(), process_time()?);
    thread::sleep(Duration::from_secs(3));
    let busy = (process_time()? - cpu).as_secs_f64() / started.elapsed().as_secs_f64();
    outcome.count("idle", 100.0 * busy);
    Ok(())
}

/// The processor time that the threads of this process have taken.
fn process_time() -> Result<Duration> {
    let mut nanoseconds = 0;
    for task in fs::read_dir("/proc/self/task")? {
        let times = fs::read_to_string(task?.path().join("schedstat"))?;
        nanoseconds += times
            .split_whitespace()
            .next()
            .context("no time")?
            .parse::<u64>()?;
    }
    Ok(Duration::from_nanos(nanoseconds))
}
