//! What is replayed: each model with its requests.

use std::path::PathBuf;

use anyhow::Result;

use crate::model::{self, Model};
use crate::{generator, trace};

/// One request: when it arrives and how long it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Arrival in nanoseconds of simulated time.
    pub arrival_ns: u64,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens that are generated.
    pub generated_tokens: u32,
}

impl Request {
    /// Tokens that the request holds at its end.
    pub fn tokens(&self) -> u32 {
        self.prompt_tokens.saturating_add(self.generated_tokens)
    }
}

/// A model and all that is asked of it.
#[derive(Clone, Debug)]
pub struct Service {
    /// The model.
    pub model: Model,
    /// Its requests in the order of arrival.
    pub requests: Vec<Request>,
}

/// Everything that shares the GPU.
#[derive(Clone, Debug)]
pub struct Workload {
    /// The services, the batch job last.
    pub services: Vec<Service>,
}

impl Workload {
    /// One service for each trace, and the batch job for as long as they run. Each trace starts at
    /// time 0.
    pub fn from_traces(traces: &[PathBuf], seed: u64) -> Result<Self> {
        let mut services = Vec::new();
        for (model, path) in [model::CHAT, model::CODE].into_iter().zip(traces) {
            services.push(Service {
                model,
                requests: trace::read(path)?,
            });
        }
        Ok(Self::with_batch(services, seed))
    }

    /// Two generated services and the batch job.
    pub fn generated(seed: u64) -> Self {
        let services = [
            (model::CHAT, generator::CHAT),
            (model::CODE, generator::CODE),
        ];
        let services = services
            .into_iter()
            .enumerate()
            .map(|(stream, (model, bursts))| Service {
                model,
                requests: generator::service(&bursts, seed, stream as u64),
            });
        Self::with_batch(services.collect(), seed)
    }

    fn with_batch(mut services: Vec<Service>, seed: u64) -> Self {
        let ends = services
            .iter()
            .filter_map(|service| service.requests.last());
        let end_ns = ends.map(|request| request.arrival_ns).max().unwrap_or(0);
        let stream = services.len() as u64;
        services.push(Service {
            model: model::BATCH,
            requests: generator::batch(end_ns, seed, stream),
        });
        Self { services }
    }

    /// Number of requests of all services.
    pub fn request_count(&self) -> usize {
        self.services
            .iter()
            .map(|service| service.requests.len())
            .sum()
    }

    /// When the last request ends if none is refused, in nanoseconds.
    pub fn end_ns(&self) -> u64 {
        let ends = self.services.iter().flat_map(|service| {
            service
                .requests
                .iter()
                .map(|request| service.end_ns(request))
        });
        ends.max().unwrap_or(0)
    }
}

impl Service {
    /// Prompt tokens of all requests.
    pub fn prompt_tokens(&self) -> u64 {
        self.requests
            .iter()
            .map(|request| u64::from(request.prompt_tokens))
            .sum()
    }

    /// Generated tokens of all requests.
    pub fn generated_tokens(&self) -> u64 {
        self.requests
            .iter()
            .map(|request| u64::from(request.generated_tokens))
            .sum()
    }

    /// Tokens of the longest request.
    pub fn tokens_max(&self) -> u32 {
        self.requests.iter().map(Request::tokens).max().unwrap_or(0)
    }

    /// The most requests that run at once if none is refused.
    pub fn running_max(&self) -> usize {
        let starts = self.requests.iter().map(|request| (request.arrival_ns, 1));
        let ends = self
            .requests
            .iter()
            .map(|request| (self.end_ns(request), -1));
        let mut changes: Vec<(u64, isize)> = starts.chain(ends).collect();
        // At one instant starts count before ends, so that the answer is an upper bound.
        changes.sort_unstable_by_key(|&(at_ns, change)| (at_ns, -change));
        let mut running = 0_isize;
        let mut running_max = 0;
        for (_, change) in changes {
            running += change;
            running_max = running_max.max(running);
        }
        running_max.unsigned_abs()
    }

    /// When a request that is not refused ends, in nanoseconds.
    fn end_ns(&self, request: &Request) -> u64 {
        let generating_ns = u64::from(request.generated_tokens) * self.model.token_ns();
        request.arrival_ns + self.model.prompt_ns(request.prompt_tokens) + generating_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(arrival_ns: u64, generated_tokens: u32) -> Request {
        Request {
            arrival_ns,
            prompt_tokens: 1,
            generated_tokens,
        }
    }

    #[test]
    fn counts_what_runs_at_once() {
        let model = model::CHAT;
        let token = model.token_ns();
        let requests = vec![request(0, 10), request(token, 1), request(20 * token, 1)];
        let service = Service { model, requests };
        assert_eq!(service.running_max(), 2);
        let none = Service {
            model,
            requests: Vec::new(),
        };
        assert_eq!(none.running_max(), 0);
        assert_eq!(none.tokens_max(), 0);
    }

    #[test]
    fn the_batch_job_runs_as_long_as_the_services() {
        let workload = Workload::generated(1);
        let [chat, code, batch] = &workload.services[..] else {
            panic!("three services")
        };
        let services = chat.requests.iter().chain(&code.requests);
        let last = services
            .map(|request| request.arrival_ns)
            .max()
            .expect("requests");
        let batch_last = batch.requests.last().expect("batch requests").arrival_ns;
        assert!(batch_last <= last && last - batch_last < 8_000_000_000);
        assert!(workload.end_ns() > last);
        assert_eq!(
            workload.request_count(),
            chat.requests.len() + code.requests.len() + batch.requests.len()
        );
    }
}
