//! A figure, in the form in which the measuring program of the benches reports its own.

use serde::Serialize;

/// What is demanded of a figure.
#[derive(Clone, Copy, Debug)]
pub enum Reach {
    Open,
    /// At most this much; without a figure it is not reached.
    AtMost(f64),
    /// At most this many times what it is measured against.
    AtMostTimes(f64),
    /// At least this many times what it is measured against.
    AtLeastTimes(f64),
}

/// Our figure of something that was done, what it is measured against, and what is demanded of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    pub name: String,
    pub ours: Option<f64>,
    pub peer: Option<f64>,
    pub ratio: Option<f64>,
    pub reach: Option<String>,
    /// Whether it is reached; nothing if nothing is demanded.
    pub pass: Option<bool>,
    pub unit: &'static str,
    pub note: Option<String>,
}

impl Finding {
    pub fn new(name: &str, unit: &'static str, figures: [Option<f64>; 2], reach: Reach) -> Self {
        let [ours, peer] = figures;
        let ratio = ours.zip(peer).map(|(ours, peer)| ours / peer);
        let note = ours.is_none().then(|| "it was not measured".to_owned());
        let (reach, pass) = match reach {
            Reach::Open => (None, None),
            Reach::AtMost(most) => (
                Some(format!("≤ {most} {unit}")),
                Some(ours.is_some_and(|ours| ours <= most)),
            ),
            Reach::AtMostTimes(most) => (
                Some(format!("≤ {most} ×")),
                Some(ratio.is_some_and(|ratio| ratio <= most)),
            ),
            Reach::AtLeastTimes(least) => (
                Some(format!("≥ {least} ×")),
                Some(ratio.is_some_and(|ratio| ratio >= least)),
            ),
        };
        let name = name.to_owned();
        Self {
            name,
            ours,
            peer,
            ratio,
            reach,
            pass,
            unit,
            note,
        }
    }

    /// Whether something is demanded and not reached.
    pub fn has_failed(&self) -> bool {
        self.pass == Some(false)
    }

    pub fn cells(&self) -> [String; 6] {
        let amount = |value: Option<f64>| match value {
            Some(value) if value.fract() == 0.0 => format!("{value} {}", self.unit),
            Some(value) => format!("{value:.3} {}", self.unit),
            None => String::new(),
        };
        let ratio = self.ratio.map(|ratio| format!("{ratio:.3}"));
        let pass = self.pass.map(|pass| if pass { "yes" } else { "NO" });
        [
            self.name.clone(),
            amount(self.ours),
            amount(self.peer),
            ratio.unwrap_or_default(),
            self.reach.clone().unwrap_or_default(),
            pass.unwrap_or_default().to_owned(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_not_measured_does_not_pass_where_something_is_demanded() {
        for (ours, reach, pass) in [
            (Some(2.0), Reach::AtMost(2.0), Some(true)),
            (Some(2.1), Reach::AtMost(2.0), Some(false)),
            (None, Reach::AtMost(2.0), Some(false)),
            (Some(2.0), Reach::Open, None),
            (None, Reach::Open, None),
        ] {
            let finding = Finding::new("work", "µs", [ours, None], reach);
            assert_eq!(finding.pass, pass, "{ours:?} {reach:?}");
            assert_eq!(finding.has_failed(), pass == Some(false));
        }
    }

    #[test]
    fn it_is_written_as_the_measuring_program_writes_it() {
        let figures = [Some(1.0), Some(2.0)];
        let finding = Finding::new("work", "bytes", figures, Reach::AtMostTimes(1.0));
        assert_eq!(
            serde_json::to_value(&finding).unwrap(),
            json!({
                "name": "work", "ours": 1.0, "peer": 2.0, "ratio": 0.5, "reach": "≤ 1 ×", "pass": true,
                "unit": "bytes", "note": null
            })
        );
        let cells = finding.cells().join("|");
        assert_eq!(cells, "work|1 bytes|2 bytes|0.500|≤ 1 ×|yes");
    }
}
