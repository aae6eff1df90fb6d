//! A model whose weights sleep and wake with it.

use super::{ElasticWeights, WeightsArriving};
use crate::error::{Result, WeightsError};
use candle_core::DType;
use candle_nn::VarBuilder;
use cuda_vmm::{Keep, Slept, WakeOptions};
use std::fmt;

/// Makes a model of a builder.
type Build<M> = dyn Fn(VarBuilder<'static>) -> candle_core::Result<M> + Send + Sync;

/// A model over [`ElasticWeights`], and how it is made of them.
///
/// Candle launches kernels from anywhere, and clones of tensors escape each wrapper. So there is no
/// gate before a launch: [`sleep`](Self::sleep) drops the model with its tensors, and is refused
/// while a clone of one is left. After a wake the first [`get`](Self::get) makes the model again, of
/// tensors at the same addresses, without reading a byte. So a captured step over them is right
/// again.
///
/// What the model has beside the weights, such as tables of sines, is made anew.
pub struct ElasticModel<M> {
    model: Option<M>,
    weights: ElasticWeights,
    dtype: DType,
    build: Box<Build<M>>,
}

impl<M> ElasticModel<M> {
    /// Makes the model of these weights.
    ///
    /// # Errors
    /// Those of `build`; [`WeightsError::Asleep`].
    pub fn new(
        weights: ElasticWeights,
        dtype: DType,
        build: impl Fn(VarBuilder<'static>) -> candle_core::Result<M> + Send + Sync + 'static,
    ) -> Result<Self> {
        let mut model = Self {
            model: None,
            weights,
            dtype,
            build: Box::new(build),
        };
        model.get()?;
        Ok(model)
    }

    /// The model. It is made if it is not there: after a wake, or after a sleep that was refused.
    ///
    /// # Errors
    /// [`WeightsError::Asleep`]; those of `build`, and then the next call tries again.
    pub fn get(&mut self) -> Result<&mut M> {
        let made = match self.model.take() {
            Some(model) => model,
            None => (self.build)(self.weights.var_builder(self.dtype)?)?,
        };
        Ok(self.model.insert(made))
    }

    /// The weights.
    pub fn weights(&self) -> &ElasticWeights {
        &self.weights
    }

    /// Whether the model is asleep.
    pub fn is_asleep(&self) -> bool {
        self.weights.is_asleep()
    }

    /// Drops the model, and puts its weights to sleep.
    ///
    /// # Errors
    /// As [`ElasticWeights::sleep`]. Then the weights are awake, and [`get`](Self::get) makes the
    /// model again.
    pub fn sleep(&mut self, keep: Keep<'_>) -> Result<Slept> {
        if self.is_asleep() {
            return Err(WeightsError::Asleep.into());
        }
        self.model = None;
        self.weights.sleep(keep)
    }

    /// Wakes the weights. The next [`get`](Self::get) makes the model.
    ///
    /// # Errors
    /// As [`ElasticWeights::wake`]. Then all is asleep as it was.
    pub fn wake(&mut self, options: &WakeOptions) -> Result<()> {
        self.weights.wake(options)
    }

    /// Wakes the weights, and does not wait for their contents: see
    /// [`ElasticWeights::wake_streaming`]. [`get`](Self::get) makes the model at once; have its work
    /// wait for the weights that it reads.
    ///
    /// # Errors
    /// As [`wake`](Self::wake).
    pub fn wake_streaming(&mut self, options: &WakeOptions) -> Result<WeightsArriving> {
        self.weights.wake_streaming(options)
    }
}

impl<M> fmt::Debug for ElasticModel<M> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = formatter.debug_struct("ElasticModel");
        debug
            .field("weights", &self.weights)
            .finish_non_exhaustive()
    }
}
