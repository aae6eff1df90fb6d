//! Which driver serves which Candle device.
//!
//! | device | driver |
//! |---|---|
//! | `Device::Cuda` | the real one, with the feature `cuda`; never the simulated one |
//! | `Device::Cpu` | the simulated one, with the feature `simulator` |
//! | `Device::Metal` | none |
//!
//! Everything else is [`UnsupportedDevice`](VmmError::UnsupportedDevice).

use crate::error::{Result, VmmError};
use candle_core::Device;
use cuda_vmm::Driver;

/// The device of [`cuda_vmm`] that serves a Candle device.
///
/// For a CUDA device that is the device of the same number of [`Driver::cuda`]; the primary context
/// that both retain is checked to be the same. For the CPU it is device 0 of one simulated driver for
/// the process: 80 GiB, granularity 2 MiB, host memory behind it where it is written.
///
/// # Errors
/// - [`UnsupportedDevice`](VmmError::UnsupportedDevice) for a kind of device that this build does not
///   serve, and for a GPU without virtual memory management.
/// - [`CandleError`](VmmError::CandleError) around a [`ForeignContext`] if the Candle device does not
///   use the primary context.
/// - [`Vmm`](VmmError::Vmm) if the driver cannot be opened or fails.
pub fn core_device(device: &Device) -> Result<cuda_vmm::Device> {
    match device {
        #[cfg(feature = "simulator")]
        Device::Cpu => Ok(simulated_driver()?.device(0)?),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => core_of(&device.cuda_stream()),
        _ => Err(VmmError::UnsupportedDevice),
    }
}

/// The driver behind functions that take no device: [`VirtualAddressRange::new`], the functions of
/// [`mapping`] and [`cuda_ffi`], [`is_vmm_supported`].
///
/// With the feature `cuda` it is the real one, otherwise the simulated one that serves CPU devices.
///
/// # Errors
/// [`Vmm`](VmmError::Vmm) if the driver cannot be opened;
/// [`UnsupportedDevice`](VmmError::UnsupportedDevice) with neither feature.
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

/// The one simulated driver of this process; started when it is first asked for. A forked process has its own.
#[cfg(feature = "simulator")]
fn simulated_driver() -> Result<Driver> {
    use cuda_vmm::PerProcess;
    use std::sync::{Mutex, PoisonError};

    // Not a `OnceLock`: a start that failed may be tried again.
    static STARTED: PerProcess<Mutex<Option<Driver>>> = PerProcess::new();
    let mut started = STARTED.get().lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(driver) = &*started {
        return Ok(driver.clone());
    }
    let driver = Driver::simulated(cuda_vmm::sim::SimConfig::new())?;
    Ok(started.insert(driver).clone())
}

#[cfg(feature = "cuda")]
pub(crate) fn core_of(
    stream: &candle_core::cuda::cudarc::driver::CudaStream,
) -> Result<cuda_vmm::Device> {
    let context = stream.context();
    let core = Driver::cuda()?.device(context.ordinal())?;
    same_context(
        context.ordinal(),
        context.cu_ctx() as usize,
        core.raw_context() as usize,
    )?;
    Ok(core)
}

/// Candle's device uses another context than the device's primary one, so that Candle and the pools
/// would not see the same memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "Candle's device {ordinal} uses context {candle_context:#x} and not the primary context {primary_context:#x}"
)]
pub struct ForeignContext {
    /// The device's number.
    pub ordinal: usize,
    /// Address of the context that Candle uses.
    pub candle_context: usize,
    /// Address of the device's primary context.
    pub primary_context: usize,
}

#[cfg(any(feature = "cuda", test))]
fn same_context(ordinal: usize, candle_context: usize, primary_context: usize) -> Result<()> {
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
        assert!(same_context(1, 0x10, 0x10).is_ok());
        let error = same_context(1, 0x10, 0x20).unwrap_err();
        assert!(matches!(error, VmmError::CandleError(_)));
        let text = error.to_string();
        assert!(
            text.contains("device 1") && text.contains("0x10") && text.contains("0x20"),
            "{text}"
        );
    }
}
