//! The event loop: requests arrive, grow token by token and end, on a simulated clock.
//!
//! A request takes memory for its whole prompt when it arrives. When the prompt has been processed
//! it takes memory for one token after another at its model's pace; one such pace after the last
//! token it ends and gives everything back. If memory for its prompt or its next token is not to be
//! had the request is refused: it gives back what it holds and does not come again.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use anyhow::Result;

use crate::slots::Slots;
use crate::tally::Tally;
use crate::workload::{Request, Workload};

/// How often the watcher of a replay looks.
const SAMPLES: u64 = 1_200;

/// Where a running request keeps its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index of the model.
    pub model: usize,
    /// Slot in the model's range of addresses.
    pub slot: usize,
}

/// Whether memory was to be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The tokens have their memory.
    Granted,
    /// Nothing has changed.
    Refused,
}

/// Memory for KV caches, shared or split between the models.
pub trait KvMemory {
    /// Adds memory for `tokens` tokens to the `held_tokens` that the request has.
    fn grow(&mut self, place: Place, held_tokens: u32, tokens: u32) -> Result<Answer>;

    /// Takes back all `tokens` tokens of a request, which are not 0.
    fn give_back(&mut self, place: Place, tokens: u32) -> Result<()>;
}

/// The state at one moment of simulated time.
#[derive(Debug)]
pub struct Sample<'a, M> {
    /// Simulated time since the first arrival, in nanoseconds.
    pub at_ns: u64,
    /// The memory that is replayed against.
    pub memory: &'a M,
    /// One for each model.
    pub tallies: &'a [Tally],
}

/// Replays the workload against a memory; `watch` sees it at even steps of simulated time and at
/// the end. Returns what became of each model's requests.
pub fn replay<M: KvMemory>(
    workload: &Workload,
    memory: &mut M,
    mut watch: impl FnMut(&Sample<'_, M>) -> Result<()>,
) -> Result<Vec<Tally>> {
    let sample_ns = (workload.end_ns() / SAMPLES).max(1);
    let mut next_sample_ns = 0;
    let mut last_ns = 0;
    let mut replay = Replay::new(workload);
    while let Some(event) = replay.next_event() {
        while next_sample_ns <= event.at_ns {
            let tallies = &replay.tallies[..];
            watch(&Sample {
                at_ns: next_sample_ns,
                memory,
                tallies,
            })?;
            next_sample_ns += sample_ns;
        }
        replay.handle(event, memory)?;
        last_ns = event.at_ns;
    }
    watch(&Sample {
        at_ns: last_ns,
        memory,
        tallies: &replay.tallies,
    })?;
    Ok(replay.tallies)
}

/// Something that happens to a request. At one instant steps come before arrivals, so that memory
/// given back is there for the newcomers; otherwise the request that arrived first comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Event {
    at_ns: u64,
    kind: Kind,
    /// Index in the order of arrival.
    request: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// A running request takes its next token, or ends.
    Step,
    Arrival,
}

/// A request and what it holds.
#[derive(Clone, Copy, Debug)]
struct Running {
    model: usize,
    request: Request,
    held_tokens: u32,
    /// Meaningful while tokens are held.
    slot: usize,
}

struct Replay<'a> {
    workload: &'a Workload,
    requests: Vec<Running>,
    arrived: usize,
    steps: BinaryHeap<Reverse<Event>>,
    slots: Vec<Slots>,
    tallies: Vec<Tally>,
}

impl<'a> Replay<'a> {
    fn new(workload: &'a Workload) -> Self {
        let mut requests = Vec::with_capacity(workload.request_count());
        for (model, service) in workload.services.iter().enumerate() {
            let running = |&request| Running {
                model,
                request,
                held_tokens: 0,
                slot: 0,
            };
            requests.extend(service.requests.iter().map(running));
        }
        requests.sort_by_key(|running| running.request.arrival_ns);
        Self {
            workload,
            requests,
            arrived: 0,
            steps: BinaryHeap::new(),
            slots: vec![Slots::default(); workload.services.len()],
            tallies: vec![Tally::default(); workload.services.len()],
        }
    }

