//! The course of events: arrivals, steps, and the GPU that the models share.
//!
//! The GPU does one step at a time. Models with something to do take turns, a step each. The card
//! switches between processes in time slices; as steps are alike, turns give each the same share.
//!
//! Each engine schedules by iterations, as Orca and vLLM do: a step has all sequences that run, and
//! in order the prompts whose blocks fit. If a sequence finds no block for its next token, the one
//! admitted last is preempted: it waits at the front to have all its tokens computed again.

use super::memory::{Memory, blocks_of};
use super::request::Request;
use anyhow::{Result, ensure};
use std::collections::VecDeque;

/// How long between two looks at the memory.
const LOOK_NS: u64 = 250_000_000;
/// For how long the background may work on while no engine can take a step and nothing arrives.
const PATIENCE_NS: u64 = 1_000_000_000;
/// How long a turn of the background takes then.
const TURN_NS: u64 = 1_000_000;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moment {
    pub at_ns: u64,
    /// What each model held, in bytes.
    pub held_bytes: Vec<u64>,
}

/// What came of serving, in one run or in several of the same.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Served {
    /// From a request's arrival to the end of the step that made its first token.
    pub first_token: Vec<f64>,
    /// From a request's first token to its last, for each token after the first.
    pub per_token: Vec<f64>,
    pub served: usize,
    /// Requests that could never have had their memory.
    pub refused: usize,
    /// Prompts that had to wait because memory was short.
    pub refused_prompts: usize,
    /// Sequences that lost their memory and were computed again.
    pub preemptions: u64,
    pub tokens: u64,
    pub sequences_max: usize,
    /// What the pool's calls cost the thread that takes the steps, for each step.
    pub calls: Vec<f64>,
    /// What each step took in all.
    pub steps: Vec<f64>,
    /// When the last request ended; of several runs the sum.
    pub end_ns: u64,
    /// What the pool's calls cost in all, those without a step among them.
    pub calls_ns: u64,
    pub held_bytes_max: u64,
    /// Memory over time, in the first run.
    pub over_time: Vec<Moment>,
}

impl Served {
    /// Tokens that were generated in a second, over all the time.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / (self.end_ns as f64 / 1e9)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub sequences_max: usize,
    /// The most prompt tokens in a step, except for a single longer prompt.
    pub prompt_tokens_max: u32,
    /// Divisor of all blocks: how many a prompt leaves free when it is admitted beside others.
    pub watermark_divisor: usize,
}

impl Limits {
    /// vLLM's defaults: 256 sequences, a hundredth of the blocks left free.
    pub const DEFAULT: Self = Self {
        sequences_max: 256,
        prompt_tokens_max: 8192,
        watermark_divisor: 100,
    };
}

#[derive(Default)]
struct Sequence {
    request: Request,
    generated: u32,
    /// When its first token was there.
    first_ns: Option<u64>,
    was_refused: bool,
    blocks: Vec<u32>,
}

impl Sequence {
    fn new(request: Request) -> Self {
        Self {
            request,
            ..Self::default()
        }
    }

    /// Tokens whose KV the next step writes or reads.
    fn tokens(&self) -> u32 {
        self.request.prompt_tokens + self.generated
    }
}

#[derive(Default)]
struct Engine<'a> {
    to_come: &'a [Request],
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
}

impl Engine<'_> {
    fn is_busy(&self) -> bool {
        !(self.waiting.is_empty() && self.running.is_empty())
    }
}

pub struct Server<'a> {
    engines: Vec<Engine<'a>>,
    memory: &'a mut dyn Memory,
    limits: Limits,
    step_ns: &'a dyn Fn(u32, usize) -> u64,
    served: &'a mut Served,
    now_ns: u64,
    /// The model whose turn it is to take a step, if it can.
    turn: usize,
    /// When memory is looked at next, if its course is noted.
    look_ns: Option<u64>,
    end_ns: u64,
}

