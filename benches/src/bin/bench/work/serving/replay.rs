//! Three models that share a pool, replayed in real time: what the pool's calls add to each step.

use super::TOKEN_BYTES;
use super::arrivals::{MODELS, arrivals};
use super::cache::{Blocks, Cache};
use super::scheduler::{Course, Scheduler};
use crate::bare::Plain;
use crate::demand::{Demand, Reach};
use crate::machine::{self, Machine};
use crate::samples::Samples;
use crate::traffic::Traffic;
use crate::work::{Outcome, Work};
use anyhow::Result;
use comfy_table::{Table, presets};
use cuda_vmm::{ModelOptions, SharedMemoryPool, SharedPoolOptions, Snapshot};

const fn of_steps(name: &'static str) -> Demand {
    Demand::time(name, "µs", Reach::Open)
}

const OWN_MEDIAN: Demand =
    of_steps("serving replayed, three models: the pool's own time in a step, p50: the whole step");
const OWN_TAIL: Demand =
    of_steps("serving replayed, three models: the pool's own time in a step, p99: the whole step");
const OWN_WORST: Demand = of_steps(
    "serving replayed, three models: the pool's own time in a step, worst: the whole step",
);
const WHOLE_MEDIAN: Demand =
    of_steps("serving replayed, three models: whole step, p50: everything allocated before");
const WHOLE_TAIL: Demand =
    of_steps("serving replayed, three models: whole step, p99: everything allocated before");
const WHOLE_WORST: Demand =
    of_steps("serving replayed, three models: whole step, worst: everything allocated before");
const REFUSED: Demand = Demand::time(
    "serving replayed, three models: prompts refused for want of memory: everything allocated before",
    "prompts",
    Reach::Open,
);
const PREEMPTED: Demand = Demand::time(
    "serving replayed, three models: sequences preempted: everything allocated before",
    "sequences",
    Reach::Open,
);
const LATE: Demand = Demand::time(
    "serving replayed, three models: allocations that called the driver on the stepping thread",
    "calls",
    Reach::Open,
);
const COMMITTED: Demand = Demand::time(
    "serving replayed, three models: most bytes committed: bytes of the limit",
    "bytes",
    Reach::Open,
);

/// Against one buffer for all, in which all blocks have memory from the beginning.
pub const WORK: Work = Work {
    name: "serving replayed, three models",
    demands: &[
        OWN_MEDIAN,
        OWN_TAIL,
        OWN_WORST,
        WHOLE_MEDIAN,
        WHOLE_TAIL,
        WHOLE_WORST,
        REFUSED,
        PREEMPTED,
        LATE,
        COMMITTED,
    ],
    measure,
};

/// What is made ahead for each model, in pages: that of a few prompts.
const PAGES_AHEAD: usize = 64;
/// How much freed memory stays mapped, in pages, before it goes back for the other models.
const PAGES_PARKED: usize = 512;

/// What the pool held when a second of the trace was over.
struct Moment {
    at_s: f64,
    used_bytes: [usize; MODELS],
    snapshot: Snapshot,
}

/// Prints what was held over time.
fn print_moments(moments: &[Moment]) {
    let mib = |bytes: usize| (bytes >> 20).to_string();
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN).set_header([
        "second",
        "committed MiB",
        "live",
        "retiring",
        "parked",
        "ahead",
        "model 1",
        "model 2",
        "model 3",
    ]);
    for Moment {
        at_s,
        used_bytes,
        snapshot,
    } in moments
    {
        let engine = &snapshot.engine;
        let mut row = vec![format!("{at_s:.0}")];
        row.extend([
            mib(engine.committed_bytes),
            mib(engine.parts.live_page_bytes),
            mib(engine.parts.retiring_bytes),
            mib(engine.parts.parked_bytes),
            mib(engine.parts.ahead_bytes),
        ]);
        row.extend(used_bytes.map(mib));
        table.add_row(row);
    }
    println!("\nserving replayed, three models: bytes held over time");
    println!("{table}");
}

/// The models of a shared pool that takes at most so much memory.
fn elastic(machine: &Machine, limit_bytes: usize) -> Result<(SharedMemoryPool, [Cache; MODELS])> {
    let page_bytes = machine.page_bytes;
    let engine = machine::options()
        .limit_bytes(limit_bytes)
        .park_bytes_max(PAGES_PARKED * page_bytes)
        .chunk_bytes_max(0);
    let options = SharedPoolOptions::new()
        .engine(engine)
        .page_bytes(page_bytes);
    let pool = SharedMemoryPool::with_options(&machine.device, options)?;
    let mut caches = Vec::with_capacity(MODELS);
    for name in ["model 1", "model 2", "model 3"] {
        let mut options = ModelOptions::new(limit_bytes);
        options.ahead_bytes_max = PAGES_AHEAD * page_bytes;
        pool.register_model_with(name, options)?;
        let model = pool.model(name)?;
        model.use_stream(&machine.stream)?;
        caches.push(Cache::elastic(model));
    }
    let caches = <[Cache; MODELS]>::try_from(caches);
    let caches = caches.map_err(|_| anyhow::anyhow!("there are not {MODELS} models"))?;
    Ok((pool, caches))
}

