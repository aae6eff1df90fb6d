//! Why a step was not captured, or did not run.

use thiserror::Error;

/// Why a [`DecodeGraph`](crate::graph::DecodeGraph) did not capture a step, or did not run it.
///
/// The device is usable after each of them, unless the error inside says otherwise
/// ([`VmmError::is_poisoned`](crate::VmmError::is_poisoned)).
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GraphError {
    /// The device uses a default stream, which other work shares. Make it by
    /// [`device::cuda_with_own_stream`](crate::device::cuda_with_own_stream).
    #[error("the device uses a default stream, which cannot be captured")]
    DefaultStream,

    /// Candle records and awaits events for each tensor of the device. A captured step would wait
    /// for events from before the capture. Make the device by
    /// [`device::cuda_with_own_stream`](crate::device::cuda_with_own_stream).
    #[error("Candle tracks events on this device, which a capture does not survive")]
    EventTracking,

    /// There is no bucket for this batch.
    #[error("a batch of {batch} sequences; the largest bucket has {batch_max}, the smallest has 1")]
    NoBucket {
        /// The sequences of the step.
        batch: usize,
        /// The size of the largest bucket.
        batch_max: usize,
    },

    /// The step failed before it was captured, when it ran for the first time.
    #[error("the step of {batch} sequences failed before its capture: {source}")]
    Warmup {
        /// The size of the bucket.
        batch: usize,
        /// The error of the step.
        source: Box<super::VmmError>,
    },

    /// The step failed while it was captured. Or it made a call that a capture does not survive:
    /// it waited for the device, copied to the host, or used another stream.
    #[error("the step of {batch} sequences could not be captured: {source}")]
    Capture {
        /// The size of the bucket.
        batch: usize,
        /// The error of the step, or of the driver.
        source: Box<super::VmmError>,
    },

    /// The step dropped a tensor that was made outside of it. The driver refuses to free that
    /// memory during a capture, and it is lost. If operations follow the drop, the first of them
    /// fails, and this is a [`Capture`](Self::Capture) with `CUDA_ERROR_INVALID_VALUE`.
    #[error("the captured step of {batch} sequences dropped a tensor that was made before it")]
    TensorDropped {
        /// The size of the bucket.
        batch: usize,
    },

    /// The step kept a tensor that was made inside of it, beside the result. Its memory is the
    /// graph's.
    #[error(
        "the captured step of {batch} sequences made {allocations} tensors and dropped {frees}: none may be kept"
    )]
    TensorKept {
        /// The size of the bucket.
        batch: usize,
        /// The allocations in the capture.
        allocations: usize,
        /// The frees in the capture.
        frees: usize,
    },

    /// The step appended to a cache of a pool, or took a view of one, while it was captured. The
    /// graph would keep addresses that are the cache's for a moment only. It is the source of a
    /// [`Capture`](Self::Capture).
    #[error("a captured step may not append to caches of a pool, nor take views of them")]
    PoolInStep,

    /// The step returned a tensor without dimensions, on another device or stream, or of another
    /// shape or dtype than when it ran for the first time.
    #[error(
        "the step of {batch} sequences returned a tensor {returned}, and {expected} is expected"
    )]
    Output {
        /// The size of the bucket.
        batch: usize,
        /// What was returned.
        returned: String,
        /// What is expected.
        expected: String,
    },

    /// Rows that the step names have left their addresses, or are shared with a fork. Drop the
    /// graph, and capture the step with the new addresses.
    #[error("rows that the captured step names have moved, were dropped, or are shared by a fork")]
    RowsMoved,

    /// The graph is paused: its step was dropped, for weights that sleep. Resume it when they are
    /// awake.
    #[error("the graph is paused, as weights of its step may be asleep")]
    Paused,

    /// Memory that the step names is used on another device or stream.
    #[error("the memory of the step belongs to another device or stream than the graph")]
    AnotherStream,
}
