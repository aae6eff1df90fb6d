//! What is printed and written of a run.

pub use crate::display::table;
use crate::figure::Finding;
use crate::sides::{Side, quantile};
use anyhow::{Context, Result};
use cuda_vmm::{Device, DriverKind};
use std::path::Path;
use std::process::ExitCode;
use std::time::SystemTime;

/// Prints when it was run, and what.
pub fn print_command() {
    let now = humantime::format_rfc3339_seconds(SystemTime::now());
    let words: Vec<_> = std::env::args().collect();
    println!("Date: {now}\nCommand: {}", words.join(" "));
}

/// Prints what was measured on, and when.
pub(crate) fn print_head(device: &Device, is_real: bool) {
    let driver = device.driver();
    let (kind, version) = (driver.kind(), driver.version());
    // The kernel module's own version; the driver tells only the newest CUDA version that it knows.
    let module = match kind {
        DriverKind::Real => std::fs::read_to_string("/sys/module/nvidia/version"),
        DriverKind::Simulated => Ok("none".to_owned()),
    };
    let module = module.as_deref().map_or("not known", str::trim);
    println!("GPU: {}, {} bytes", device.name(), device.total_bytes());
    println!("Driver: {kind}, kernel module {module}, CUDA {version}");
    print_command();
    if !is_real {
        println!("Times of this run mean nothing, and are not judged.");
    }
}

/// Prints what the sides of some work took.
pub(crate) fn print_sides<'a>(name: &str, sides: impl Iterator<Item = &'a Side>) {
    println!("\n{name}");
    let rows = sides.map(|side| {
        let quantiles = [500, 990, 999, 1000].map(|part| time(quantile(&side.samples, part)));
        let row = [side.name.clone(), side.samples.len().to_string()];
        row.into_iter().chain(quantiles)
    });
    let table = table(["side", "rounds", "median", "p99", "p99.9", "max"], rows);
    if table.row_count() > 0 {
        println!("{table}");
    }
}

/// Prints the figures, and writes them as JSON if a file is named. Returns success if none fails.
pub fn end(findings: &[Finding], json: Option<&Path>) -> Result<ExitCode> {
    let rows = findings.iter().map(|finding| {
        let amount = |value| format!("{} {}", number(value), finding.unit);
        let pass = finding.pass.map(|pass| if pass { "yes" } else { "NO" });
        [
            finding.name.clone(),
            finding.ours.map(amount).unwrap_or_default(),
            finding.peer.map(amount).unwrap_or_default(),
            finding.ratio.map(number).unwrap_or_default(),
            finding.reach.clone().unwrap_or_default(),
            pass.unwrap_or_default().to_owned(),
        ]
    });
    let head = ["figure", "ours", "peer", "ratio", "reach", "pass"];
    println!("\n{}", table(head, rows));
    for finding in findings {
        if let Some(note) = &finding.note {
            println!("{}: {note}", finding.name);
        }
    }
    if let Some(path) = json {
        write(path, findings)?;
    }
    let fails = findings.iter().any(|finding| finding.pass == Some(false));
    Ok(ExitCode::from(u8::from(fails)))
}

fn write(path: &Path, findings: &[Finding]) -> Result<()> {
    let text = serde_json::to_string_pretty(findings)?;
    std::fs::write(path, text + "\n").with_context(|| format!("writing {}", path.display()))
}

/// Whole numbers as they are, others with four digits that count.
fn number(value: f64) -> String {
    if value.fract() == 0.0 {
        return value.to_string();
    }
    let digits = 3 - value.abs().log10().floor() as i32;
    format!("{value:.0$}", digits.clamp(0, 9) as usize)
}

/// A time as a person reads it.
fn time(ns: f64) -> String {
    match ns {
        ns if ns < 1e3 => format!("{ns:.0} ns"),
        ns if ns < 1e6 => format!("{:.2} µs", ns / 1e3),
        ns => format!("{:.3} ms", ns / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_four_digits_that_count_and_times_a_unit_that_fits() {
        let numbers = [0.0, 0.051_234, 1.049_96, 18_123.4, 65_536.0].map(number);
        assert_eq!(numbers, ["0", "0.05123", "1.050", "18123", "65536"]);
        let times = [93.4, 1_234.0, 18_123_400.0].map(time);
        assert_eq!(times, ["93 ns", "1.23 µs", "18.123 ms"]);
    }

    #[test]
    fn json_is_a_list_with_null_for_what_is_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let work = Finding::new("work: peer", "µs", "≤ 4.5 ×");
        let judge = |ours| work.clone().judge(ours, Some(1.0));
        let findings = [judge(2.0), judge(9.0), work.clone().noted("no GPU")];
        write(file.path(), &findings).unwrap();
        let list: serde_json::Value = serde_json::from_reader(&file).unwrap();
        let cases = [
            (Some(2.0), Some(true), None),
            (Some(9.0), Some(false), None),
            (None, None, Some("no GPU")),
        ];
        let rows = cases.map(|(ours, pass, note): (Option<f64>, _, _)| {
            serde_json::json!({
                "name": "work: peer", "ours": ours, "peer": ours.map(|_| 1.0), "ratio": ours,
                "reach": "≤ 4.5 ×", "pass": pass, "unit": "µs", "note": note,
            })
        });
        assert_eq!(list, serde_json::json!(rows));
    }
}
