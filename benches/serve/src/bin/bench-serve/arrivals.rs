//! When requests arrive, and what they are: all of it follows from the workloads' file and a seed.

use crate::settings::{Closed, HandOver, Idle, Ramps, Tokens, Traces};
use cuda_vmm_benches::serving::{PHASES, Request, paced, staggered_ramps};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::iter::{once, repeat_n};

/// A run of a workload, which begins when the server has nothing to do.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// Requests a second at the top of a ramp, or the number of clients.
    pub peak: Option<u32>,
    pub seed: u64,
    /// Each begins with the last token of the one before.
    pub phases: Vec<Phase>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Phase {
    pub name: PhaseName,
    /// How many clients there are, each of which waits for its response before it sends the next
    /// request. Without, a request is sent when its time comes, whatever has not come back.
    pub clients: Option<u32>,
    pub requests: Vec<Planned>,
}

/// What a phase is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PhaseName {
    /// What is measured.
    Measured,
    /// One request at a time, as a measure for the others.
    Unloaded,
    /// Requests of the first model that fill the memory.
    Fill,
    /// Requests of the other that want it.
    HandOver,
    /// The same once more, when that model has the memory.
    Alone,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    pub model: usize,
    /// After the phase's beginning.
    pub arrival_us: u64,
    pub prompt: Vec<u32>,
    pub generated_tokens: u32,
}

/// Bytes are the tokens of models without a tokenizer.
const PROMPT_IDS: u32 = 256;

/// What a run's random numbers begin with.
fn random(workload: char, peak: u32, seed: u64) -> StdRng {
    StdRng::seed_from_u64((u64::from(workload) << 56) ^ (u64::from(peak) << 32) ^ seed)
}

impl Run {
    fn new(peak: Option<u32>, seed: u64, phases: impl IntoIterator<Item = Phase>) -> Self {
        let phases = phases.into_iter().collect();
        Self { peak, seed, phases }
    }

    /// How many requests there are.
    pub fn requests(&self) -> usize {
        self.phases.iter().map(|phase| phase.requests.len()).sum()
    }
}

/// A phase with the requests of each model, whose prompts are random.
fn phase(name: PhaseName, models: &[Vec<Request>], random: &mut StdRng) -> Phase {
    let mut requests = Vec::new();
    for (model, of_model) in models.iter().enumerate() {
        requests.extend(of_model.iter().map(|request| {
            Planned {
                model,
                arrival_us: request.arrival_ns / 1000,
                prompt: (0..request.prompt_tokens)
                    .map(|_| random.random_range(0..PROMPT_IDS))
                    .collect(),
                generated_tokens: request.generated_tokens,
            }
        }));
    }
    requests.sort_by_key(|planned| planned.arrival_us);
    Phase {
        name,
        clients: None,
        requests,
    }
}

fn with_tokens(mut models: Vec<Vec<Request>>, tokens: Tokens) -> Vec<Vec<Request>> {
    for request in models.iter_mut().flatten() {
        request.prompt_tokens = tokens.prompt;
        request.generated_tokens = tokens.generated;
    }
    models
}

/// This many requests of a model at once.
fn at_once(count: u32, tokens: Tokens) -> Vec<Request> {
    let one = Request::new(0, tokens.prompt, tokens.generated);
    vec![one; count as usize]
}

/// (a): an unloaded run, then each seed of each peak.
pub fn ramps(ramps: &Ramps) -> Vec<Run> {
    let models = (0..ramps.models).map(|model| {
        let of_model = (model..ramps.unloaded).step_by(ramps.models as usize);
        at_once(of_model.count() as u32, ramps.tokens)
    });
    let models: Vec<_> = models.collect();
    let mut unloaded = phase(PhaseName::Unloaded, &models, &mut random('a', 0, 0));
    unloaded.clients = Some(1);
    let seeds = |peak| (0..ramps.seeds).map(move |seed| (peak, seed));
    let runs = ramps.peaks.iter().copied().flat_map(seeds);
    let runs = runs.map(|(peak, seed)| {
        let mut random = random('a', peak, seed);
        let within = random.random_range(0..PHASES);
        let mut models = staggered_ramps(ramps.models, peak / ramps.speed, within);
        for request in models.iter_mut().flatten() {
            request.arrival_ns /= u64::from(ramps.speed);
        }
        let models = with_tokens(models, ramps.tokens);
        Run::new(
            Some(peak),
            seed,
            [phase(PhaseName::Measured, &models, &mut random)],
        )
    });
    once(Run::new(None, 0, [unloaded])).chain(runs).collect()
}

