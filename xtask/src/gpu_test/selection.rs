//! Which rows of the matrix are asked for.

use super::arguments::{Arguments, Usage, Words};
use super::cell::{Cell, Driver, Page};

/// The rows that are asked for on a machine with this many GPUs; `None` where none answers.
///
/// # Errors
///
/// [`Usage`] if there is no such row.
pub fn select(arguments: &Arguments, gpus: Option<u32>) -> Result<Vec<Cell>, Usage> {
    let devices = arguments
        .devices
        .unwrap_or(if gpus == Some(1) { 1 } else { 2 });
    let cells = cells(arguments, devices);
    if !cells.is_empty() {
        return Ok(cells);
    }
    Err(Usage(match left_out(arguments, gpus) {
        0 => {
            "no row is what --driver, --devices, --sanitize and --only together ask for".to_owned()
        }
        count => format!(
            "the {count} rows asked for need two GPUs and this machine has one; --devices 2 demands them"
        ),
    }))
}

/// How many rows were not asked for only because this machine has one GPU.
pub fn left_out(arguments: &Arguments, gpus: Option<u32>) -> usize {
    if arguments.devices.is_some() || gpus != Some(1) {
        return 0;
    }
    cells(arguments, 2).len() - cells(arguments, 1).len()
}

/// The rows, where the real ones may have so many devices.
fn cells(arguments: &Arguments, devices: u32) -> Vec<Cell> {
    let mut cells = Cell::all(arguments.sanitize);
    cells.retain(|cell| {
        let most = match cell.driver {
            Driver::Real => devices,
            Driver::Simulated | Driver::SimulatedLibrary => arguments.devices.unwrap_or(2),
        };
        let words_are_true = if arguments.only.is_empty() {
            is_due(arguments, cell, &[])
        } else {
            arguments.only.iter().any(|Words(words)| {
                words.iter().all(|word| cell.is(word)) && is_due(arguments, cell, words)
            })
        };
        arguments.driver.include(cell.driver) && cell.devices <= most && words_are_true
    });
    cells
}

/// Whether `words` are enough to ask for this cell. Sanitizing takes long: on an axis of which nothing is
/// said, it is done for one value only.
fn is_due(arguments: &Arguments, cell: &Cell, words: &[String]) -> bool {
    let said = |value: &str| {
        words
            .iter()
            .any(|word| *word == value || *word == cell.name())
    };
    let devices =
        cell.devices == 1 || arguments.devices.is_some() || said(&cell.devices.to_string());
    let page = cell.page == Page::Mib2 || said(cell.page.word());
    !arguments.sanitize || (devices && page)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu_test::cell::Suite;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        matrix: Arguments,
    }

    fn parse(line: &str) -> Arguments {
        let words = std::iter::once("line").chain(line.split_whitespace());
        Line::try_parse_from(words).unwrap().matrix
    }

    fn names(line: &str, gpus: Option<u32>) -> Vec<String> {
        let cells = select(&parse(line), gpus).unwrap();
        cells.iter().map(Cell::name).collect()
    }

    #[test]
    fn real_rows_have_as_many_devices_as_the_machine_unless_told() {
        for (line, gpus, rows, left) in [
            ("", Some(1), 24, 24),
            ("", Some(2), 48, 0),
            ("", Some(8), 48, 0),
            ("", None, 48, 0),
            ("--devices 1", Some(2), 24, 0),
            ("--devices 2", Some(1), 48, 0),
            ("--driver simulated", Some(1), 36, 0),
            ("--driver simulated --devices 1", None, 20, 0),
            ("--driver all", Some(1), 24 + 36, 24),
            ("--only core", Some(1), 4, 4),
        ] {
            assert_eq!(names(line, gpus).len(), rows, "{line:?} {gpus:?}");
            assert_eq!(left_out(&parse(line), gpus), left, "{line:?} {gpus:?}");
        }
    }

    #[test]
    fn only_takes_rows_of_which_all_words_are_true_and_adds_up() {
        assert_eq!(
            names("--only own-stream,16MiB --devices 1", None),
            ["real/1/16MiB/own-stream/facade"]
        );
        assert_eq!(
            names(
                "--driver all --devices 1 --only simulated,stress,2MiB --only real/1/32MiB/-/leaks",
                None
            ),
            ["real/1/32MiB/-/leaks", "simulated/1/2MiB/-/stress"]
        );
        let cells = select(&parse("--only facade"), None).unwrap();
        assert!(cells.iter().all(|cell| cell.suite == Suite::Facade));
        assert_eq!(cells.len(), 16);
    }

    #[test]
    fn unknown_words_and_empty_selections_are_usage_errors() {
        for line in [
            "--only nonsense",
            "--only real,",
            "--only -",
            "--only 3",
            "--devices 3",
        ] {
            let words = std::iter::once("line").chain(line.split_whitespace());
            assert!(Line::try_parse_from(words).is_err(), "{line}");
        }
        for line in [
            "--only simulated",
            "--only core,pools",
            "--driver simulated --only own-stream",
            "--sanitize --only facade",
            "--sanitize --driver simulated",
            "--devices 1 --only 2",
        ] {
            assert!(select(&parse(line), None).is_err(), "{line}");
        }
        let error = select(&parse("--only 2"), Some(1)).unwrap_err();
        assert!(error.to_string().contains("--devices 2"), "{error}");
    }

    #[test]
    fn sanitizing_is_for_one_row_unless_told() {
        for (line, rows) in [
            ("--sanitize", &["real/1/2MiB/-/core-sanitized"] as &[&str]),
            (
                "--sanitize --only 16MiB",
                &["real/1/16MiB/-/core-sanitized"],
            ),
            (
                "--sanitize --devices 2",
                &[
                    "real/1/2MiB/-/core-sanitized",
                    "real/2/2MiB/-/core-sanitized",
                ],
            ),
            ("--sanitize --only 2", &["real/2/2MiB/-/core-sanitized"]),
            (
                "--sanitize --only real/2/32MiB/-/core-sanitized",
                &["real/2/32MiB/-/core-sanitized"],
            ),
        ] {
            assert_eq!(names(line, None), rows, "{line}");
        }
        let left = left_out(&parse("--sanitize"), Some(1));
        assert_eq!(left, 0);
    }
}
