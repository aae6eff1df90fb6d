//! Many measurements of one thing.

use std::time::Duration;

/// Measurements in nanoseconds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Samples {
    sorted_ns: Vec<f64>,
}

impl Samples {
    /// Of what was measured, in any order.
    pub fn new(mut values_ns: Vec<f64>) -> Self {
        values_ns.sort_by(f64::total_cmp);
        Self {
            sorted_ns: values_ns,
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.sorted_ns.len()
    }

    /// The smallest value that so many of a thousand do not exceed; no number where nothing was measured.
    pub fn quantile_ns(&self, per_mille: usize) -> f64 {
        let rank = (per_mille * self.count()).div_ceil(1000);
        let value = self.sorted_ns.get(rank.max(1) - 1);
        value.copied().unwrap_or(f64::NAN)
    }

    /// Half of all are not above it.
    pub fn median_ns(&self) -> f64 {
        self.quantile_ns(500)
    }

    /// The largest.
    pub fn max_ns(&self) -> f64 {
        self.quantile_ns(1000)
    }
}

impl FromIterator<Duration> for Samples {
    fn from_iter<I: IntoIterator<Item = Duration>>(durations: I) -> Self {
        let values_ns = durations.into_iter().map(|time| time.as_secs_f64() * 1e9);
        Self::new(values_ns.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let samples: Samples = (1..=1000).rev().map(Duration::from_nanos).collect();
        assert_eq!(samples.count(), 1000);
        assert_eq!(samples.median_ns().round(), 500.0);
        assert_eq!(samples.quantile_ns(990).round(), 990.0);
        assert_eq!(samples.quantile_ns(999).round(), 999.0);
        assert_eq!(samples.max_ns().round(), 1000.0);
    }

    #[test]
    fn of_a_few_the_tail_is_the_largest() {
        let samples = Samples::new(vec![3.0, 1.0, 2.0]);
        assert_eq!(samples.median_ns(), 2.0);
        assert_eq!(samples.quantile_ns(999), 3.0);
        assert_eq!(Samples::new(vec![7.0]).quantile_ns(0), 7.0);
    }

    #[test]
    fn nothing_has_no_median() {
        assert!(Samples::default().median_ns().is_nan());
    }
}
