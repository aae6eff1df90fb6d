//! What is asked of the models that share a GPU.

const SECOND_NS: u64 = 1_000_000_000;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Arrival in nanoseconds of simulated time.
    pub arrival_ns: u64,
    pub prompt_tokens: u32,
    /// Tokens that are generated, the first of them by the prompt's step.
    pub generated_tokens: u32,
}

impl Request {
    pub fn new(arrival_ns: u64, prompt_tokens: u32, generated_tokens: u32) -> Self {
        Self {
            arrival_ns,
            prompt_tokens,
            generated_tokens,
        }
    }

    /// Tokens that the request holds when its last token is made, which is written no more.
    pub fn tokens_max(&self) -> u32 {
        (self.prompt_tokens + self.generated_tokens).saturating_sub(1)
    }
}

/// Tokens of each request of the made workloads.
pub const PROMPT_TOKENS: u32 = 256;
pub const GENERATED_TOKENS: u32 = 256;

/// At so many places within its share of a second, its phases, each request may arrive.
pub const PHASES: u64 = 32;

/// Requests whose number in each second is given, evenly spaced within it.
pub fn paced(start_ns: u64, phase: u64, rates: impl IntoIterator<Item = u32>) -> Vec<Request> {
    let seconds = (0_u64..).zip(rates);
    let of_second = |(second, rate): (u64, u32)| {
        let (begin_ns, rate) = (start_ns + second * SECOND_NS, u64::from(rate));
        (0..rate).map(move |index| {
            let within_ns = (index * PHASES + phase) * SECOND_NS / (PHASES * rate);
            Request::new(begin_ns + within_ns, PROMPT_TOKENS, GENERATED_TOKENS)
        })
    };
    seconds.flat_map(of_second).collect()
}

/// The rate in each second of a ramp: 0, 1, and so on up to the peak, and down again to 1.
fn ramp(peak: u32) -> impl Iterator<Item = u32> {
    (0..=peak).chain((1..peak).rev())
}

/// Models with a ramp each, which begin 2.25 ramp-ups apart; a ramp-up takes `peak` seconds.
pub fn staggered_ramps(models: u32, peak: u32, phase: u64) -> Vec<Vec<Request>> {
    let apart_ns = u64::from(peak) * SECOND_NS * 9 / 4;
    let ramp = |model| paced(model * apart_ns, phase, ramp(peak));
    (0..u64::from(models)).map(ramp).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counted one by one, as the published text tells it.
    fn counted(peak: u32) -> usize {
        let (mut rate, mut requests, mut rising) = (0_u32, 0, true);
        loop {
            requests += rate as usize;
            rising &= rate < peak;
            if !rising && rate == 1 {
                return requests;
            }
            if rising { rate += 1 } else { rate -= 1 }
        }
    }

    #[test]
    fn a_ramp_has_as_many_requests_as_a_plain_count() {
        for peak in [2, 12, 14, 15, 16, 17, 18, 20] {
            let ramps = [0, 1, PHASES - 1].map(|phase| staggered_ramps(3, peak, phase));
            for requests in ramps.concat() {
                assert_eq!(requests.len(), counted(peak), "peak {peak}");
                assert_eq!(requests.len(), (peak * peak) as usize);
            }
        }
    }

    #[test]
    fn requests_are_evenly_spaced_within_a_second_and_ramps_begin_apart() {
        let models = staggered_ramps(3, 4, 0);
        let arrivals = |model: usize| models[model].iter().map(|request| request.arrival_ns);
        // Rate 0 in the first second, 1 in the next, 2 in the third, and 4 in the fifth.
        let first: Vec<_> = arrivals(0).map(|ns| ns / 1_000_000).collect();
        assert_eq!(first[..3], [1000, 2000, 2500]);
        assert_eq!(first[6..10], [4000, 4250, 4500, 4750]);
        assert_eq!(first.last(), Some(&7000), "down to one request a second");
        for model in 1..3 {
            let begin_ns = model as u64 * 9 * SECOND_NS;
            assert!(arrivals(model).eq(arrivals(0).map(|ns| ns + begin_ns)));
        }
        let later = &staggered_ramps(1, 4, PHASES / 2)[0];
        let later = [0, 1, 2].map(|index| later[index].arrival_ns / 1_000_000);
        assert_eq!(later, [1500, 2250, 2750], "half a share later");
    }

    #[test]
    fn each_second_has_its_rate() {
        let requests = paced(500, PHASES - 1, [3, 0, 7]);
        let in_second = |second: u64| {
            let within = |request: &&Request| (request.arrival_ns - 500) / SECOND_NS == second;
            requests.iter().filter(within).count()
        };
        assert_eq!([0, 1, 2, 3].map(in_second), [3, 0, 7, 0]);
    }
}
