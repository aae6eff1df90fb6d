//! Workload (a) simulated with what its steps took, to be compared with what was measured.

use crate::arrivals::{self, PhaseName, Planned, Run};
use crate::policy::Policy;
use crate::record::Ran;
use crate::report::Started;
use crate::settings::{self, Settings};
use crate::summary::{Section, highest_peak};
use crate::workload::Workload;
use anyhow::Result;
use cuda_vmm_benches::report::table;
use cuda_vmm_benches::serving::{Counted, Limits, Memory, Request, Served, Server};
use cuda_vmm_benches::{mean, quantile};

/// Tokens of a block, as the server has them and the simulation.
const BLOCK_TOKENS: usize = 16;

/// How long steps take on the device that was measured. In nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepTime {
    /// A step without prompts: this, and more for each sequence.
    pub decode_ns: f64,
    pub sequence_ns: f64,
    /// What prompts add: this, and more for each of their tokens.
    pub prompt_ns: f64,
    pub token_ns: f64,
}

impl StepTime {
    /// Fits lines through the mean times of steps of about a size. `None` if there are too few.
    pub fn fit(servers: &[&Started]) -> Option<Self> {
        let steps = servers.iter().flat_map(|server| &server.steps);
        let decode = steps.map(|it| {
            let count = it.count as f64;
            let (sequences, ns) = (it.sequences as f64 / count, it.seconds * 1e9 / count);
            (sequences, ns, count)
        });
        let (decode_ns, sequence_ns) = line(decode)?;
        let steps = servers.iter().flat_map(|server| &server.prompt_steps);
        let prompts = steps.map(|it| {
            let count = it.count as f64;
            let sequences = it.sequences as f64 / count;
            let decode_ns = match it.sequences {
                0 => 0.,
                _ => decode_ns + sequence_ns * sequences,
            };
            let tokens = it.prompt_tokens as f64 / count;
            (tokens, it.seconds * 1e9 / count - decode_ns, count)
        });
        let (prompt_ns, token_ns) = line(prompts)?;
        Some(Self {
            decode_ns,
            sequence_ns,
            prompt_ns,
            token_ns,
        })
    }

    fn step_ns(&self, prompt_tokens: u32, sequences: usize) -> u64 {
        let mut ns = 0.;
        if sequences > 0 {
            ns += self.decode_ns + self.sequence_ns * sequences as f64;
        }
        if prompt_tokens > 0 {
            ns += self.prompt_ns + self.token_ns * f64::from(prompt_tokens);
        }
        ns.max(1.) as u64
    }
}

/// The line with the least squares through points with weights: its height at 0, and its slope.
/// It is level if all points are at one place.
fn line(points: impl Iterator<Item = (f64, f64, f64)>) -> Option<(f64, f64)> {
    let points: Vec<_> = points.collect();
    let weight: f64 = points.iter().map(|point| point.2).sum();
    if weight <= 0. {
        return None;
    }
    let mean = |of: fn(&(f64, f64, f64)) -> f64| {
        let weighted = points.iter().map(|point| of(point) * point.2);
        weighted.sum::<f64>() / weight
    };
    let (x, y) = (mean(|point| point.0), mean(|point| point.1));
    let squares = mean(|point| point.0 * point.0) - x * x;
    let slope = match squares > 1e-9 * x * x {
        true => (mean(|point| point.0 * point.1) - x * y) / squares,
        false => 0.,
    };
    Some((y - slope * x, slope))
}

