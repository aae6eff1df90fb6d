//! How a decode step is split over a GPU.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::kv_batch::KvBatch;
use super::stream::is_same_stream;
use crate::error::{Result, VmmError};
use candle_core::{Device, Error, Tensor};

/// How [`decode`](super::decode) splits the keys over a GPU, with the memory for partial results.
///
/// Make it once for each stream, before a capture, for the largest batch. Decode steps of all
/// layers share it, one after the other on that stream. On a CPU device it holds only the sizes.
///
/// ```
/// use candle_core::Device;
/// use candle_cuda_vmm::attention::DecodePlan;
///
/// // At most 64 sequences at once, of a model with 32 query heads.
/// let plan = DecodePlan::new(&Device::Cpu, 64, 32)?;
/// assert_eq!((plan.batch_max(), plan.query_heads()), (64, 32));
/// # Ok::<(), candle_cuda_vmm::VmmError>(())
/// ```
#[derive(Debug)]
pub struct DecodePlan {
    pub(super) device: Device,
    pub(super) batch_max: usize,
    pub(super) query_heads: usize,
    /// `None` on a CPU device.
    #[cfg(feature = "attention")]
    pub(super) on_device: Option<super::cuda_plan::DevicePlan>,
}

impl DecodePlan {
    /// Makes a plan for decode steps of at most `batch_max` sequences of a model with `query_heads`
    /// query heads. A step of another model may use it if its sequences times its query heads are
    /// not more.
    ///
    /// # Errors
    /// - [`CandleError`](VmmError::CandleError) with `EmptyTensor` if a number is 0.
    /// - [`NoAttentionKernels`](VmmError::NoAttentionKernels) for a GPU, in a build without the
    ///   feature `attention`.
    /// - [`CandleError`](VmmError::CandleError) if a CUDA call fails or memory runs out.
    pub fn new(device: &Device, batch_max: usize, query_heads: usize) -> Result<Self> {
        if batch_max == 0 || query_heads == 0 {
            return Err(Error::EmptyTensor { op: "decode_plan" }.into());
        }
        #[cfg(not(feature = "attention"))]
        if !device.is_cpu() {
            return Err(VmmError::NoAttentionKernels);
        }
        Ok(Self {
            #[cfg(feature = "attention")]
            on_device: super::cuda_plan::DevicePlan::new(device, batch_max, query_heads)?,
            device: device.clone(),
            batch_max,
            query_heads,
        })
    }

    /// Returns the most sequences of a decode step.
    pub fn batch_max(&self) -> usize {
        self.batch_max
    }

    /// Returns the number of query heads that the plan was made for.
    pub fn query_heads(&self) -> usize {
        self.query_heads
    }

    /// Fails if a decode step does not fit the plan.
    pub(super) fn check(&self, q: &Tensor, kv: &KvBatch, query_heads: usize) -> Result<()> {
        if !is_same_stream(&self.device, q.device()) {
            return Err(VmmError::PlanOnAnotherDevice);
        }
        let heads = kv.batch() * query_heads;
        let heads_max = self.batch_max.saturating_mul(self.query_heads);
        match heads <= heads_max {
            true => Ok(()),
            false => Err(VmmError::BeyondPlan { heads, heads_max }),
        }
    }
}
