//! Threads that use everything at random for as long as you say: tensors, caches, sequences, block
//! tables and ranges of several accounts under one limit. All bytes are checked, the parts of the
//! memory add up at each look, and in the end everything is given back.
//!
//! `cargo run --release --example soak -- --minutes 60` runs on the CPU device, and the simulated
//! driver fails calls at random. With `--features cuda` it runs on GPU 0, where no call is made to
//! fail. The example shows no use of the crate; it is a test that can go on for hours.

mod life;
mod player;
mod tally;
#[cfg(test)]
mod tests;
mod tokens;
mod watch;

use candle_core::Device;
use candle_cuda_vmm::cuda_vmm;
use candle_cuda_vmm::device::core_device;
use candle_cuda_vmm::{EngineOptions, Result};
use clap::Parser;
use cuda_vmm::{SharedMemoryPool, SharedPoolOptions};
use player::{OPERATIONS, Player};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;
use tally::{Outcome, Tally};
use watch::{Faults, Watch};

/// Use everything at random, and check that nothing is lost
#[derive(Clone, Debug, Parser)]
struct Arguments {
    /// For how many minutes
    #[arg(long, value_name = "N", default_value_t = 1.0, value_parser = minutes)]
    minutes: f64,
    /// How many threads, each with an account of its own
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=64))]
    threads: u64,
    /// Seed of all that is random. Threads still meet in another order in each run
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
}

fn minutes(text: &str) -> std::result::Result<f64, String> {
    match text.parse() {
        Ok(minutes) if (0.0..=1e6).contains(&minutes) => Ok(minutes),
        _ => Err("it is a number from 0 to 1,000,000".to_owned()),
    }
}

/// Pages that each thread has on average under the common limit: less than it asks for.
const PAGES: usize = 20;

/// Soaks, and returns what was done; or fails if anything was wrong.
fn soak(arguments: &Arguments) -> Result<Tally> {
    let device = match cfg!(feature = "cuda") {
        true => Device::new_cuda(0)?,
        false => Device::Cpu,
    };
    let core = core_device(&device)?;
    let page = core.granularity_bytes();
    let engine = EngineOptions::new()
        .limit_bytes(arguments.threads as usize * PAGES * page)
        .park_bytes_max(16 * page)
        .cache_bytes_max(16 * page);
    let options = SharedPoolOptions::new().engine(engine).page_bytes(page);
    let shared = SharedMemoryPool::with_options(&core, options)?;
    let faults = Faults::of(&core);
    let (is_over, is_over_for_all) = (AtomicBool::new(false), |over: &AtomicBool| {
        over.load(Ordering::Relaxed)
    });
    let outcome: Result<Tally> = thread::scope(|scope| {
        let threads: Vec<_> = (0..arguments.threads)
            .map(|number| {
                let (shared, device) = (&shared, device.clone());
                let (is_over, has_faults) = (&is_over, faults.is_some());
                let seed = arguments.seed << 8 | number;
                scope.spawn(move || {
                    let player = Player::new(number, seed, device, shared, has_faults);
                    let played = player.play(|| is_over_for_all(is_over));
                    // The others need not go on.
                    is_over.fetch_or(played.is_err(), Ordering::Relaxed);
                    played
                })
            })
            .collect();
        let mut watch = Watch::new(&shared, faults.as_ref(), arguments.seed);
        let watched = watch.run(Duration::from_secs_f64(60.0 * arguments.minutes), || {
            is_over_for_all(&is_over)
        });
        is_over.store(true, Ordering::Relaxed);
        let mut sum = Tally::default();
        for thread in threads {
            sum += thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        watched?;
        watch.report();
        Ok(sum)
    });
    if let Some(faults) = &faults {
        faults.clear();
    }
    let tally = outcome?;
    watch::expect_all_given_back(&core, &shared)?;
    Ok(tally)
}

/// What a run that shows something has done, and this one has not.
fn never_happened(tally: &Tally) -> Vec<&'static str> {
    let mut missing: Vec<_> = OPERATIONS.iter().map(|(name, ..)| *name).collect();
    missing.retain(|name| !tally.was_done(name));
    missing.extend((tally.count(Outcome::Refused) == 0).then_some("a refusal"));
    let has_faults = cfg!(not(feature = "cuda"));
    let is_missing = has_faults && tally.count(Outcome::Failed) == 0;
    missing.extend(is_missing.then_some("a call that failed"));
    missing
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match soak(&arguments) {
        Ok(tally) => {
            println!("{tally}");
            println!("all bytes were right, and everything was given back");
            let missing = never_happened(&tally);
            // A run without a kind of thing has shown nothing about it.
            if arguments.minutes >= 1.0 && !missing.is_empty() {
                eprintln!("never happened: {}", missing.join(", "));
                return ExitCode::FAILURE;
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("with seed {}: {error}", arguments.seed);
            ExitCode::FAILURE
        }
    }
}
