//! What is demanded of a figure, and whether it is reached.

use anyhow::{Error, Result, bail};
use serde::{Deserialize, Serialize};

/// How far a figure must reach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub enum Reach {
    /// At most this many times the peer's figure.
    AtMostTimes(f64),
    /// At least this many times the peer's figure.
    AtLeastTimes(f64),
    /// At most this much.
    AtMost(f64),
    /// Nothing is demanded.
    #[default]
    Open,
}

impl TryFrom<String> for Reach {
    type Error = Error;

    /// Reads what reports show: `≤ 1.5 ×`, `≥ 2 ×`, `≤ 20 µs`, or nothing.
    fn try_from(text: String) -> Result<Self> {
        let parts: Vec<_> = text.split_whitespace().collect();
        Ok(match parts[..] {
            [] => Self::Open,
            ["≤", most, "×"] => Self::AtMostTimes(most.parse()?),
            ["≥", least, "×"] => Self::AtLeastTimes(least.parse()?),
            ["≤", most, _] => Self::AtMost(most.parse()?),
            _ => bail!("not a reach: {text:?}"),
        })
    }
}

/// What a figure is worth on a simulated driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// It is a time, a ratio of times, or depends on which thread is first: only a GPU can tell.
    Time,
    /// It is a count, which is right on any driver.
    Count,
}

/// A figure, which is a quantile of what one side of some work took, and what is demanded of it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Figure {
    /// The work's name.
    pub work: String,
    /// What is done, and against what.
    pub name: String,
    /// The unit of our figure and of the peer's.
    pub unit: String,
    /// What must be reached.
    pub reach: Reach,
    /// What it is worth on a simulated driver.
    pub kind: Kind,
    /// The quantile, as a number of a thousand.
    pub per_mille: usize,
    /// Our side.
    pub ours: String,
    /// The peer's, if there is one.
    pub peer: Option<String>,
}

impl Figure {
    /// Reads a list of figures, in the order of the report.
    ///
    /// # Errors
    /// If the text is no such list.
    pub fn list(text: &str) -> Result<Vec<Self>> {
        let mut reader = csv::Reader::from_reader(text.as_bytes());
        Ok(reader.deserialize().collect::<Result<_, _>>()?)
    }

    /// The figure without a value.
    pub fn blank(&self) -> Finding {
        Finding::new(&self.name, &self.unit, self.reach)
    }
}

/// A figure, as it is reported.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// What was done, and against what.
    pub name: String,
    /// Our figure.
    pub ours: Option<f64>,
    /// The peer's, if there is one.
    pub peer: Option<f64>,
    /// Ours divided by the peer's.
    pub ratio: Option<f64>,
    /// What is demanded.
    pub reach: Option<String>,
    /// Whether it is reached; nothing if nothing is demanded, or nothing could be measured.
    pub pass: Option<bool>,
    /// The unit of both figures.
    pub unit: String,
    /// What else there is to say.
    pub note: Option<String>,
    #[serde(skip)]
    demanded: Reach,
}

impl Finding {
    /// A figure without a value.
    pub fn new(name: &str, unit: &str, reach: Reach) -> Self {
        Self {
            name: name.to_owned(),
            ours: None,
            peer: None,
            ratio: None,
            reach: match reach {
                Reach::AtMostTimes(most) => Some(format!("≤ {most} ×")),
                Reach::AtLeastTimes(least) => Some(format!("≥ {least} ×")),
                Reach::AtMost(most) => Some(format!("≤ {most} {unit}")),
                Reach::Open => None,
            },
            pass: None,
            unit: unit.to_owned(),
            note: None,
            demanded: reach,
        }
    }