fn measure(machine: &Machine) -> Result<Outcome> {
    let (settings, page_bytes) = (&machine.replay, machine.page_bytes);
    let traffic = Traffic::new(machine, &machine.device, &machine.stream)?;
    // All the memory that the pools share, or less on a smaller card.
    let limit_bytes = machine.fitting(settings.tokens * TOKEN_BYTES, 0.9, page_bytes)?;
    let trace = arrivals(settings.peak);
    // In the simulator a step takes no time to speak of, and the trace goes by as fast as other work is measured.
    let speed = match machine.is_real() {
        true => 1.0,
        false => (settings.seconds / machine.settings.patience.as_secs_f64()).max(1.0),
    };
    let run = |caches, each_second: &mut dyn FnMut(f64, [usize; MODELS])| {
        let mut scheduler = Scheduler::new(caches, &machine.stream, &traffic, settings, page_bytes);
        scheduler.run(&trace, speed, each_second)
    };

    let (pool, caches) = elastic(machine, limit_bytes)?;
    let mut moments: Vec<Moment> = Vec::new();
    let ours = run(caches, &mut |at_s, used| {
        moments.push(Moment {
            at_s,
            used_bytes: used.map(|blocks| blocks * page_bytes),
            snapshot: pool.snapshot(),
        });
    })?;
    let counters = pool.snapshot().counters;
    print_moments(&moments);
    for name in pool.models() {
        pool.unregister_model(&name)?;
    }
    drop(pool);

    let plain = Plain::new(&machine.device, limit_bytes)?;
    let blocks = Blocks::new(limit_bytes / page_bytes);
    let caches = [0; MODELS].map(|_| Cache::backed(&blocks, plain.address(), page_bytes));
    let before = run(caches, &mut |_, _| {})?;
    let late = counters.ranges.late_prefetches;
    let most_bytes = moments
        .iter()
        .map(|moment| moment.snapshot.engine.committed_bytes);
    let most_bytes = most_bytes.max().unwrap_or_default();
    outcome(machine, ours, before, late, (most_bytes, limit_bytes))
}

fn outcome(
    machine: &Machine,
    ours: Course,
    before: Course,
    late: u64,
    (most_bytes, limit_bytes): (usize, usize),
) -> Result<Outcome> {
    let note = format!(
        "{}; {} requests ended, at most {} sequences in a step",
        machine.replay, ours.ended, ours.sequences_max
    );
    let [own, whole, whole_before] =
        [ours.own_times, ours.whole_times, before.whole_times].map(Samples::from_iter);
    let mut outcome = Outcome::default();
    let us = |samples: &Samples, per_mille| samples.quantile_ns(per_mille) / 1e3;
    for (demand, per_mille) in [(&OWN_MEDIAN, 500), (&OWN_TAIL, 990), (&OWN_WORST, 1000)] {
        let whole_us = us(&whole, per_mille);
        outcome.add_noted(demand, us(&own, per_mille), Some(whole_us), note.clone());
    }
    for (demand, per_mille) in [
        (&WHOLE_MEDIAN, 500),
        (&WHOLE_TAIL, 990),
        (&WHOLE_WORST, 1000),
    ] {
        let peer_us = us(&whole_before, per_mille);
        outcome.add(demand, us(&whole, per_mille), Some(peer_us));
    }
    for (demand, ours, peer) in [
        (&REFUSED, ours.refused_prompts, before.refused_prompts),
        (&PREEMPTED, ours.preemptions, before.preemptions),
    ] {
        outcome.findings.push(crate::demand::Finding {
            // Where the peer has none there is nothing to divide by.
            ratio: (peer > 0).then_some(ours as f64 / peer as f64),
            ..demand.judge(ours as f64, Some(peer as f64))
        });
    }
    outcome.add(&LATE, late as f64, None);
    outcome.add(&COMMITTED, most_bytes as f64, Some(limit_bytes as f64));
    let measured = &mut outcome.measured;
    measured.push("the pool's own time in a step", own);
    measured.push("whole steps", whole);
    measured.push("whole steps, everything allocated before", whole_before);
    measured.push("time to first token", Samples::from_iter(ours.first_tokens));
    let first_tokens = Samples::from_iter(before.first_tokens);
    measured.push(
        "time to first token, everything allocated before",
        first_tokens,
    );
    Ok(outcome)
}
