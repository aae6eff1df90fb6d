//! A piece of work, and what comes of it.

use crate::figure::{Figure, Finding, Kind};
use crate::samples::Samples;
use crate::sides::{Settings, Side, Sides};
use anyhow::{Context, Result};

/// One kind of work, whose figures come of what its sides take.
pub struct Work<M> {
    /// What it is.
    pub name: &'static str,
    measure: fn(&M, &mut Outcome) -> Result<()>,
}

/// What came of some work.
#[derive(Debug, Default)]
pub struct Outcome {
    sides: Vec<Side>,
    /// What is to be said of the figures of a side, which may have no samples.
    notes: Vec<(String, String)>,
}

impl Outcome {
    /// Measures sides in turns.
    ///
    /// # Errors
    /// A side's.
    pub fn measure(&mut self, sides: Sides<'_>, settings: &Settings, rounds: usize) -> Result<()> {
        self.sides.extend(sides.measure(settings, rounds)?);
        Ok(())
    }

    /// Takes in times that were measured otherwise.
    pub fn times(&mut self, name: &str, samples: impl IntoIterator<Item = std::time::Duration>) {
        self.samples_of(name, samples.into_iter().collect(), true);
    }

    /// Takes in a number.
    pub fn count(&mut self, name: &str, value: f64) {
        self.samples_of(name, Samples::from_iter([value]), false);
    }

    /// Takes in a side that was measured otherwise.
    pub fn samples_of(&mut self, name: &str, samples: Samples, is_time: bool) {
        let (name, amount) = (name.to_owned(), 1.0);
        self.sides.push(Side {
            name,
            samples,
            amount,
            is_time,
        });
    }

    /// Says something of the figures of a side, or why it could not be measured.
    pub fn note(&mut self, side: &str, text: impl Into<String>) {
        self.notes.push((side.to_owned(), text.into()));
    }

    /// One side's measurements.
    ///
    /// # Errors
    /// If there is no such side.
    pub fn samples(&self, name: &str) -> Result<&Samples> {
        Ok(&self
            .side(name)
            .with_context(|| format!("no side is named {name}"))?
            .samples)
    }

    /// One side's quantile in microseconds.
    ///
    /// # Errors
    /// If there is no such side.
    pub fn us(&self, name: &str, per_mille: usize) -> Result<f64> {
        Ok(self.samples(name)?.quantile(per_mille) / 1e3)
    }

    /// All sides whose measurements are times.
    pub fn timed(&self) -> impl Iterator<Item = &Side> {
        self.sides.iter().filter(|side| side.is_time)
    }

    fn side(&self, name: &str) -> Option<&Side> {
        self.sides.iter().find(|side| side.name == name)
    }

    /// Judges a figure, if its sides were measured or it was said why not.
    fn judge(&self, figure: &Figure) -> Option<Finding> {
        let notes = self.notes.iter().filter(|(side, _)| *side == figure.ours);
        let notes: Vec<_> = notes.map(|(_, text)| text.as_str()).collect();
        let noted = |finding: Finding| match notes.is_empty() {
            true => finding,
            false => finding.noted(notes.join("; ")),
        };
        let value = |name: &String| Some(value(figure, self.side(name)?));
        let Some(ours) = value(&figure.ours) else {
            return (!notes.is_empty()).then(|| noted(figure.blank()));
        };
        let peer = figure.peer.as_ref();
        let peer = peer.map(|peer| value(peer).unwrap_or(f64::NAN));
        Some(noted(figure.blank().judge(ours, peer)))
    }
}

/// A side's value in the unit of a figure. Units that end with `/s` are rates.
fn value(figure: &Figure, side: &Side) -> f64 {
    let value = side.samples.quantile(figure.per_mille);
    match figure.unit.as_str() {
        "µs" => value / 1e3,
        "ms" => value / 1e6,
        "GB/s" => side.amount / value,
        unit if unit.ends_with("/s") => side.amount * 1e9 / value,
        _ => value,
    }
}

impl<M> Work<M> {
    /// Work that is measured on a machine.
    pub const fn new(name: &'static str, measure: fn(&M, &mut Outcome) -> Result<()>) -> Self {
        Self { name, measure }
    }

    /// Measures, and returns one finding for each figure whatever happens. Times are judged only on
    /// a real machine.
    pub fn run(&self, machine: &M, is_real: bool, figures: &[Figure]) -> (Outcome, Vec<Finding>) {
        let mut outcome = Outcome::default();
        let error = (self.measure)(machine, &mut outcome).err();
        if error.is_some() {
            outcome = Outcome::default();
        }
        let error = error.map(|error| format!("{error:#}"));
        let find = |figure: &Figure| {
            let failed = || {
                let why = error.as_deref().unwrap_or("it was not measured");
                figure.blank().failed(why)
            };
            let finding = outcome.judge(figure).unwrap_or_else(failed);
            match figure.kind == Kind::Time && !is_real && error.is_none() {
                true => finding.unjudged(),
                false => finding,
            }
        };
        let figures = figures.iter().filter(|figure| figure.work == self.name);
        let findings = figures.map(find).collect();
        (outcome, findings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const FIGURES: &str = "work,name,unit,reach,kind,per_mille,ours,peer\n\
        w,a time,µs,≤ 2 ×,time,500,fast,slow\n\
        w,a rate,GB/s,≥ 0.5 ×,time,500,fast,slow\n\
        w,a count,bytes,≤ 1 bytes,count,1000,held,\n\
        w,absent,µs,≤ 1 µs,time,500,nothing,\n\
        w,forgotten,µs,≤ 1 µs,count,500,nobody,\n";

    fn measure(fails: &bool, outcome: &mut Outcome) -> Result<()> {
        let mut sides = Sides::new();
        sides.add_rate("fast", 10.0, || Ok(Duration::from_nanos(2000)));
        sides.add_rate("slow", 10.0, || Ok(Duration::from_nanos(4000)));
        let settings = Settings {
            rounds: 1,
            rounds_min: 1,
            patience: Duration::MAX,
        };
        outcome.measure(sides, &settings, 1)?;
        outcome.count("held", 2.0);
        outcome.note("nothing", "one core");
        anyhow::ensure!(!fails, "the device is lost");
        Ok(())
    }

    #[test]
    fn every_figure_is_found_judged_or_excused() {
        let figures = Figure::list(FIGURES).unwrap();
        let work = Work { name: "w", measure };
        let (outcome, found) = work.run(&false, true, &figures);
        assert_eq!(outcome.timed().count(), 2);
        assert!(outcome.samples("d").is_err());
        assert_eq!(outcome.us("fast", 500).unwrap(), 2.0);
        assert_eq!((found[0].ours, found[0].ratio), (Some(2.0), Some(0.5)));
        assert_eq!((found[1].ours, found[1].peer), (Some(0.005), Some(0.0025)));
        assert_eq!(found[3].note.as_deref(), Some("one core"));
        let passes: Vec<_> = found.iter().map(|finding| finding.pass).collect();
        let judged = [Some(true), Some(true), Some(false), None, Some(false)];
        assert_eq!(passes, judged);
        let (_, simulated) = work.run(&false, false, &figures);
        let passes: Vec<_> = simulated.iter().map(|finding| finding.pass).collect();
        assert_eq!(passes, [None, None, Some(false), None, Some(false)]);
        let (_, failed) = work.run(&true, false, &figures);
        for finding in failed {
            assert_eq!(finding.note.as_deref(), Some("the device is lost"));
            assert_eq!(finding.pass, Some(false));
        }
    }
}
