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
        let mut values = self.0.clone();
        let rank = (per_mille * values.len()).div_ceil(1000).max(1);
        match rank <= values.len() {
            true => *values.select_nth_unstable_by(rank - 1, f64::total_cmp).1,
            false => f64::NAN,
        }
    }

    /// The mean; NaN if nothing was measured.
    pub fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.count() as f64
    }
}

impl Extend<f64> for Samples {
    fn extend<I: IntoIterator<Item = f64>>(&mut self, values: I) {
        self.0.extend(values);
    }
}

impl IntoIterator for Samples {
    type Item = f64;
    type IntoIter = std::vec::IntoIter<f64>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        Self(values.into_iter().collect())
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
        assert_eq!(samples.mean(), 500.5);
        let quantiles = [500, 990, 999, 1000].map(|per_mille| samples.quantile(per_mille));
        assert_eq!(quantiles, [500.0, 990.0, 999.0, 1000.0]);
    }

    #[test]
    fn of_a_few_the_tail_is_the_largest() {
        let samples = Samples::from_iter([3.0, 1.0, 2.0]);
        assert_eq!(samples.quantile(500), 2.0);
        assert_eq!(samples.quantile(999), 3.0);
        assert_eq!(Samples::from_iter([7.0]).quantile(0), 7.0);
        let mut two = Samples::from_iter([1.0, 2.0]);
        two.extend([0.5, 7.0]);
        let quantiles = [250, 500, 750].map(|part| two.quantile(part));
        assert_eq!(quantiles, [0.5, 1.0, 2.0]);
    }

    #[test]
    fn nothing_has_no_median() {
        assert!(Samples::default().quantile(500).is_nan());
        assert!(Samples::default().mean().is_nan());
    }
}
