//! As little of a server as makes a pool work: models that batch what they have, in steps that take turns on one stream.

use super::TOKEN_BYTES;
use super::arrivals::{Arrival, MODELS};
use super::cache::Cache;
use super::settings::ReplaySettings;
use crate::traffic::Traffic;
use anyhow::Result;
use cuda_vmm::Stream;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Tokens of each prompt, and that each request generates, the first of them by the prompt's step.
const PROMPT_TOKENS: usize = 256;
const GENERATED_TOKENS: usize = 256;
/// Prompts that one step takes at most.
const PROMPTS_MAX: usize = 8;

/// A request that waits for its prompt's step.
#[derive(Clone, Copy)]
struct Waiting {
    arrival: Arrival,
    /// Whether there was no memory for it once.
    was_refused: bool,
    /// Whether it had begun, and gave its memory back.
    is_again: bool,
}

/// A request that is being served.
struct Sequence {
    waited: Waiting,
    tokens: usize,
    blocks: Vec<usize>,
}

impl Sequence {
    /// The last token that is generated is written no more.
    fn has_ended(&self) -> bool {
        self.tokens + 1 >= PROMPT_TOKENS + GENERATED_TOKENS
    }
}

/// One model: its blocks, what waits for its prompt's step, and what it generates.
struct Model {
    cache: Cache,
    waiting: VecDeque<Waiting>,
    running: Vec<Sequence>,
}

/// What came of a replay.
#[derive(Default)]
pub struct Course {
    /// The time that the pool's calls took in each step.
    pub own_times: Vec<Duration>,
    /// What each step took in all.
    pub whole_times: Vec<Duration>,
    /// From a request's arrival to its first token.
    pub first_tokens: Vec<Duration>,
    /// Prompts that had to wait for want of memory.
    pub refused_prompts: usize,
    /// Sequences that gave all their blocks back for want of one more, to begin again later.
    pub preemptions: usize,
    /// Requests that got all their tokens.
    pub ended: usize,
    /// The most sequences of one step.
    pub sequences_max: usize,
}

/// The models, and where their steps run.
pub struct Scheduler<'a> {
    models: Vec<Model>,
    stream: &'a Stream,
    traffic: &'a Traffic<'a>,
    settings: &'a ReplaySettings,
    block_bytes: usize,
}

impl<'a> Scheduler<'a> {
    /// Models with nothing to do.
    pub fn new(
        caches: [Cache; MODELS],
        stream: &'a Stream,
        traffic: &'a Traffic<'a>,
        settings: &'a ReplaySettings,
        block_bytes: usize,
    ) -> Self {
        let models = caches.into_iter().map(|cache| Model {
            cache,
            waiting: VecDeque::new(),
            running: Vec::new(),
        });
        Self {
            models: models.collect(),
            stream,
            traffic,
            settings,
            block_bytes,
        }
    }

    /// Serves what arrives between two moments of the trace, whose time runs `speed` times as fast as the clock.
    /// `each_second` is called when a second of the trace is over, with the blocks that each model uses.
    pub fn run(
        &mut self,
        arrivals: &[Arrival],
        speed: f64,
        mut each_second: impl FnMut(f64, [usize; MODELS]),
    ) -> Result<Course> {
        let (from_s, to_s) = self.settings.window_s();
        let in_window = |arrival: &&Arrival| (from_s..to_s).contains(&arrival.at_s);
        let mut arrivals = arrivals.iter().filter(in_window).copied().peekable();
        let mut course = Course::default();
        let mut next_second = from_s.floor() + 1.0;
        let started = Instant::now();
        let now_s = || from_s + started.elapsed().as_secs_f64() * speed;
        while now_s() < to_s {
            while let Some(arrival) = arrivals.next_if(|arrival| arrival.at_s <= now_s()) {
                self.models[arrival.model].waiting.push_back(Waiting {
                    arrival,
                    was_refused: false,
                    is_again: false,
                });
            }
            let mut is_idle = true;
            for index in 0..MODELS {
                is_idle &= !self.step(index, &now_s, speed, &mut course)?;
            }
            while next_second <= now_s().min(to_s) {
                let used = [0, 1, 2].map(|index: usize| self.models[index].cache.used());
                each_second(next_second, used);
                next_second += 1.0;
            }
            if is_idle {
                // Nothing can come of looking all the time.
                std::thread::sleep(Duration::from_micros(100));
            }
        }
        Ok(course)
    }

