//! Many measurements of one thing.

use std::time::Duration;

/// Measurements: times in nanoseconds, or counts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The smallest value that this many of a thousand do not exceed; NaN if nothing was measured.
    pub fn quantile(&self, per_mille: usize) -> f64 {
        let rank = (per_mille * self.count()).div_ceil(1000);
        let value = self.0.get(rank.max(1) - 1);
        value.copied().unwrap_or(f64::NAN)
    }

    /// The smallest value that half of all do not exceed.
    pub fn median(&self) -> f64 {
        self.quantile(500)
    }

    /// The mean; NaN if nothing was measured.
    pub fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.count() as f64
    }

    /// These and others.
    pub fn merged(self, other: Self) -> Self {
        self.0.into_iter().chain(other.0).collect()
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        let mut values: Vec<_> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        Self(values)
    }
}

impl FromIterator<Duration> for Samples {
    fn from_iter<I: IntoIterator<Item = Duration>>(times: I) -> Self {
        let nanoseconds = times.into_iter().map(|time| time.as_nanos() as f64);
        nanoseconds.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let samples: Samples = (1..=1000).rev().map(Duration::from_nanos).collect();
        assert_eq!(samples.count(), 1000);
        assert_eq!(samples.median(), 500.0);
        assert_eq!(samples.mean(), 500.5);
        assert_eq!(
            [990, 999, 1000].map(|per_mille| samples.quantile(per_mille)),
            [990.0, 999.0, 1000.0]
        );
    }

    #[test]
    fn of_a_few_the_tail_is_the_largest() {
        let samples = Samples::from_iter([3.0, 1.0, 2.0]);
        assert_eq!(samples.median(), 2.0);
        assert_eq!(samples.quantile(999), 3.0);
        assert_eq!(Samples::from_iter([7.0]).quantile(0), 7.0);
        let two = Samples::from_iter([1.0, 2.0]).merged(Samples::from_iter([0.5, 7.0]));
        assert_eq!(
            [250, 500, 750].map(|part| two.quantile(part)),
            [0.5, 1.0, 2.0]
        );
    }

    #[test]
    fn nothing_has_no_median() {
        assert!(Samples::default().median().is_nan());
        assert!(Samples::default().mean().is_nan());
    }
}
