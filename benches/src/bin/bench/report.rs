//! What is printed of a run beside its figures.

use crate::listing::{aligned, new_table};
use crate::machine::Machine;
use crate::sides::Measured;
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
    fn times_have_a_unit_that_fits() {
        assert_eq!(time(93.4), "93 ns");
        assert_eq!(time(1_234.0), "1.23 µs");
        assert_eq!(time(18_123_400.0), "18.123 ms");
    }
}
