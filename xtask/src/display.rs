//! How tables and times are printed.

use comfy_table::{CellAlignment, Row, Table, presets};
use std::time::Duration;

/// A Markdown table. All columns but the first are right-aligned.
pub fn table<R: Into<Row>>(head: impl Into<Row>, rows: impl IntoIterator<Item = R>) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header(head).add_rows(rows);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// A duration, to a tenth of a second.
pub fn time(duration: Duration) -> humantime::FormattedDuration {
    let tenths = (duration.as_secs_f64() * 10.0).round() as u64;
    humantime::format_duration(Duration::from_millis(tenths * 100))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_well_around_a_minute() {
        for (ms, text) in [(1_240, "1s 200ms"), (60_000, "1m"), (185_040, "3m 5s")] {
            assert_eq!(time(Duration::from_millis(ms)).to_string(), text);
        }
    }
}
