//! Work that takes no longer beside ten thousand models than beside ten.
//!
//! The driver does nothing, so all of the time is this project's own, on any machine.

use crate::machine::Machine;
use anyhow::{Context, Result, ensure};
use cuda_vmm::{Account, Engine, EngineOptions, Stream, VirtualMemoryPool, WorkerMode};
use cuda_vmm_benches::{GRANULARITY as PAGE, Outcome, Sides, drop_time, no_op_driver, time};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fs, thread};

/// How many times a sample does what takes less than the clock can tell.
const TIMES: u32 = 32;

/// As many as are named; a few if times mean nothing.
fn scaled(machine: &Machine, count: usize) -> usize {
    let few = (count / 20).max(10);
    if machine.is_real() { count } else { few }
}

fn engine(work_ends: bool, worker: WorkerMode) -> Result<Engine> {
    let device = no_op_driver(work_ends).device(0)?;
    let options = EngineOptions::new().chunk_bytes_max(0).worker(worker);
    Ok(Engine::new(&device, options)?)
}

/// A range whose pages are live.
fn range(account: &Account, pages: usize) -> Result<VirtualMemoryPool> {
    // With addresses for one more.
    let capacity_bytes = (pages + 1) * PAGE;
    let range = VirtualMemoryPool::on_account(account, capacity_bytes, PAGE, Default::default())?;
    range.use_stream(&Stream::new(account.engine().device())?)?;
    range.allocate(0, pages * PAGE)?;
    Ok(range)
}

fn models(engine: &Engine, count: usize) -> Result<Vec<VirtualMemoryPool>> {
    let open = |_| range(&engine.own_account()?, 1);
    (0..count).map(open).collect()
}

fn ranges(account: &Account, count: usize) -> Result<Vec<VirtualMemoryPool>> {
    (0..count).map(|_| range(account, 1)).collect()
}

/// A page that a model frees and takes while a refusal of another is remembered.
pub fn remembered(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let mut sides = Sides::default();
    for named in [10, 1_000, 10_000] {
        let count = scaled(machine, named);
        let engine = engine(true, WorkerMode::Manual)?;
        let models = models(&engine, count)?;
        engine.set_limit_bytes(count * PAGE)?;
        sides.add(&format!("{named} models"), move || {
            let (first, last) = (&models[0], &models[count - 1]);
            ensure!(first.try_allocate(PAGE, PAGE).is_err(), "there was memory");
            let again = |_| {
                last.deallocate(0, PAGE)?;
                last.try_allocate(0, PAGE).map(drop)
            };
            let ((), elapsed) = time(|| (0..TIMES).try_for_each(again))?;
            ensure!(first.account().withdraw() == PAGE, "it was forgotten");
            Ok(elapsed / TIMES)
        });
    }
    outcome.measure(sides, &machine.settings, machine.settings.rounds * 5)
}

/// Ranges that are closed beside others.
pub fn closed(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let mut sides = Sides::default();
    for named in [64, 4_096] {
        let count = scaled(machine, named);
        let account = engine(true, WorkerMode::Manual)?.own_account()?;
        let others = ranges(&account, count)?;
        sides.add(&format!("beside {named}"), move || {
            let account = others[0].account();
            let ranges = ranges(account, TIMES as usize)?;
            let ((), elapsed) = time(|| ranges.into_iter().try_for_each(|range| range.close()))?;
            Ok(elapsed / TIMES)
        });
    }
    outcome.measure(sides, &machine.settings, machine.settings.rounds * 5)
}

/// A sequence of 64 ranges that ends while 64 are there, and 10,000 models that end together.
pub fn dropped(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let account = engine(true, WorkerMode::Manual)?.own_account()?;
    let _others = ranges(&account, scaled(machine, 63 * 64))?;
    let (mut sequences, mut all) = (Sides::default(), Sides::default());
    sequences.add("sequence", || Ok(drop_time(ranges(&account, 64)?)));
    outcome.measure(sequences, &machine.settings, machine.settings.rounds)?;
    all.add("models", || {
        let engine = engine(true, WorkerMode::Manual)?;
        Ok(drop_time(models(&engine, scaled(machine, 10_000))?))
    });
    outcome.measure(all, &machine.settings, 3)
}

/// A page that is taken back while others retire.
pub fn taken_back(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let (many, settings) = (scaled(machine, 20_000), &machine.settings);
    let engine = engine(false, WorkerMode::Manual)?;
    let pool = range(&engine.own_account()?, many)?;
    let free = |page: usize| pool.deallocate(page * PAGE, PAGE);
    let take = |page: usize| pool.try_allocate(page * PAGE, PAGE).map(drop);
    (0..many).try_for_each(free)?;
    let mut sides = Sides::default();
    // A tenth of them, so that most retire all the time.
    sides.add("pages", || {
        // The first puts what was freed into the engine's queue.
        take(1)?;
        let ((), elapsed) = time(|| (0..many).step_by(10).try_for_each(take))?;
        (0..many).step_by(10).chain([1]).try_for_each(free)?;
        Ok(elapsed / (many / 10) as u32)
    });
    outcome.measure(sides, settings, settings.rounds.div_ceil(4))?;
    let retiring_bytes = engine.stats().parts.retiring_bytes;
    ensure!(retiring_bytes == many * PAGE, "some were over");
    Ok(())
}

/// A page of another range while the worker lets leased parts go, and the worker's share of a core.
pub fn leased(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let many = scaled(machine, 20_000);
    let engine = engine(true, WorkerMode::Thread)?;
    let other = range(&engine.own_account()?, 1)?;
    let lease = || {
        let range = range(&engine.own_account()?, many)?;
        let tokens: Vec<_> = (0..many).map(|_| Arc::new(())).collect();
        for (page, token) in tokens.iter().enumerate() {
            range.lease(page * PAGE, PAGE, token.clone())?;
            range.deallocate(page * PAGE, PAGE)?;
        }
        anyhow::Ok((range, tokens))
    };
    let mut samples = Vec::new();
    for _ in 0..machine.settings.rounds_min() {
        let (_range, tokens) = lease()?;
        drop(tokens);
        while engine.stats().parts.leased_bytes > 0 {
            for _ in 0..1_000 {
                let ((), elapsed) = time(|| {
                    other.deallocate(0, PAGE)?;
                    other.allocate(0, PAGE).map(drop)
                })?;
                samples.push(elapsed.as_nanos() as f64);
            }
        }
    }
    outcome.times("another range", samples);
    let _held = lease()?;
    let (started, before) = (Instant::now(), process_time()?);
    thread::sleep(Duration::from_secs(3));
    let busy = (process_time()? - before).as_secs_f64() / started.elapsed().as_secs_f64();
    outcome.count("idle", 100.0 * busy);
    Ok(())
}

/// The processor time that the threads of this process have taken.
fn process_time() -> Result<Duration> {
    let mut nanoseconds = 0;
    for task in fs::read_dir("/proc/self/task")? {
        let times = fs::read_to_string(task?.path().join("schedstat"))?;
        let time = times.split_whitespace().next().context("no time")?;
        nanoseconds += time.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(nanoseconds))
}