impl<'a> Server<'a> {
    /// Serves each model's requests, in the order of arrival. `step_ns` is the time of a step with
    /// so many prompt tokens and sequences that decode. What comes of it is added to `served`.
    pub fn new(
        models: &'a [Vec<Request>],
        memory: &'a mut dyn Memory,
        limits: Limits,
        step_ns: &'a dyn Fn(u32, usize) -> u64,
        served: &'a mut Served,
    ) -> Self {
        let engines = models.iter().map(|to_come| Engine {
            to_come,
            ..Engine::default()
        });
        Self {
            engines: engines.collect(),
            memory,
            limits,
            step_ns,
            now_ns: 0,
            turn: 0,
            look_ns: served.over_time.is_empty().then_some(0),
            end_ns: 0,
            served,
        }
    }

    /// Serves until all requests end, or until a moment; an error if some can never go on.
    pub fn run(mut self, until_ns: u64) -> Result<()> {
        let mut idle_from_ns = None;
        self.memory.work(0)?;
        while self.now_ns < until_ns {
            self.look();
            if self.step()? {
                idle_from_ns = None;
                continue;
            }
            let engines = self.engines.iter();
            let next = engines.filter_map(|engine| engine.to_come.first());
            let idle_ns = match next.map(|request| request.arrival_ns).min() {
                Some(next_ns) => next_ns.min(until_ns) - self.now_ns,
                None if !self.engines.iter().any(Engine::is_busy) => break,
                None => {
                    let idle_ns = self.now_ns - *idle_from_ns.get_or_insert(self.now_ns);
                    let is_patient = idle_ns < PATIENCE_NS;
                    ensure!(is_patient, "requests are left that get no memory");
                    TURN_NS
                }
            };
            self.memory.idle(&mut self.now_ns, idle_ns)?;
        }
        self.look_ns = self.look_ns.map(|_| self.now_ns);
        self.look();
        self.served.end_ns += self.end_ns;
        Ok(())
    }

    /// Takes in what has arrived, and steps the next model that can; returns whether one could.
    pub fn step(&mut self) -> Result<bool> {
        self.arrive();
        let (first, models) = (self.turn, self.engines.len());
        for model in (first..first + models).map(|model| model % models) {
            if !self.engines[model].is_busy() {
                continue;
            }
            let began_ns = self.now_ns;
            // If memory is so short that a sequence was preempted, no prompt comes in.
            let preempted = self.grow(model)?;
            let decodes = self.engines[model].running.len();
            let prompt_tokens = if preempted { 0 } else { self.admit(model)? };
            let sequences = self.engines[model].running.len();
            let mut calls_ns = self.now_ns - began_ns;
            if sequences == 0 {
                self.served.calls_ns += calls_ns;
                continue;
            }
            let step_ns = (self.step_ns)(prompt_tokens, decodes);
            self.memory.step(&mut self.now_ns, step_ns)?;
            let ready_ns = self.now_ns;
            self.finish(model)?;
            calls_ns += self.now_ns - ready_ns;
            self.served.calls.push(calls_ns as f64);
            self.served.steps.push((self.now_ns - began_ns) as f64);
            self.served.tokens += sequences as u64;
            self.served.sequences_max = self.served.sequences_max.max(sequences);
            self.served.calls_ns += calls_ns;
            self.turn = model + 1;
            return Ok(true);
        }
        Ok(false)
    }

    /// Takes in what has arrived by now, except for requests that could never have their blocks.
    fn arrive(&mut self) {
        for (model, engine) in self.engines.iter_mut().enumerate() {
            while let [next, later @ ..] = engine.to_come
                && next.arrival_ns <= self.now_ns
            {
                match blocks_of(next.tokens_max()) <= self.memory.most_blocks(model) {
                    true => engine.waiting.push_back(Sequence::new(*next)),
                    false => self.served.refused += 1,
                }
                engine.to_come = later;
            }
        }
    }

