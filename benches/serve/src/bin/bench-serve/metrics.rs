//! What the server's `/metrics` says of its models.

use anyhow::{Result, ensure};

/// The numbers of each model, in the order of their names that are given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metrics {
    pub committed_bytes: Vec<u64>,
    pub running: Vec<u64>,
    pub waiting: Vec<u64>,
    pub preemptions: Vec<u64>,
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
        Ok(metrics)
    }

    /// Whether no sequence runs or waits.
    pub fn is_idle(&self) -> bool {
        self.running.iter().chain(&self.waiting).all(|it| *it == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_in_the_order_of_the_models_and_none_may_be_missing() {
        let names = ["m1".to_owned(), "m2".to_owned()];
        let mut text = String::new();
        for (at, name) in ["committed_bytes", "serve_running", "serve_waiting"]
            .iter()
            .enumerate()
        {
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
        assert!(!metrics.is_idle());
    }
}
