//! One row of the report: a cell, and what came of it.

use super::cell::Cell;
use std::time::Duration;

/// What came of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Each program succeeded, ran tests, and opened the driver that it should.
    Pass,
    /// One of them did not.
    Fail,
    /// It was not run, as the machine lacks something.
    Skipped,
}

impl State {
    /// All, in order.
    pub const ALL: [Self; 3] = [Self::Pass, Self::Fail, Self::Skipped];

    /// How it is written.
    pub fn word(self) -> &'static str {
        match self {
            Self::Pass => "PASS",
            Self::Fail => "FAIL",
            Self::Skipped => "SKIPPED",
        }
    }
}

/// A row.
#[derive(Clone, Debug)]
pub struct Row {
    /// Where it stands in the matrix.
    pub cell: Cell,
    /// What came of it.
    pub state: State,
    /// How long it ran.
    pub time: Duration,
    /// Tests that passed.
    pub passed: u64,
    /// Tests that failed.
    pub failed: u64,
    /// Why it did not pass, or what else is to be said.
    pub note: String,
    /// What its programs printed.
    pub log: String,
}

impl Row {
    /// A row that was not run.
    pub fn not_run(cell: Cell, state: State, note: String) -> Self {
        Self {
            cell,
            state,
            time: Duration::ZERO,
            passed: 0,
            failed: 0,
            note,
            log: String::new(),
        }
    }
}

/// How many rows have this state.
pub fn count(rows: &[Row], state: State) -> usize {
    rows.iter().filter(|row| row.state == state).count()
}

/// The exit code: 1 if a row failed; 2 if none did, but some were skipped; 0 if all passed.
pub fn exit_code(rows: &[Row]) -> u8 {
    if count(rows, State::Fail) > 0 {
        1
    } else if count(rows, State::Skipped) > 0 {
        2
    } else {
        0
    }
}
