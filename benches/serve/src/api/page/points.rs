//! Samples as points of charts: fewer, with means and rates.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::history::{History, Sample};
use crate::figures::{Figures, ModelFigures};
use std::time::Duration;

/// The samples within this time are one point. The times begin at multiples of it, so a point stays
/// the same when others come.
const WIDTH: Duration = Duration::from_secs(2);

/// A part of a model's memory: its name, and its bytes.
type Part = (&'static str, fn(&ModelFigures) -> usize);

/// The parts of a model's memory, in the order in which they are drawn.
pub const PARTS: [Part; 4] = [
    ("live", |it| it.live_bytes),
    ("cached prefix", |it| it.prefix_bytes),
    ("ahead", |it| it.ahead_bytes),
    ("other", |it| it.other_bytes),
];

/// What the samples of a short time say.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// How long before the newest sample, in minutes; not above 0.
    pub minutes: f64,
    /// What belongs to no model, in bytes.
    pub unowned_bytes: f64,
    /// What is not committed, in bytes.
    pub free_bytes: f64,
    /// Each model, in the order of the figures.
    pub models: Vec<ModelPoint>,
}

/// Means of one model's numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ModelPoint {
    /// The [`PARTS`] of its memory, in bytes.
    pub parts_bytes: [f64; PARTS.len()],
    pub running: f64,
    pub waiting: f64,
    /// Tokens that were generated in a second.
    pub token_rate: f64,
}

/// The points of all samples, the oldest first.
pub fn points(history: &History) -> Vec<Point> {
    let samples: Vec<_> = history.samples().collect();
    let Some(newest) = samples.last().map(|it| it.at) else {
        return Vec::new();
    };
    let slot = |sample: &Sample| sample.at.as_millis() / WIDTH.as_millis();
    let slots = samples.chunk_by(|one, next| slot(one) == slot(next));
    let points = slots.map(|slot| {
        // The newest slot is not over yet, so rates are of the time before its last sample.
        let end = slot[slot.len() - 1].at.saturating_sub(WIDTH);
        let before = samples.partition_point(|sample| sample.at <= end);
        point(samples[before.saturating_sub(1)], slot, newest)
    });
    points.collect()
}

/// The point of some samples, with rates since an earlier sample.
fn point(before: &Sample, samples: &[&Sample], newest: Duration) -> Point {
    let last = samples[samples.len() - 1];
    let mean = |number: &dyn Fn(&Figures) -> usize| {
        let sum: f64 = samples.iter().map(|it| number(&it.figures) as f64).sum();
        sum / samples.len() as f64
    };
    let seconds = last.at.saturating_sub(before.at).as_secs_f64();
    let models = last.figures.models.iter().enumerate().map(|(at, model)| {
        let of = |number: fn(&ModelFigures) -> usize| {
            mean(&|figures| figures.models.get(at).map_or(0, number))
        };
        let had = before.figures.models.get(at);
        let had = had.map_or(0, |it| it.generated_tokens);
        let generated = model.generated_tokens.saturating_sub(had) as f64;
        ModelPoint {
            parts_bytes: PARTS.map(|(_, bytes)| of(bytes)),
            running: of(|it| it.running),
            waiting: of(|it| it.waiting),
            token_rate: if seconds > 0. {
                generated / seconds
            } else {
                0.
            },
        }
    });
    Point {
        minutes: -newest.saturating_sub(last.at).as_secs_f64() / 60.,
        unowned_bytes: mean(&|it| it.unowned_bytes),
        free_bytes: mean(&|it| it.free_bytes),
        models: models.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sample after so many halves of a second.
    fn push(history: &mut History, halves: u64, live_bytes: usize, generated_tokens: u64) {
        let model = ModelFigures {
            live_bytes,
            prefix_bytes: 2 * live_bytes,
            running: live_bytes,
            generated_tokens,
            ..ModelFigures::default()
        };
        let figures = Figures {
            free_bytes: 100 - 3 * live_bytes,
            models: vec![model],
            ..Figures::default()
        };
        history.push(Duration::from_millis(500 * halves), figures);
    }

    #[test]
    fn points_have_means_and_rates() {
        let mut history = History::default();
        for (halves, live, tokens) in [(2, 1, 7), (3, 3, 10), (4, 5, 30), (7, 7, 70), (8, 0, 71)] {
            push(&mut history, halves, live, tokens);
        }
        let points = points(&history);
        let numbers: Vec<_> = points
            .iter()
            .map(|point| {
                let model = point.models[0];
                let [live, prefix, ahead, other] = model.parts_bytes;
                assert_eq!((prefix, ahead, other), (2. * live, 0., 0.));
                assert_eq!(point.free_bytes, 100. - 3. * live);
                assert_eq!(model.running, live);
                (point.minutes * 60., live, model.token_rate)
            })
            .collect();
        // Of the first half of a second, as no more is known, and of two seconds.
        assert_eq!(numbers, [(-2.5, 2., 6.), (-0.5, 6., 30.), (0., 0., 20.5)]);
    }

    #[test]
    fn one_sample_is_a_point_without_a_rate_and_none_is_none() {
        let mut history = History::default();
        assert_eq!(points(&history), []);
        push(&mut history, 9, 4, 1000);
        let points = points(&history);
        assert_eq!(points.len(), 1);
        assert_eq!(
            (points[0].minutes, points[0].models[0].token_rate),
            (0., 0.)
        );
    }

    #[test]
    fn five_minutes_are_few_points_that_stay_when_others_come() {
        let mut history = History::default();
        (0..=600).for_each(|halves| push(&mut history, halves, halves as usize % 30, halves));
        let before = points(&history);
        assert_eq!(before.len(), 151);
        push(&mut history, 601, 1, 601);
        let after = points(&history);
        // The first has lost a sample, and the last has got one.
        for (one, other) in before[1..150].iter().zip(&after[1..150]) {
            assert_eq!(one.models, other.models);
        }
    }
}
