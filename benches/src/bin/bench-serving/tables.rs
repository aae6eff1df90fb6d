//! What is printed of each contest.

use crate::contest::{Contest, Pool};
use crate::ramps::Ramps;
use cuda_vmm_benches::report::table;
use cuda_vmm_benches::serving::Served;
use cuda_vmm_benches::{mean, quantile};

fn milliseconds(value: f64) -> String {
    format!("{value:.0$}", if value < 100.0 { 2 } else { 1 })
}

fn ms(ns: f64) -> String {
    milliseconds(ns / 1e6)
}

/// A column's head and its cells.
type Column = (&'static str, fn(&Served) -> String);

/// The columns of a contest's table after the pool.
const COLUMNS: [Column; 13] = [
    ("first token: mean", |it| ms(mean(&it.first_token))),
    ("p50", |it| ms(quantile(&it.first_token, 500))),
    ("p99 (ms)", |it| ms(quantile(&it.first_token, 990))),
    ("per token: mean", |it| ms(mean(&it.per_token))),
    ("p50", |it| ms(quantile(&it.per_token, 500))),
    ("p99 (ms)", |it| ms(quantile(&it.per_token, 990))),
    ("served", |it| it.served.to_string()),
    ("refused", |it| it.refused.to_string()),
    ("preempted", |it| it.preemptions.to_string()),
    ("tokens/s", |it| format!("{:.1}", it.tokens_per_second())),
    ("most held (GiB)", |it| {
        format!("{:.2}", it.held_bytes_max as f64 / (1_u64 << 30) as f64)
    }),
    ("calls, mean a step (µs)", |it| {
        format!("{:.2}", it.calls_ns as f64 / 1e3 / it.calls.len() as f64)
    }),
    ("worst (µs)", |it| {
        format!("{:.0}", quantile(&it.calls, 1000) / 1e3)
    }),
];

pub fn print_contest(contest: &Contest) {
    let head: Vec<_> = ["pool"].into_iter().chain(COLUMNS.map(|it| it.0)).collect();
    let rows = Pool::ALL.map(|pool| {
        let cells = COLUMNS.map(|(_, cell)| cell(contest.of(pool)));
        [pool.name().to_owned()].into_iter().chain(cells)
    });
    println!("\n{}\n{}", contest.name, table(head, rows));
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
    let table = table(head, rows);
    println!("\n(a), p99 time to first token (ms)\n{table}");
}
