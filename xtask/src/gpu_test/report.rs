//! What is written down of a run: `report.md`, and JSON.

use super::cell::CandleDevice;
use super::facts::Facts;
use super::row::{self, Row, State};
use serde::Serialize;

/// How many lines of a failed row's log the report shows.
const LOG_LINES: usize = 400;

/// A run of the matrix.
pub struct Report {
    /// Where it ran.
    pub facts: Facts,
    /// What came of each row.
    pub rows: Vec<Row>,
    /// What else is to be said.
    pub remark: Option<String>,
}

#[derive(Serialize)]
struct JsonReport<'a> {
    machine: &'a Facts,
    rows: Vec<JsonRow<'a>>,
    passed: usize,
    failed: usize,
    skipped: usize,
}

#[derive(Serialize)]
struct JsonRow<'a> {
    name: String,
    driver: &'a str,
    devices: u32,
    page: &'a str,
    candle_device: Option<&'a str>,
    suite: String,
    state: &'a str,
    seconds: f64,
    tests_passed: u64,
    tests_failed: u64,
    note: &'a str,
}

impl Report {
    /// How many rows have which state.
    pub fn counts(&self) -> String {
        let counts =
            State::ALL.map(|state| format!("{} {}", row::count(&self.rows, state), state.word()));
        counts.join(", ")
    }

    /// For programs.
    pub fn json(&self) -> serde_json::Result<String> {
        let rows = self.rows.iter().map(|row| JsonRow {
            name: row.cell.name(),
            driver: row.cell.driver.word(),
            devices: row.cell.devices,
            page: row.cell.page.word(),
            candle_device: row.cell.candle_device.map(CandleDevice::word),
            suite: row.cell.suite_name(),
            state: row.state.word(),
            seconds: (row.time.as_secs_f64() * 1000.0).round() / 1000.0,
            tests_passed: row.passed,
            tests_failed: row.failed,
            note: &row.note,
        });
        let count = |state| row::count(&self.rows, state);
        let report = JsonReport {
            machine: &self.facts,
            rows: rows.collect(),
            passed: count(State::Pass),
            failed: count(State::Fail),
            skipped: count(State::Skipped),
        };
        Ok(serde_json::to_string_pretty(&report)? + "\n")
    }

    /// For people.
    pub fn markdown(&self) -> String {
        let mut text = "# GPU test report\n\n| | |\n|---|---|\n".to_owned();
        for (name, value) in self.facts.lines() {
            text += &format!("| {name} | {} |\n", cell(&value));
        }
        text += &format!("\n{}\n", self.counts());
        if let Some(remark) = &self.remark {
            text += &format!("\n{remark}\n");
        }
        text += "\n| Driver | Devices | Page | Candle device | Suite | State | Seconds | Tests passed | Note |\n\
            |---|---:|---|---|---|---|---:|---:|---|\n";
        for row in &self.rows {
            text += &format!(
                "| {} | {} | {} | {} | {} | {} | {:.1} | {} | {} |\n",
                row.cell.driver.word(),
                row.cell.devices,
                row.cell.page.word(),
                row.cell.candle_device.map_or("-", CandleDevice::word),
                row.cell.suite_name(),
                row.state.word(),
                row.time.as_secs_f64(),
                row.passed,
                cell(&row.note)
            );
        }
        for row in &self.rows {
            if row.state == State::Fail && !row.log.is_empty() {
                text += &format!(
                    "\n## Log of {}\n\n```text\n{}\n```\n",
                    row.cell.name(),
                    end_of(&row.log)
                );
            }
        }
        text
    }
}

/// Text for a cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

/// The last lines of a log, and how many are left out.
fn end_of(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    let left_out = lines.len().saturating_sub(LOG_LINES);
    let end = lines[left_out..].join("\n");
    match left_out {
        0 => end,
        _ => format!("({left_out} lines left out)\n{end}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_log_is_cut_at_its_beginning() {
        assert_eq!(end_of("one\ntwo\n"), "one\ntwo");
        let log: String = (0..=LOG_LINES).map(|line| format!("{line}\n")).collect();
        let end = end_of(&log);
        assert!(end.starts_with("(1 lines left out)\n1\n"), "{end}");
        assert!(end.ends_with(&format!("\n{LOG_LINES}")), "{end}");
    }

    #[test]
    fn a_note_cannot_break_the_table() {
        assert_eq!(cell("a|b\nc"), "a\\|b c");
    }
}
