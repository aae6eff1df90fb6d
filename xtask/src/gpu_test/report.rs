//! What is printed of a run, and written down: `report.md`, and JSON.

use super::build::Manifest;
use super::cell::{Cell, State};
use super::conditions::{Conditions, lines};
use crate::display;
use crate::tests::Counts;
use anstyle::AnsiColor;
use itertools::Itertools;
use minijinja::{Environment, context};
use serde::Serialize;
use serde_json::{Value, json};
use std::time::Duration;
use strum::IntoEnumIterator;

/// How many lines of a failed row's log the report shows.
const LOG_LINES: usize = 400;

/// A row of the report: a cell, and what came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    #[serde(flatten)]
    pub cell: Cell,
    pub state: State,
    pub seconds: f64,
    #[serde(flatten)]
    pub counts: Counts,
    /// Why it did not pass, or what else is to be said.
    pub note: String,
    #[serde(skip)]
    pub log: String,
}

#[derive(Serialize)]
pub struct Report<'a> {
    pub machine: Value,
    pub rows: &'a [Row],
    pub passed: usize,
    pub failed: usize,
    pub skipped: usize,
    #[serde(skip)]
    pub remark: String,
}

/// The machine, and what was run there.
pub fn machine(command: &str, conditions: &Conditions, manifest: &Manifest) -> Value {
    let asked = conditions.gpus.as_ref();
    let gpus = asked.and_then(|answer| answer.as_ref().ok());
    let say = |program, arguments: &[_]| lines(program, arguments).into_iter().next();
    let query = ["--query-gpu=driver_version", "--format=csv,noheader"];
    let is_linked = !manifest.libraries.is_empty();
    json!({
        "gpu": gpus.map(|gpus| &gpus.name),
        // Nothing if it was not asked.
        "gpus": asked.map(|_| gpus.map_or(0, |gpus| gpus.count)),
        "driver": gpus.and_then(|_| say("nvidia-smi", &query)),
        "cuda": gpus.map(|gpus| &gpus.cuda),
        "kernel": say("uname", &["-sr"]),
        "date": say("date", &["-u", "+%Y-%m-%d %H:%M UTC"]),
        "command": command,
        "commit": manifest.commit,
        "compiler": manifest.compiler,
        "candle_kernels": manifest.candle_kernels,
        "cuda_libraries": is_linked.then(|| conditions.libraries.describe()),
    })
}

impl<'a> Report<'a> {
    pub fn new(machine: Value, rows: &'a [Row], remark: String) -> Self {
        Self {
            machine,
            rows,
            passed: count(rows, State::Pass),
            failed: count(rows, State::Fail),
            skipped: count(rows, State::Skipped),
            remark,
        }
    }

    /// The exit code: 1 if a row failed; 2 if none did, but some were skipped; 0 if all passed.
    pub fn exit_code(&self) -> u8 {
        match (self.failed, self.skipped) {
            (0, 0) => 0,
            (0, _) => 2,
            _ => 1,
        }
    }

    fn failures(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(|row| row.state == State::Fail)
    }

    fn counts(&self) -> String {
        let count = |state| format!("{} {state}", count(self.rows, state));
        State::iter().map(count).join(", ")
    }

    pub fn markdown(&self) -> Result<String, minijinja::Error> {
        let logs = self.failures().filter(|row| !row.log.is_empty());
        let log = |row: &Row| (row.cell.name, end_of(&row.log));
        let logs = logs.map(log).collect_vec();
        let (counts, remark) = (self.counts(), &self.remark);
        let mut templates = Environment::new();
        templates.add_filter("cell", cell);
        templates.set_trim_blocks(true);
        let data = minijinja::Value::from_serialize(self);
        let data = context! { logs, counts, remark, ..data };
        templates.render_str(include_str!("report.md.j2"), data)
    }

    /// Prints the table at the end, what failed, and where the report is.
    pub fn print(&self, time: Duration, written_to: &str) {
        let head = "driver,suite,rows,PASS,FAIL,SKIPPED,tests,time";
        println!("\n{}\n", display::table(head.split(','), groups(self.rows)));
        self.failures().for_each(print_row);
        if !self.remark.is_empty() {
            println!("{}", self.remark);
        }
        let (counts, time) = (self.counts(), display::time(time));
        let was_asked = self.machine["gpus"].is_number();
        let no_gpu = if was_asked { "none" } else { "not asked" };
        let gpu = self.machine["gpu"].as_str().unwrap_or(no_gpu);
        println!("{counts} in {time}; GPU: {gpu}; report: {written_to}");
    }
}

pub fn count<'a>(rows: impl IntoIterator<Item = &'a Row>, state: State) -> usize {
    rows.into_iter().filter(|row| row.state == state).count()
}

/// Prints the line of a row that has ended, in colour on a terminal.
pub fn print_row(row: &Row) {
    let colour = match row.state {
        State::Pass => AnsiColor::Green,
        State::Fail => AnsiColor::Red,
        State::Skipped => AnsiColor::Yellow,
    };
    let (style, state) = (colour.on_default().bold(), row.state.to_string());
    let time = display::time(Duration::from_secs_f64(row.seconds)).to_string();
    let (name, passed, note) = (row.cell.name, row.counts.passed, &row.note);
    let line = format!("{style}{state}{style:#}{:1$}", "", 7 - state.len());
    let line = format!("{line} {name:<46} {time:>13} {passed:>5} tests  {note}");
    anstream::println!("{}", line.trim_end());
}

/// A line for each suite on each driver, and one for all.
fn groups(rows: &[Row]) -> Vec<Vec<String>> {
    let line = |driver: String, suite: &str, rows: &[&Row]| {
        let tests: u64 = rows.iter().map(|row| row.counts.passed).sum();
        let time = Duration::from_secs_f64(rows.iter().map(|row| row.seconds).sum());
        let mut line = vec![driver, suite.to_owned(), rows.len().to_string()];
        line.extend(State::iter().map(|state| count(rows.iter().copied(), state).to_string()));
        line.extend([tests.to_string(), display::time(time).to_string()]);
        line
    };
    let group = |row: &Row| (row.cell.driver, row.cell.suite);
    let groups = rows.iter().map(group).unique().map(|(driver, suite)| {
        let mine = rows.iter().filter(|row| group(row) == (driver, suite));
        line(driver.to_string(), suite, &mine.collect_vec())
    });
    let all = line("all".to_owned(), "", &rows.iter().collect_vec());
    groups.chain([all]).collect()
}

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
    fn a_long_log_is_cut_at_its_beginning_and_a_note_cannot_break_the_table() {
        assert_eq!(end_of("one\ntwo\n"), "one\ntwo");
        let log: String = (0..=LOG_LINES).map(|line| format!("{line}\n")).collect();
        let end = end_of(&log);
        assert!(end.starts_with("(1 lines left out)\n1\n"), "{end}");
        assert!(end.ends_with(&format!("\n{LOG_LINES}")), "{end}");
        assert_eq!(cell("a|b\nc"), "a\\|b c");
    }
}
