//! A figure, in the form in which the measuring program of the benches reports its own.

use serde::Serialize;

/// A figure and what is demanded of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// What was done.
    pub name: String,
    /// Our figure.
    pub ours: Option<f64>,
    /// What it is measured against, if anything.
    pub peer: Option<f64>,
    /// Ours divided by the peer's.
    pub ratio: Option<f64>,
    /// What is demanded.
    pub reach: Option<String>,
    /// Whether it is reached; nothing where nothing is demanded.
    pub pass: Option<bool>,
    /// The unit of both figures.
    pub unit: &'static str,
    /// What else there is to say.
    pub note: Option<String>,
}

impl Finding {
    /// A figure that may be so much at most, if anything is demanded; without a figure it does not reach that.
    pub fn at_most(name: String, ours: Option<f64>, unit: &'static str, most: Option<f64>) -> Self {
        Self {
            name,
            ours,
            peer: None,
            ratio: None,
            reach: most.map(|most| format!("≤ {most} {unit}")),
            pass: most.map(|most| ours.is_some_and(|ours| ours <= most)),
            unit,
            note: ours.is_none().then(|| "it was not measured".to_owned()),
        }
    }

    /// A figure that may be what the other is, at most.
    pub fn within(name: String, ours: f64, allowed: f64, unit: &'static str) -> Self {
        let ratio = ours / allowed;
        Self {
            peer: Some(allowed),
            ratio: Some(ratio),
            reach: Some("≤ 1 ×".to_owned()),
            pass: Some(ratio <= 1.0),
            ..Self::at_most(name, Some(ours), unit, None)
        }
    }

    /// A figure that is to be so many times the other, at least.
    pub fn at_least(name: String, ours: f64, peer: f64, unit: &'static str, least: f64) -> Self {
        let ratio = ours / peer;
        Self {
            peer: Some(peer),
            ratio: Some(ratio),
            reach: Some(format!("≥ {least} ×")),
            pass: Some(ratio >= least),
            ..Self::at_most(name, Some(ours), unit, None)
        }
    }

    /// Whether something is demanded and not reached.
    pub fn has_failed(&self) -> bool {
        self.pass == Some(false)
    }

    /// The cells of its line in a table.
    pub fn cells(&self) -> Vec<String> {
        let amount = |value: Option<f64>| match value {
            Some(value) if value.fract() == 0.0 => format!("{value} {}", self.unit),
            Some(value) => format!("{value:.3} {}", self.unit),
            None => String::new(),
        };
        let pass = match self.pass {
            Some(true) => "yes",
            Some(false) => "NO",
            None => "",
        };
        vec![
            self.name.clone(),
            amount(self.ours),
            amount(self.peer),
            self.ratio
                .map(|ratio| format!("{ratio:.3}"))
                .unwrap_or_default(),
            self.reach.clone().unwrap_or_default(),
            pass.to_owned(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_not_measured_does_not_pass_where_something_is_demanded() {
        for (ours, most, pass) in [
            (Some(2.0), Some(2.0), Some(true)),
            (Some(2.1), Some(2.0), Some(false)),
            (None, Some(2.0), Some(false)),
            (Some(2.0), None, None),
            (None, None, None),
        ] {
            let finding = Finding::at_most("work".to_owned(), ours, "µs", most);
            assert_eq!(finding.pass, pass, "{ours:?} {most:?}");
            assert_eq!(finding.has_failed(), pass == Some(false));
        }
    }

    #[test]
    fn it_is_written_as_the_measuring_program_writes_it() {
        let finding = Finding::within("work".to_owned(), 1.0, 2.0, "bytes");
        assert_eq!(
            serde_json::to_value(&finding).unwrap(),
            json!({
                "name": "work", "ours": 1.0, "peer": 2.0, "ratio": 0.5, "reach": "≤ 1 ×", "pass": true,
                "unit": "bytes", "note": null
            })
        );
        assert_eq!(
            finding.cells().join("|"),
            "work|1 bytes|2 bytes|0.500|≤ 1 ×|yes"
        );
    }
}
