//! Statistics of what was recorded.

use crate::arrivals::PhaseName;
use crate::policy::Policy;
use crate::record::{Ran, Recorded};
use crate::workload::Workload;
use cuda_vmm_benches::quantile;

/// The runs of which a table tells: those of a workload with one peak, or a phase of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section {
    pub workload: Workload,
    pub peak: Option<u32>,
    pub phase: PhaseName,
}

impl Section {
    /// All that there are, in the order of the runs.
    pub fn all(ran: &[Ran]) -> Vec<Self> {
        let mut all = Vec::new();
        for run in ran {
            for request in &run.requests {
                let section = Self {
                    workload: run.workload,
                    peak: run.peak,
                    phase: request.phase,
                };
                if !all.contains(&section) {
                    all.push(section);
                }
            }
        }
        all
    }

    /// How the table is headed.
    pub fn title(&self) -> String {
        let name = self.workload.name();
        match (self.workload, self.peak, self.phase) {
            (_, _, PhaseName::Unloaded) => format!("{name}: unloaded, one request at a time"),
            (_, _, PhaseName::Fill) => format!("{name}: the first model fills the memory"),
            (_, _, PhaseName::HandOver) => format!("{name}: the other model wants all of it"),
            (_, _, PhaseName::Alone) => format!("{name}: the same without the first"),
            (Workload::Closed, Some(clients), _) => format!("{name}: {clients} clients"),
            (_, Some(peak), _) => format!("{name}: peak {peak}"),
            _ => name.to_owned(),
        }
    }

    /// The runs of a policy, by seed.
    pub fn runs<'a>(&self, ran: &'a [Ran], policy: Policy) -> Vec<&'a Ran> {
        let is_of = |run: &&Ran| {
            let key = (run.workload, run.peak, run.policy);
            let has_phase = || run.requests.iter().any(|it| it.phase == self.phase);
            key == (self.workload, self.peak, policy) && has_phase()
        };
        ran.iter().filter(is_of).collect()
    }

    /// What came of a policy's runs, together; `None` if there is none.
    pub fn summary(&self, ran: &[Ran], policy: Policy) -> Option<Summary> {
        let runs = self.runs(ran, policy);
        (!runs.is_empty()).then(|| Summary::of(&runs, self.phase))
    }
}

/// What came of some runs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    /// From a request's planned arrival to its first token, of those that were served.
    pub first_token_us: Vec<f64>,
    /// From a request's first token to its last, for each token after the first.
    pub per_token_us: Vec<f64>,
    pub served: usize,
    pub refused: usize,
    pub failed: usize,
    pub preemptions: u64,
    pub tokens_per_second: f64,
    /// The same while each client of a closed loop has its first request's first token and none has
    /// its last: no prompt is computed meanwhile.
    pub decoded_per_second: f64,
    /// How much later requests were sent than planned.
    pub late_us: Vec<f64>,
    pub held_bytes_max: u64,
    /// What of that sequences used, at that moment.
    pub live_bytes: u64,
}

impl Summary {
    /// Takes a phase of runs together.
    pub fn of(runs: &[&Ran], phase: PhaseName) -> Self {
        let mut summary = Self::default();
        let mut all = Tokens::default();
        let mut decoded = Tokens::default();
        for run in runs {
            let requests: Vec<_> = run.requests.iter().filter(|it| it.phase == phase).collect();
            for request in &requests {
                summary.served += usize::from(request.is_served());
                summary.refused += usize::from(request.is_refused());
                let has_failed = !request.is_served() && !request.is_refused();
                summary.failed += usize::from(has_failed);
                let wait = request.first_token_wait_us();
                summary.first_token_us.extend(wait.map(|us| us as f64));
                summary.per_token_us.extend(request.per_token_us());
                summary.late_us.push(request.late_us() as f64);
            }
            for looked in &run.memory {
                let held_bytes = looked.committed_bytes.iter().sum();
                if held_bytes > summary.held_bytes_max {
                    summary.held_bytes_max = held_bytes;
                    summary.live_bytes = looked.live_bytes.iter().sum();
                }
            }
            summary.preemptions += run.preemptions;
            let clients = match run.workload {
                Workload::Closed => run.peak,
                _ => None,
            };
            all.add(rate(&requests, clients));
            decoded.add(decode_rate(&requests, clients));
        }
        summary.tokens_per_second = all.per_second();
        summary.decoded_per_second = decoded.per_second();
        summary
    }

    /// p99 time to first token, in milliseconds.
    pub fn p99_ms(&self) -> f64 {
        quantile(&self.first_token_us, 990) / 1e3
    }
}

/// Tokens, and in which time they came.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Tokens {
    count: usize,
    time_us: u64,
}

impl Tokens {
    /// Those of requests that came after a time, until another.
    fn within(requests: &[&Recorded], first_us: u64, last_us: u64) -> Self {
        let times = requests.iter().flat_map(|request| times(request));
        Self {
            count: times
                .filter(|us| (first_us + 1..=last_us).contains(us))
                .count(),
            time_us: last_us.saturating_sub(first_us),
        }
    }