    /// Takes each running sequence's next block, oldest first; returns whether one is preempted.
    fn grow(&mut self, model: usize) -> Result<bool> {
        let engine = &mut self.engines[model];
        let (mut at, mut preempted) = (0, false);
        while at < engine.running.len() {
            let sequence = &mut engine.running[at];
            let missing = blocks_of(sequence.tokens()) - sequence.blocks.len();
            let taken = match missing {
                0 => Some(Vec::new()),
                _ => self.memory.take(&mut self.now_ns, model, missing)?,
            };
            if let Some(blocks) = taken {
                sequence.blocks.extend(blocks);
                at += 1;
            } else if let Some(mut victim) = engine.running.pop() {
                let blocks = std::mem::take(&mut victim.blocks);
                self.memory.give(&mut self.now_ns, model, blocks)?;
                engine.waiting.push_front(victim);
                self.served.preemptions += 1;
                preempted = true;
            }
        }
        Ok(preempted)
    }

    /// Admits waiting prompts in order while their blocks fit; returns how many tokens they have.
    fn admit(&mut self, model: usize) -> Result<u32> {
        let (engine, limits) = (&mut self.engines[model], &self.limits);
        let reserve = self.memory.most_blocks(model) / limits.watermark_divisor;
        let mut prompt_tokens = 0;
        while let Some(next) = engine.waiting.front_mut() {
            let (tokens, need) = (next.tokens(), blocks_of(next.tokens()));
            let over = prompt_tokens > 0 && prompt_tokens + tokens > limits.prompt_tokens_max;
            if over || engine.running.len() >= limits.sequences_max {
                break;
            }
            let is_first = engine.running.is_empty();
            let reserve = if is_first { 0 } else { reserve };
            let blocks = match need + reserve > self.memory.free_blocks(model) {
                true => None,
                false => self.memory.take(&mut self.now_ns, model, need)?,
            };
            let Some(blocks) = blocks else {
                self.served.refused_prompts += usize::from(!next.was_refused);
                next.was_refused = true;
                break;
            };
            next.blocks = blocks;
            prompt_tokens += tokens;
            engine.running.extend(engine.waiting.pop_front());
        }
        Ok(prompt_tokens)
    }

    /// Ends a step: each sequence has a token more, and those that have all give their blocks back.
    fn finish(&mut self, model: usize) -> Result<()> {
        let (running, ready_ns) = (&mut self.engines[model].running, self.now_ns);
        for sequence in running.iter_mut() {
            sequence.generated += 1;
            if sequence.first_ns.is_none() {
                sequence.first_ns = Some(ready_ns);
                let waited_ns = ready_ns - sequence.request.arrival_ns;
                self.served.first_token.push(waited_ns as f64);
            }
        }
        let is_over = |one: &mut Sequence| one.generated >= one.request.generated_tokens;
        let mut given = Vec::new();
        for sequence in running.extract_if(.., is_over) {
            let first_ns = sequence.first_ns.unwrap_or(ready_ns);
            let later = u64::from(sequence.request.generated_tokens.saturating_sub(1));
            let per_token = (ready_ns - first_ns).checked_div(later);
            self.served.per_token.extend(per_token.map(|ns| ns as f64));
            self.served.served += 1;
            self.end_ns = ready_ns;
            given.extend(sequence.blocks);
        }
        if !given.is_empty() {
            self.memory.give(&mut self.now_ns, model, given)?;
        }
        Ok(())
    }

    /// Notes what is held, now and then.
    fn look(&mut self) {
        let models = 0..self.engines.len();
        let held_bytes: Vec<_> = models.map(|model| self.memory.held_bytes(model)).collect();
        let most = self.served.held_bytes_max.max(held_bytes.iter().sum());
        self.served.held_bytes_max = most;
        let at_ns = self.now_ns;
        if self.look_ns.is_some_and(|look_ns| at_ns >= look_ns) {
            self.look_ns = Some(at_ns + LOOK_NS);
            self.served.over_time.push(Moment { at_ns, held_bytes });
        }
    }
}
