//! The command line.

use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};

const GIB: f64 = (1_u64 << 30) as f64;

/// Two services and a batch job share one GPU's memory under one limit.
///
/// Replays requests against a SharedMemoryPool: the KV cache of each request grows token by token
/// in its model's range of addresses and is given back when the request ends. Beside it stands what
/// a static split of the same memory would have refused. Runs on a GPU if there is one, otherwise
/// on the simulated driver.
#[derive(Clone, Debug, Parser)]
#[command(name = "demo", after_long_help = EXPLANATION)]
pub struct Arguments {
    /// Trace in the Azure LLM inference format (CSV with the columns TIMESTAMP, ContextTokens and
    /// GeneratedTokens). The first trace drives the chat service, the second the code service; each
    /// starts at time 0. Without traces both are generated
    #[arg(long = "trace", value_name = "FILE")]
    pub traces: Vec<PathBuf>,

    /// Seed of the generated services and of the batch job's lengths
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    pub seed: u64,

    /// Physical memory that the models share, in GiB
    #[arg(long, value_name = "GIB", default_value = "24", allow_negative_numbers = true, value_parser = parse_gib)]
    pub limit_gib: f64,

    /// Shares of the static split, in proportion to each other: chat,code,batch (with one trace:
    /// chat,batch). Equal shares if not given
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',', value_parser = parse_share)]
    pub shares: Vec<f64>,

    /// Where to draw memory over time [default: demo.svg in the target folder; where there is none,
    /// in the current folder]
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,

    /// Where to write the figures as data
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

const EXPLANATION: &str = "\
Models:
  chat   Llama 3.1 8B       131,072 bytes of KV cache a token, 40 tokens/s a request
  code   Qwen2.5 Coder 14B  196,608 bytes a token, 30 tokens/s
  batch  Llama 3.2 3B       114,688 bytes a token, 30 tokens/s

The batch job is built in. It works off a backlog of long documents at a steady pace: a request of
6,144 to 10,240 prompt tokens and 768 to 1,280 generated tokens every 8 seconds, from the start until
the last arrival of the services; about four run at a time.

Without traces, chat and code arrive in bursts for 10 minutes of simulated time. Time is simulated:
nothing sleeps, and each request generates at its model's constant pace.

Refusal: a request whose prompt finds no memory is refused at arrival; one that finds no memory for
its next token is refused midway. Either way it gives back what it holds, does not come again, and
counts as one refused request. The static split gives each model a fixed share of the limit (--shares)
and answers the same requests by the same rule, in whole pages, as bookkeeping without a driver.

Live is the KV cache that running requests hold; committed is the physical memory that the pool holds
for them. Freed memory goes back to the device in real time while simulated time runs much faster, so
committed lies above live by what is on its way back. It is never in the way of a request: the pool
waits for it where it is needed.

Examples:
  demo
  demo --seed 7 --limit-gib 16 --json demo.json
  demo --trace AzureLLMInferenceTrace_conv.csv --trace AzureLLMInferenceTrace_code.csv";

impl Arguments {
    /// Reads the command line; exits with a message and code 2 if it is wrong.
    pub fn from_command_line() -> Self {
        Self::parse().checked().unwrap_or_else(|error| error.exit())
    }

    /// Checks what depends on several values.
    fn checked(self) -> Result<Self, clap::Error> {
        let traces = self.traces.len();
        if traces > 2 {
            return Err(mistake(&format!(
                "{traces} traces; at most 2 services can be replayed"
            )));
        }
        let models = if traces == 1 { 2 } else { 3 };
        if !self.shares.is_empty() && self.shares.len() != models {
            let shares = self.shares.len();
            return Err(mistake(&format!("{shares} shares for {models} models")));
        }
        Ok(self)
    }

    /// The limit in bytes, rounded down.
    pub fn limit_bytes(&self) -> u64 {
        (self.limit_gib * GIB) as u64
    }
}

fn mistake(message: &str) -> clap::Error {
    Arguments::command().error(ErrorKind::ValueValidation, message)
}

fn parse_gib(text: &str) -> Result<f64, String> {
    let gib: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if !(gib > 0.0 && gib <= 1_048_576.0) {
        return Err("must be more than 0 and at most 1048576".to_owned());
    }
    Ok(gib)
}

fn parse_share(text: &str) -> Result<f64, String> {
    let share: f64 = text.trim().parse().map_err(|_| "not a number".to_owned())?;
    if !(share.is_finite() && share > 0.0) {
        return Err("must be more than 0".to_owned());
    }
    Ok(share)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generator::{
        BATCH_GENERATED_TOKENS, BATCH_PROMPT_TOKENS, BATCH_SPACING_SECONDS, SERVICE_SECONDS,
    };
    use crate::model::{BATCH, CHAT, CODE};
    use crate::table::count;

    fn parse(arguments: &[&str]) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from([&["demo"], arguments].concat())?.checked()
    }

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn the_help_agrees_with_the_models() {
        for model in [CHAT, CODE, BATCH] {
            for fact in [
                model.network.to_owned(),
                format!("{} bytes", count(model.bytes_per_token)),
                format!("{} tokens/s", model.generated_tokens_per_second),
            ] {
                assert!(EXPLANATION.contains(&fact), "{}: {fact}", model.name);
            }
        }
        for mean in [BATCH_PROMPT_TOKENS, BATCH_GENERATED_TOKENS].map(u64::from) {
            let range = [mean - mean / 4, mean + mean / 4].map(count);
            let range = format!("{} to {}", range[0], range[1]);
            assert!(EXPLANATION.contains(&range), "{range}");
        }
        assert!(EXPLANATION.contains(&format!("every {BATCH_SPACING_SECONDS} seconds")));
        assert!(EXPLANATION.contains(&format!("{} minutes", SERVICE_SECONDS / 60)));
    }

    #[test]
    fn reads_traces_limit_and_shares() {
        let line = [
            "--trace",
            "a",
            "--trace",
            "b",
            "--limit-gib",
            "0.5",
            "--shares",
            "2,1,1",
        ];
        let arguments = parse(&line).expect("valid");
        assert_eq!(arguments.traces, [PathBuf::from("a"), PathBuf::from("b")]);
        assert_eq!(arguments.limit_bytes(), 1 << 29);
        assert_eq!(arguments.shares, [2.0, 1.0, 1.0]);
    }

    #[test]
    fn counts_of_traces_and_shares_must_fit() {
        for line in [
            &["--trace", "a", "--trace", "b", "--trace", "c"][..],
            &["--shares", "1,1"],
            &["--shares", "1,1,1", "--trace", "a"],
        ] {
            assert_eq!(
                parse(line).expect_err("must fail").exit_code(),
                2,
                "{line:?}"
            );
        }
        assert!(parse(&["--shares", "1,1", "--trace", "a"]).is_ok());
    }

    #[test]
    fn rejects_bad_values_and_unknown_flags() {
        for line in [
            ["--limit-gib", "0"],
            ["--limit-gib", "-1"],
            ["--limit-gib", "NaN"],
            ["--limit-gib", "inf"],
            ["--limit-gib", "much"],
            ["--shares", "1,0,1"],
            ["--shares", "1,,1"],
            ["--seed", "-1"],
            ["--trace-file", "a"],
        ] {
            assert_eq!(
                parse(&line).expect_err("must fail").exit_code(),
                2,
                "{line:?}"
            );
        }
    }
}