/// What came of some runs with one peak, simulated under a policy.
pub fn simulate(
    runs: &[&Run],
    models: usize,
    policy: Policy,
    settings: &settings::Server,
    time: &StepTime,
) -> Result<Served> {
    let blocks = (settings.memory_mib << 20) / settings.token_bytes / BLOCK_TOKENS;
    let limits = Limits {
        sequences_max: settings.sequences.into(),
        prompt_tokens_max: settings.step_tokens.into(),
        // The server leaves nothing free.
        watermark_divisor: usize::MAX,
    };
    let step_ns = |prompt, sequences| time.step_ns(prompt, sequences);
    let mut served = Served::default();
    for run in runs {
        let requests = requests(run, models);
        let mut memory: Box<dyn Memory> = match policy {
            Policy::Static => Box::new(Counted::split(blocks / models, models)),
            _ => Box::new(Counted::shared(blocks, models)),
        };
        Server::new(&requests, &mut *memory, limits, &step_ns, &mut served).run(u64::MAX)?;
    }
    Ok(served)
}

/// Prints what was measured of workload (a) beside what is simulated with its own times of steps.
///
/// # Errors
///
/// If a simulated request never gets its memory.
pub fn print(ran: &[Ran], servers: &[Started], settings: &Settings) -> Result<()> {
    let of_ramps = servers.iter().filter(|it| it.workload == Workload::Ramps);
    let Some(time) = StepTime::fit(&of_ramps.collect::<Vec<_>>()) else {
        return Ok(());
    };
    let runs = arrivals::ramps(&settings.ramps);
    let mut rows = Vec::new();
    for section in Section::all(ran) {
        let (Workload::Ramps, Some(peak)) = (section.workload, section.peak) else {
            continue;
        };
        let of_peak: Vec<_> = runs.iter().filter(|run| run.peak == Some(peak)).collect();
        for policy in [Policy::Static, Policy::Elastic, Policy::Ideal] {
            let Some(measured) = section.summary(ran, policy) else {
                continue;
            };
            let models = settings.ramps.models as usize;
            let simulated = simulate(&of_peak, models, policy, &settings.server, &time)?;
            let figures = |first_token: &[f64], unit: f64| {
                [mean(first_token), quantile(first_token, 990)].map(|it| it / unit)
            };
            let measured = figures(&measured.first_token_us, 1e3);
            let way_ns = way_ns(ran, policy, settings, &time);
            let simulated = simulated.first_token.iter().map(|ns| ns + way_ns);
            let simulated = figures(&simulated.collect::<Vec<_>>(), 1e6);
            let cells = measured
                .into_iter()
                .zip(simulated)
                .flat_map(|(measured, simulated)| {
                    [measured, simulated, measured / simulated].map(|it| format!("{it:.2}"))
                });
            let is_below = highest_peak(ran, policy) >= Some(peak);
            let head = [peak.to_string(), policy.name().to_owned()];
            let knee = [if is_below { "below" } else { "above" }.to_owned()];
            rows.push(
                head.into_iter()
                    .chain(cells)
                    .chain(knee)
                    .collect::<Vec<_>>(),
            );
        }
    }
    let head = [
        "peak",
        "policy",
        "mean (ms)",
        "simulated",
        "ratio",
        "p99 (ms)",
        "simulated",
        "ratio",
        "the knee",
    ];
    println!(
        "\n(a), time to first token, measured and simulated\n{}",
        table(head, rows)
    );
    let StepTime {
        decode_ns,
        sequence_ns,
        prompt_ns,
        token_ns,
    } = time;
    println!(
        "A step takes {:.3} ms and {:.4} ms for each sequence; prompts add {:.3} ms and {:.5} ms for \
         each token: fitted to the steps of all policies",
        decode_ns / 1e6,
        sequence_ns / 1e6,
        prompt_ns / 1e6,
        token_ns / 1e6
    );
    Ok(())
}

/// What a request takes beside its step, from the client and back, with one request at a time. The
/// simulation has no such way.
fn way_ns(ran: &[Ran], policy: Policy, settings: &Settings, time: &StepTime) -> f64 {
    let unloaded = Section {
        workload: Workload::Ramps,
        peak: None,
        phase: PhaseName::Unloaded,
    };
    let step_ns = time.step_ns(settings.ramps.tokens.prompt, 0) as f64;
    let measured = unloaded.summary(ran, policy);
    measured.map_or(0., |it| (mean(&it.first_token_us) * 1e3 - step_ns).max(0.))
}

