//! What is measured against each other, in turns, so that what drifts affects all alike.

use anyhow::{Context, Error, Result};
use std::time::{Duration, Instant};

/// How long each piece of work is measured.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How many rounds work gets that takes some milliseconds.
    pub rounds: usize,
    /// The time after which no further round of one piece of work begins.
    pub patience: Duration,
}

impl Settings {
    pub fn new(rounds: usize, seconds: u64) -> Self {
        let patience = Duration::from_secs(seconds);
        Self { rounds, patience }
    }

    /// The fewest rounds, however long they take.
    pub fn rounds_min(&self) -> usize {
        self.rounds.min(3)
    }

    /// With more time, for work whose rounds are long and whose figure is near its reach.
    pub fn patient(&self, times: u32) -> Self {
        let patience = self.patience.saturating_mul(times);
        Self { patience, ..*self }
    }

    /// The turns of all sides, as round and side: each round begins with another side. Rounds end
    /// with the time for one piece of work; the first `warm` ones do not count.
    pub fn turns(
        &self,
        sides: usize,
        rounds: usize,
        warm: usize,
    ) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (least, patience, started) = (self.rounds_min() + warm, self.patience, Instant::now());
        let in_time = move |round: &usize| *round < least || started.elapsed() <= patience;
        let turns = move |round| (0..sides).map(move |turn| (round, (round + turn) % sides));
        (0..rounds + warm).take_while(in_time).flat_map(turns)
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Side {
    pub name: String,
    pub samples: Vec<f64>,
    /// How much is done in the time of a sample, for figures that are rates.
    pub amount: f64,
    pub is_time: bool,
}

impl Side {
    pub fn new(name: &str, samples: Vec<f64>, is_time: bool) -> Self {
        Self {
            name: name.to_owned(),
            samples,
            amount: 1.0,
            is_time,
        }
    }
}

/// One round of a side, which returns what it took.
type Act<'a> = Box<dyn FnMut() -> Result<Duration> + 'a>;

#[derive(Default)]
pub struct Sides<'a>(Vec<(Side, Act<'a>)>);

impl<'a> Sides<'a> {
    /// Adds a side. A round returns the time of what matters, and puts everything back as it was.
    pub fn add(&mut self, name: &str, act: impl FnMut() -> Result<Duration> + 'a) {
        self.add_rate(name, 1.0, act);
    }

    /// Adds a side that does this much in a round.
    pub fn add_rate(&mut self, name: &str, done: f64, act: impl FnMut() -> Result<Duration> + 'a) {
        let mut side = Side::new(name, Vec::new(), true);
        side.amount = done;
        self.0.push((side, Box::new(act)));
    }

    /// Runs all sides in turns. A round before the first warms up and does not count.
    pub(crate) fn measure(mut self, settings: &Settings, rounds: usize) -> Result<Vec<Side>> {
        for (round, side) in settings.turns(self.0.len(), rounds, 1) {
            let (side, act) = &mut self.0[side];
            let time = act().with_context(|| side.name.clone())?;
            if round > 0 {
                side.samples.push(time.as_nanos() as f64);
            }
        }
        Ok(self.0.into_iter().map(|(side, _)| side).collect())
    }
}

/// The time that something takes which can fail, and what it returns.
pub fn time<T, E: Into<Error>>(act: impl FnOnce() -> Result<T, E>) -> Result<(T, Duration)> {
    let started = Instant::now();
    let (outcome, elapsed) = (act(), started.elapsed());
    let outcome = outcome.map_err(Into::into).context("while it was timed")?;
    Ok((outcome, elapsed))
}

/// The time that it takes to drop a value.
pub fn drop_time<T>(value: T) -> Duration {
    let started = Instant::now();
    drop(value);
    started.elapsed()
}

/// The smallest value that this many of a thousand do not exceed; NaN if nothing was measured.
pub fn quantile(samples: &[f64], per_mille: usize) -> f64 {
    let mut values = samples.to_vec();
    let rank = (per_mille * values.len()).div_ceil(1000).max(1);
    match rank <= values.len() {
        true => *values.select_nth_unstable_by(rank - 1, f64::total_cmp).1,
        false => f64::NAN,
    }
}

/// The mean; NaN if nothing was measured.
pub fn mean(samples: &[f64]) -> f64 {
    samples.iter().sum::<f64>() / samples.len() as f64
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::cell::RefCell;

    pub fn settings(patience: Duration) -> Settings {
        let rounds = 2;
        Settings { rounds, patience }
    }

    #[test]
    fn each_round_begins_with_another_side_and_the_first_does_not_count() {
        let order = RefCell::new(String::new());
        let mut sides = Sides::default();
        for name in ["a", "b", "c"] {
            let order = &order;
            sides.add(name, move || {
                order.borrow_mut().push_str(name);
                Ok(Duration::from_nanos(5))
            });
        }
        let measured = sides.measure(&settings(Duration::MAX), 3).unwrap();
        assert_eq!(*order.borrow(), "abcbcacababc");
        assert!(measured.iter().all(|side| side.samples.len() == 3));
        assert_eq!(measured[0].samples, [5.0; 3]);
    }

    #[test]
    fn rounds_end_with_the_time_for_them_but_not_before_the_least() {
        let mut sides = Sides::default();
        sides.add("a", || Ok(Duration::ZERO));
        let measured = sides.measure(&settings(Duration::ZERO), 100).unwrap();
        assert_eq!(measured[0].samples.len(), 2);
    }

    #[test]
    fn a_side_that_fails_is_named() {
        let mut sides = Sides::default();
        sides.add("broken", || anyhow::bail!("no memory"));
        let error = sides.measure(&settings(Duration::MAX), 1).unwrap_err();
        assert_eq!(format!("{error:#}"), "broken: no memory");
    }

    #[test]
    fn quantiles_are_values_that_were_measured_and_of_a_few_the_tail_is_the_largest() {
        let samples: Vec<_> = (1..=1000).rev().map(f64::from).collect();
        assert_eq!(mean(&samples), 500.5);
        let quantiles = [500, 990, 999, 1000].map(|per_mille| quantile(&samples, per_mille));
        assert_eq!(quantiles, [500.0, 990.0, 999.0, 1000.0]);
        let quantiles = [500, 999].map(|part| quantile(&[3.0, 1.0, 2.0], part));
        assert_eq!(quantiles, [2.0, 3.0]);
        let quantiles = [250, 500, 750].map(|part| quantile(&[1.0, 2.0, 0.5, 7.0], part));
        assert_eq!(quantiles, [0.5, 1.0, 2.0]);
        assert_eq!(quantile(&[7.0], 0), 7.0);
        assert!(quantile(&[], 500).is_nan() && mean(&[]).is_nan());
    }
}
