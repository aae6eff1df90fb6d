//! What is printed of each contest.

use crate::contest::{Contest, Pool};
use crate::listing::{aligned, new_table};
use crate::outcome::Times;
use crate::work::ramps::Ramps;
use std::time::SystemTime;

/// Prints when it was run, and what was run.
pub fn print_head() {
    let date = humantime::format_rfc3339_seconds(SystemTime::now());
    println!("Date: {date}");
    let command: Vec<String> = std::env::args().collect();
    println!("Command: {}", command.join(" "));
    println!(
        "All times are simulated: steps by the fitted time model, driver calls by the costs of an H100."
    );
}

fn milliseconds(value: f64) -> String {
    match value {
        value if value < 100.0 => format!("{value:.2}"),
        value => format!("{value:.1}"),
    }
}

fn times(times: &Times) -> [String; 3] {
    let percentile = |percent| times.percentile_ms(percent);
    [times.mean_ms(), percentile(50), percentile(99)].map(milliseconds)
}

/// Prints what came of a workload in each pool.
pub fn print_contest(contest: &Contest) {
    let mut table = new_table(&[
        "pool",
        "first token: mean",
        "p50",
        "p99 (ms)",
        "per token: mean",
        "p50",
        "p99 (ms)",
        "served",
        "refused",
        "preempted",
        "tokens/s",
        "most held (GiB)",
        "calls, mean a step (µs)",
        "worst (µs)",
    ]);
    for pool in Pool::ALL {
        let outcome = contest.of(pool);
        let mut row = vec![pool.name().to_owned()];
        row.extend(times(&outcome.first_token));
        row.extend(times(&outcome.per_token));
        row.extend([
            outcome.served.to_string(),
            outcome.refused.to_string(),
            outcome.preemptions.to_string(),
            format!("{:.1}", outcome.tokens_per_second()),
            format!(
                "{:.2}",
                outcome.held_bytes_max as f64 / (1_u64 << 30) as f64
            ),
            format!(
                "{:.2}",
                outcome.calls_ns as f64 / 1e3 / outcome.steps as f64
            ),
            format!("{:.0}", outcome.calls_ns_max as f64 / 1e3),
        ]);
        table.add_row(row);
    }
    println!("\n{}\n{}", contest.name, aligned(table));
}

/// Prints the curves of workload (a) beside those that were published.
pub fn print_curves(ramps: &Ramps) {
    let mut head = vec!["peak"];
    head.extend(Pool::ALL.map(Pool::name));
    head.extend(["static ÷ ours", "published static", "simulated ÷ published"]);
    head.extend(["published KVCached", "page at a time ÷ published"]);
    let mut table = new_table(&head);
    for (point, contest) in ramps {
        let p99 = |pool| contest.of(pool).first_token.percentile_ms(99);
        let mut row = vec![point.peak.to_string()];
        row.extend(Pool::ALL.map(|pool| milliseconds(p99(pool))));
        row.push(format!("{:.1}", p99(Pool::StaticSplit) / p99(Pool::Ours)));
        row.push(format!("{:.0}", point.static_ms));
        row.push(format!("{:.2}", p99(Pool::StaticSplit) / point.static_ms));
        row.push(format!("{:.0}", point.elastic_ms));
        row.push(format!("{:.2}", p99(Pool::PageAtATime) / point.elastic_ms));
        table.add_row(row);
    }
    println!("\n(a), p99 time to first token (ms)\n{}", aligned(table));
}
