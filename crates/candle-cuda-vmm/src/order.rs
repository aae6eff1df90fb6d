//! Orders work between the streams of Candle's device objects.
//!
//! `Device::new_cuda_with_stream` makes a new stream for each device object, and Candle accepts
//! tensors of any device object of the same GPU. Those streams run concurrently. Candle orders its
//! own tensors by events, unless events are off or one side is the per-thread stream. Memory of a
//! pool has no such events, so the streams wait for each other here.

use candle_core::Result;
use candle_core::cuda::WrapErr;
use candle_core::cuda::cudarc::driver::CudaStream;
use std::sync::Arc;

/// Orders work on `stream` between the past and the future work of another stream.
///
/// The work runs after everything that the other stream was given before `begin`. Everything that
/// the other stream is given after `end` runs after the work.
#[must_use = "the other stream waits for the work only after `end`"]
pub(crate) struct StreamOrder<'a> {
    /// `None` if both are the same stream.
    streams: Option<[&'a CudaStream; 2]>,
}

impl<'a> StreamOrder<'a> {
    /// Makes `stream` wait for `other` (`cuEventRecord`, `cuStreamWaitEvent`). Does nothing if both
    /// are the same stream.
    pub(crate) fn begin(stream: &'a Arc<CudaStream>, other: &'a Arc<CudaStream>) -> Result<Self> {
        if stream.cu_stream() == other.cu_stream() {
            return Ok(Self { streams: None });
        }
        stream.join(other).w()?;
        let streams = Some([&**stream, &**other]);
        Ok(Self { streams })
    }

    /// Makes the other stream wait for the work. If that fails, the calling thread waits instead.
    pub(crate) fn end(self) -> Result<()> {
        let Some([stream, other]) = self.streams else {
            return Ok(());
        };
        match other.join(stream) {
            Ok(()) => Ok(()),
            Err(_) => stream.synchronize().w(),
        }
    }
}