    fn add(&mut self, other: Self) {
        self.count += other.count;
        self.time_us += other.time_us;
    }

    fn per_second(self) -> f64 {
        self.count as f64 / (self.time_us as f64 / 1e6)
    }
}

/// Tokens from the first arrival to the last token.
///
/// In a closed loop it is the time in which all clients have a request that has its first token, or
/// waits behind one that had: from when each has had its first until the last request is sent.
fn rate(requests: &[&Recorded], clients: Option<u32>) -> Tokens {
    let first = match clients {
        None => requests.iter().map(|it| it.planned_us).min(),
        Some(clients) => all_have_begun(&first_of_each(requests, clients)),
    };
    let last = match clients {
        None => requests.iter().filter_map(|it| it.last_token_us()).max(),
        Some(_) => requests.iter().map(|it| it.sent_us).max(),
    };
    Tokens::within(requests, first.unwrap_or(0), last.unwrap_or(0))
}

/// Tokens of a closed loop's first requests, while all of them are generated.
fn decode_rate(requests: &[&Recorded], clients: Option<u32>) -> Tokens {
    let first = first_of_each(requests, clients.unwrap_or(0));
    let ends = first.iter().filter_map(|it| it.last_token_us());
    let both = all_have_begun(&first).zip(ends.min());
    both.map_or_else(Tokens::default, |(begun, ended)| {
        Tokens::within(&first, begun, ended)
    })
}

/// The first request of each client.
fn first_of_each<'a>(requests: &[&'a Recorded], clients: u32) -> Vec<&'a Recorded> {
    let mut sent = requests.to_vec();
    sent.sort_by_key(|it| it.sent_us);
    sent.truncate(clients as usize);
    sent
}

/// When the last of some requests has its first token.
fn all_have_begun(requests: &[&Recorded]) -> Option<u64> {
    requests.iter().filter_map(|it| it.first_token_us).max()
}

/// When each token came.
fn times(request: &Recorded) -> impl Iterator<Item = u64> {
    let later = request.first_token_us.map(|first| {
        let mut at = first;
        let later = request.token_gaps_us.iter().map(move |gap| {
            at += gap;
            at
        });
        std::iter::once(first).chain(later)
    });
    later.into_iter().flatten()
}

/// The median of paired ratios, and the least and the most.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ratio {
    pub median: f64,
    pub least: f64,
    pub most: f64,
}

/// For each seed that both policies have, the ratio of a figure of their runs; `None` without any.
pub fn paired(
    ran: &[Ran],
    section: &Section,
    policies: [Policy; 2],
    figure: impl Fn(&Summary) -> f64,
) -> Option<Ratio> {
    let [over, under] = policies.map(|policy| section.runs(ran, policy));
    let ratios = over.iter().filter_map(|one| {
        let other = under.iter().find(|other| other.seed == one.seed)?;
        let [one, other] = [one, other].map(|run| figure(&Summary::of(&[run], section.phase)));
        Some(one / other)
    });
    let ratios: Vec<_> = ratios.filter(|ratio| ratio.is_finite()).collect();
    (!ratios.is_empty()).then(|| Ratio {
        median: quantile(&ratios, 500),
        least: quantile(&ratios, 0),
        most: quantile(&ratios, 1000),
    })
}

/// How many times the time of an unloaded server a peak's p99 may be.
const LOADED_TIMES: f64 = 10.0;