    /// Judges what was measured.
    pub fn judge(self, ours: f64, peer: Option<f64>) -> Self {
        let ratio = peer.map(|peer| ours / peer);
        let pass = match self.demanded {
            Reach::AtMostTimes(most) => Some(ratio.is_some_and(|ratio| ratio <= most)),
            Reach::AtLeastTimes(least) => Some(ratio.is_some_and(|ratio| ratio >= least)),
            Reach::AtMost(most) => Some(ours <= most),
            Reach::Open => None,
        };
        // A peer that has none of something leaves nothing to divide by.
        let ratio = ratio.filter(|ratio| ratio.is_finite());
        Self {
            ours: Some(ours),
            peer,
            ratio,
            pass,
            ..self
        }
    }

    /// Says how measuring failed on a machine that could have done it, which is not reaching it.
    pub fn failed(self, error: &str) -> Self {
        let pass = (self.demanded != Reach::Open).then_some(false);
        Self {
            pass,
            ..self.noted(error)
        }
    }

    /// Says something of it, before what was said already.
    pub fn noted(self, note: impl Into<String>) -> Self {
        let before = self.note.map(|before| format!("; {before}"));
        let note = Some(note.into() + &before.unwrap_or_default());
        Self { note, ..self }
    }

    /// Takes the verdict back.
    pub fn unjudged(self) -> Self {
        Self { pass: None, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn figure(reach: Reach) -> Finding {
        Finding::new("work", "µs", reach)
    }

    #[test]
    fn a_figure_that_equals_its_reach_passes() {
        for (reach, ours, peer, pass) in [
            (Reach::AtMostTimes(2.0), 4.0, Some(2.0), Some(true)),
            (Reach::AtMostTimes(2.0), 4.1, Some(2.0), Some(false)),
            (Reach::AtLeastTimes(0.5), 1.0, Some(2.0), Some(true)),
            (Reach::AtLeastTimes(0.5), 0.9, Some(2.0), Some(false)),
            (Reach::AtMost(20.0), 20.0, None, Some(true)),
            (Reach::AtMost(20.0), 20.5, Some(1.0), Some(false)),
            (Reach::Open, 1e9, Some(1.0), None),
        ] {
            assert_eq!(
                figure(reach).judge(ours, peer).pass,
                pass,
                "{reach:?} {ours}"
            );
        }
    }

    #[test]
    fn what_is_no_number_does_not_pass() {
        for reach in ["≤ 2 ×", "≥ 2 ×", "≤ 2 µs"] {
            let reach = Reach::try_from(reach.to_owned()).unwrap();
            let finding = figure(reach).judge(f64::NAN, Some(1.0));
            assert_eq!(finding.pass, Some(false), "{reach:?}");
        }
        let finding = figure(Reach::AtMostTimes(2.0)).judge(1.0, None);
        assert_eq!(finding.pass, Some(false));
    }

    #[test]
    fn failing_is_not_reaching_where_something_is_demanded() {
        assert_eq!(figure(Reach::AtMost(1.0)).failed("why").pass, Some(false));
        assert_eq!(figure(Reach::Open).failed("why").pass, None);
        let finding = figure(Reach::AtMost(1.0)).noted("why");
        assert_eq!((finding.pass, finding.ours), (None, None));
        assert_eq!(finding.reach.as_deref(), Some("≤ 1 µs"));
        assert_eq!(finding.note.as_deref(), Some("why"));
    }

    #[test]
    fn every_figure_has_a_name_of_its_own_and_the_reach_that_its_list_shows() {
        for text in [
            include_str!("../figures/bench.csv"),
            include_str!("../figures/bench-candle.csv"),
        ] {
            let figures = Figure::list(text).unwrap();
            let names: BTreeSet<_> = figures.iter().map(|figure| &figure.name).collect();
            assert_eq!(names.len(), figures.len());
            for figure in &figures {
                let reach = figure.blank().reach.unwrap_or_default();
                assert!(
                    text.contains(&format!(",{},{reach},", figure.unit)),
                    "{reach}"
                );
            }
        }
        for wrong in ["2 ×", "≤ two ×", "≥ 2 µs"] {
            assert!(Reach::try_from(wrong.to_owned()).is_err(), "{wrong}");
        }
    }
}
