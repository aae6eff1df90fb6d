//! Weights that sleep, and what the model is made of with them.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use crate::config::Config;
use crate::weights::{Source, Weights};
use candle_core::DType;
use candle_cuda_vmm::cuda_vmm;
use candle_cuda_vmm::{ElasticWeights, HostStore, Keep, Result, VmmError, WakeOptions};

/// Weights that sleep, and what the model is made of with them.
pub struct Sleeper {
    weights: ElasticWeights,
    pub(super) config: Config,
    dtype: DType,
    pub(super) store: HostStore,
}

/// What became of the contents of a model that sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Whether the host has the weights. If not, a wake reads or makes them again.
    pub weights: bool,
    /// Whether the host has the prefixes. If not, they are forgotten.
    pub prefixes: bool,
}

impl Sleeper {
    /// Weights on the model's account, and the store that has contents while it sleeps.
    pub fn new(weights: ElasticWeights, config: &Config, dtype: DType, store: HostStore) -> Self {
        Self {
            weights,
            config: config.clone(),
            dtype,
            store,
        }
    }

    /// What to make the model of.
    ///
    /// # Errors
    ///
    /// If they are asleep.
    pub fn weights(&self) -> Result<Weights> {
        let builder = self.weights.var_builder(self.dtype)?;
        let device = builder.device().clone();
        Ok(Weights::new(Source::Built(builder), self.dtype, &device))
    }

    /// Puts the weights to sleep. Nothing was written to them since they were made.
    /// Returns whether the host has them.
    pub(super) fn sleep(&mut self) -> Result<bool> {
        match self.weights.sleep(Keep::Constant(&self.store)) {
            Err(error) if is_store_full(&error) => {
                self.weights.sleep(Keep::Nothing)?;
                Ok(false)
            }
            slept => slept.map(|_| true),
        }
    }

    /// Has the memory of the weights again, and what is in it, unless they are awake.
    pub(super) fn wake(&mut self) -> Result<()> {
        match self.weights.is_asleep() {
            true => self.weights.wake(&WakeOptions::new()),
            false => Ok(()),
        }
    }
}

/// Whether a store has no room.
pub fn is_store_full(error: &VmmError) -> bool {
    matches!(
        error,
        VmmError::Vmm(cuda_vmm::VmmError::HostStoreFull { .. })
    )
}