/// The highest peak of workload (a) up to which a policy serves every request, and its p99 time to
/// first token is at most ten times that of its unloaded server; `None` if there is none.
pub fn highest_peak(ran: &[Ran], policy: Policy) -> Option<u32> {
    let all = Section::all(ran);
    let all = all.iter().filter(|it| it.workload == Workload::Ramps);
    let p99_ms = |section: &Section| section.summary(ran, policy).map(|it| it.p99_ms());
    let mut unloaded = all.clone().filter(|it| it.phase == PhaseName::Unloaded);
    let unloaded_ms = p99_ms(unloaded.next()?)?;
    let peaks = all.filter(|it| it.peak.is_some());
    let within = peaks.take_while(|section| {
        section.summary(ran, policy).is_some_and(|it| {
            let is_whole = it.refused == 0 && it.failed == 0;
            is_whole && it.p99_ms() <= LOADED_TIMES * unloaded_ms
        })
    });
    within.filter_map(|section| section.peak).last()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Looked;

    /// A request that was served, with its tokens a time apart.
    fn served(planned_us: u64, first_us: u64, gaps: &[u64]) -> Recorded {
        Recorded {
            model: 0,
            phase: PhaseName::Measured,
            prompt_tokens: 8,
            generated_tokens_asked: 1 + gaps.len() as u32,
            planned_us,
            sent_us: planned_us + 5,
            first_token_us: Some(first_us),
            token_gaps_us: gaps.to_vec(),
            end_us: first_us + gaps.iter().sum::<u64>() + 1,
            status: Some(200),
            retry_after: None,
            failure: None,
            tokens: 1 + gaps.len(),
        }
    }

    fn ran(policy: Policy, peak: Option<u32>, seed: u64, requests: Vec<Recorded>) -> Ran {
        let looked = |at_us, bytes: [u64; 2]| Looked {
            at_us,
            committed_bytes: bytes.to_vec(),
            live_bytes: vec![at_us, 0],
            prefix_bytes: vec![0, 0],
        };
        Ran {
            workload: Workload::Ramps,
            policy,
            peak,
            seed,
            requests,
            memory: vec![looked(0, [1, 2]), looked(5, [4, 4]), looked(9, [5, 2])],
            preemptions: 3,
        }
    }

    #[test]
    fn a_summary_counts_what_was_served_and_leaves_the_rest_out() {
        let mut refused = served(0, 0, &[]);
        (refused.status, refused.first_token_us) = (Some(503), None);
        refused.retry_after = Some(1);
        let mut failed = served(50, 60, &[10]);
        failed.failure = Some("cut".to_owned());
        let requests = vec![
            served(100, 300, &[100, 300]),
            refused,
            failed,
            served(0, 1000, &[0]),
        ];
        let run = ran(Policy::Elastic, Some(4), 0, requests);
        let section = Section::all(std::slice::from_ref(&run))[0];
        assert_eq!(section.title(), "(a) ramps: peak 4");
        let summary = Summary::of(&[&run, &run], PhaseName::Measured);
        assert_eq!((summary.served, summary.refused, summary.failed), (4, 2, 2));
        assert_eq!(summary.first_token_us[..2], [200.0, 1000.0]);
        assert_eq!(summary.per_token_us[..2], [200.0, 0.0]);
        assert_eq!((summary.preemptions, summary.held_bytes_max), (6, 8));
        assert_eq!(summary.live_bytes, 5);
        assert_eq!(summary.late_us[..], [5.0; 8]);
        // Seven tokens in 1,000 µs of each run, those of the failed request too.
        assert_eq!(summary.tokens_per_second, 7.0 / 1e-3);
        assert_eq!(summary.p99_ms(), 1.0);
    }

    #[test]
    fn a_closed_loop_is_measured_while_all_clients_have_requests() {
        let mut requests = [
            served(0, 100, &[100, 100]),
            served(0, 150, &[100, 100]),
            served(310, 400, &[100, 100]),
            served(360, 450, &[100, 100]),
        ];
        for request in &mut requests {
            request.sent_us = request.planned_us;
        }
        let requests: Vec<_> = requests.iter().collect();
        let tokens = |count, time_us| Tokens { count, time_us };
        // After 150, up to 360: of the first 200 and 300, of the second 250 and 350.
        assert_eq!(rate(&requests, Some(2)), tokens(4, 210));
        assert_eq!(rate(&requests, None), tokens(12, 650));
        // Up to 300: of the first 200 and 300, of the second 250.
        assert_eq!(decode_rate(&requests, Some(2)), tokens(3, 150));
        assert_eq!(decode_rate(&requests, None), Tokens::default());
    }

    #[test]
    fn ratios_are_of_the_same_seed() {
        let run = |policy, seed, us| ran(policy, Some(4), seed, vec![served(0, us, &[])]);
        let all = [
            run(Policy::Static, 0, 1000),
            run(Policy::Static, 1, 600),
            run(Policy::Static, 2, 5000),
            run(Policy::Elastic, 2, 1000),
            run(Policy::Elastic, 1, 300),
            run(Policy::Elastic, 0, 1000),
            run(Policy::Elastic, 3, 1),
        ];
        let section = Section::all(&all)[0];
        let ratio = paired(
            &all,
            &section,
            [Policy::Static, Policy::Elastic],
            Summary::p99_ms,
        );
        let (median, least, most) = (2.0, 1.0, 5.0);
        let expected = Ratio {
            median,
            least,
            most,
        };
        assert_eq!(ratio, Some(expected));
        let none = paired(
            &all,
            &section,
            [Policy::Static, Policy::Ideal],
            Summary::p99_ms,
        );
        assert_eq!(none, None);
    }

    #[test]
    fn the_highest_peak_is_ten_times_the_unloaded_at_most() {
        let mut unloaded = served(0, 100, &[]);
        unloaded.phase = PhaseName::Unloaded;
        let run = |peak, us| ran(Policy::Static, Some(peak), 0, vec![served(0, us, &[])]);
        let mut all = vec![ran(Policy::Static, None, 0, vec![unloaded])];
        all.extend([run(2, 200), run(4, 1000), run(6, 1001), run(8, 200)]);
        assert_eq!(highest_peak(&all, Policy::Static), Some(4));
        let mut refused = served(0, 0, &[]);
        (refused.status, refused.first_token_us) = (Some(503), None);
        refused.retry_after = Some(1);
        all[2].requests.push(refused);
        assert_eq!(highest_peak(&all, Policy::Static), Some(2));
        assert_eq!(highest_peak(&all, Policy::Elastic), None);
        assert_eq!(highest_peak(&all[1..], Policy::Static), None);
    }
}