/// (b): excerpts of traces, whose arrivals are the same for each seed.
pub fn traces(settings: &Traces, traces: &[Vec<Request>]) -> Vec<Run> {
    let begin_ns = (settings.start_seconds * 1e9) as u64;
    let end_ns = ((settings.start_seconds + settings.seconds) * 1e9) as u64;
    let Tokens { prompt, generated } = settings.tokens_max;
    let models = traces.iter().map(|trace| {
        let inside = trace.iter();
        let inside = inside.filter(|request| (begin_ns..end_ns).contains(&request.arrival_ns));
        let of_model = inside.map(|request| Request {
            arrival_ns: ((request.arrival_ns - begin_ns) as f64 * settings.stretch) as u64,
            // A request for no token still gets the one that the prompt's step makes.
            prompt_tokens: request.prompt_tokens.clamp(1, prompt),
            generated_tokens: request.generated_tokens.clamp(1, generated),
        });
        of_model.collect()
    });
    let models: Vec<Vec<Request>> = models.collect();
    let runs = (0..settings.seeds).map(|seed| {
        let mut random = random('b', 0, seed);
        Run::new(
            None,
            seed,
            [phase(PhaseName::Measured, &models, &mut random)],
        )
    });
    runs.collect()
}

/// (c): models that have served a few requests and are idle then, and a busy one.
pub fn idle(settings: &Idle) -> Vec<Run> {
    let idle = settings.idle_models;
    let begin_ns = |model: u32| u64::from(model * settings.apart_seconds) * 1_000_000_000;
    let runs = (0..settings.seeds).map(|seed| {
        let mut random = random('c', 0, seed);
        let within = random.random_range(0..PHASES);
        let rates = |rate, seconds| repeat_n(rate, seconds as usize);
        let models = (0..idle).map(|model| {
            let rates = rates(settings.idle_rate, settings.idle_seconds);
            paced(begin_ns(model), within, rates)
        });
        let busy = rates(settings.busy_rate, settings.busy_seconds);
        let models = models.chain(once(paced(begin_ns(idle), within, busy)));
        let models = with_tokens(models.collect(), settings.tokens);
        Run::new(
            None,
            seed,
            [phase(PhaseName::Measured, &models, &mut random)],
        )
    });
    runs.collect()
}

/// (d): a model fills the memory; from its last token on, the other wants it.
pub fn hand_over(settings: &HandOver) -> Vec<Run> {
    let fill = [at_once(settings.fill, settings.fill_tokens), Vec::new()];
    let then = [Vec::new(), at_once(settings.then, settings.then_tokens)];
    let runs = (0..settings.seeds).map(|seed| {
        let mut random = random('d', 0, seed);
        let phases = [
            (PhaseName::Fill, &fill),
            (PhaseName::HandOver, &then),
            (PhaseName::Alone, &then),
        ];
        let phases = phases.map(|(name, models)| phase(name, models, &mut random));
        Run::new(None, seed, phases)
    });
    runs.collect()
}

