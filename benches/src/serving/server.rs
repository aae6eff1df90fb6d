//! The course of events: arrivals, steps, and the GPU that the models share.
//!
//! The GPU does one step at a time. If several models have something to do they take turns, a step
//! each: the engines are processes beside each other, between which the card switches in time
//! slices, and as their steps are alike this gives each the same share of the card as smaller
//! slices would.

use super::memory::Memory;
use super::request::Request;
use super::scheduler::{Limits, Scheduler};
use super::served::{Moment, Run, Served};
use anyhow::{Result, ensure};

/// How long between two looks at the memory.
const LOOK_NS: u64 = 250_000_000;
/// For how long the background may work on while no engine can take a step and nothing arrives.
const PATIENCE_NS: u64 = 1_000_000_000;
/// How long a turn of the background takes then.
const TURN_NS: u64 = 1_000_000;

/// Everything that shares the GPU.
pub struct Server<'a> {
    run: Run<'a>,
    step_ns: &'a dyn Fn(u32, usize) -> u64,
    engines: Vec<Scheduler>,
    /// Requests that have not arrived, of each model.
    to_come: Vec<&'a [Request]>,
    /// The model whose turn it is to take a step, if it can.
    turn: usize,
    /// When memory is looked at next, if its course is noted.
    look_ns: Option<u64>,
    /// When the last request ended so far.
    end_ns: u64,
}

impl<'a> Server<'a> {
    /// A server to which each model's requests come, in the order of arrival. A step of this many
    /// prompt tokens and sequences that decode takes `step_ns`. What comes of it is added to
    /// `served`.
    pub fn new(
        models: &'a [Vec<Request>],
        memory: &'a mut dyn Memory,
        limits: Limits,
        step_ns: &'a dyn Fn(u32, usize) -> u64,
        served: &'a mut Served,
    ) -> Self {
        let engines = (0..models.len()).map(|model| Scheduler::new(model, limits));
        Self {
            step_ns,
            engines: engines.collect(),
            to_come: models.iter().map(Vec::as_slice).collect(),
            turn: 0,
            look_ns: served.over_time.is_empty().then_some(0),
            end_ns: 0,
            run: Run {
                memory,
                now_ns: 0,
                served,
            },
        }
    }

    /// Serves until all requests have ended, or until a moment.
    ///
    /// # Errors
    /// If the memory fails, or if requests are left that can never go on.
    pub fn run(mut self, until_ns: u64) -> Result<()> {
        let mut idle_from_ns = None;
        self.run.memory.work(0)?;
        while self.run.now_ns < until_ns {
            self.look();
            if self.step()? {
                idle_from_ns = None;
                continue;
            }
            let now_ns = self.run.now_ns;
            let next = self.to_come.iter().filter_map(|requests| requests.first());
            let idle_ns = match next.map(|request| request.arrival_ns).min() {
                Some(next_ns) => next_ns.min(until_ns) - now_ns,
                None if self.engines.iter().all(|engine| !engine.is_busy()) => break,
                None => {
                    let idle_ns = now_ns - *idle_from_ns.get_or_insert(now_ns);
                    let is_patient = idle_ns < PATIENCE_NS;
                    ensure!(is_patient, "requests are left that get no memory");
                    TURN_NS
                }
            };
            self.run.memory.idle(&mut self.run.now_ns, idle_ns)?;
        }
        self.look_ns = self.look_ns.map(|_| self.run.now_ns);
        self.look();
        self.run.served.end_ns += self.end_ns;
        Ok(())
    }

    /// Takes in what has arrived by now.
    fn arrive(&mut self) {
        for (engine, requests) in self.engines.iter_mut().zip(&mut self.to_come) {
            while let [next, later @ ..] = requests
                && next.arrival_ns <= self.run.now_ns
            {
                engine.arrive(*next, &mut self.run);
                *requests = later;
            }
        }
    }

    /// Takes in what has arrived, and has the next model that can take a step; returns whether one
    /// could.
    ///
    /// # Errors
    /// If the memory fails.
    pub fn step(&mut self) -> Result<bool> {
        self.arrive();
        let (first, models) = (self.turn, self.engines.len());
        for model in (first..first + models).map(|model| model % models) {
            let (engine, run) = (&mut self.engines[model], &mut self.run);
            if !engine.is_busy() {
                continue;
            }
            let began_ns = run.now_ns;
            let step = engine.plan(run)?;
            let mut calls_ns = run.now_ns - began_ns;
            let sequences = step.decodes + step.prompts;
            if sequences == 0 {
                run.served.calls_ns += calls_ns;
                continue;
            }
            let step_ns = (self.step_ns)(step.prompt_tokens, step.decodes);
            run.memory.step(&mut run.now_ns, step_ns)?;
            let ready_ns = run.now_ns;
            let ended = engine.finish(run)?;
            calls_ns += run.now_ns - ready_ns;
            let served = &mut *run.served;
            served.calls.push(calls_ns as f64);
            served.steps.push((run.now_ns - began_ns) as f64);
            served.tokens += sequences as u64;
            served.sequences_max = served.sequences_max.max(sequences);
            served.calls_ns += calls_ns;
            served.served += ended.len();
            for sequence in ended {
                let first_ns = sequence.first_ns.unwrap_or(ready_ns);
                let later = u64::from(sequence.request.generated_tokens.saturating_sub(1));
                let per_token = (ready_ns - first_ns).checked_div(later);
                served.per_token.extend(per_token.map(|ns| ns as f64));
                self.end_ns = ready_ns;
            }
            self.turn = model + 1;
            return Ok(true);
        }
        Ok(false)
    }

    /// Notes what is held, now and then.
    fn look(&mut self) {
        let Run {
            memory,
            now_ns: at_ns,
            served,
        } = &mut self.run;
        let models = 0..self.engines.len();
        let held_bytes: Vec<_> = models.map(|model| memory.held_bytes(model)).collect();
        served.held_bytes_max = served.held_bytes_max.max(held_bytes.iter().sum());
        if self.look_ns.is_some_and(|look_ns| *at_ns >= look_ns) {
            self.look_ns = Some(*at_ns + LOOK_NS);
            let at_ns = *at_ns;
            served.over_time.push(Moment { at_ns, held_bytes });
        }
    }
}
