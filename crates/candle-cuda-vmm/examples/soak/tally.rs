//! What was done, and what came of it.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::AddAssign;

/// What can come of an operation that is allowed to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// There was no memory for it.
    Refused,
    /// A driver call was made to fail.
    Failed,
}

/// How often each operation ended in each way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally(BTreeMap<&'static str, [u64; 3]>);

impl Tally {
    pub fn note(&mut self, operation: &'static str, outcome: Outcome) {
        self.0.entry(operation).or_default()[outcome as usize] += 1;
    }

    /// How many operations ended so.
    pub fn count(&self, outcome: Outcome) -> u64 {
        self.0.values().map(|counts| counts[outcome as usize]).sum()
    }

    /// Whether an operation was done at least once.
    pub fn was_done(&self, operation: &str) -> bool {
        self.0.get(operation).is_some_and(|counts| counts[0] > 0)
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        for (name, counts) in other.0 {
            let own = self.0.entry(name).or_default();
            (own.iter_mut().zip(counts)).for_each(|(own, count)| *own += count);
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            formatter,
            "operation                  done    refused     failed"
        )?;
        for (name, [done, refused, failed]) in &self.0 {
            writeln!(
                formatter,
                "{name:<20} {done:>10} {refused:>10} {failed:>10}"
            )?;
        }
        Ok(())
    }
}
