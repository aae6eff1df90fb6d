//! The course of events: arrivals, steps, and the GPU that the models share.
//!
//! The GPU does one step at a time. If several models have something to do they take turns, a step
//! each: the engines are processes beside each other, between which the card switches in time
//! slices, and as their steps are alike this gives each the same share of the card as smaller
//! slices would.

use super::memory::Memory;
use super::request::Request;
use super::scheduler::{Limits, Scheduler};
use crate::samples::Samples;
use anyhow::{Result, ensure};

/// How long between two looks at the memory.
const LOOK_NS: u64 = 250_000_000;
/// For how long the background may work on while no engine can take a step and nothing arrives.
const PATIENCE_NS: u64 = 1_000_000_000;
/// How long a turn of the background takes then.
const TURN_NS: u64 = 1_000_000;

/// What was held at a moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moment {
    /// When.
    pub at_ns: u64,
    /// What each model held, in bytes.
    pub held_bytes: Vec<u64>,
}

/// What came of serving.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Served {
    /// From a request's arrival to the end of the step that made its first token.
    pub first_token: Samples,
    /// From a request's first token to its last, for each token after the first.
    pub per_token: Samples,
    /// Requests that were served to their end.
    pub served: usize,
    /// Requests that could never have had their memory.
    pub refused: usize,
    /// Prompts that had to wait because memory was short.
    pub refused_prompts: usize,
    /// Sequences that lost their memory and were computed again.
    pub preemptions: u64,
    /// Tokens that were generated.
    pub tokens: u64,
    /// The most sequences in a step.
    pub sequences_max: usize,
    /// What the pool's calls cost the thread that takes the steps, for each step.
    pub calls: Samples,
    /// What each step took in all.
    pub steps: Samples,
    /// When the last request ended; of several runs the sum.
    pub end_ns: u64,
    /// What the pool's calls cost in all, those without a step among them.
    pub calls_ns: u64,
    /// The most that was held at once, in bytes.
    pub held_bytes_max: u64,
    /// Memory over time.
    pub over_time: Vec<Moment>,
}

impl Served {
    /// With another run of the same: all requests of both, the worst of what is a maximum, and the
    /// first one's memory over time.
    pub fn merged(self, other: Self) -> Self {
        Self {
            first_token: self.first_token.merged(other.first_token),
            per_token: self.per_token.merged(other.per_token),
            served: self.served + other.served,
            refused: self.refused + other.refused,
            refused_prompts: self.refused_prompts + other.refused_prompts,
            preemptions: self.preemptions + other.preemptions,
            tokens: self.tokens + other.tokens,
            sequences_max: self.sequences_max.max(other.sequences_max),
            calls: self.calls.merged(other.calls),
            steps: self.steps.merged(other.steps),
            end_ns: self.end_ns + other.end_ns,
            calls_ns: self.calls_ns + other.calls_ns,
            held_bytes_max: self.held_bytes_max.max(other.held_bytes_max),
            over_time: self.over_time,
        }
    }

    /// Tokens that were generated in a second, over all the time.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / (self.end_ns as f64 / 1e9)
    }
}

/// Everything that shares the GPU.
pub struct Server<'a> {
    memory: &'a mut dyn Memory,
    step_ns: &'a dyn Fn(u32, usize) -> u64,
    engines: Vec<Scheduler>,
    /// Requests that have not arrived, of each model.
    to_come: Vec<&'a [Request]>,
    now_ns: u64,
    look_ns: u64,
    per_token: Vec<f64>,
    calls: Vec<f64>,
    steps: Vec<f64>,
    served: Served,
}

impl<'a> Server<'a> {
    /// A server to which each model's requests come, in the order of arrival. A step of this many
    /// prompt tokens and sequences that decode takes `step_ns`.
    pub fn new(
        models: &'a [Vec<Request>],
        memory: &'a mut dyn Memory,
        limits: Limits,
        step_ns: &'a dyn Fn(u32, usize) -> u64,
    ) -> Self {
        let engines = (0..models.len()).map(|model| Scheduler::new(model, limits));
        Self {
            memory,
            step_ns,
            engines: engines.collect(),
            to_come: models.iter().map(Vec::as_slice).collect(),
            now_ns: 0,
            look_ns: 0,
            per_token: Vec::new(),
            calls: Vec::new(),
            steps: Vec::new(),
            served: Served::default(),
        }
    }

