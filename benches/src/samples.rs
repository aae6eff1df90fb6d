//! Many measurements of one thing: times in nanoseconds, or counts.

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
mod tests {
    use super::*;

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
