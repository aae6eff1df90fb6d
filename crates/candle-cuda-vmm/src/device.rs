//! Maps a Candle device to a driver.
//!
//! | device | driver |
//! |---|---|
//! | `Device::Cuda` | the real one, with the feature `cuda`; never the simulated one |
//! | `Device::Cpu` | the simulated one, with the feature `simulator` |
//! | `Device::Metal` | none |
//!
//! Without its feature, a device is [`UnsupportedDevice`](VmmError::UnsupportedDevice).

use crate::error::{Result, VmmError};
use candle_core::Device;
use cuda_vmm::Driver;

/// Returns the device of [`cuda_vmm`] that corresponds to a Candle device.
///
/// For a CUDA device it is the device of the same number of [`Driver::cuda`]. The function checks
/// that both use the device's primary context. For the CPU it is device 0 of one simulated driver
/// per process. That device has 80 GiB and a granularity of 2 MiB, and takes host memory only for
/// what is written.
///
/// # Errors
/// - [`UnsupportedDevice`](VmmError::UnsupportedDevice) for a kind of device that this build does
///   not support, and for a GPU without virtual memory management.
/// - [`CandleError`](VmmError::CandleError) with a [`ForeignContext`] if the Candle device does not
///   use the primary context.
/// - [`Vmm`](VmmError::Vmm) if the driver cannot be opened or fails.
pub fn core_device(device: &Device) -> Result<cuda_vmm::Device> {
    match device {
        #[cfg(feature = "simulator")]
        Device::Cpu => Ok(simulated_driver()?.device(0)?),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => device_of_stream(&device.cuda_stream()),
        _ => Err(VmmError::UnsupportedDevice),
    }
}

/// Makes a Candle device for GPU `ordinal` with a stream of its own, for steps that are captured
/// ([`graph`](crate::graph)).
///
/// Candle's events are off for this device object. They order the streams of several device objects
/// that use one tensor, and a capture does not survive them. So before another device object, of
/// this GPU or another, reads a tensor of this one (`to_device`), synchronise this device, or make
/// the other stream wait (`CudaStream::join`). Drop the tensor only when that read has run. Copies
/// to the CPU are ordered as always.
///
/// # Errors
/// [`CandleError`](VmmError::CandleError) if there is no such GPU, or without the feature `cuda`.
pub fn cuda_with_own_stream(ordinal: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(ordinal)?;
    #[cfg(feature = "cuda")]
    if let Device::Cuda(cuda) = &device {
        // SAFETY: the device object is new, and so is its context object, which no other device
        // object shares. All of its work is on the one stream, which needs no events. Other streams
        // reach its tensors as the documentation above says.
        #[allow(unsafe_code)]
        unsafe {
            cuda.cuda_stream().context().disable_event_tracking();
        }
    }
    Ok(device)
}

/// Returns the driver for functions that take no device: [`VirtualAddressRange::new`], the
/// functions of [`mapping`] and [`cuda_ffi`], and [`is_vmm_supported`].
///
/// With the feature `cuda` it is the real one, otherwise the simulated one that CPU devices use.
///
/// # Errors
/// - [`Vmm`](VmmError::Vmm) if the driver cannot be opened.
/// - [`UnsupportedDevice`](VmmError::UnsupportedDevice) if neither feature is on.
///
/// [`VirtualAddressRange::new`]: crate::VirtualAddressRange::new
/// [`mapping`]: crate::mapping
/// [`cuda_ffi`]: crate::cuda_ffi
/// [`is_vmm_supported`]: crate::is_vmm_supported
pub fn default_driver() -> Result<Driver> {
    #[cfg(feature = "cuda")]
    return Ok(Driver::cuda()?);
    #[cfg(all(feature = "simulator", not(feature = "cuda")))]
    return simulated_driver();
    #[cfg(not(any(feature = "cuda", feature = "simulator")))]
    return Err(VmmError::UnsupportedDevice);
}

/// Returns the one simulated driver of this process, and starts it on the first call. A forked
/// process starts its own.
#[cfg(feature = "simulator")]
fn simulated_driver() -> Result<Driver> {
    use cuda_vmm::PerProcess;
    use std::sync::{Mutex, PoisonError};

    // Not a `OnceLock`: if the start fails, the next call tries again.
    static STARTED: PerProcess<Mutex<Option<Driver>>> = PerProcess::new();
    let mut started = STARTED.get().lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(driver) = &*started {
        return Ok(driver.clone());
    }
    let driver = Driver::simulated(cuda_vmm::sim::SimConfig::new())?;
    Ok(started.insert(driver).clone())
}

/// Returns the core's device for the device of a Candle stream.
#[cfg(feature = "cuda")]
pub(crate) fn device_of_stream(
    stream: &candle_core::cuda::cudarc::driver::CudaStream,
) -> Result<cuda_vmm::Device> {
    let context = stream.context();
    let core = Driver::cuda()?.device(context.ordinal())?;
    check_same_context(
        context.ordinal(),
        context.cu_ctx() as usize,
        core.raw_context() as usize,
    )?;
    Ok(core)
}

/// The error if Candle's device does not use the device's primary context.
///
/// Memory of the pools is visible in the primary context only.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[error(
    "Candle's device {ordinal} uses context {candle_context:#x} instead of the primary context {primary_context:#x}"
)]
pub struct ForeignContext {
    /// The device's number.
    pub ordinal: usize,
    /// Address of the context that Candle uses.
    pub candle_context: usize,
    /// Address of the device's primary context.
    pub primary_context: usize,
}

/// Fails unless both contexts are the same.
#[cfg(any(feature = "cuda", test))]
fn check_same_context(ordinal: usize, candle_context: usize, primary_context: usize) -> Result<()> {
    if candle_context == primary_context {
        return Ok(());
    }
    let error = ForeignContext {
        ordinal,
        candle_context,
        primary_context,
    };
    Err(candle_core::Error::wrap(error).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_context_than_the_primary_one_is_refused() {
        assert!(check_same_context(1, 0x10, 0x10).is_ok());
        let error = check_same_context(1, 0x10, 0x20).unwrap_err();
        assert!(matches!(error, VmmError::CandleError(_)));
        let text = error.to_string();
        assert!(
            text.contains("device 1") && text.contains("0x10") && text.contains("0x20"),
            "{text}"
        );
    }
}
