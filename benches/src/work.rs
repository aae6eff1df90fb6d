//! A piece of work, and what comes of it.

use crate::figure::{Figure, Finding, Kind};
use crate::sides::{Settings, Side, Sides, quantile};
use anyhow::{Context, Result};

/// Work on a machine, by name. Its figures come of what its sides take.
pub type Work<M> = (&'static str, fn(&M, &mut Outcome) -> Result<()>);

#[derive(Debug, Default)]
pub struct Outcome {
    sides: Vec<Side>,
    /// What is to be said of the figures of a side, which may have no samples.
    notes: Vec<(String, String)>,
    /// Why it ended early.
    error: Option<String>,
}

impl Outcome {
    pub(crate) fn of<M>(work: Work<M>, machine: &M) -> Self {
        let mut outcome = Self::default();
        let ended = work.1(machine, &mut outcome);
        let error = ended.err().map(|error| format!("{error:#}"));
        Self { error, ..outcome }
    }

    pub fn measure(&mut self, sides: Sides<'_>, settings: &Settings, rounds: usize) -> Result<()> {
        self.sides.extend(sides.measure(settings, rounds)?);
        Ok(())
    }

    /// Takes in times that were measured otherwise.
    pub fn times(&mut self, name: &str, samples: Vec<f64>) {
        self.sides.push(Side::new(name, samples, true));
    }

    /// Takes in times in each of which this much was done.
    pub fn rates(&mut self, name: &str, amount: f64, samples: Vec<f64>) {
        self.times(name, samples);
        if let Some(side) = self.sides.last_mut() {
            side.amount = amount;
        }
    }

    pub fn count(&mut self, name: &str, value: f64) {
        self.sides.push(Side::new(name, vec![value], false));
    }

    /// Says something of the figures of a side, or why it could not be measured.
    pub fn note(&mut self, side: &str, text: impl Into<String>) {
        self.notes.push((side.to_owned(), text.into()));
    }

    /// One side's quantile in microseconds; an error if there is no such side.
    pub fn us(&self, name: &str, per_mille: usize) -> Result<f64> {
        let side = self.side(name);
        let side = side.with_context(|| format!("no side is named {name}"))?;
        Ok(quantile(&side.samples, per_mille) / 1e3)
    }

    pub(crate) fn timed(&self) -> impl Iterator<Item = &Side> {
        self.sides.iter().filter(|side| side.is_time)
    }

    fn side(&self, name: &str) -> Option<&Side> {
        self.sides.iter().find(|side| side.name == name)
    }

    /// Judges a figure, whatever happened: a time only on a real machine.
    pub fn judge(&self, figure: &Figure, is_real: bool) -> Finding {
        let blank = figure.blank();
        if let Some(error) = &self.error {
            return blank.failed(error);
        }
        let notes = self.notes.iter().filter(|(side, _)| *side == figure.ours);
        let notes: Vec<_> = notes.map(|(_, text)| text.as_str()).collect();
        let value = |name: &String| self.side(name).map(|side| value(figure, side));
        let peer = figure.peer.as_ref();
        let peer = peer.map(|peer| value(peer).unwrap_or(f64::NAN));
        let mut finding = match value(&figure.ours) {
            Some(ours) => blank.judge(ours, peer),
            None if notes.is_empty() => blank.failed("it was not measured"),
            None => blank,
        };
        if !notes.is_empty() {
            finding = finding.noted(notes.join("; "));
        }
        match is_real || figure.kind == Kind::Count {
            true => finding,
            false => finding.unjudged(),
        }
    }
}

/// A side's value in the unit of a figure. Units that end with `/s` are rates.
fn value(figure: &Figure, side: &Side) -> f64 {
    let value = quantile(&side.samples, figure.per_mille);
    match figure.unit.as_str() {
        "µs" => value / 1e3,
        "ms" => value / 1e6,
        "GB/s" => side.amount / value,
        unit if unit.ends_with("/s") => side.amount * 1e9 / value,
        _ => value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sides::tests::settings;
    use std::time::Duration;

    const FIGURES: &str = "work,name,unit,reach,kind,per_mille,ours,peer\n\
        w,a time,µs,≤ 2 ×,time,500,fast,slow\n\
        w,a rate,GB/s,≥ 0.5 ×,time,500,fast,slow\n\
        w,a count,bytes,≤ 1 bytes,count,1000,held,\n\
        w,absent,µs,≤ 1 µs,time,500,nothing,\n\
        w,forgotten,µs,≤ 1 µs,count,500,nobody,\n";

    fn measure(fails: &bool, outcome: &mut Outcome) -> Result<()> {
        let mut sides = Sides::default();
        sides.add_rate("fast", 10.0, || Ok(Duration::from_nanos(2000)));
        sides.add_rate("slow", 10.0, || Ok(Duration::from_nanos(4000)));
        outcome.measure(sides, &settings(Duration::MAX), 1)?;
        outcome.count("held", 2.0);
        outcome.note("nothing", "one core");
        anyhow::ensure!(!fails, "the device is lost");
        Ok(())
    }

    #[test]
    fn every_figure_is_found_judged_or_excused() {
        let figures = Figure::list(FIGURES).unwrap();
        let found = |outcome: &Outcome, is_real| -> Vec<Finding> {
            let found = figures.iter().map(|figure| outcome.judge(figure, is_real));
            found.collect()
        };
        let passes = |found: &[Finding]| -> Vec<_> { found.iter().map(|one| one.pass).collect() };
        let outcome = Outcome::of(("w", measure), &false);
        assert_eq!(outcome.timed().count(), 2);
        assert!(outcome.us("d", 500).is_err());
        let real = found(&outcome, true);
        assert_eq!(outcome.us("fast", 500).unwrap(), 2.0);
        assert_eq!((real[0].ours, real[0].ratio), (Some(2.0), Some(0.5)));
        assert_eq!((real[1].ours, real[1].peer), (Some(0.005), Some(0.0025)));
        assert_eq!(real[3].note.as_deref(), Some("one core"));
        let judged = [Some(true), Some(true), Some(false), None, Some(false)];
        assert_eq!(passes(&real), judged);
        let simulated = passes(&found(&outcome, false));
        assert_eq!(simulated, [None, None, Some(false), None, Some(false)]);
        for failed in found(&Outcome::of(("w", measure), &true), false) {
            assert_eq!(failed.note.as_deref(), Some("the device is lost"));
            assert_eq!(failed.pass, Some(false));
        }
    }
}
