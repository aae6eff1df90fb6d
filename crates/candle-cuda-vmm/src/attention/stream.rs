//! Candle's devices and their streams.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use candle_core::{Device, Error, Result, Tensor};

/// Fails unless two tensors are on one device.
pub fn check_device(left: &Tensor, right: &Tensor, op: &'static str) -> Result<()> {
    let (lhs, rhs) = (left.device().location(), right.device().location());
    match lhs == rhs {
        true => Ok(()),
        false => Err(Error::DeviceMismatchBinaryOp { lhs, rhs, op }),
    }
}

/// Returns whether the device's stream is being captured. Copies to the host would end the capture.
pub fn is_capturing(device: &Device) -> bool {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        use candle_core::cuda::cudarc::driver::sys::CUstreamCaptureStatus;
        let status = device.cuda_stream().capture_status();
        return status != Ok(CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE);
    }
    let _ = device;
    false
}

/// Returns whether two devices are the same, with the same stream.
pub fn is_same_stream(left: &Device, right: &Device) -> bool {
    #[cfg(feature = "cuda")]
    if let (Device::Cuda(left), Device::Cuda(right)) = (left, right) {
        // A context's default streams have one handle in all contexts.
        let streams = [left, right].map(|device| device.cuda_stream());
        let is_same = streams[0].cu_stream() == streams[1].cu_stream();
        return is_same && streams[0].context().ordinal() == streams[1].context().ordinal();
    }
    left.location() == right.location()
}
