//! Order between the streams of Candle's device objects.
//!
//! `Device::new_cuda_with_stream` makes a stream for each device object, and Candle takes tensors of any that is of the same
//! GPU. Their streams run beside each other. Candle orders its own tensors by events, unless those are switched off or one
//! side is the per-thread stream; memory of a pool has none, so here the streams wait for each other.

use candle_core::Result;
use candle_core::cuda::WrapErr;
use candle_core::cuda::cudarc::driver::CudaStream;
use std::sync::Arc;

/// Work on one stream that reads or writes what is another's: it comes after what the other was given before, and what the
/// other is given later comes after it.
#[must_use = "the other stream comes after the work only when it is ended"]
pub(crate) struct InTurn<'a> {
    /// None where both are one.
    streams: Option<[&'a CudaStream; 2]>,
}

impl<'a> InTurn<'a> {
    /// Begins work on `stream` (`cuEventRecord` on the other, `cuStreamWaitEvent`). Nothing is done if both are one.
    pub(crate) fn new(stream: &'a Arc<CudaStream>, other: &'a Arc<CudaStream>) -> Result<Self> {
        if stream.cu_stream() == other.cu_stream() {
            return Ok(Self { streams: None });
        }
        stream.join(other).w()?;
        let streams = Some([&**stream, &**other]);
        Ok(Self { streams })
    }

    /// Ends it. If the other stream cannot be made to wait, the caller does.
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