    fn next_event(&mut self) -> Option<Event> {
        let arrival = self.requests.get(self.arrived).map(|running| Event {
            at_ns: running.request.arrival_ns,
            kind: Kind::Arrival,
            request: self.arrived,
        });
        let step = self.steps.peek().map(|&Reverse(event)| event);
        match (arrival, step) {
            (Some(arrival), Some(step)) if step < arrival => self.steps.pop().map(|event| event.0),
            (Some(arrival), _) => {
                self.arrived += 1;
                Some(arrival)
            }
            (None, _) => self.steps.pop().map(|event| event.0),
        }
    }

    fn handle(&mut self, event: Event, memory: &mut impl KvMemory) -> Result<()> {
        let Running {
            model,
            request,
            held_tokens,
            ..
        } = self.requests[event.request];
        let pace = &self.workload.services[model].model;
        let (tokens, wait_ns) = match event.kind {
            Kind::Arrival => (request.prompt_tokens, pace.prompt_ns(request.prompt_tokens)),
            Kind::Step if held_tokens < request.tokens() => (1, pace.token_ns()),
            Kind::Step => {
                self.release(event.request, memory)?;
                self.tallies[model].completed += 1;
                return Ok(());
            }
        };
        if self.grow(event.request, tokens, memory)? == Answer::Granted {
            let at_ns = event.at_ns + wait_ns;
            self.steps.push(Reverse(Event {
                at_ns,
                kind: Kind::Step,
                request: event.request,
            }));
            return Ok(());
        }
        self.release(event.request, memory)?;
        match event.kind {
            Kind::Arrival => self.tallies[model].refused_at_arrival += 1,
            Kind::Step => self.tallies[model].refused_midway += 1,
        }
        Ok(())
    }

    fn grow(&mut self, index: usize, tokens: u32, memory: &mut impl KvMemory) -> Result<Answer> {
        let running = &mut self.requests[index];
        let model = running.model;
        if tokens == 0 {
            return Ok(Answer::Granted);
        }
        if running.held_tokens == 0 {
            running.slot = self.slots[model].take();
        }
        let place = Place {
            model,
            slot: running.slot,
        };
        let answer = memory.grow(place, running.held_tokens, tokens)?;
        if answer == Answer::Granted {
            running.held_tokens += tokens;
            let tally = &mut self.tallies[model];
            tally.tokens += u64::from(tokens);
            tally.live_bytes += self.workload.services[model].model.bytes(tokens);
            tally.peak_live_bytes = tally.peak_live_bytes.max(tally.live_bytes);
        } else if running.held_tokens == 0 {
            self.slots[model].put_back(running.slot);
        }
        Ok(answer)
    }

