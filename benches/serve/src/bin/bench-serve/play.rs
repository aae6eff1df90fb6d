//! A run of a workload: its requests are sent, and memory is looked at meanwhile.

use crate::arrivals::{Phase, Planned, Run};
use crate::client::{Client, since};
use crate::record::{Looked, Recorded};
use anyhow::{Context, Result};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// How long between two looks at the memory.
const LOOK: Duration = Duration::from_millis(200);
/// From when all requests are ready to the first arrival.
const LEAD_US: u64 = 20_000;
/// For how long a server may be busy with what came before.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// What came of a run.
pub struct Played {
    pub requests: Vec<Recorded>,
    pub memory: Vec<Looked>,
    pub preemptions: u64,
}

/// How many requests each model gets at once before anything is recorded.
const WARM_UP: [usize; 6] = [1, 2, 4, 8, 16, 32];

/// Sends requests with prompts of this length to each model that are not recorded: the first of a
/// size take longer, as libraries load kernels for it.
///
/// # Errors
///
/// If one of them is not served.
pub async fn warm_up(client: &Client, models: usize, prompt_tokens: u32) -> Result<()> {
    for model in 0..models {
        for (turn, requests) in WARM_UP.into_iter().enumerate() {
            let mut sent = JoinSet::new();
            for number in 0..requests {
                let planned = Planned {
                    model,
                    arrival_us: 0,
                    // No prefix is that of another.
                    prompt: vec![(64 * turn + number) as u32 % 256; prompt_tokens as usize],
                    generated_tokens: 4,
                };
                let ready = client.ready(&planned, crate::arrivals::PhaseName::Measured, 0);
                let client = client.clone();
                sent.spawn(async move { client.send_now(ready, Instant::now()).await });
            }
            while let Some(record) = sent.join_next().await {
                let record = record.context("a request's task failed")?;
                anyhow::ensure!(record.is_served(), "a first request failed: {record:?}");
            }
        }
    }
    Ok(())
}

/// Runs it on a server that has nothing to do, or soon will.
///
/// # Errors
///
/// If the server's numbers cannot be had, or it does not become idle. Requests that fail are
/// recorded.
pub async fn play(client: &Client, run: &Run) -> Result<Played> {
    let before = client.idle(IDLE_TIMEOUT).await?;
    let start = Instant::now();
    let looks = Arc::new(Mutex::new(Vec::new()));
    let mut watch = JoinSet::new();
    watch.spawn(watch_memory(client.clone(), start, looks.clone()));
    let mut requests: Vec<Recorded> = Vec::new();
    for phase in &run.phases {
        let last_us = requests.iter().filter_map(Recorded::last_token_us).max();
        let begin_us = last_us.unwrap_or_else(|| since(start) + LEAD_US);
        requests.extend(send_all(client, phase, begin_us, start).await?);
    }
    watch.shutdown().await;
    let after = client.idle(IDLE_TIMEOUT).await?;
    let mut memory = std::mem::take(&mut *looks.lock().unwrap_or_else(PoisonError::into_inner));
    let preemptions = |counts: &[u64]| counts.iter().sum::<u64>();
    let preempted = preemptions(&after.preemptions) - preemptions(&before.preemptions);
    memory.push(Looked::new(since(start), after));
    Ok(Played {
        requests,
        memory,
        preemptions: preempted,
    })
}

/// Notes what `/metrics` says until it is aborted. A look that fails is left out.
async fn watch_memory(client: Client, start: Instant, looks: Arc<Mutex<Vec<Looked>>>) {
    let mut ticks = tokio::time::interval(LOOK);
    loop {
        ticks.tick().await;
        if let Ok(metrics) = client.metrics().await {
            let looked = Looked::new(since(start), metrics);
            let mut looks = looks.lock().unwrap_or_else(PoisonError::into_inner);
            looks.push(looked);
        }
    }
}

/// Sends the requests of a phase that begins at a time, and waits for all; in the order of plan.
async fn send_all(
    client: &Client,
    phase: &Phase,
    begin_us: u64,
    start: Instant,
) -> Result<Vec<Recorded>> {
    let planned = phase.requests.iter();
    let ready = planned.map(|planned| client.ready(planned, phase.name, begin_us));
    let ready: Vec<_> = ready.collect();
    let mut tasks = JoinSet::new();
    match phase.clients {
        // An open loop: each request has a task of its own, and none waits for another.
        None => {
            for ready in ready {
                let client = client.clone();
                tasks.spawn(async move { vec![client.send(ready, start).await] });
            }
        }
        Some(clients) => {
            let all = Arc::new(Mutex::new(ready.into_iter()));
            for _ in 0..clients {
                let (client, all) = (client.clone(), all.clone());
                tasks.spawn(async move {
                    let mut records = Vec::new();
                    let next = || all.lock().unwrap_or_else(PoisonError::into_inner).next();
                    while let Some(mut ready) = next() {
                        ready.plan(since(start));
                        records.push(client.send_now(ready, start).await);
                    }
                    records
                });
            }
        }
    }
    let mut records = Vec::new();
    while let Some(ended) = tasks.join_next().await {
        records.extend(ended.context("a request's task failed")?);
    }
    records.sort_by_key(|record| record.planned_us);
    Ok(records)
}
