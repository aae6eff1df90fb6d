//! The course of events: arrivals, steps, and the GPU that the models share.
//!
//! The GPU does one step at a time. Where several models have something to do they take turns, a step each: the engines are
//! processes beside each other, between which the card switches in time slices, and as their steps are alike this gives each
//! the same share of the card as smaller slices would.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use crate::outcome::{Moment, Outcome, Times};
use crate::pools::Memory;
use crate::scheduler::{Limits, Scheduler};
use crate::time_model::TimeModel;
use crate::workload::{Request, Workload};
use anyhow::{Result, bail};

/// How long between two looks at the memory, in simulated time.
const LOOK_NS: u64 = 250_000_000;
/// For how long the background is given another turn while no engine can take a step and nothing arrives.
const PATIENCE_NS: u64 = 1_000_000_000;
/// How long such a turn takes.
const TURN_NS: u64 = 1_000_000;

/// Everything that shares the GPU.
struct Simulation<'a> {
    memory: &'a mut dyn Memory,
    time: TimeModel,
    engines: Vec<Scheduler>,
    /// Requests that have not arrived, of each model.
    to_come: Vec<std::slice::Iter<'a, Request>>,
    now_ns: u64,
    look_ns: u64,
    first_token: Vec<u64>,
    per_token: Vec<u64>,
    outcome: Outcome,
}

/// Runs a workload to its end.
///
/// # Errors
/// If the memory fails, or if requests are left that nobody can go on with.
pub fn run(
    workload: &Workload,
    memory: &mut dyn Memory,
    time: TimeModel,
    limits: Limits,
) -> Result<Outcome> {
    let models = 0..workload.models.len();
    let simulation = Simulation {
        memory,
        time,
        engines: models.map(|model| Scheduler::new(model, limits)).collect(),
        to_come: workload
            .models
            .iter()
            .map(|requests| requests.iter())
            .collect(),
        now_ns: 0,
        look_ns: 0,
        first_token: Vec::new(),
        per_token: Vec::new(),
        outcome: Outcome::default(),
    };
    simulation.run()
}

impl Simulation<'_> {
    fn run(mut self) -> Result<Outcome> {
        let mut turn = 0;
        let mut idle_ns = 0;
        self.memory.work(0)?;
        loop {
            self.arrive();
            self.look();
            match self.step(turn)? {
                Some(model) => (turn, idle_ns) = (model + 1, 0),
                None => match self.next_arrival_ns() {
                    Some(next_ns) => {
                        self.memory.work(self.now_ns)?;
                        self.now_ns = next_ns;
                    }
                    None if self.engines.iter().all(|engine| !engine.is_busy()) => break,
                    None if idle_ns < PATIENCE_NS => {
                        self.memory.work(self.now_ns)?;
                        self.now_ns += TURN_NS;
                        idle_ns += TURN_NS;
                    }
                    None => bail!("requests are left for which no memory can be had"),
                },
            }
        }
        self.look_ns = self.now_ns;
        self.look();
        self.outcome.first_token = Times::new(self.first_token);
        self.outcome.per_token = Times::new(self.per_token);
        self.outcome.preemptions = self.engines.iter().map(|engine| engine.preemptions).sum();
        self.outcome.memory_calls = self.memory.memory_calls();
        Ok(self.outcome)
    }

    /// Takes in what has arrived by now.
    fn arrive(&mut self) {
        for (engine, requests) in self.engines.iter_mut().zip(&mut self.to_come) {
            while let Some(next) = requests
                .as_slice()
                .first()
                .filter(|next| next.arrival_ns <= self.now_ns)
            {
                let taken = engine.arrive(*next, &*self.memory);
                self.outcome.refused += usize::from(!taken);
                requests.next();
            }
        }
    }

    fn next_arrival_ns(&self) -> Option<u64> {
        let next = self
            .to_come
            .iter()
            .filter_map(|requests| requests.as_slice().first());
        next.map(|request| request.arrival_ns).min()
    }

    /// The next model that can takes a step; answers which.
    fn step(&mut self, turn: usize) -> Result<Option<usize>> {
        let models = self.engines.len();
        for model in (0..models).map(|index| (turn + index) % models) {
            if !self.engines[model].is_busy() {
                continue;
            }
            let began_ns = self.now_ns;
            let step = self.engines[model].plan(self.memory, &mut self.now_ns)?;
            let mut calls_ns = self.now_ns - began_ns;
            if step.is_empty() {
                self.outcome.calls_ns += calls_ns;
                continue;
            }
            self.memory.work(self.now_ns)?;
            self.now_ns += self.time.step(step.prompt_tokens, step.decodes);
            let ready_ns = self.now_ns;
            let ended = self.engines[model].finish(step, self.memory, &mut self.now_ns)?;
            calls_ns += self.now_ns - ready_ns;
            self.outcome.steps += 1;
            self.outcome.tokens += (step.prompts + step.decodes) as u64;
            self.outcome.calls_ns += calls_ns;
            self.outcome.calls_ns_max = self.outcome.calls_ns_max.max(calls_ns);
            for sequence in ended {
                let first_ns = sequence.first_ns.unwrap_or(ready_ns);
                self.first_token
                    .push(first_ns - sequence.request.arrival_ns);
                let later = u64::from(sequence.request.generated_tokens.saturating_sub(1));
                self.per_token
                    .extend((ready_ns - first_ns).checked_div(later));
                self.outcome.served += 1;
                self.outcome.end_ns = ready_ns;
            }
            return Ok(Some(model));
        }
        Ok(None)
    }

    /// Notes what is held, now and then.
    fn look(&mut self) {
        let models = 0..self.engines.len();
        let held_bytes: Vec<_> = models.map(|model| self.memory.held_bytes(model)).collect();
        let sum = held_bytes.iter().sum();
        self.outcome.held_bytes_max = self.outcome.held_bytes_max.max(sum);
        if self.now_ns >= self.look_ns {
            self.look_ns = self.now_ns + LOOK_NS;
            let at_ns = self.now_ns;
            self.outcome.over_time.push(Moment { at_ns, held_bytes });
        }
    }
}
