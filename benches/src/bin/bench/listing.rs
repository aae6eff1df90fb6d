//! The list of figures, as it is printed and written.

use crate::demand::Finding;
use anyhow::{Context, Result};
use comfy_table::{CellAlignment, Table, presets};
use std::path::Path;

/// Prints the figures.
pub fn print_findings(findings: &[Finding]) {
    let mut table = new_table(&["figure", "ours", "peer", "ratio", "reach", "pass"]);
    for finding in findings {
        let amount = |value: Option<f64>| match value {
            Some(value) => format!("{} {}", number(value), finding.unit),
            None => String::new(),
        };
        table.add_row([
            finding.name.to_owned(),
            amount(finding.ours),
            amount(finding.peer),
            finding.ratio.map(number).unwrap_or_default(),
            finding.reach.clone().unwrap_or_default(),
            match finding.pass {
                Some(true) => "yes",
                Some(false) => "NO",
                None => "",
            }
            .to_owned(),
        ]);
    }
    println!("\n{}", aligned(table));
    for finding in findings {
        if let Some(note) = &finding.note {
            println!("{}: {note}", finding.name);
        }
    }
}

/// Writes the figures as JSON.
pub fn write(path: &Path, findings: &[Finding]) -> Result<()> {
    let text = serde_json::to_string_pretty(findings)?;
    std::fs::write(path, text + "\n").with_context(|| format!("writing {}", path.display()))
}

/// A table that Markdown understands.
pub fn new_table(head: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN).set_header(head);
    table
}

/// All columns but the first to the right.
pub fn aligned(mut table: Table) -> Table {
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Whole numbers as they are, others with four digits that count.
pub fn number(value: f64) -> String {
    if value.fract() == 0.0 {
        return format!("{value}");
    }
    let digits = 3 - value.abs().log10().floor() as i32;
    format!("{value:.0$}", digits.clamp(0, 9) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demand::{Demand, Reach};

    #[test]
    fn numbers_have_four_digits_that_count() {
        for (value, text) in [
            (0.0, "0"),
            (0.051_234, "0.05123"),
            (1.049_96, "1.050"),
            (18_123.4, "18123"),
            (65_536.0, "65536"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn json_is_a_list_with_null_for_what_is_not() {
        let folder = std::env::temp_dir().join(format!("bench-listing-{}", std::process::id()));
        let demand = Demand::time("work: peer", "µs", Reach::AtMostTimes(4.5));
        let findings = [
            demand.judge(2.0, Some(1.0)),
            demand.judge(9.0, Some(1.0)),
            demand.unmeasured("no GPU"),
        ];
        write(&folder, &findings).unwrap();
        let text = std::fs::read_to_string(&folder).unwrap();
        std::fs::remove_file(&folder).unwrap();
        let list: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            list,
            serde_json::json!([
                {"name": "work: peer", "ours": 2.0, "peer": 1.0, "ratio": 2.0, "reach": "≤ 4.5 ×", "pass": true,
                 "unit": "µs", "note": null},
                {"name": "work: peer", "ours": 9.0, "peer": 1.0, "ratio": 9.0, "reach": "≤ 4.5 ×", "pass": false,
                 "unit": "µs", "note": null},
                {"name": "work: peer", "ours": null, "peer": null, "ratio": null, "reach": "≤ 4.5 ×", "pass": null,
                 "unit": "µs", "note": "no GPU"},
            ])
        );
    }
}
