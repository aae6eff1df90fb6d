//! What is printed and written of a run.

use crate::demand::Finding;
use crate::machine::Machine;
use crate::sides::Measured;
use anyhow::{Context, Result};
use comfy_table::{CellAlignment, Table, presets};
use std::path::Path;
use std::time::SystemTime;

/// Prints what was measured on, and when.
pub fn print_head(machine: &Machine) {
    let device = &machine.device;
    // The kernel module's own version; the driver tells only the newest CUDA version that it knows.
    let module = std::fs::read_to_string("/sys/module/nvidia/version");
    let module = match machine.is_real() {
        true => module.map_or_else(|_| "not known".to_owned(), |text| text.trim().to_owned()),
        false => "none".to_owned(),
    };
    println!("GPU: {}, {} bytes", device.name(), device.total_bytes());
    println!(
        "Driver: {}, kernel module {module}, CUDA {}",
        device.driver().kind(),
        device.driver().version()
    );
    println!(
        "Date: {}",
        humantime::format_rfc3339_seconds(SystemTime::now())
    );
    let command: Vec<String> = std::env::args().collect();
    println!("Command: {}", command.join(" "));
    if !machine.is_real() {
        println!("Times on a simulated driver mean nothing, and are not judged.");
    }
}

/// Prints what the sides of some work took.
pub fn print_sides(name: &str, measured: &Measured) {
    let mut table = new_table(&["side", "rounds", "median", "p99", "p99.9", "max"]);
    for (side, samples) in measured.iter() {
        let quantiles = [500, 990, 999, 1000];
        let mut row = vec![(*side).to_owned(), samples.count().to_string()];
        row.extend(quantiles.map(|per_mille| time(samples.quantile_ns(per_mille))));
        table.add_row(row);
    }
    println!("\n{name}");
    if !table.is_empty() {
        println!("{}", aligned(table));
    }
}

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
fn new_table(head: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN).set_header(head);
    table
}

/// All columns but the first to the right.
fn aligned(mut table: Table) -> Table {
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// A time as a person reads it.
fn time(ns: f64) -> String {
    match ns {
        ns if ns < 1e3 => format!("{ns:.0} ns"),
        ns if ns < 1e6 => format!("{:.2} µs", ns / 1e3),
        ns => format!("{:.3} ms", ns / 1e6),
    }
}

/// Whole numbers as they are, others with four digits that count.
fn number(value: f64) -> String {
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
        assert_eq!(time(93.4), "93 ns");
        assert_eq!(time(1_234.0), "1.23 µs");
        assert_eq!(time(18_123_400.0), "18.123 ms");
    }

    #[test]
    fn json_is_a_list_with_null_for_what_is_not() {
        let folder = std::env::temp_dir().join(format!("bench-report-{}", std::process::id()));
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
