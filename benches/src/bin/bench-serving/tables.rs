//! What is printed of each contest.

use crate::contest::{Contest, Pool};
use crate::ramps::Ramps;
use cuda_vmm_benches::Samples;
use cuda_vmm_benches::report::table;

fn milliseconds(value: f64) -> String {
    format!("{value:.0$}", if value < 100.0 { 2 } else { 1 })
}

fn times(times: &Samples) -> [String; 3] {
    [times.mean(), times.median(), times.quantile(990)].map(|ns| milliseconds(ns / 1e6))
}

/// Prints what came of a workload in each pool.
pub fn print_contest(contest: &Contest) {
    let head = [
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
    ];
    let rows = Pool::ALL.map(|pool| {
        let outcome = contest.of(pool);
        let steps = outcome.calls.count() as f64;
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
            format!("{:.2}", outcome.calls_ns as f64 / 1e3 / steps),
            format!("{:.0}", outcome.calls.quantile(1000) / 1e3),
        ]);
        row
    });
    println!("\n{}\n{}", contest.name, table(&head, rows));
}

/// Prints the curves of workload (a) beside those that were published.
pub fn print_curves(ramps: &Ramps) {
    let mut head = vec!["peak"];
    head.extend(Pool::ALL.map(Pool::name));
    head.extend(["static ÷ ours", "published static", "simulated ÷ published"]);
    head.extend(["published KVCached", "page at a time ÷ published"]);
    let rows = ramps.iter().map(|(point, contest)| {
        let p99 = |pool| contest.p99_ms(pool);
        let mut row = vec![point.peak.to_string()];
        row.extend(Pool::ALL.map(|pool| milliseconds(p99(pool))));
        row.extend([
            format!("{:.1}", p99(Pool::StaticSplit) / p99(Pool::Ours)),
            format!("{:.0}", point.static_ms),
            format!("{:.2}", p99(Pool::StaticSplit) / point.static_ms),
            format!("{:.0}", point.elastic_ms),
            format!("{:.2}", p99(Pool::PageAtATime) / point.elastic_ms),
        ]);
        row
    });
    println!(
        "\n(a), p99 time to first token (ms)\n{}",
        table(&head, rows)
    );
}
