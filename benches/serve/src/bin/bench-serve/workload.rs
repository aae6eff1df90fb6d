//! The workloads, and what each needs of a server.

use crate::arrivals::{self, Run};
use crate::settings::Settings;
use clap::ValueEnum;
// The reader of traces makes these.
pub use cuda_vmm_benches::serving::Request;
use serde::Serialize;

/// What is asked of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Workload {
    /// Ramps of several models that hardly overlap
    #[value(name = "a", alias = "ramps")]
    Ramps,
    /// Excerpts of traces
    #[value(name = "b", alias = "traces")]
    Traces,
    /// Idle models beside a busy one
    #[value(name = "c", alias = "idle")]
    Idle,
    /// All memory from one model to another
    #[value(name = "d", alias = "hand-over")]
    HandOver,
    /// Clients of one model that wait for each response
    #[value(name = "e", alias = "closed")]
    Closed,
}

impl Workload {
    pub const ALL: [Self; 5] = [
        Self::Ramps,
        Self::Traces,
        Self::Idle,
        Self::HandOver,
        Self::Closed,
    ];

    /// Its name, as in the simulated benchmark.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ramps => "(a) ramps",
            Self::Traces => "(b) traces",
            Self::Idle => "(c) idle models and a busy one",
            Self::HandOver => "(d) hand over",
            Self::Closed => "(e) closed loop",
        }
    }

    /// How many models the server has for it.
    pub fn models(self, settings: &Settings, traces: &[Vec<Request>]) -> usize {
        match self {
            Self::Ramps => settings.ramps.models as usize,
            Self::Traces => traces.len(),
            Self::Idle => settings.idle.idle_models as usize + 1,
            Self::HandOver => 2,
            Self::Closed => 1,
        }
    }

    /// Its runs, the same for each policy.
    pub fn runs(self, settings: &Settings, traces: &[Vec<Request>]) -> Vec<Run> {
        match self {
            Self::Ramps => arrivals::ramps(&settings.ramps),
            Self::Traces => arrivals::traces(&settings.traces, traces),
            Self::Idle => arrivals::idle(&settings.idle),
            Self::HandOver => arrivals::hand_over(&settings.hand_over),
            Self::Closed => arrivals::closed(&settings.closed),
        }
    }
}
