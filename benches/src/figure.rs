//! What is demanded of a figure, and whether it is reached.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// What a figure is worth on a simulated driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// It is a time, a ratio of times, or depends on which thread is first: only a GPU can tell.
    Time,
    /// It is a count, which is right on any driver.
    Count,
}

/// A quantile of what one side of some work took, and what is demanded of it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Figure {
    pub work: String,
    pub(crate) name: String,
    pub(crate) unit: String,
    reach: String,
    pub(crate) kind: Kind,
    pub(crate) per_mille: usize,
    /// The name of our side, and of the peer's if there is one.
    pub(crate) ours: String,
    pub(crate) peer: Option<String>,
}

impl Figure {
    /// Reads a list of figures; an error if a reach is none that [`Finding::new`] takes.
    pub fn list(text: &str) -> Result<Vec<Self>> {
        let mut reader = csv::Reader::from_reader(text.as_bytes());
        let figures: Vec<Self> = reader.deserialize().collect::<Result<_, _>>()?;
        for figure in &figures {
            is_reached(&figure.reach, f64::NAN, None).with_context(|| figure.name.clone())?;
        }
        Ok(figures)
    }

    pub fn blank(&self) -> Finding {
        Finding::new(&self.name, &self.unit, &self.reach)
    }
}

/// Whether our figure and its ratio to the peer's reach what is demanded; `None` if nothing is.
fn is_reached(reach: &str, ours: f64, ratio: Option<f64>) -> Result<Option<bool>> {
    // What is no number reaches nothing.
    let ratio = ratio.unwrap_or(f64::NAN);
    let parts: Vec<_> = reach.split_whitespace().collect();
    Ok(Some(match parts[..] {
        [] => return Ok(None),
        ["≤", most, "×"] => ratio <= most.parse()?,
        ["≥", least, "×"] => ratio >= least.parse()?,
        ["≤", most, _] => ours <= most.parse()?,
        ["≥", least, _] => ours >= least.parse()?,
        _ => bail!("not a reach: {reach:?}"),
    }))
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Finding {
    pub(crate) name: String,
    pub(crate) ours: Option<f64>,
    pub(crate) peer: Option<f64>,
    pub(crate) ratio: Option<f64>,
    pub(crate) reach: Option<String>,
    /// Whether it is reached; `None` if nothing is demanded, or nothing could be measured.
    pub pass: Option<bool>,
    pub(crate) unit: String,
    pub(crate) note: Option<String>,
}

impl Finding {
    /// A figure without a value. Its reach is `≤ 1.5 ×` or `≥ 2 ×` the peer's figure, an amount, as
    /// in `≤ 20 µs` or `≥ 900 tokens/s`, or empty if nothing is demanded.
    pub fn new(name: &str, unit: &str, reach: &str) -> Self {
        Self {
            name: name.to_owned(),
            reach: (!reach.is_empty()).then(|| reach.to_owned()),
            unit: unit.to_owned(),
            ..Self::default()
        }
    }

    pub fn judge(self, ours: f64, peer: Option<f64>) -> Self {
        let ratio = peer.map(|peer| ours / peer);
        let reach = self.reach.as_deref().unwrap_or_default();
        Self {
            pass: is_reached(reach, ours, ratio).unwrap_or(Some(false)),
            ours: Some(ours),
            peer,
            // A peer that has none of something leaves nothing to divide by.
            ratio: ratio.filter(|ratio| ratio.is_finite()),
            ..self
        }
    }

    /// Says how measuring failed on a machine that could have done it, which is not reaching it.
    pub fn failed(self, error: &str) -> Self {
        let pass = self.reach.as_ref().map(|_| false);
        Self { pass, ..self }.noted(error)
    }

    /// Says something of it, before what was said already.
    pub fn noted(self, note: impl Into<String>) -> Self {
        let before = self.note.map(|before| format!("; {before}"));
        let note = Some(note.into() + &before.unwrap_or_default());
        Self { note, ..self }
    }

    pub fn unjudged(self) -> Self {
        Self { pass: None, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn figure(reach: &str) -> Finding {
        Finding::new("work", "µs", reach)
    }

    #[test]
    fn a_figure_that_equals_its_reach_passes() {
        for (reach, ours, peer, pass) in [
            ("≤ 2 ×", 4.0, Some(2.0), Some(true)),
            ("≤ 2 ×", 4.1, Some(2.0), Some(false)),
            ("≥ 0.5 ×", 1.0, Some(2.0), Some(true)),
            ("≥ 0.5 ×", 0.9, Some(2.0), Some(false)),
            ("≤ 20 µs", 20.0, None, Some(true)),
            ("≤ 20 µs", 20.5, Some(1.0), Some(false)),
            ("≥ 900 tokens/s", 900.0, None, Some(true)),
            ("≥ 900 tokens/s", 899.0, Some(1.0), Some(false)),
            ("", 1e9, Some(1.0), None),
            // What is no number does not pass.
            ("≤ 2 ×", f64::NAN, Some(1.0), Some(false)),
            ("≥ 2 ×", f64::NAN, Some(1.0), Some(false)),
            ("≤ 2 µs", f64::NAN, Some(1.0), Some(false)),
            ("≤ 2 ×", 1.0, None, Some(false)),
        ] {
            let found = figure(reach).judge(ours, peer);
            assert_eq!(found.pass, pass, "{reach} {ours}");
        }
    }

    #[test]
    fn failing_is_not_reaching_where_something_is_demanded() {
        assert_eq!(figure("≤ 1 µs").failed("why").pass, Some(false));
        assert_eq!(figure("").failed("why").pass, None);
        let finding = figure("≤ 1 µs").noted("why");
        assert_eq!((finding.pass, finding.ours), (None, None));
        assert_eq!(finding.reach.as_deref(), Some("≤ 1 µs"));
        assert_eq!(finding.note.as_deref(), Some("why"));
    }

    #[test]
    fn every_figure_has_a_name_of_its_own_and_a_reach_in_its_unit() {
        for text in [
            include_str!("../figures/bench.csv"),
            include_str!("../figures/bench-candle.csv"),
            include_str!("../figures/bench-serving.csv"),
            include_str!("../figures/bookkeeping.csv"),
        ] {
            let figures = Figure::list(text).unwrap();
            let names: BTreeSet<_> = figures.iter().map(|figure| &figure.name).collect();
            assert_eq!(names.len(), figures.len());
            for Figure { reach, unit, .. } in &figures {
                let ends = [" ×", &format!(" {unit}")];
                let has_end = ends.iter().any(|end| reach.ends_with(end));
                assert!(has_end || reach.is_empty(), "{reach}");
            }
        }
        for wrong in ["2 ×", "≤ two ×", "2 µs"] {
            assert!(is_reached(wrong, 1.0, None).is_err(), "{wrong}");
        }
    }
}
