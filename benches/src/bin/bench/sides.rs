//! What is measured against each other, in turns, so that what drifts hits all alike.

use crate::machine::Settings;
use crate::samples::Samples;
use anyhow::{Context, Result};
use std::time::{Duration, Instant};

/// One round of a side; what it took.
type Act<'a> = Box<dyn FnMut() -> Result<Duration> + 'a>;

/// The sides of a comparison.
#[derive(Default)]
pub struct Sides<'a> {
    sides: Vec<(&'static str, Act<'a>)>,
}

impl<'a> Sides<'a> {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a side, which takes the time of what matters in a round itself, and puts everything back as it was.
    pub fn add(&mut self, name: &'static str, act: impl FnMut() -> Result<Duration> + 'a) {
        self.sides.push((name, Box::new(act)));
    }

    /// Runs all sides in turns, each round beginning with another, for so many rounds or until the time for one
    /// piece of work is used up. A round before the first warms up and does not count.
    pub fn measure(mut self, settings: &Settings, rounds: usize) -> Result<Measured> {
        let mut times = vec![Vec::with_capacity(rounds); self.sides.len()];
        let started = Instant::now();
        for round in 0..=rounds {
            if round > settings.rounds_min && started.elapsed() > settings.patience {
                break;
            }
            for turn in 0..self.sides.len() {
                let side = (round + turn) % self.sides.len();
                let (name, act) = &mut self.sides[side];
                let time = act().with_context(|| (*name).to_owned())?;
                if round > 0 {
                    times[side].push(time);
                }
            }
        }
        let samples = times.into_iter().map(Samples::from_iter);
        let names = self.sides.iter().map(|(name, _)| *name);
        Ok(Measured(names.zip(samples).collect()))
    }
}

/// What the sides took.
#[derive(Debug, Default)]
pub struct Measured(Vec<(&'static str, Samples)>);

impl Measured {
    /// Takes in what was measured otherwise.
    pub fn push(&mut self, name: &'static str, samples: Samples) {
        self.0.push((name, samples));
    }

    /// Takes in what was measured in turns of its own.
    pub fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// One side's measurements.
    pub fn samples(&self, name: &str) -> Result<&Samples> {
        let side = self.0.iter().find(|(side, _)| *side == name);
        side.map(|(_, samples)| samples)
            .with_context(|| format!("no side is named {name}"))
    }

    /// One side's median, in microseconds.
    pub fn median_us(&self, name: &str) -> Result<f64> {
        Ok(self.samples(name)?.median_ns() / 1e3)
    }

    /// All sides.
    pub fn iter(&self) -> impl Iterator<Item = &(&'static str, Samples)> {
        self.0.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    fn settings(patience: Duration) -> Settings {
        Settings {
            rounds: 4,
            rounds_min: 2,
            patience,
        }
    }

    #[test]
    fn each_round_begins_with_another_side_and_the_first_does_not_count() {
        let order = RefCell::new(String::new());
        let mut sides = Sides::new();
        for name in ["a", "b", "c"] {
            let order = &order;
            sides.add(name, move || {
                order.borrow_mut().push_str(name);
                Ok(Duration::from_nanos(5))
            });
        }
        let measured = sides.measure(&settings(Duration::MAX), 3).unwrap();
        assert_eq!(*order.borrow(), "abcbcacababc");
        assert!(measured.iter().all(|(_, samples)| samples.count() == 3));
        assert!(measured.samples("d").is_err());
        assert_eq!(measured.median_us("a").unwrap(), 0.005);
    }

    #[test]
    fn rounds_end_with_the_time_for_them_but_not_before_the_least() {
        let mut sides = Sides::new();
        sides.add("a", || Ok(Duration::ZERO));
        let measured = sides.measure(&settings(Duration::ZERO), 100).unwrap();
        assert_eq!(measured.samples("a").unwrap().count(), 2);
    }

    #[test]
    fn a_side_that_fails_is_named() {
        let mut sides = Sides::new();
        sides.add("broken", || anyhow::bail!("no memory"));
        let error = sides.measure(&settings(Duration::MAX), 1).unwrap_err();
        assert_eq!(format!("{error:#}"), "broken: no memory");
    }
}
