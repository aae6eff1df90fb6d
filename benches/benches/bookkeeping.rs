//! What the pools cost beside the driver: every driver call is a function that does nothing.
//!
//! Run as `cargo bench`, with no other arguments, it also judges its figures: the median of each
//! bench, and the host memory of the bookkeeping. `BENCH_JSON` names the file of their list.

use anyhow::Result;
use criterion::{BenchmarkGroup, Criterion, measurement::WallTime};
use cuda_vmm::{Device, Engine, EngineOptions, PoolOptions, Quota};
use cuda_vmm::{SharedMemoryPool, Stream, VirtualMemoryPool};
use cuda_vmm_benches::{GRANULARITY, Outcome, ParkedModels, bookkeeping_memory};
use cuda_vmm_benches::{figure::Figure, no_op_driver, report};
use std::hint::black_box;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

const CAPACITY: usize = 128 << 30;

/// Bytes of a token, and how many are in a page after the first.
const TOKEN: usize = 4096;
const TOKENS: usize = GRANULARITY / TOKEN - 1;

const PARKED: usize = 64;
/// Pages that each of several models has parked. Taking them lasts longer than starting a thread.
const PARKED_OF_EACH: usize = 4096;

/// What a page takes one thread, and each of two threads at the same time.
const THREADS: [&str; 2] = [
    "take back a parked page of a model, one thread",
    "take back a parked page of a model, each of two threads",
];

/// The benches, and what came of those that were run.
struct Benches<'a> {
    group: BenchmarkGroup<'a, WallTime>,
    outcome: Outcome,
}

impl Benches<'_> {
    /// Runs a bench, which returns the time of as many iterations as it is told.
    fn add(&mut self, name: &str, mut act: impl FnMut(u64) -> Duration) {
        let mut samples = Vec::new();
        self.group.bench_function(name, |bencher| {
            bencher.iter_custom(|iterations| {
                let time = act(iterations);
                samples.push(time.as_nanos() as f64 / iterations as f64);
                time
            });
        });
        self.outcome.times(name, samples);
    }

    /// Runs a bench of something that is timed as a whole.
    fn add_plain(&mut self, name: &str, mut act: impl FnMut()) {
        self.add(name, |iterations| {
            let started = Instant::now();
            (0..iterations).for_each(|_| act());
            started.elapsed()
        });
    }
}

/// The time of this many pages, of rounds of some pages each.
fn in_rounds(pages: u64, of_round: usize, round: impl FnMut() -> Duration) -> Duration {
    let rounds = pages.div_ceil(of_round as u64);
    let elapsed: Duration = std::iter::repeat_with(round).take(rounds as usize).sum();
    elapsed.mul_f64(pages as f64 / (rounds * of_round as u64) as f64)
}

fn run(benches: &mut Benches, device: &Device) -> Result<()> {
    let stream = Stream::new(device)?;
    let pool = || VirtualMemoryPool::new(device, CAPACITY, GRANULARITY);
    let (unnamed, named) = (pool()?, pool()?);
    named.use_stream(&stream)?;
    for (name, pool) in [
        ("allocate and deallocate one page, no stream named", unnamed),
        ("allocate and deallocate one page, one stream named", named),
    ] {
        benches.add_plain(name, || {
            black_box(pool.allocate(0, GRANULARITY).expect("room"));
            pool.deallocate(0, GRANULARITY).expect("live");
        });
    }

    let model = ParkedModels::new(&stream, 1, PARKED)?;
    // Without the time of parking them.
    let take_back = || {
        model.park(0).expect("room");
        let started = Instant::now();
        model.take_back(0).expect("parked");
        started.elapsed()
    };
    let take_all = |pages| in_rounds(pages, PARKED, take_back);
    benches.add("take back a parked page", take_all);
    drop(model);

    // The time of one page stays as it is with one thread if threads do not disturb each other.
    let models = ParkedModels::new(&stream, 2, PARKED_OF_EACH)?;
    for (threads, name) in (1..).zip(THREADS) {
        let take = || models.take(threads).expect("parked");
        benches.add(name, |pages| in_rounds(pages, PARKED_OF_EACH, take));
    }
    drop(models);

    let engine = Engine::new(device, EngineOptions::new())?;
    let tokens = VirtualMemoryPool::on_engine(&engine, CAPACITY, GRANULARITY)?;
    tokens.allocate(0, 1)?;
    benches.add_plain("allocate and deallocate a token in a live page", || {
        black_box(tokens.allocate(TOKEN, TOKEN).expect("room"));
        tokens.deallocate(TOKEN, TOKEN).expect("live");
    });

    let growing = VirtualMemoryPool::on_engine(&engine, CAPACITY, GRANULARITY)?;
    // The first token brings the page.
    let grow = || {
        growing.allocate(0, TOKEN).expect("room");
        let started = Instant::now();
        for token in 1..=TOKENS {
            black_box(growing.allocate(token * TOKEN, TOKEN).expect("room"));
        }
        let elapsed = started.elapsed();
        growing.deallocate(0, GRANULARITY).expect("live");
        elapsed
    };
    let grow_all = |tokens| in_rounds(tokens, TOKENS, grow);
    benches.add("allocate a token in a live page", grow_all);

    let shared = SharedMemoryPool::new(device, 1 << 40)?;
    let model = |number| {
        let account = shared.register_model(&format!("model {number}"), Quota::new())?;
        VirtualMemoryPool::on_account(&account, CAPACITY, GRANULARITY, PoolOptions::new())
    };
    let models = (0..64).map(model).collect::<cuda_vmm::Result<Vec<_>>>()?;
    let model = &models[7];
    let one_page = || {
        let address = model.allocate_anywhere(GRANULARITY, 256).expect("room");
        let offset = (black_box(address) - model.base_address()) as usize;
        model.deallocate(offset, GRANULARITY).expect("live");
    };
    let name = "allocate and deallocate one page of one model in 64";
    benches.add_plain(name, one_page);
    Ok(())
}

/// Judges the benches, what two threads do together against one, and the host memory.
fn judge(mut outcome: Outcome) -> Result<ExitCode> {
    let [one_us, two_us] = THREADS.map(|name| outcome.us(name, 500));
    match std::thread::available_parallelism()?.get() {
        1 => outcome.note("pages of two threads", "one core"),
        _ => outcome.count("pages of two threads", 2.0 / two_us?),
    }
    outcome.count("pages of one thread", 1.0 / one_us?);
    for filling in bookkeeping_memory()? {
        let mapped = format!("{} bytes mapped", filling.mapped_bytes);
        let allowed_bytes = filling.allowed_bytes() as f64;
        outcome.count(&format!("held, {mapped}"), filling.held_bytes as f64);
        outcome.count(&format!("allowed, {mapped}"), allowed_bytes);
    }
    let figures = Figure::list(include_str!("../figures/bookkeeping.csv"))?;
    let findings: Vec<_> = figures.iter().map(|one| outcome.judge(one, true)).collect();
    let json = std::env::var_os("BENCH_JSON").map(PathBuf::from);
    report::end(&findings, json.as_deref())
}

fn main() -> Result<ExitCode> {
    let mut criterion = Criterion::default().configure_from_args();
    let (group, outcome) = (criterion.benchmark_group("bookkeeping"), Outcome::default());
    let mut benches = Benches { group, outcome };
    run(&mut benches, &no_op_driver(true).device(0)?)?;
    benches.group.finish();
    match std::env::args().skip(1).eq(["--bench"]) {
        true => judge(benches.outcome),
        false => Ok(ExitCode::SUCCESS),
    }
}
