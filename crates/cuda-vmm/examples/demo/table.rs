//! The table that is printed at the end.

use crate::figures::{Figures, ModelFigures, Outcome};

const HEADER: [[&str; 8]; 2] = [
    ["", "", "", "peak", "peak", "refused,", "static", "refused,"],
    [
        "model",
        "requests",
        "tokens",
        "live",
        "committed",
        "elastic",
        "share",
        "static split",
    ],
];

/// A row for each model and one for the sum.
pub fn render(figures: &Figures) -> String {
    let mut rows: Vec<Vec<String>> = HEADER
        .iter()
        .map(|row| row.map(str::to_owned).to_vec())
        .collect();
    rows.extend(figures.models.iter().map(|model| row(model).to_vec()));
    rows.push(total(figures).to_vec());

    let widths: Vec<usize> = (0..HEADER[0].len())
        .map(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        if index == HEADER.len() || index == rows.len() - 1 {
            text.push_str(&"-".repeat(widths.iter().sum::<usize>() + 2 * (widths.len() - 1)));
            text.push('\n');
        }
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            line.push_str(&match column {
                0 => format!("{cell:<width$}"),
                _ => format!("  {cell:>width$}"),
            });
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn row(model: &ModelFigures) -> [String; 8] {
    [
        model.model.to_owned(),
        count(model.requests),
        count(model.prompt_tokens + model.generated_tokens),
        gib(model.elastic.peak_live_bytes),
        gib(model.elastic_peak_committed_bytes),
        refusals(&model.elastic),
        gib(model.static_share_bytes),
        refusals(&model.r#static),
    ]
}

fn total(figures: &Figures) -> [String; 8] {
    let tokens = figures
        .models
        .iter()
        .map(|model| model.prompt_tokens + model.generated_tokens);
    let shares = figures.models.iter().map(|model| model.static_share_bytes);
    [
        "all".to_owned(),
        count(figures.requests),
        count(tokens.sum()),
        String::new(),
        String::new(),
        count(figures.elastic_refused),
        gib(shares.sum()),
        count(figures.static_refused),
    ]
}

/// The sum, and its parts at arrival and midway.
fn refusals(outcome: &Outcome) -> String {
    let parts = format!(
        "{} + {}",
        count(outcome.refused_at_arrival),
        count(outcome.refused_midway)
    );
    format!("{} ({parts})", count(outcome.refused))
}

/// Bytes in GiB.
pub fn gib(bytes: u64) -> String {
    format!("{:.2} GiB", bytes as f64 / (1_u64 << 30) as f64)
}

/// A number with a comma at every thousand.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        assert_eq!(
            ["0", "999"],
            [count(0), count(999)].each_ref().map(String::as_str)
        );
        assert_eq!(count(1_000), "1,000");
        assert_eq!(count(44_756_000), "44,756,000");
        assert_eq!(gib(3 << 29), "1.50 GiB");
    }

    #[test]
    fn refusals_show_sum_and_parts() {
        let outcome = Outcome {
            completed: 0,
            refused: 1_234,
            refused_at_arrival: 1_200,
            refused_midway: 34,
            tokens: 0,
            peak_live_bytes: 0,
        };
        assert_eq!(refusals(&outcome), "1,234 (1,200 + 34)");
    }
}
