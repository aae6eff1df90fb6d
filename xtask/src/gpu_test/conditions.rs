//! What this machine has of what rows need.

use super::cell::{Cell, Driver, Suite};
use super::probe::Answer;
use super::row::State;
use super::{libraries::Libraries, sanitizer};
use std::path::PathBuf;

/// What this machine has.
#[derive(Clone, Debug, Default)]
pub struct Conditions {
    /// What the probe answered, if it was asked.
    pub gpu: Option<Answer>,
    /// The CUDA libraries for Candle.
    pub libraries: Libraries,
    /// NVIDIA's memory checker, if it was looked for and is here.
    pub sanitizer: Option<PathBuf>,
}

impl Conditions {
    /// What can be known before anything is built.
    pub fn find(gpu: Option<Answer>, sanitize: bool) -> Self {
        Self {
            gpu,
            libraries: Libraries::default(),
            sanitizer: sanitize.then(sanitizer::find).flatten(),
        }
    }

    /// Why a cell cannot be run here, and whether that is a failure.
    pub fn obstacle(&self, cell: &Cell) -> Option<(State, String)> {
        if cell.driver != Driver::Real {
            return None;
        }
        let skipped = |reason: String| Some((State::Skipped, reason));
        let gpus = match &self.gpu {
            None => return skipped("no GPU was looked for".to_owned()),
            Some(Answer::NoGpu(reason)) => return skipped(reason.clone()),
            Some(Answer::Broken(reason)) => {
                return Some((
                    State::Fail,
                    format!("the CUDA driver is here, but fails: {reason}"),
                ));
            }
            Some(Answer::Gpu(gpu)) => gpu.count,
        };
        if gpus < cell.devices {
            return skipped(format!(
                "needs {} GPUs, this machine has {gpus}",
                cell.devices
            ));
        }
        if cell.sanitized && self.sanitizer.is_none() {
            return skipped(
                "compute-sanitizer is neither on PATH nor in a CUDA toolkit".to_owned(),
            );
        }
        if cell.suite == Suite::Facade && !self.libraries.missing.is_empty() {
            return skipped(format!("missing {}", self.libraries.missing.join(", ")));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu_test::probe::Gpu;

    #[test]
    fn sanitized_rows_are_skipped_where_there_is_no_sanitizer() {
        let mut conditions = Conditions {
            gpu: Some(Answer::Gpu(Gpu {
                name: "Test GPU".to_owned(),
                count: 1,
                cuda: "13.0".to_owned(),
            })),
            ..Conditions::default()
        };
        let [plain, sanitized] = [false, true].map(|sanitized| {
            let mut cells = Cell::all(sanitized).into_iter();
            cells.find(|cell| cell.is("core")).unwrap()
        });
        assert_eq!(conditions.obstacle(&plain), None);
        let (state, reason) = conditions.obstacle(&sanitized).unwrap();
        assert_eq!(state, State::Skipped);
        assert!(reason.contains("compute-sanitizer"), "{reason}");
        conditions.sanitizer = Some(PathBuf::from("compute-sanitizer"));
        assert_eq!(conditions.obstacle(&sanitized), None);
    }
}
