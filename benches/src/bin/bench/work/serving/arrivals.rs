//! When requests arrive: three models, whose rates climb to a peak and fall back one after the other.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

/// How many models there are.
pub const MODELS: usize = 3;

/// A request of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Arrival {
    /// When, in seconds.
    pub at_s: f64,
    /// Whose.
    pub model: usize,
}

/// All requests in order. Each model's rate climbs by one request a second each second, from 0 to the peak, and falls back to
/// 1 as fast; requests are evenly spaced within a second; models begin 2.25 ramp-ups apart.
pub fn arrivals(peak: u32) -> Vec<Arrival> {
    let rates = || (0..=peak).chain((1..peak).rev());
    let mut all = Vec::new();
    for model in 0..MODELS {
        let begin_s = model as f64 * 2.25 * f64::from(peak);
        for (second, rate) in rates().enumerate() {
            all.extend((0..rate).map(|index| Arrival {
                at_s: begin_s + second as f64 + f64::from(index) / f64::from(rate),
                model,
            }));
        }
    }
    all.sort_by(|a, b| a.at_s.total_cmp(&b.at_s));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_climb_and_fall_and_models_come_one_after_the_other() {
        let all = arrivals(4);
        let of = |model: usize| {
            let mine = all.iter().filter(move |arrival| arrival.model == model);
            mine.map(|arrival| arrival.at_s).collect::<Vec<_>>()
        };
        assert_eq!(
            of(0)[..6],
            [1.0, 2.0, 2.5, 3.0, 3.0 + 1.0 / 3.0, 3.0 + 2.0 / 3.0]
        );
        assert_eq!(of(0)[6..10], [4.0, 4.25, 4.5, 4.75]);
        assert_eq!(of(0).len(), 16, "the square of the peak");
        assert_eq!(of(0).last(), Some(&7.0));
        for model in 1..MODELS {
            let begin_s = 9.0 * model as f64;
            let later: Vec<_> = of(0).iter().map(|at_s| at_s + begin_s).collect();
            assert!(
                of(model)
                    .iter()
                    .zip(&later)
                    .all(|(a, b)| (a - b).abs() < 1e-9)
            );
        }
        assert!(all.is_sorted_by(|a, b| a.at_s <= b.at_s));
    }
}
