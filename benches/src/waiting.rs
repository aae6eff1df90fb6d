//! Waiting for what an engine does in the background.

use anyhow::{Result, ensure};
use cuda_vmm::{Engine, EngineStats};
use std::time::{Duration, Instant};

/// For how long something may be waited for.
const PATIENCE: Duration = Duration::from_secs(10);

/// Steps an engine until its numbers are as they should be; an error if that takes too long.
pub fn step_until(
    engine: &Engine,
    what: &str,
    mut is_so: impl FnMut(&EngineStats) -> Result<bool>,
) -> Result<()> {
    let started = Instant::now();
    while !is_so(&engine.stats())? {
        ensure!(started.elapsed() < PATIENCE, "waited in vain for {what}");
        engine.step();
    }
    Ok(())
}

/// Waits until an engine's own thread has its numbers as they should be; an error if it lasts.
pub fn watch(engine: &Engine, what: &str, is_so: impl Fn(&EngineStats) -> bool) -> Result<()> {
    let started = Instant::now();
    while !is_so(&engine.stats()) {
        ensure!(started.elapsed() < PATIENCE, "waited in vain for {what}");
        std::hint::spin_loop();
    }
    Ok(())
}
