//! What is printed of the runs.

use crate::arrivals::PhaseName;
use crate::metrics::Steps;
use crate::policy::Policy;
use crate::record::Ran;
use crate::report::Started;
use crate::summary::{Ratio, Section, Summary, highest_peak, paired};
use crate::workload::Workload;
use cuda_vmm_benches::report::table;
use cuda_vmm_benches::{mean, quantile};

/// A column's head and its cells.
type Column = (&'static str, fn(&Summary) -> String);

/// The columns of a section's table after the policy.
const COLUMNS: [Column; 13] = [
    ("first token: mean", |it| ms(mean(&it.first_token_us))),
    ("p50", |it| ms(quantile(&it.first_token_us, 500))),
    ("p99 (ms)", |it| ms(quantile(&it.first_token_us, 990))),
    ("per token: mean", |it| ms(mean(&it.per_token_us))),
    ("p99 (ms)", |it| ms(quantile(&it.per_token_us, 990))),
    ("served", |it| it.served.to_string()),
    ("refused", |it| it.refused.to_string()),
    ("failed", |it| it.failed.to_string()),
    ("preempted", |it| it.preemptions.to_string()),
    ("tokens/s", |it| format!("{:.1}", it.tokens_per_second)),
    ("sent late: p99 (ms)", |it| ms(quantile(&it.late_us, 990))),
    ("most held (GiB)", |it| gib(it.held_bytes_max)),
    ("of it live", |it| gib(it.live_bytes)),
];

fn gib(bytes: u64) -> String {
    format!("{:.3}", bytes as f64 / (1_u64 << 30) as f64)
}

fn ms(us: f64) -> String {
    let ms = us / 1e3;
    format!("{ms:.0$}", if ms < 100.0 { 2 } else { 1 })
}

/// The policies that have runs of a section.
fn policies(ran: &[Ran], section: &Section) -> impl Iterator<Item = (Policy, Summary)> {
    let of = |policy| section.summary(ran, policy).map(|it| (policy, it));
    Policy::ALL.into_iter().filter_map(of)
}

/// Prints all tables.
pub fn print(ran: &[Ran], servers: &[Started]) {
    let sections = Section::all(ran);
    for section in &sections {
        let head: Vec<_> = ["policy"]
            .into_iter()
            .chain(COLUMNS.map(|it| it.0))
            .collect();
        let rows = policies(ran, section).map(|(policy, summary)| {
            let cells = COLUMNS.map(|(_, cell)| cell(&summary));
            [policy.name().to_owned()].into_iter().chain(cells)
        });
        println!("\n{}\n{}", section.title(), table(head, rows));
    }
    print_curves(ran, &sections);
    print_hand_over(ran, &sections);
    print_closed(ran, &sections);
    print_steps(servers);
}

/// Prints the rates of workload (e).
fn print_closed(ran: &[Ran], sections: &[Section]) {
    let closed = sections.iter().filter(|it| it.workload == Workload::Closed);
    let rows = closed.flat_map(|section| {
        policies(ran, section).map(|(policy, it)| {
            let rates = [it.tokens_per_second, it.decoded_per_second];
            let rates = rates.map(|rate| format!("{rate:.0}"));
            [
                vec![peak(section), policy.name().to_owned()],
                rates.to_vec(),
            ]
            .concat()
        })
    });
    let rows: Vec<_> = rows.collect();
    if !rows.is_empty() {
        let head = [
            "clients",
            "policy",
            "tokens/s, prompts within",
            "tokens/s while all generate",
        ];
        let table = table(head, rows);
        println!("\n(e), tokens a second\n{table}");
    }
}

/// Prints how long steps without prompts took, and what of that is the server's own.
fn print_steps(servers: &[Started]) {
    let rows = servers.iter().flat_map(|server| {
        let models = server.steps.iter();
        let mut sizes: Vec<_> = models.map(|steps| steps.sequences_max).collect();
        sizes.sort_unstable();
        sizes.dedup();
        sizes.into_iter().map(|size| {
            let models = server.steps.iter().filter(|it| it.sequences_max == size);
            let models: Vec<_> = models.collect();
            let sum = |number: fn(&Steps) -> f64| models.iter().map(|it| number(it)).sum::<f64>();
            let most =
                |number: fn(&Steps) -> f64| models.iter().map(|it| number(it)).fold(0., f64::max);
            let (count, seconds) = (sum(|it| it.count as f64), sum(|it| it.seconds));
            let percent = |share: f64| format!("{:.1}%", 100. * share);
            [
                server.workload.name().to_owned(),
                server.policy.name().to_owned(),
                size.to_string(),
                format!("{count}"),
                format!("{:.1}", sum(|it| it.sequences as f64) / count),
                ms(seconds / count * 1e6),
                percent(sum(|it| it.own_seconds) / seconds),
                percent(most(|it| it.own_share_p50)),
                percent(most(|it| it.own_share_p99)),
            ]
        })
    });
    let head = [
        "workload",
        "policy",
        "sequences, up to",
        "steps",
        "sequences, mean",
        "step (ms)",
        "own share: mean",
        "p50",
        "p99",
    ];
    let table = table(head, rows.collect::<Vec<_>>());
    println!("\nSteps without prompts; quantiles are those of the model with the largest\n{table}");
}

/// What is divided by what in the table of the ramps.
const PAIRS: [(&str, [Policy; 2]); 3] = [
    ("static ÷ elastic", [Policy::Static, Policy::Elastic]),
    (
        "page at a time ÷ elastic",
        [Policy::PageAtATime, Policy::Elastic],
    ),
    ("elastic ÷ ideal", [Policy::Elastic, Policy::Ideal]),
];

/// Prints the curves of workload (a), their ratios by seed, and how high each policy goes.
fn print_curves(ran: &[Ran], sections: &[Section]) {
    let ramps = sections.iter().filter(|it| it.workload == Workload::Ramps);
    let ramps: Vec<_> = ramps.collect();
    if ramps.is_empty() {
        return;
    }
    let head = ["peak"].into_iter().chain(Policy::ALL.map(Policy::name));
    let rows = ramps.iter().map(|section| {
        let cell = |policy| {
            let summary = section.summary(ran, policy);
            summary.map_or_else(String::new, |it| ms(it.p99_ms() * 1e3))
        };
        [peak(section)].into_iter().chain(Policy::ALL.map(cell))
    });
    let curves = table(head.collect::<Vec<_>>(), rows);
    println!("\n(a), p99 time to first token (ms)\n{curves}");

    let heads = PAIRS.map(|(name, _)| [format!("{name}: p99"), "mean".to_owned()]);
    let head = [vec!["peak".to_owned()], heads.concat()].concat();
    let measured = ramps.iter().filter(|it| it.peak.is_some());
    let rows = measured.map(|section| {
        let cells = PAIRS.map(|(_, pair)| {
            let figures: [fn(&Summary) -> f64; 2] =
                [Summary::p99_ms, |it| mean(&it.first_token_us)];
            figures.map(|figure| ratio(paired(ran, section, pair, figure)))
        });
        [vec![peak(section)], cells.concat()].concat()
    });
    let ratios = table(head, rows);
    println!("\n(a), time to first token, seeds paired: median (least, most)\n{ratios}");
    for policy in Policy::ALL {
        if ran.iter().any(|run| run.policy == policy) {
            let highest = highest_peak(ran, policy);
            let highest = highest.map_or_else(|| "none".to_owned(), |peak| peak.to_string());
            let name = policy.name();
            println!(
                "{name}: highest peak up to which all are served with p99 at most ten times the unloaded one: {highest}"
            );
        }
    }
}

fn peak(section: &Section) -> String {
    let peak = section.peak.map(|peak| peak.to_string());
    peak.unwrap_or_else(|| "unloaded".to_owned())
}

fn ratio(ratio: Option<Ratio>) -> String {
    ratio.map_or_else(String::new, |it| {
        format!("{:.2} ({:.2}, {:.2})", it.median, it.least, it.most)
    })
}

/// Prints how long the other model waits for memory in workload (d).
fn print_hand_over(ran: &[Ran], sections: &[Section]) {
    let section = |phase| {
        let mut sections = sections.iter();
        sections.find(|it| it.workload == Workload::HandOver && it.phase == phase)
    };
    let both = section(PhaseName::HandOver).zip(section(PhaseName::Alone));
    let Some((after, alone)) = both else {
        return;
    };
    let rows = policies(ran, after).map(|(policy, summary)| {
        let times = [Some(summary), alone.summary(ran, policy)].map(|summary| {
            let times = summary.map(|it| it.first_token_us).unwrap_or_default();
            [0, 500, 1000].map(|part| ms(quantile(&times, part)))
        });
        [vec![policy.name().to_owned()], times.concat()].concat()
    });
    let head = [
        "policy",
        "after the first: soonest",
        "p50",
        "last",
        "without the first: soonest",
        "p50",
        "last",
    ];
    let table = table(head, rows);
    println!("\n(d), from a model's last token to the other's first tokens (ms)\n{table}");
}