/// (e): clients that wait for each response.
pub fn closed(settings: &Closed) -> Vec<Run> {
    let seeds = |clients| (0..settings.seeds).map(move |seed| (clients, seed));
    let runs = settings.clients.iter().copied().flat_map(seeds);
    let runs = runs.map(|(clients, seed)| {
        let requests = at_once(clients * settings.requests_per_client, settings.tokens);
        let mut random = random('e', clients, seed);
        let mut phase = phase(PhaseName::Measured, &[requests], &mut random);
        phase.clients = Some(clients);
        Run::new(Some(clients), seed, [phase])
    });
    runs.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Settings;
    use crate::settings::tests::CPU;
    use crate::workload::Workload;
    use std::collections::HashSet;

    fn settings() -> Settings {
        Settings::parse(CPU).unwrap()
    }

    fn trace() -> Vec<Request> {
        let request = |second: u64| Request::new(second * 1_000_000_000, 5000 * second as u32, 0);
        (0..600).map(request).collect()
    }

    #[test]
    fn arrivals_follow_from_the_seed_and_no_prefix_repeats() {
        let settings = settings().with_seeds(2);
        let traces = [trace(), trace()];
        for workload in Workload::ALL {
            let runs = workload.runs(&settings, &traces);
            assert_eq!(runs, workload.runs(&settings, &traces), "{workload:?}");
            let more = workload.runs(&settings.clone().with_seeds(3), &traces);
            for run in &runs {
                assert!(more.contains(run), "more seeds leave the others");
            }
            let phases = runs.iter().flat_map(|run| &run.phases);
            let requests: Vec<_> = phases.clone().flat_map(|it| &it.requests).collect();
            let prompts = requests.iter().filter(|it| it.prompt.len() >= 16);
            let prefixes: HashSet<_> = prompts.clone().map(|it| &it.prompt[..16]).collect();
            assert_eq!(prefixes.len(), prompts.count(), "{workload:?}");
            let models = workload.models(&settings, &traces);
            for request in &requests {
                assert!(request.model < models && request.generated_tokens > 0);
                assert!(request.prompt.iter().all(|id| *id < 256) && !request.prompt.is_empty());
            }
            for phase in phases {
                assert!(phase.requests.is_sorted_by_key(|it| it.arrival_us));
            }
        }
    }

    #[test]
    fn ramps_have_their_peak_and_are_shorter_than_published() {
        let settings = settings().ramps;
        let runs = ramps(&settings);
        assert_eq!(runs[0].phases[0].name, PhaseName::Unloaded);
        assert_eq!(runs[0].requests(), settings.unloaded as usize);
        let steps = settings.peaks[0] / settings.speed;
        let run = &runs[1];
        assert_eq!(run.peak, Some(settings.peaks[0]));
        assert_eq!(run.requests() as u32, settings.models * steps * steps);
        // In the step of the first model's peak.
        let step_us = 1_000_000 / u64::from(settings.speed);
        let first = u64::from(steps) * step_us;
        let requests = run.phases[0].requests.iter();
        let at_top = requests.filter(|it| (first..first + step_us).contains(&it.arrival_us));
        assert_eq!(at_top.count() as u32, steps);
    }

    #[test]
    fn an_excerpt_begins_where_it_is_told_and_lengths_are_cut() {
        let settings = Traces {
            start_seconds: 10.0,
            seconds: 3.0,
            stretch: 2.0,
            tokens_max: Tokens {
                prompt: 52_000,
                generated: 9,
            },
            seeds: 1,
        };
        let runs = traces(&settings, &[trace()]);
        let requests = &runs[0].phases[0].requests;
        let arrivals: Vec<_> = requests.iter().map(|it| it.arrival_us).collect();
        assert_eq!(arrivals, [0, 2_000_000, 4_000_000]);
        let prompts: Vec<_> = requests.iter().map(|it| it.prompt.len()).collect();
        assert_eq!(prompts, [50_000, 52_000, 52_000]);
        assert_eq!(requests[0].generated_tokens, 1);
    }

    #[test]
    fn idle_models_come_before_the_busy_one_and_hand_over_has_three_phases() {
        let settings = settings();
        let requests = &idle(&settings.idle)[0].phases[0].requests;
        let busy = settings.idle.idle_models as usize;
        let busy: Vec<_> = requests.iter().filter(|it| it.model == busy).collect();
        let expected = settings.idle.busy_rate * settings.idle.busy_seconds;
        assert_eq!(busy.len() as u32, expected);
        let begin = u64::from(settings.idle.idle_models * settings.idle.apart_seconds);
        assert!(busy[0].arrival_us >= begin * 1_000_000);
        let run = &hand_over(&settings.hand_over)[0];
        let names: Vec<_> = run.phases.iter().map(|it| it.name).collect();
        assert_eq!(
            names,
            [PhaseName::Fill, PhaseName::HandOver, PhaseName::Alone]
        );
        let models = run.phases.iter().map(|it| it.requests[0].model);
        assert!(models.eq([0, 1, 1]));
    }
}