    fn release(&mut self, index: usize, memory: &mut impl KvMemory) -> Result<()> {
        let running = &mut self.requests[index];
        let (model, tokens) = (running.model, std::mem::take(&mut running.held_tokens));
        if tokens == 0 {
            return Ok(());
        }
        memory.give_back(
            Place {
                model,
                slot: running.slot,
            },
            tokens,
        )?;
        self.slots[model].put_back(running.slot);
        self.tallies[model].live_bytes -= self.workload.services[model].model.bytes(tokens);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{BATCH, CHAT};
    use crate::workload::Service;

    /// Room for this many tokens, for any request; writes down what it was asked.
    #[derive(Default)]
    struct Room {
        free_tokens: u32,
        log: Vec<String>,
    }

    impl KvMemory for Room {
        fn grow(&mut self, place: Place, held_tokens: u32, tokens: u32) -> Result<Answer> {
            let Place { model, slot } = place;
            if tokens > self.free_tokens {
                self.log
                    .push(format!("no {model}.{slot} {held_tokens}+{tokens}"));
                return Ok(Answer::Refused);
            }
            self.free_tokens -= tokens;
            self.log
                .push(format!("{model}.{slot} {held_tokens}+{tokens}"));
            Ok(Answer::Granted)
        }

        fn give_back(&mut self, place: Place, tokens: u32) -> Result<()> {
            self.free_tokens += tokens;
            self.log
                .push(format!("{}.{} -{tokens}", place.model, place.slot));
            Ok(())
        }
    }

    fn run(free_tokens: u32, services: Vec<Service>) -> (Vec<Tally>, Vec<String>) {
        let mut room = Room {
            free_tokens,
            log: Vec::new(),
        };
        let tallies = replay(&Workload { services }, &mut room, |_| Ok(())).expect("a replay");
        assert_eq!(room.free_tokens, free_tokens, "all memory is given back");
        (tallies, room.log)
    }

    fn chat(requests: &[(u64, u32, u32)]) -> Service {
        let request = |&(arrival_ns, prompt_tokens, generated_tokens)| Request {
            arrival_ns,
            prompt_tokens,
            generated_tokens,
        };
        Service {
            model: CHAT,
            requests: requests.iter().map(request).collect(),
        }
    }

    #[test]
    fn a_request_grows_and_gives_back() {
        let (tallies, log) = run(10, vec![chat(&[(0, 5, 2)])]);
        assert_eq!(log, ["0.0 0+5", "0.0 5+1", "0.0 6+1", "0.0 -7"]);
        let bytes = CHAT.bytes(7);
        let expected = Tally {
            completed: 1,
            tokens: 7,
            peak_live_bytes: bytes,
            ..Tally::default()
        };
        assert_eq!(tallies, [expected]);
    }

    #[test]
    fn refusals_at_arrival_and_midway_are_kept_apart() {
        let (tallies, log) = run(6, vec![chat(&[(0, 5, 2), (1, 2, 1)])]);
        assert_eq!(
            log,
            ["0.0 0+5", "no 0.1 0+2", "0.0 5+1", "no 0.0 6+1", "0.0 -6"]
        );
        assert_eq!(
            (tallies[0].refused_at_arrival, tallies[0].refused_midway),
            (1, 1)
        );
        assert_eq!(
            (
                tallies[0].completed,
                tallies[0].tokens,
                tallies[0].live_bytes
            ),
            (0, 6, 0)
        );
        assert_eq!(tallies[0].refused(), 2);
    }

    #[test]
    fn memory_given_back_at_an_instant_serves_an_arrival_at_it() {
        let end_ns = CHAT.prompt_ns(4) + CHAT.token_ns();
        let (tallies, log) = run(5, vec![chat(&[(0, 4, 1), (end_ns, 5, 0)])]);
        assert_eq!(log, ["0.0 0+4", "0.0 4+1", "0.0 -5", "0.0 0+5", "0.0 -5"]);
        assert_eq!(tallies[0].completed, 2);
    }

    #[test]
    fn events_are_handled_in_order_of_time_then_arrival() {
        let batch = Service {
            model: BATCH,
            ..chat(&[(0, 8, 1)])
        };
        // Chat's prompts of 12 tokens and batch's of 8 both take a millisecond.
        let (_, log) = run(99, vec![chat(&[(0, 12, 1), (0, 12, 0)]), batch]);
        assert_eq!(
            log,
            [
                "0.0 0+12", "0.1 0+12", "1.0 0+8", "0.0 12+1", "0.1 -12", "1.0 8+1", "0.0 -13",
                "1.0 -9"
            ]
        );
    }

    #[test]
    fn empty_prompts_and_empty_requests_complete() {
        let (tallies, log) = run(1, vec![chat(&[(0, 0, 0), (0, 0, 1)])]);
        assert_eq!(log, ["0.0 0+1", "0.0 -1"]);
        assert_eq!(tallies[0].completed, 2);
    }

    fn sample_times(requests: &[(u64, u32, u32)]) -> Vec<u64> {
        let mut times = Vec::new();
        let mut room = Room {
            free_tokens: 9,
            log: Vec::new(),
        };
        let workload = Workload {
            services: vec![chat(requests)],
        };
        let watch = |sample: &Sample<'_, Room>| {
            times.push(sample.at_ns);
            Ok(())
        };
        replay(&workload, &mut room, watch).expect("a replay");
        times
    }

    #[test]
    fn samples_are_evenly_spaced_and_end_with_the_last_event() {
        let end_ns = 6_000_000;
        let arrival_ns = end_ns - CHAT.prompt_ns(1);
        let mut expected: Vec<u64> = (0..=SAMPLES).map(|index| index * 5_000).collect();
        expected.push(end_ns);
        assert_eq!(sample_times(&[(0, 1, 0), (arrival_ns, 1, 0)]), expected);
    }

    #[test]
    fn a_lone_request_has_as_many_samples_as_any_other() {
        assert!(sample_times(&[(0, 5, 4)]).len() <= SAMPLES as usize + 2);
        assert_eq!(sample_times(&[(0, 0, 0)]), [0, 0]);
    }
}
