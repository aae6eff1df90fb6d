//! What the server's `/metrics` says of its models.

use anyhow::{Context, Result, ensure};
use serde::Serialize;

/// The numbers of each model, in the order of their names that are given.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    pub committed_bytes: Vec<u64>,
    /// What of that sequences use, and what only the prefix cache holds.
    pub live_bytes: Vec<u64>,
    pub prefix_bytes: Vec<u64>,
    pub running: Vec<u64>,
    pub waiting: Vec<u64>,
    pub preemptions: Vec<u64>,
    pub steps: Vec<Steps>,
    pub prompt_steps: Vec<PromptSteps>,
}

/// Steps with prompts, since the server started.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct PromptSteps {
    pub model: usize,
    /// As many tokens of prompts, or up to half of them less.
    pub prompt_tokens_max: u32,
    pub count: u64,
    /// Of all of them together.
    pub prompt_tokens: u64,
    /// Sequences that decoded beside the prompts.
    pub sequences: u64,
    pub seconds: f64,
}

/// Steps without prompts, since the server started.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Steps {
    pub model: usize,
    /// As many sequences, or up to half of them less.
    pub sequences_max: u32,
    pub count: u64,
    /// Of all their sequences together.
    pub sequences: u64,
    pub seconds: f64,
    /// What of that is the server's own: all but the model's.
    pub own_seconds: f64,
    /// The share that is the server's own in half of the steps at most, and in 99 of 100.
    pub own_share_p50: f64,
    pub own_share_p99: f64,
}

impl Metrics {
    /// Reads Prometheus's text.
    ///
    /// # Errors
    ///
    /// If a number of a model is missing.
    pub fn parse(text: &str, models: &[String]) -> Result<Self> {
        let mut metrics = Self::default();
        let all = [
            ("cuda_vmm_committed_bytes", &mut metrics.committed_bytes),
            ("cuda_vmm_serve_live_bytes", &mut metrics.live_bytes),
            (
                "cuda_vmm_serve_cached_prefix_bytes",
                &mut metrics.prefix_bytes,
            ),
            ("cuda_vmm_serve_running", &mut metrics.running),
            ("cuda_vmm_serve_waiting", &mut metrics.waiting),
            ("cuda_vmm_serve_preemptions_total", &mut metrics.preemptions),
        ];
        for (name, values) in all {
            for model in models {
                let head = format!("{name}{{model=\"{model}\"}} ");
                let mut lines = text.lines().filter_map(|line| line.strip_prefix(&head));
                let value: Option<u64> = lines.next().and_then(|value| value.parse().ok());
                ensure!(value.is_some(), "/metrics has no {head}");
                values.extend(value);
            }
        }
        for (model, name) in models.iter().enumerate() {
            metrics.steps.extend(steps(text, model, name)?);
            metrics
                .prompt_steps
                .extend(prompt_steps(text, model, name)?);
        }
        Ok(metrics)
    }

    /// Whether no sequence runs or waits.
    pub fn is_idle(&self) -> bool {
        self.running.iter().chain(&self.waiting).all(|it| *it == 0)
    }
}

/// The numbers of the steps of a model and a size.
struct OfSize<'a> {
    text: &'a str,
    /// What stands between the metric's name and its value.
    labels: String,
    size: &'a str,
}

impl<'a> OfSize<'a> {
    /// Those of a model by a label, for which a metric counts steps. It has none before its first.
    fn all(text: &'a str, model: &str, label: &str, counted: &str) -> Vec<Self> {
        let head = format!("{counted}_count{{model=\"{model}\",{label}=\"");
        let lines = text.lines().filter_map(|line| line.strip_prefix(&head));
        let sizes = lines.filter_map(|line| line.split_once('"'));
        let of_size = sizes.map(|(size, _)| Self {
            text,
            labels: format!("{{model=\"{model}\",{label}=\"{size}\""),
            size,
        });
        of_size.collect()
    }

    /// The value of a metric, which may have more labels.
    fn number(&self, metric: &str, more: &str) -> Result<f64> {
        let head = format!("cuda_vmm_serve_{metric}{}{more}}} ", self.labels);
        let mut lines = self
            .text
            .lines()
            .filter_map(|line| line.strip_prefix(&head));
        let value = lines.next().and_then(|value| value.parse().ok());
        value.with_context(|| format!("/metrics has no {head}"))
    }
}

