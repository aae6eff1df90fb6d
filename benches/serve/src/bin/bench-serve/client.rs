//! One request over HTTP, token by token.

use crate::arrivals::{PhaseName, Planned};
use crate::metrics::Metrics;
use crate::record::Recorded;
use crate::stream::{Events, Said};
use anyhow::{Context, Result, ensure};
use reqwest::{Response, header};
use serde_json::json;
use std::time::{Duration, Instant};

/// A request that takes longer has failed.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(300);
/// How late a timer of the runtime may be: it counts whole milliseconds. The rest is waited for
/// without one.
const TIMER: Duration = Duration::from_millis(2);
/// The numbers of a server are to be had at once.
const METRICS_TIMEOUT: Duration = Duration::from_secs(10);

/// Sends requests to one server.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    url: String,
    models: Vec<String>,
}

/// A request that is ready to be sent.
pub struct Ready {
    body: String,
    record: Recorded,
}

impl Ready {
    /// Has the request be planned for this time.
    pub fn plan(&mut self, planned_us: u64) {
        self.record.planned_us = planned_us;
    }
}

impl Client {
    /// A client of the server at a URL without a path, with models of these names.
    ///
    /// # Errors
    ///
    /// If the HTTP client cannot be made.
    pub fn new(url: &str, models: Vec<String>) -> Result<Self> {
        let http = reqwest::Client::builder()
            .no_proxy()
            .tcp_nodelay(true)
            .build()
            .context("no HTTP client")?;
        let url = url.to_owned();
        Ok(Self { http, url, models })
    }

    /// Makes all of a request that can be made before its time.
    pub fn ready(&self, planned: &Planned, phase: PhaseName, begin_us: u64) -> Ready {
        let body = json!({
            "model": self.models[planned.model], "prompt": planned.prompt,
            "max_tokens": planned.generated_tokens, "temperature": 0, "stream": true,
            "ignore_eos": true, "return_token_ids": true,
        });
        Ready {
            body: body.to_string(),
            record: Recorded {
                model: planned.model,
                phase,
                prompt_tokens: planned.prompt.len(),
                generated_tokens_asked: planned.generated_tokens,
                planned_us: begin_us + planned.arrival_us,
                sent_us: 0,
                first_token_us: None,
                token_gaps_us: Vec::new(),
                end_us: 0,
                status: None,
                retry_after: None,
                failure: None,
                tokens: 0,
            },
        }
    }

    /// Sends a request when its time comes, and records all that comes back. `start` is the run's
    /// beginning.
    pub async fn send(&self, ready: Ready, start: Instant) -> Recorded {
        let planned = start + Duration::from_micros(ready.record.planned_us);
        if let Some(early) = planned.checked_sub(TIMER) {
            tokio::time::sleep_until(early.into()).await;
        }
        while Instant::now() < planned {
            tokio::task::yield_now().await;
        }
        self.send_now(ready, start).await
    }

    /// Sends a request, and records all that comes back.
    pub async fn send_now(&self, ready: Ready, start: Instant) -> Recorded {
        let Ready { body, mut record } = ready;
        record.sent_us = since(start);
        let request = self.http.post(format!("{}/v1/completions", self.url));
        let request = request.header(header::CONTENT_TYPE, "application/json");
        let response = request.timeout(REQUEST_TIMEOUT).body(body).send().await;
        record.failure = match response {
            Ok(response) => receive(response, &mut record, start).await,
            Err(error) => Some(describe(&error)),
        };
        record.end_us = since(start);
        record
    }

    /// What the server says of its models.
    ///
    /// # Errors
    ///
    /// If it says nothing, or does not say all.
    pub async fn metrics(&self) -> Result<Metrics> {
        let request = self.http.get(format!("{}/metrics", self.url));
        let response = request.timeout(METRICS_TIMEOUT).send().await;
        let text = response.context("no /metrics")?.text().await;
        Metrics::parse(&text.context("no /metrics")?, &self.models)
    }

    /// Waits until the server has nothing to do.
    ///
    /// # Errors
    ///
    /// If that takes too long.
    pub async fn idle(&self, patience: Duration) -> Result<Metrics> {
        let deadline = Instant::now() + patience;
        loop {
            let metrics = self.metrics().await?;
            if metrics.is_idle() {
                return Ok(metrics);
            }
            let is_time = Instant::now() < deadline;
            ensure!(is_time, "the server is still busy: {metrics:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Microseconds since a run's beginning.
pub fn since(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// Reads a response to its end. Returns why there is no whole text, if the request was not refused.
async fn receive(mut response: Response, record: &mut Recorded, start: Instant) -> Option<String> {
    let status = response.status().as_u16();
    record.status = Some(status);
    let retry_after = response.headers().get(header::RETRY_AFTER);
    let retry_after = retry_after.and_then(|value| value.to_str().ok());
    record.retry_after = retry_after.and_then(|value| value.parse().ok());
    if status != 200 {
        let text = response.text().await.unwrap_or_default();
        return (!record.is_refused()).then_some(text);
    }
    let (mut events, mut last_us) = (Events::default(), None);
    let (mut is_done, mut failure) = (false, None);
    loop {
        let bytes = match response.chunk().await {
            Ok(Some(bytes)) => bytes,
            Ok(None) => break,
            Err(error) => return Some(describe(&error)),
        };
        let now_us = since(start);
        events.push(&bytes, |data| match Said::read(data) {
            Said::Done => is_done = true,
            Said::Failed(why) => failure = Some(why),
            Said::Tokens(count) => {
                for _ in 0..count {
                    match last_us.replace(now_us) {
                        None => record.first_token_us = Some(now_us),
                        Some(last_us) => record.token_gaps_us.push(now_us - last_us),
                    }
                }
                record.tokens += count;
            }
        });
    }
    let (tokens, asked) = (record.tokens, record.generated_tokens_asked);
    let short = || (tokens != asked as usize).then(|| format!("{tokens} tokens of {asked}"));
    let cut = || (!is_done).then(|| "the stream was cut".to_owned());
    failure.or_else(cut).or_else(short)
}

/// An error with its causes.
fn describe(error: &reqwest::Error) -> String {
    let (mut text, mut cause) = (error.to_string(), std::error::Error::source(error));
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}
