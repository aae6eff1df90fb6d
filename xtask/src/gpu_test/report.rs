//! What is printed of a run, and written down: `report.md`, and JSON.

use super::build::Manifest;
use super::cell::State;
use super::conditions::{Conditions, first_line};
use super::probe::Answer;
use super::runner::Row;
use crate::display;
use anstyle::AnsiColor;
use serde_json::{Map, json};
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::process::Command;
use std::time::Duration;

/// How many lines of a failed row's log the report shows.
const LOG_LINES: usize = 400;

/// A run of the matrix.
pub struct Report {
    /// The machine, and what was run there: names for programs and for people, the value, and what is said without one.
    pub facts: [(&'static str, &'static str, Option<String>, &'static str); 11],
    pub gpus: Option<u32>,
    pub rows: Vec<Row>,
    /// What else is to be said.
    pub remark: Option<String>,
}

impl Report {
    /// Asks the machine for its facts; there are no rows yet.
    pub fn new(command: String, conditions: &Conditions, manifest: &Manifest) -> Self {
        let (gpu, cuda) = match conditions.gpu.clone() {
            Some(Answer::Gpu { name, cuda, .. }) => (Some(name), Some(cuda)),
            _ => (None, None),
        };
        let gpus = conditions.gpu.as_ref();
        let gpus = gpus.map(|answer| answer.count().unwrap_or(0));
        let no_gpu = if gpus.is_some() { "none" } else { "not asked" };
        let query = ["--query-gpu=driver_version", "--format=csv,noheader"];
        let query = || first_line(Command::new("nvidia-smi").args(query));
        let driver = gpu.as_ref().and_then(|_| query());
        let kernel = first_line(Command::new("uname").arg("-sr"));
        let date = first_line(Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]));
        let is_linked = !manifest.libraries.is_empty();
        let libraries = is_linked.then(|| conditions.libraries.describe());
        let (commit, compiler) = (manifest.commit.clone(), manifest.compiler.clone());
        let kernels = manifest.candle_kernels.clone();
        let count = gpus.map(|count| count.to_string());
        let facts = [
            ("gpu", "GPU", gpu, no_gpu),
            ("gpus", "GPUs", count, no_gpu),
            ("driver", "Driver", driver, "not known"),
            ("cuda", "CUDA version of the driver", cuda, "none"),
            ("kernel", "Kernel", kernel, "not known"),
            ("date", "Date", date, "not known"),
            ("command", "Command", Some(command), ""),
            ("commit", "Built from", Some(commit), ""),
            ("compiler", "Built with", Some(compiler), ""),
            ("candle_kernels", "Candle's kernels for", kernels, "none"),
            ("cuda_libraries", "CUDA libraries", libraries, "none"),
        ];
        let (rows, remark) = (Vec::new(), None);
        Self {
            facts,
            gpus,
            rows,
            remark,
        }
    }

    /// The exit code: 1 if a row failed; 2 if none did, but some were skipped; 0 if all passed.
    pub fn exit_code(&self) -> u8 {
        match [State::Fail, State::Skipped].map(|state| count(&self.rows, state)) {
            [0, 0] => 0,
            [0, _] => 2,
            _ => 1,
        }
    }

    /// How many rows have which state.
    fn counts(&self) -> String {
        let count = |state: &State| format!("{} {}", count(&self.rows, *state), state.word());
        State::ALL.iter().map(count).collect::<Vec<_>>().join(", ")
    }

    /// For programs.
    pub fn json(&self) -> serde_json::Result<String> {
        let facts = self.facts.iter();
        let facts = facts.map(|(key, _, value, _)| ((*key).to_owned(), json!(value)));
        let mut machine: Map<_, _> = facts.collect();
        machine["gpus"] = json!(self.gpus);
        let row = |row: &Row| {
            json!({
                "name": row.cell.name(),
                "driver": row.cell.driver.word(),
                "devices": row.cell.devices,
                "page": row.cell.page(),
                "candle_device": row.cell.candle_device,
                "suite": row.cell.suite_name(),
                "state": row.state.word(),
                "seconds": (row.time.as_secs_f64() * 1000.0).round() / 1000.0,
                "tests_passed": row.counts.passed,
                "tests_failed": row.counts.failed,
                "note": row.note,
            })
        };
        let report = json!({
            "machine": machine,
            "rows": self.rows.iter().map(row).collect::<Vec<_>>(),
            "passed": count(&self.rows, State::Pass),
            "failed": count(&self.rows, State::Fail),
            "skipped": count(&self.rows, State::Skipped),
        });
        Ok(serde_json::to_string_pretty(&report)? + "\n")
    }