/// The requests of each model, as the simulation takes them.
fn requests(run: &Run, models: usize) -> Vec<Vec<Request>> {
    let measured = run
        .phases
        .iter()
        .filter(|it| it.name == PhaseName::Measured);
    let mut requests = vec![Vec::new(); models];
    for Planned {
        model,
        arrival_us,
        prompt,
        generated_tokens,
    } in measured.flat_map(|phase| &phase.requests)
    {
        let request = Request::new(arrival_us * 1000, prompt.len() as u32, *generated_tokens);
        requests[*model].push(request);
    }
    requests
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arrivals::Phase;
    use crate::metrics::{PromptSteps, Steps};

    const TIME: StepTime = StepTime {
        decode_ns: 1e6,
        sequence_ns: 1e4,
        prompt_ns: 2e6,
        token_ns: 5e3,
    };

    #[test]
    fn a_fit_finds_the_line_that_was_there() {
        let steps = [(4, 3), (50, 7), (1, 100)].map(|(sequences, count)| Steps {
            count,
            sequences: sequences * count,
            seconds: count as f64 * (1e-3 + 1e-5 * sequences as f64),
            ..Steps::default()
        });
        let prompts = [(256, 0, 5), (4096, 10, 2)];
        let prompt_steps = prompts.map(|(tokens, sequences, count)| {
            let decode = if sequences > 0 {
                1e-3 + 1e-5 * sequences as f64
            } else {
                0.
            };
            PromptSteps {
                count,
                prompt_tokens: tokens * count,
                sequences: sequences * count,
                seconds: count as f64 * (decode + 2e-3 + 5e-6 * tokens as f64),
                ..PromptSteps::default()
            }
        });
        let mut server = Started {
            workload: Workload::Ramps,
            policy: Policy::Elastic,
            flags: Vec::new(),
            steps: steps.to_vec(),
            prompt_steps: prompt_steps.to_vec(),
        };
        let time = StepTime::fit(&[&server]).unwrap();
        let found = [
            time.decode_ns,
            time.sequence_ns,
            time.prompt_ns,
            time.token_ns,
        ];
        let expected = [
            TIME.decode_ns,
            TIME.sequence_ns,
            TIME.prompt_ns,
            TIME.token_ns,
        ];
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-6 * expected, "{time:?}");
        }
        server.prompt_steps.truncate(1);
        let time = StepTime::fit(&[&server]).unwrap();
        assert_eq!(time.token_ns, 0.);
        assert!((time.prompt_ns - 3.28e6).abs() < 1., "{time:?}");
        server.prompt_steps.clear();
        assert_eq!(StepTime::fit(&[&server]), None);
    }

    #[test]
    fn a_first_token_takes_its_prompt_and_a_split_keeps_requests_waiting() {
        let planned = |model| Planned {
            model,
            arrival_us: 5,
            prompt: vec![0; 256],
            generated_tokens: 16,
        };
        let phase = Phase {
            name: PhaseName::Measured,
            clients: None,
            requests: vec![planned(0), planned(0)],
        };
        let run = Run {
            peak: Some(1),
            seed: 0,
            phases: vec![phase],
        };
        // 17 blocks for each request: half of the memory holds one.
        let mut settings = Settings::parse(settings::tests::CPU).unwrap().server;
        (settings.memory_mib, settings.token_bytes) = (1, (1 << 20) / BLOCK_TOKENS / 40);
        let first = |policy| {
            let served = simulate(&[&run], 2, policy, &settings, &TIME).unwrap();
            assert_eq!((served.served, served.refused), (2, 0));
            served.first_token
        };
        let together_ns = 2e6 + 512. * 5e3;
        assert_eq!(first(Policy::Elastic), [together_ns; 2]);
        let alone_ns = 2e6 + 256. * 5e3;
        let waited_ns = 2. * alone_ns + 15. * (1e6 + 1e4);
        assert_eq!(first(Policy::Static), [alone_ns, waited_ns]);
    }
}
