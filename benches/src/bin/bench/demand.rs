//! What is demanded of a figure, and whether it is reached.

use serde::Serialize;

/// How far a figure must reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reach {
    /// At most so many times the peer's figure.
    AtMostTimes(f64),
    /// At least so many times the peer's figure.
    AtLeastTimes(f64),
    /// At most so much.
    AtMost(f64),
    /// Nothing is demanded.
    Open,
}

/// What a figure is worth on a simulated driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It is a time, a ratio of times, or hangs on who is first: only a GPU can tell.
    Time,
    /// It is a count, which is right on any driver.
    Count,
}

/// A figure and what is demanded of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Demand {
    /// What is done, and against what.
    pub name: &'static str,
    /// The unit of our figure and of the peer's.
    pub unit: &'static str,
    /// What must be reached.
    pub reach: Reach,
    /// What it is worth on a simulated driver.
    pub kind: Kind,
}

/// A figure, as it is reported.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// What was done, and against what.
    pub name: &'static str,
    /// Our figure.
    pub ours: Option<f64>,
    /// The peer's, if there is one.
    pub peer: Option<f64>,
    /// Ours divided by the peer's.
    pub ratio: Option<f64>,
    /// What is demanded.
    pub reach: Option<String>,
    /// Whether it is reached; nothing where nothing is demanded, or nothing could be measured.
    pub pass: Option<bool>,
    /// The unit of both figures.
    pub unit: &'static str,
    /// What else there is to say.
    pub note: Option<String>,
}

impl Demand {
    /// A time, judged against a peer's.
    pub const fn time(name: &'static str, unit: &'static str, reach: Reach) -> Self {
        Self {
            name,
            unit,
            reach,
            kind: Kind::Time,
        }
    }

    /// A count.
    pub const fn count(name: &'static str, unit: &'static str, reach: Reach) -> Self {
        Self {
            name,
            unit,
            reach,
            kind: Kind::Count,
        }
    }

    /// Judges what was measured.
    pub fn judge(&self, ours: f64, peer: Option<f64>) -> Finding {
        let ratio = peer.map(|peer| ours / peer);
        let pass = match self.reach {
            Reach::AtMostTimes(most) => Some(ratio.is_some_and(|ratio| ratio <= most)),
            Reach::AtLeastTimes(least) => Some(ratio.is_some_and(|ratio| ratio >= least)),
            Reach::AtMost(most) => Some(ours <= most),
            Reach::Open => None,
        };
        Finding {
            ours: Some(ours),
            peer,
            ratio,
            pass,
            ..self.blank()
        }
    }

    /// Says why nothing was measured.
    pub fn unmeasured(&self, note: impl Into<String>) -> Finding {
        Finding {
            note: Some(note.into()),
            ..self.blank()
        }
    }

    /// Says how measuring failed on a machine that could have done it, which is not reaching it.
    pub fn failed(&self, error: impl Into<String>) -> Finding {
        Finding {
            pass: (self.reach != Reach::Open).then_some(false),
            ..self.unmeasured(error)
        }
    }

    fn blank(&self) -> Finding {
        let reach = match self.reach {
            Reach::AtMostTimes(most) => Some(format!("≤ {most} ×")),
            Reach::AtLeastTimes(least) => Some(format!("≥ {least} ×")),
            Reach::AtMost(most) => Some(format!("≤ {most} {}", self.unit)),
            Reach::Open => None,
        };
        Finding {
            name: self.name,
            ours: None,
            peer: None,
            ratio: None,
            reach,
            pass: None,
            unit: self.unit,
            note: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demand(reach: Reach) -> Demand {
        Demand::time("work", "µs", reach)
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
                demand(reach).judge(ours, peer).pass,
                pass,
                "{reach:?} {ours}"
            );
        }
    }

    #[test]
    fn what_is_no_number_does_not_pass() {
        for reach in [
            Reach::AtMostTimes(2.0),
            Reach::AtLeastTimes(2.0),
            Reach::AtMost(2.0),
        ] {
            let finding = demand(reach).judge(f64::NAN, Some(1.0));
            assert_eq!(finding.pass, Some(false), "{reach:?}");
        }
        let finding = demand(Reach::AtMostTimes(2.0)).judge(1.0, None);
        assert_eq!(finding.pass, Some(false));
    }

    #[test]
    fn failing_is_not_reaching_where_something_is_demanded() {
        assert_eq!(demand(Reach::AtMost(1.0)).failed("why").pass, Some(false));
        assert_eq!(demand(Reach::Open).failed("why").pass, None);
        let finding = demand(Reach::AtMost(1.0)).unmeasured("why");
        assert_eq!((finding.pass, finding.ours), (None, None));
        assert_eq!(finding.reach.as_deref(), Some("≤ 1 µs"));
        assert_eq!(finding.note.as_deref(), Some("why"));
    }
}
