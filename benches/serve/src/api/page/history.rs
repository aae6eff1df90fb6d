//! The figures of the last minutes.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use crate::figures::Figures;
use std::collections::VecDeque;
use std::time::Duration;

/// How long a sample is kept.
pub const KEPT: Duration = Duration::from_secs(300);

/// The figures at a moment.
#[derive(Clone, Debug)]
pub struct Sample {
    /// How long after the beginning.
    pub at: Duration,
    pub figures: Figures,
}

/// The samples of the last [`KEPT`], the oldest first.
#[derive(Debug, Default)]
pub struct History {
    samples: VecDeque<Sample>,
}

impl History {
    /// Adds the newest sample, and forgets those that are too old beside it.
    pub fn push(&mut self, at: Duration, figures: Figures) {
        let is_old = |sample: &Sample| at.saturating_sub(sample.at) > KEPT;
        while self.samples.front().is_some_and(is_old) {
            self.samples.pop_front();
        }
        self.samples.push_back(Sample { at, figures });
    }

    /// The samples, the oldest first.
    pub fn samples(&self) -> impl ExactSizeIterator<Item = &Sample> {
        self.samples.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(history: &History) -> Vec<u64> {
        history.samples().map(|it| it.at.as_secs()).collect()
    }

    #[test]
    fn samples_are_kept_for_five_minutes_and_no_longer() {
        let mut history = History::default();
        assert_eq!(at(&history), [0; 0]);
        for second in [0, 1, 299, 300] {
            history.push(Duration::from_secs(second), Figures::default());
        }
        assert_eq!(at(&history), [0, 1, 299, 300]);
        history.push(Duration::from_secs(301), Figures::default());
        assert_eq!(at(&history), [1, 299, 300, 301]);
        history.push(Duration::from_secs(600), Figures::default());
        assert_eq!(at(&history), [300, 301, 600]);
        // Nothing was sampled for long.
        history.push(Duration::from_secs(5000), Figures::default());
        assert_eq!(at(&history), [5000]);
    }

    #[test]
    fn there_are_no_more_samples_than_fit_into_five_minutes() {
        let mut history = History::default();
        for half in 0..2000 {
            history.push(Duration::from_millis(half * 500), Figures::default());
        }
        assert_eq!(history.samples().len(), 601);
    }
}