fn steps(text: &str, model: usize, name: &str) -> Result<Vec<Steps>> {
    let all = OfSize::all(text, name, "sequences", "cuda_vmm_serve_step_seconds");
    let steps = all.into_iter().map(|of| {
        Ok(Steps {
            model,
            sequences_max: of.size.parse()?,
            count: of.number("step_seconds_count", "")? as u64,
            sequences: of.number("step_sequences_total", "")? as u64,
            seconds: of.number("step_seconds_sum", "")?,
            own_seconds: of.number("step_own_seconds_sum", "")?,
            own_share_p50: of.number("step_own_ratio", ",quantile=\"0.5\"")?,
            own_share_p99: of.number("step_own_ratio", ",quantile=\"0.99\"")?,
        })
    });
    steps.collect()
}

fn prompt_steps(text: &str, model: usize, name: &str) -> Result<Vec<PromptSteps>> {
    let counted = "cuda_vmm_serve_prompt_step_seconds";
    let steps = OfSize::all(text, name, "prompt_tokens", counted);
    let steps = steps.into_iter().map(|of| {
        Ok(PromptSteps {
            model,
            prompt_tokens_max: of.size.parse()?,
            count: of.number("prompt_step_seconds_count", "")? as u64,
            prompt_tokens: of.number("prompt_step_tokens_total", "")? as u64,
            sequences: of.number("prompt_step_sequences_total", "")? as u64,
            seconds: of.number("prompt_step_seconds_sum", "")?,
        })
    });
    steps.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_in_the_order_of_the_models_and_none_may_be_missing() {
        let names = ["m1".to_owned(), "m2".to_owned()];
        let mut text = String::new();
        let names_of = [
            "committed_bytes",
            "serve_running",
            "serve_waiting",
            "serve_live_bytes",
            "serve_cached_prefix_bytes",
        ];
        for (at, name) in names_of.iter().enumerate() {
            text += &format!("# HELP cuda_vmm_{name} {{model=\"m1\"}} 9\n");
            text += &format!("cuda_vmm_{name}{{model=\"m2\"}} {at}2\n");
            text += &format!("cuda_vmm_{name}{{model=\"m1\"}} {at}1\n");
        }
        let error = Metrics::parse(&text, &names).unwrap_err().to_string();
        assert!(error.contains("preemptions_total"), "{error}");
        for name in &names {
            text += &format!("cuda_vmm_serve_preemptions_total{{model=\"{name}\"}} 0\n");
        }
        let metrics = Metrics::parse(&text, &names).unwrap();
        assert_eq!(metrics.committed_bytes, [1, 2]);
        assert_eq!(metrics.running, [11, 12]);
        assert_eq!(
            (metrics.live_bytes, metrics.prefix_bytes),
            (vec![31, 32], vec![41, 42])
        );
        assert!(metrics.steps.is_empty());
    }

    #[test]
    fn steps_are_read_with_all_their_numbers_or_not_at_all() {
        let mut text = String::new();
        let label = "{model=\"m2\",sequences=\"64\"";
        for (name, value) in [
            ("step_seconds_count", "3"),
            ("step_sequences_total", "150"),
            ("step_seconds_sum", "0.006"),
            ("step_own_seconds_sum", "0.0003"),
        ] {
            text += &format!("cuda_vmm_serve_{name}{label}}} {value}\n");
        }
        assert!(steps(&text, 1, "m2").is_err());
        for (quantile, value) in [("0.5", "0.05"), ("0.99", "0.095")] {
            text += &format!(
                "cuda_vmm_serve_step_own_ratio{label},quantile=\"{quantile}\"}} {value}\n"
            );
        }
        let expected = Steps {
            model: 1,
            sequences_max: 64,
            count: 3,
            sequences: 150,
            seconds: 0.006,
            own_seconds: 0.0003,
            own_share_p50: 0.05,
            own_share_p99: 0.095,
        };
        assert_eq!(steps(&text, 1, "m2").unwrap(), [expected]);
        assert!(steps(&text, 0, "m1").unwrap().is_empty());

        let label = "{model=\"m1\",prompt_tokens=\"256\"}";
        for (name, value) in [("count", "2"), ("sum", "0.01")] {
            text += &format!("cuda_vmm_serve_prompt_step_seconds_{name}{label} {value}\n");
        }
        assert!(prompt_steps(&text, 0, "m1").is_err());
        for (name, value) in [("tokens", "500"), ("sequences", "0")] {
            text += &format!("cuda_vmm_serve_prompt_step_{name}_total{label} {value}\n");
        }
        let expected = PromptSteps {
            model: 0,
            prompt_tokens_max: 256,
            count: 2,
            prompt_tokens: 500,
            sequences: 0,
            seconds: 0.01,
        };
        assert_eq!(prompt_steps(&text, 0, "m1").unwrap(), [expected]);
    }
}