    /// One step of a model: prompts that have room, and a token for each sequence. False if there is none of either.
    fn step(
        &mut self,
        index: usize,
        now_s: &impl Fn() -> f64,
        speed: f64,
        course: &mut Course,
    ) -> Result<bool> {
        let model = &mut self.models[index];
        if model.waiting.is_empty() && model.running.is_empty() {
            return Ok(false);
        }
        let started = Instant::now();
        // Before the prompts, so that what runs is served before what waits.
        let mut touched = model.grow(self.block_bytes, course)?;
        let decoding = model.running.len();
        let prompts = model.admit(self.block_bytes, &mut touched, course)?;
        if decoding + prompts == 0 {
            return Ok(false);
        }
        for block in touched {
            let target = model.cache.address(block);
            // SAFETY: the block is live until it is given back, which is after this step's work: the stream is synchronised below.
            unsafe { self.traffic.touch(self.stream, target, self.block_bytes) }?;
        }
        let time = (self.settings).step_time(decoding, prompts * PROMPT_TOKENS);
        self.traffic.queue_for(self.stream, time)?;
        self.stream.synchronize()?;
        let end_s = now_s();
        let begun = model.running[decoding..].iter();
        for sequence in begun.filter(|sequence| !sequence.waited.is_again) {
            let waited_s = (end_s - sequence.waited.arrival.at_s).max(0.0) / speed;
            course.first_tokens.push(Duration::from_secs_f64(waited_s));
        }
        for sequence in &mut model.running[..decoding] {
            sequence.tokens += 1;
        }
        let ended = model
            .running
            .extract_if(.., |sequence| sequence.has_ended());
        let ended: Vec<_> = ended.collect();
        course.ended += ended.len();
        let blocks = ended.into_iter().flat_map(|sequence| sequence.blocks);
        model.cache.give(blocks.collect())?;
        course.own_times.push(model.cache.own_time().0);
        course.whole_times.push(started.elapsed());
        course.sequences_max = course.sequences_max.max(decoding + prompts);
        Ok(true)
    }
}

impl Model {
    /// Takes a block for each sequence whose next token needs one; answers the blocks. Where there is no memory, the sequence
    /// that came last gives way.
    fn grow(&mut self, block_bytes: usize, course: &mut Course) -> Result<Vec<usize>> {
        let mut taken = Vec::new();
        let mut at = 0;
        while at < self.running.len() {
            let sequence = &mut self.running[at];
            if sequence.blocks.len() * block_bytes > sequence.tokens * TOKEN_BYTES {
                at += 1;
                continue;
            }
            if let Some(blocks) = self.cache.take(1)? {
                taken.extend(&blocks);
                sequence.blocks.extend(blocks);
                at += 1;
                continue;
            }
            if let Some(last) = self.running.pop() {
                course.preemptions += 1;
                taken.retain(|block| !last.blocks.contains(block));
                self.cache.give(last.blocks)?;
                self.waiting.push_front(Waiting {
                    is_again: true,
                    ..last.waited
                });
            }
        }
        Ok(taken)
    }

    /// Takes the blocks of prompts that wait, in order, while there is room; answers how many it were.
    fn admit(
        &mut self,
        block_bytes: usize,
        touched: &mut Vec<usize>,
        course: &mut Course,
    ) -> Result<usize> {
        let wanted = (PROMPT_TOKENS * TOKEN_BYTES).div_ceil(block_bytes);
        let mut prompts = 0;
        while prompts < PROMPTS_MAX
            && let Some(first) = self.waiting.front_mut()
        {
            let Some(blocks) = self.cache.take(wanted)? else {
                course.refused_prompts += usize::from(!first.was_refused);
                first.was_refused = true;
                break;
            };
            let waited = *first;
            self.waiting.pop_front();
            touched.extend(&blocks);
            self.running.push(Sequence {
                waited,
                tokens: PROMPT_TOKENS,
                blocks,
            });
            prompts += 1;
        }
        Ok(prompts)
    }
}