    /// For people.
    pub fn markdown(&self) -> String {
        let mut text = "# GPU test report\n\n| | |\n|---|---|\n".to_owned();
        for (key, name, value, otherwise) in &self.facts {
            let value = cell(value.as_deref().unwrap_or(otherwise));
            let value = match *key {
                "command" => format!("`{value}`"),
                "commit" => format!("commit {value}"),
                _ => value,
            };
            text += &format!("| {name} | {value} |\n");
        }
        text += &format!("\n{}\n", self.counts());
        if let Some(remark) = &self.remark {
            text += &format!("\n{remark}\n");
        }
        text += "\n| Driver | Devices | Page | Candle device | Suite | State | Seconds | Tests passed | Note |\n\
            |---|---:|---|---|---|---|---:|---:|---|\n";
        for row in &self.rows {
            let (axes, seconds) = (row.cell.name().replace('/', " | "), row.time.as_secs_f64());
            let (state, passed, note) = (row.state.word(), row.counts.passed, cell(&row.note));
            text += &format!("| {axes} | {state} | {seconds:.1} | {passed} | {note} |\n");
        }
        let failed = self.rows.iter().filter(|row| row.state == State::Fail);
        for row in failed.filter(|row| !row.log.is_empty()) {
            let (name, log) = (row.cell.name(), end_of(&row.log));
            text += &format!("\n## Log of {name}\n\n```text\n{log}\n```\n");
        }
        text
    }

    /// Prints the table at the end, what failed, and where the report is.
    pub fn print(&self, time: Duration, written_to: &str) {
        let [pass, fail, skipped] = State::ALL.map(State::word);
        let head = [
            "driver", "suite", "rows", pass, fail, skipped, "tests", "time",
        ];
        println!("\n{}\n", display::table(head, groups(&self.rows)));
        let failed = self.rows.iter().filter(|row| row.state == State::Fail);
        failed.for_each(print_row);
        if let Some(remark) = &self.remark {
            println!("{remark}");
        }
        let (counts, time, gpu) = (self.counts(), display::time(time), &self.facts[0]);
        let gpu = gpu.2.as_deref().unwrap_or(gpu.3);
        println!("{counts} in {time}; GPU: {gpu}; report: {written_to}");
    }
}

/// How many rows have this state.
pub fn count(rows: &[Row], state: State) -> usize {
    rows.iter().filter(|row| row.state == state).count()
}

/// Prints the line of a row that has ended.
pub fn print_row(row: &Row) {
    let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let line = format!(
        "{}{:width$} {:<46} {:>13} {:>5} tests  {}",
        coloured(row.state, std::io::stdout().is_terminal() && !unwanted),
        "",
        row.cell.name(),
        display::time(row.time).to_string(),
        row.counts.passed,
        row.note,
        width = State::Skipped.word().len() - row.state.word().len(),
    );
    println!("{}", line.trim_end());
}

/// A line for each suite on each driver, and one for all.
fn groups(rows: &[Row]) -> Vec<[String; 8]> {
    let mut groups: BTreeMap<_, Vec<Row>> = BTreeMap::new();
    for row in rows {
        let suite = (row.cell.driver, row.cell.suite);
        groups.entry(suite).or_default().push(row.clone());
    }
    let mut lines = Vec::new();
    for ((driver, _), group) in groups {
        let suite = group[0].cell.suite_name();
        lines.push(line(driver.word(), suite, &group));
    }
    lines.push(line("all", String::new(), rows));
    lines
}

fn line(driver: &str, suite: String, rows: &[Row]) -> [String; 8] {
    let [passed, failed, skipped] = State::ALL.map(|state| count(rows, state).to_string());
    let tests: u64 = rows.iter().map(|row| row.counts.passed).sum();
    let time = display::time(rows.iter().map(|row| row.time).sum());
    let (count, tests, time) = (rows.len().to_string(), tests.to_string(), time.to_string());
    let driver = driver.to_owned();
    [driver, suite, count, passed, failed, skipped, tests, time]
}

fn coloured(state: State, is_colourful: bool) -> String {
    let colour = match state {
        State::Pass => AnsiColor::Green,
        State::Fail => AnsiColor::Red,
        State::Skipped => AnsiColor::Yellow,
    };
    let style = colour.on_default().bold();
    match is_colourful {
        true => format!("{style}{}{style:#}", state.word()),
        false => state.word().to_owned(),
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

    #[test]
    fn only_colours_differ() {
        assert_eq!(coloured(State::Pass, false), "PASS");
        let text = coloured(State::Fail, true);
        assert!(text.starts_with('\u{1b}') && text.contains("FAIL"));
    }
}