    /// Serves until all requests have ended, or until a moment.
    ///
    /// # Errors
    /// If the memory fails, or if requests are left that can never go on.
    pub fn run(mut self, until_ns: u64) -> Result<Served> {
        let (mut turn, mut idle_from_ns) = (0, None);
        self.memory.work(0)?;
        while self.now_ns < until_ns {
            self.arrive();
            self.look();
            if let Some(model) = self.step(turn)? {
                (turn, idle_from_ns) = (model + 1, None);
                continue;
            }
            let next = self.to_come.iter().filter_map(|requests| requests.first());
            let idle_ns = match next.map(|request| request.arrival_ns).min() {
                Some(next_ns) => next_ns.min(until_ns) - self.now_ns,
                None if self.engines.iter().all(|engine| !engine.is_busy()) => break,
                None => {
                    let idle_ns = self.now_ns - *idle_from_ns.get_or_insert(self.now_ns);
                    ensure!(
                        idle_ns < PATIENCE_NS,
                        "requests are left that get no memory"
                    );
                    TURN_NS
                }
            };
            self.memory.idle(&mut self.now_ns, idle_ns)?;
        }
        self.look_ns = self.now_ns;
        self.look();
        let engines = || self.engines.iter();
        let first_token = engines().flat_map(|engine| &engine.first_token_ns);
        Ok(Served {
            first_token: first_token.map(|ns| *ns as f64).collect(),
            per_token: self.per_token.into_iter().collect(),
            calls: self.calls.into_iter().collect(),
            steps: self.steps.into_iter().collect(),
            preemptions: engines().map(|engine| engine.preemptions).sum(),
            refused_prompts: engines().map(|engine| engine.refused_prompts).sum(),
            ..self.served
        })
    }

    /// Takes in what has arrived by now.
    fn arrive(&mut self) {
        for (engine, requests) in self.engines.iter_mut().zip(&mut self.to_come) {
            while let [next, later @ ..] = requests
                && next.arrival_ns <= self.now_ns
            {
                let taken = engine.arrive(*next, &*self.memory);
                self.served.refused += usize::from(!taken);
                *requests = later;
            }
        }
    }

    /// The next model that can takes a step; returns which.
    fn step(&mut self, turn: usize) -> Result<Option<usize>> {
        let models = self.engines.len();
        for model in (0..models).map(|index| (turn + index) % models) {
            let (engine, served) = (&mut self.engines[model], &mut self.served);
            if !engine.is_busy() {
                continue;
            }
            let began_ns = self.now_ns;
            let step = engine.plan(self.memory, &mut self.now_ns)?;
            let mut calls_ns = self.now_ns - began_ns;
            if step.sequences() == 0 {
                served.calls_ns += calls_ns;
                continue;
            }
            let step_ns = (self.step_ns)(step.prompt_tokens, step.decodes);
            self.memory.step(&mut self.now_ns, model, step_ns)?;
            let ready_ns = self.now_ns;
            let ended = engine.finish(step, self.memory, &mut self.now_ns)?;
            calls_ns += self.now_ns - ready_ns;
            self.calls.push(calls_ns as f64);
            self.steps.push((self.now_ns - began_ns) as f64);
            served.tokens += step.sequences() as u64;
            served.sequences_max = served.sequences_max.max(step.sequences());
            served.calls_ns += calls_ns;
            served.served += ended.len();
            for sequence in ended {
                let first_ns = sequence.first_ns.unwrap_or(ready_ns);
                let later = u64::from(sequence.request.generated_tokens.saturating_sub(1));
                let per_token = (ready_ns - first_ns).checked_div(later);
                self.per_token.extend(per_token.map(|ns| ns as f64));
                served.end_ns = ready_ns;
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
        self.served.held_bytes_max = self.served.held_bytes_max.max(sum);
        if self.now_ns >= self.look_ns {
            self.look_ns = self.now_ns + LOOK_NS;
            let at_ns = self.now_ns;
            self.served.over_time.push(Moment { at_ns, held_bytes });
        }
    }
}
