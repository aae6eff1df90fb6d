//! A piece of work, and what comes of it.

use crate::demand::{Demand, Finding, Kind};
use crate::machine::Machine;
use crate::sides::Measured;
use anyhow::Result;

/// One kind of work, and the figures that come of it.
pub struct Work {
    /// What it is.
    pub name: &'static str,
    /// Its figures, in the order of the report.
    pub demands: &'static [Demand],
    /// Measures it.
    pub measure: fn(&Machine) -> Result<Outcome>,
}

/// What came of some work.
#[derive(Debug, Default)]
pub struct Outcome {
    /// What was measured against each other.
    pub measured: Measured,
    /// The figures.
    pub findings: Vec<Finding>,
}

impl Outcome {
    /// Only what was measured, so far.
    pub fn new(measured: Measured) -> Self {
        Self {
            measured,
            findings: Vec::new(),
        }
    }

    /// Adds a figure.
    pub fn add(&mut self, demand: &Demand, ours: f64, peer: Option<f64>) {
        self.findings.push(demand.judge(ours, peer));
    }

    /// Adds a figure with something to be said of it.
    pub fn add_noted(&mut self, demand: &Demand, ours: f64, peer: Option<f64>, note: String) {
        self.findings.push(Finding {
            note: Some(note),
            ..demand.judge(ours, peer)
        });
    }

    /// Adds the ratio of the medians of two sides.
    pub fn add_medians(&mut self, demand: &Demand, ours: &str, peer: &str) -> Result<()> {
        let ours = self.measured.median_us(ours)?;
        let peer = self.measured.median_us(peer)?;
        self.add(demand, ours, Some(peer));
        Ok(())
    }
}

impl Work {
    /// Whether a word means this work.
    pub fn is_meant_by(&self, word: &str) -> bool {
        self.name.contains(word) || self.demands.iter().any(|demand| demand.name.contains(word))
    }

    /// Measures, and answers with one finding for each demand whatever happens.
    pub fn run(&self, machine: &Machine) -> (Measured, Vec<Finding>) {
        let outcome = (self.measure)(machine);
        let error = outcome.as_ref().err().map(|error| format!("{error:#}"));
        let outcome = outcome.unwrap_or_default();
        let find = |demand: &Demand| {
            let found = outcome
                .findings
                .iter()
                .find(|found| found.name == demand.name);
            let mut finding = found.cloned().unwrap_or_else(|| {
                demand.failed(error.as_deref().unwrap_or("it was not measured"))
            });
            if demand.kind == Kind::Time && !machine.is_real() && error.is_none() {
                finding.pass = None;
            }
            finding
        };
        let findings = self.demands.iter().map(find).collect();
        (outcome.measured, findings)
    }

    /// What is reported where nothing can be measured.
    pub fn unmeasured(&self, note: &str) -> Vec<Finding> {
        let demands = self.demands.iter();
        demands.map(|demand| demand.unmeasured(note)).collect()
    }
}
