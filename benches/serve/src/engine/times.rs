//! How long steps take, and how much of that is the server's own.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use std::time::Duration;

/// Parts in which a share is counted.
const PARTS: usize = 200;

/// The times of steps of about as many sequences, or tokens of prompts.
///
/// A step's own time is all that is not the model's: taking in what the thread is told, planning,
/// inputs, and handing out tokens. The model's time begins with its first launch and ends when its
/// tokens are on the host.
#[derive(Clone, Copy, Debug)]
pub struct StepTimes {
    steps: u64,
    /// Of all steps together, as the next.
    sequences: u64,
    prompt_tokens: u64,
    total: Duration,
    own: Duration,
    /// How many steps had a share up to each part.
    shares: [u64; PARTS],
}

impl Default for StepTimes {
    fn default() -> Self {
        Self {
            steps: 0,
            sequences: 0,
            prompt_tokens: 0,
            total: Duration::ZERO,
            own: Duration::ZERO,
            shares: [0; PARTS],
        }
    }
}

impl StepTimes {
    /// Adds a step of so many sequences that decode, and so many tokens of prompts.
    pub fn add(
        &mut self,
        (sequences, prompt_tokens): (usize, usize),
        total: Duration,
        own: Duration,
    ) {
        self.steps += 1;
        self.sequences += sequences as u64;
        self.prompt_tokens += prompt_tokens as u64;
        self.total += total;
        self.own += own;
        let share = own.as_secs_f64() / total.as_secs_f64().max(f64::MIN_POSITIVE);
        // As a part of the whole it is at most the last.
        let part = (share * PARTS as f64).ceil().max(1.) as usize - 1;
        self.shares[part.min(PARTS - 1)] += 1;
    }

    /// How many steps there were.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// How many sequences they had, added up.
    pub fn sequences(&self) -> u64 {
        self.sequences
    }

    /// How many tokens of prompts they had, added up.
    pub fn prompt_tokens(&self) -> u64 {
        self.prompt_tokens
    }

    /// How long they took together.
    pub fn total(&self) -> Duration {
        self.total
    }

    /// How much of that was the server's own.
    pub fn own(&self) -> Duration {
        self.own
    }

    /// The share of its own time that a step has at most, for this part of the steps; rounded up to
    /// half a percent. 0 if there were none.
    pub fn share(&self, quantile: f64) -> f64 {
        let wanted = (self.steps as f64 * quantile).ceil();
        let mut steps = 0;
        let part = self.shares.iter().position(|count| {
            steps += count;
            steps > 0 && steps as f64 >= wanted
        });
        part.map_or(0., |part| (part + 1) as f64 / PARTS as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn shares_are_those_of_the_steps() {
        let mut times = StepTimes::default();
        assert_eq!((times.steps(), times.share(0.5)), (0, 0.));
        for _ in 0..98 {
            times.add((4, 0), 100 * MS, 2 * MS);
        }
        times.add((3, 7), 100 * MS, 31 * MS);
        times.add((1, 0), 10 * MS, 10 * MS);
        assert_eq!((times.steps(), times.sequences()), (100, 396));
        assert_eq!(times.prompt_tokens(), 7);
        assert_eq!((times.total(), times.own()), (9910 * MS, 237 * MS));
        assert_eq!((times.share(0.5), times.share(0.98)), (0.02, 0.02));
        assert_eq!((times.share(0.99), times.share(1.)), (0.31, 1.));
    }

    #[test]
    fn a_step_that_took_no_time_is_counted() {
        let mut times = StepTimes::default();
        times.add((1, 0), Duration::ZERO, Duration::ZERO);
        assert_eq!((times.steps(), times.share(0.99)), (1, 0.005));
    }
}
