//! What is printed of a run.

use super::cell::{Driver, Suite};
use super::report::Report;
use super::row::{self, Row, State};
use crate::{progress, table};
use anstyle::AnsiColor;
use std::io::IsTerminal;
use std::time::Duration;

/// Prints the line of a row that has ended.
pub fn print_row(row: &Row) {
    // The width is that of the longest state, then of the longest name.
    let line = format!(
        "{}{:width$} {:<46} {:>13} {:>5} tests  {}",
        coloured(row.state, is_colourful()),
        "",
        row.cell.name(),
        progress::seconds(row.time),
        row.passed,
        row.note,
        width = State::Skipped.word().len() - row.state.word().len(),
    );
    println!("{}", line.trim_end());
}

/// Prints the table at the end, what failed, and where the report is.
pub fn print_end(report: &Report, time: Duration, written_to: &str) {
    let head = [
        "driver", "suite", "rows", "PASS", "FAIL", "SKIPPED", "tests", "time",
    ];
    println!(
        "\n{}",
        table::render(&head, &groups(&report.rows), &[2, 3, 4, 5, 6, 7])
    );
    for row in report.rows.iter().filter(|row| row.state == State::Fail) {
        print_row(row);
    }
    if let Some(remark) = &report.remark {
        println!("{remark}");
    }
    println!(
        "{} in {}; GPU: {}; report: {written_to}",
        report.counts(),
        progress::seconds(time),
        report.facts.first_gpu()
    );
}

/// A line for each suite on each driver, and one for all.
fn groups(rows: &[Row]) -> Vec<Vec<String>> {
    let mut lines = Vec::new();
    for driver in Driver::ALL {
        for suite in Suite::ALL {
            let group: Vec<Row> = rows
                .iter()
                .filter(|row| row.cell.driver == driver && row.cell.suite == suite)
                .cloned()
                .collect();
            if let Some(first) = group.first() {
                lines.push(line(driver.word(), &first.cell.suite_name(), &group));
            }
        }
    }
    lines.push(line("all", "", rows));
    lines
}

fn line(driver: &str, suite: &str, rows: &[Row]) -> Vec<String> {
    let mut line = vec![driver.to_owned(), suite.to_owned(), rows.len().to_string()];
    line.extend(State::ALL.map(|state| row::count(rows, state).to_string()));
    line.push(rows.iter().map(|row| row.passed).sum::<u64>().to_string());
    line.push(progress::seconds(rows.iter().map(|row| row.time).sum()));
    line
}

/// Whether standard output shows colours, and they are wanted.
fn is_colourful() -> bool {
    let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    std::io::stdout().is_terminal() && !unwanted
}

fn coloured(state: State, colourful: bool) -> String {
    let colour = match state {
        State::Pass => AnsiColor::Green,
        State::Fail => AnsiColor::Red,
        State::Skipped => AnsiColor::Yellow,
    };
    let style = colour.on_default().bold();
    match colourful {
        true => format!("{style}{}{style:#}", state.word()),
        false => state.word().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu_test::cell::Cell;

    #[test]
    fn rows_are_counted_by_driver_and_suite() {
        let rows: Vec<Row> = Cell::all(false)
            .into_iter()
            .filter(|cell| cell.is("2") && (cell.is("core") || cell.is("leaks")))
            .map(|cell| Row {
                passed: 2,
                ..Row::not_run(cell, State::Pass, String::new())
            })
            .collect();
        let groups: Vec<String> = groups(&rows).iter().map(|line| line.join(" ")).collect();
        assert_eq!(
            groups,
            [
                "real core 4 4 0 0 8 0.0 s",
                "real leaks 4 4 0 0 8 0.0 s",
                "simulated core 4 4 0 0 8 0.0 s",
                "simulated leaks 4 4 0 0 8 0.0 s",
                "all  16 16 0 0 32 0.0 s",
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
