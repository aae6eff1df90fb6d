//! Arrivals and lengths made up where no trace is given: bursty services and a steady batch job.

use std::f64::consts::TAU;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::workload::Request;

const SECOND_NS: f64 = 1e9;

/// How long the generated services run, in seconds.
pub const SERVICE_SECONDS: u64 = 600;
/// Time between two requests of the batch job, in seconds.
pub const BATCH_SPACING_SECONDS: u64 = 8;
/// Mean lengths of the batch job's requests, in tokens; each is within a quarter of the mean.
pub const BATCH_PROMPT_TOKENS: u32 = 8_192;
/// See [`BATCH_PROMPT_TOKENS`].
pub const BATCH_GENERATED_TOKENS: u32 = 1_024;

/// A service whose rate of arrivals switches between calm and bursts.
#[derive(Clone, Copy, Debug)]
pub struct Bursts {
    calm_per_second: f64,
    burst_per_second: f64,
    /// Mean length of a calm stretch and of a burst, in seconds; both are exponential.
    calm_seconds: f64,
    burst_seconds: f64,
    prompt: Lengths,
    generated: Lengths,
}

/// Log-normal lengths in tokens.
#[derive(Clone, Copy, Debug)]
struct Lengths {
    median: f64,
    /// Standard deviation of the logarithm.
    spread: f64,
    max: u32,
}

/// Chat: always busy, long answers.
pub const CHAT: Bursts = Bursts {
    calm_per_second: 4.0,
    burst_per_second: 12.0,
    calm_seconds: 60.0,
    burst_seconds: 20.0,
    prompt: Lengths {
        median: 900.0,
        spread: 0.8,
        max: 14_000,
    },
    generated: Lengths {
        median: 170.0,
        spread: 0.7,
        max: 1_000,
    },
};

/// Code completion: idle most of the time, then many long prompts at once, short answers.
pub const CODE: Bursts = Bursts {
    calm_per_second: 0.5,
    burst_per_second: 20.0,
    calm_seconds: 40.0,
    burst_seconds: 10.0,
    prompt: Lengths {
        median: 1_800.0,
        spread: 0.7,
        max: 7_500,
    },
    generated: Lengths {
        median: 25.0,
        spread: 0.8,
        max: 400,
    },
};

/// Requests of one service over [`SERVICE_SECONDS`], in the order of arrival. `stream` keeps the
/// services of one seed apart.
pub fn service(bursts: &Bursts, seed: u64, stream: u64) -> Vec<Request> {
    let mut random = random(seed, stream);
    let end = SERVICE_SECONDS as f64;
    let mut requests = Vec::new();
    let mut now = 0.0;
    let mut in_burst = false;
    while now < end {
        let (rate, seconds) = if in_burst {
            (bursts.burst_per_second, bursts.burst_seconds)
        } else {
            (bursts.calm_per_second, bursts.calm_seconds)
        };
        let stretch_end = end.min(now + exponential(&mut random, seconds));
        let mut arrival = now + exponential(&mut random, 1.0 / rate);
        while arrival < stretch_end {
            requests.push(Request {
                arrival_ns: (arrival * SECOND_NS) as u64,
                prompt_tokens: bursts.prompt.draw(&mut random),
                generated_tokens: bursts.generated.draw(&mut random),
            });
            arrival += exponential(&mut random, 1.0 / rate);
        }
        now = stretch_end;
        in_burst = !in_burst;
    }
    requests
}

/// Requests of the batch job, evenly spaced from time 0 to `end_ns`.
pub fn batch(end_ns: u64, seed: u64, stream: u64) -> Vec<Request> {
    let mut random = random(seed, stream);
    let around =
        |random: &mut StdRng, mean: u32| random.random_range(mean - mean / 4..=mean + mean / 4);
    let spacing_ns = BATCH_SPACING_SECONDS * 1_000_000_000;
    (0..=end_ns / spacing_ns)
        .map(|index| Request {
            arrival_ns: index * spacing_ns,
            prompt_tokens: around(&mut random, BATCH_PROMPT_TOKENS),
            generated_tokens: around(&mut random, BATCH_GENERATED_TOKENS),
        })
        .collect()
}

impl Lengths {
    fn draw(&self, random: &mut StdRng) -> u32 {
        let length = self.median * (self.spread * normal(random)).exp();
        (length.round() as u32).clamp(1, self.max)
    }
}

fn random(seed: u64, stream: u64) -> StdRng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&stream.to_le_bytes());
    StdRng::from_seed(key)
}

fn exponential(random: &mut StdRng, mean: f64) -> f64 {
    -mean * (1.0 - random.random::<f64>()).ln()
}

/// A standard normal number, by the Box-Muller transform.
fn normal(random: &mut StdRng) -> f64 {
    let radius = (-2.0 * (1.0 - random.random::<f64>()).ln()).sqrt();
    radius * (TAU * random.random::<f64>()).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_requests() {
        assert_eq!(service(&CHAT, 7, 0), service(&CHAT, 7, 0));
        assert_ne!(service(&CHAT, 7, 0), service(&CHAT, 8, 0));
        assert_ne!(service(&CHAT, 7, 0), service(&CHAT, 7, 1));
        assert_eq!(batch(1 << 40, 7, 2), batch(1 << 40, 7, 2));
    }

    #[test]
    fn arrivals_are_sorted_and_end_in_time() {
        for seed in 0..8 {
            let requests = service(&CODE, seed, 1);
            assert!(requests.is_sorted_by_key(|request| request.arrival_ns));
            let last = requests.last().expect("some requests");
            assert!(last.arrival_ns < SERVICE_SECONDS * 1_000_000_000);
        }
    }

    #[test]
    fn lengths_keep_to_their_shape() {
        let mut lengths: Vec<u32> = service(&CHAT, 3, 0)
            .iter()
            .map(|r| r.prompt_tokens)
            .collect();
        lengths.sort_unstable();
        let median = f64::from(lengths[lengths.len() / 2]);
        assert!((700.0..1_100.0).contains(&median), "median {median}");
        assert!(lengths.iter().all(|length| (1..=14_000).contains(length)));
    }

    #[test]
    fn services_are_burstier_than_chance() {
        // Arrivals at a constant rate have as much variance as mean in their counts per second.
        let requests = service(&CODE, 5, 1);
        let mut counts = vec![0.0; SERVICE_SECONDS as usize];
        for request in &requests {
            counts[(request.arrival_ns / 1_000_000_000) as usize] += 1.0;
        }
        let mean = counts.iter().sum::<f64>() / counts.len() as f64;
        let variance = counts
            .iter()
            .map(|count| (count - mean).powi(2))
            .sum::<f64>()
            / counts.len() as f64;
        assert!(variance > 3.0 * mean, "variance {variance}, mean {mean}");
    }

    #[test]
    fn the_batch_job_is_evenly_spaced() {
        let requests = batch(80_000_000_000, 1, 2);
        assert_eq!(requests.len(), 11);
        for (index, request) in requests.iter().enumerate() {
            assert_eq!(request.arrival_ns, index as u64 * 8_000_000_000);
            assert!((6_144..=10_240).contains(&request.prompt_tokens));
            assert!((768..=1_280).contains(&request.generated_tokens));
        }
    }
}
