//! What is printed of a run, and written down: `report.md`, and JSON.

use super::build::Manifest;
use super::cell::{Driver, Suite};
use super::conditions::{Conditions, first_line};
use super::probe::Answer;
use super::runner::{Row, State};
use crate::display;
use anstyle::AnsiColor;
use serde_json::{Map, Value, json};
use std::io::IsTerminal;
use std::process::Command;
use std::time::Duration;

/// How many lines of a failed row's log the report shows.
const LOG_LINES: usize = 400;

/// A run of the matrix.
pub struct Report {
    /// The machine, and what was run there.
    pub facts: Vec<Fact>,
    /// What came of each row.
    pub rows: Vec<Row>,
    /// What else is to be said.
    pub remark: Option<String>,
}

/// A fact: its name for programs and for people, its value if it has one, and how a person reads it.
pub struct Fact {
    key: &'static str,
    name: &'static str,
    value: Value,
    text: String,
}

/// Asks the machine for its facts.
pub fn facts(command: &str, conditions: &Conditions, manifest: &Manifest) -> Vec<Fact> {
    let fact = |key, name, value: Option<&str>, otherwise: &str| Fact {
        key,
        name,
        value: value.into(),
        text: value.unwrap_or(otherwise).to_owned(),
    };
    let (gpu, cuda) = match &conditions.gpu {
        Some(Answer::Gpu { name, cuda, .. }) => (Some(name.as_str()), Some(cuda.as_str())),
        _ => (None, None),
    };
    let gpus = conditions
        .gpu
        .as_ref()
        .map(|answer| answer.count().unwrap_or(0));
    let no_gpu = if gpus.is_some() { "none" } else { "not asked" };
    let query = ["--query-gpu=driver_version", "--format=csv,noheader"];
    let driver = gpu.and_then(|_| first_line(Command::new("nvidia-smi").args(query)));
    let kernel = first_line(Command::new("uname").arg("-sr"));
    let date = first_line(Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]));
    let is_linked = !manifest.libraries.is_empty();
    let libraries = is_linked.then(|| conditions.libraries.describe());
    let kernels = manifest.candle_kernels.as_deref();
    let quoted = |fact: Fact, text: String| Fact { text, ..fact };
    vec![
        fact("gpu", "GPU", gpu, no_gpu),
        Fact {
            value: json!(gpus),
            ..fact(
                "gpus",
                "GPUs",
                gpus.map(|count| count.to_string()).as_deref(),
                no_gpu,
            )
        },
        fact("driver", "Driver", driver.as_deref(), "not known"),
        fact("cuda", "CUDA version of the driver", cuda, "none"),
        fact("kernel", "Kernel", kernel.as_deref(), "not known"),
        fact("date", "Date", date.as_deref(), "not known"),
        quoted(
            fact("command", "Command", Some(command), ""),
            format!("`{command}`"),
        ),
        quoted(
            fact("commit", "Built from", Some(&manifest.commit), ""),
            format!("commit {}", manifest.commit),
        ),
        fact("compiler", "Built with", Some(&manifest.compiler), ""),
        fact("candle_kernels", "Candle's kernels for", kernels, "none"),
        fact(
            "cuda_libraries",
            "CUDA libraries",
            libraries.as_deref(),
            "none",
        ),
    ]
}

/// How many rows have this state.
pub fn count<'a>(rows: impl IntoIterator<Item = &'a Row>, state: State) -> usize {
    rows.into_iter().filter(|row| row.state == state).count()
}

impl Report {
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
        let facts = self
            .facts
            .iter()
            .map(|fact| (fact.key.to_owned(), fact.value.clone()));
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
            "machine": facts.collect::<Map<_, _>>(),
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
        for Fact {
            name, text: value, ..
        } in &self.facts
        {
            text += &format!("| {name} | {} |\n", cell(value));
        }
        text += &format!("\n{}\n", self.counts());
        if let Some(remark) = &self.remark {
            text += &format!("\n{remark}\n");
        }
        text += "\n| Driver | Devices | Page | Candle device | Suite | State | Seconds | Tests passed | Note |\n\
            |---|---:|---|---|---|---|---:|---:|---|\n";
        for row in &self.rows {
            let (axes, seconds) = (row.cell.axes().join(" | "), row.time.as_secs_f64());
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
        let head = [
            "driver", "suite", "rows", "PASS", "FAIL", "SKIPPED", "tests", "time",
        ];
        println!("\n{}\n", display::table(head, groups(&self.rows)));
        self.rows
            .iter()
            .filter(|row| row.state == State::Fail)
            .for_each(print_row);
        if let Some(remark) = &self.remark {
            println!("{remark}");
        }
        let (counts, time) = (self.counts(), display::time(time));
        println!(
            "{counts} in {time}; GPU: {}; report: {written_to}",
            self.facts[0].text
        );
    }
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
    let mut lines = Vec::new();
    for driver in Driver::ALL {
        for suite in Suite::ALL {
            let is_mine = |row: &&Row| row.cell.driver == driver && row.cell.suite == suite;
            let group: Vec<&Row> = rows.iter().filter(is_mine).collect();
            if let Some(first) = group.first() {
                lines.push(line(driver.word(), first.cell.suite_name(), &group));
            }
        }
    }
    lines.push(line("all", String::new(), &rows.iter().collect::<Vec<_>>()));
    lines
}

fn line(driver: &str, suite: String, rows: &[&Row]) -> [String; 8] {
    let count = |state| count(rows.iter().copied(), state).to_string();
    [
        driver.to_owned(),
        suite,
        rows.len().to_string(),
        count(State::Pass),
        count(State::Fail),
        count(State::Skipped),
        rows.iter()
            .map(|row| row.counts.passed)
            .sum::<u64>()
            .to_string(),
        display::time(rows.iter().map(|row| row.time).sum()).to_string(),
    ]
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
    use crate::gpu_test::cell::Cell;
    use crate::tests::Counts;

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
    fn rows_are_counted_by_driver_and_suite() {
        let (passed, failed) = (2, 0);
        let row = |cell| Row {
            counts: Counts { passed, failed },
            ..Row::not_run(cell, State::Pass, String::new())
        };
        let mut cells = Cell::all(false);
        cells.retain(|cell| cell.is("2") && (cell.is("core") || cell.is("leaks")));
        let rows: Vec<Row> = cells.into_iter().map(row).collect();
        assert_eq!(
            groups(&rows)
                .iter()
                .map(|line| line.join(" "))
                .collect::<Vec<_>>(),
            [
                "real core 4 4 0 0 8 0s",
                "real leaks 4 4 0 0 8 0s",
                "simulated core 4 4 0 0 8 0s",
                "simulated leaks 4 4 0 0 8 0s",
                "all  16 16 0 0 32 0s",
            ]
        );
    }

    #[test]
    fn only_colours_differ() {
        assert_eq!(coloured(State::Pass, false), "PASS");
        let text = coloured(State::Fail, true);
        assert!(
            text.starts_with('\u{1b}') && text.contains("FAIL"),
            "{text:?}"
        );
    }
}
