//! Making room between Candle's own allocations and the pools, when the device runs out of memory.
//!
//! Candle allocates from the device's memory pool (`cuMemAllocAsync`), which may keep what Candle has freed; memory of our
//! pools is none of it. So one may run out of what the other merely keeps:
//! - *Candle runs out*: [`SharedMemoryPool::relieve`](crate::SharedMemoryPool::relieve), or that of the engine, and then
//!   again.
//! - *a pool runs out*: [`let_candle_make_room`], once for each device, and then it happens by itself.
//!
//! `EngineOptions::headroom_bytes` leaves memory to Candle from the beginning, which is better than either.
//!
//! # Safety
//! The device's memory pool is the driver's own or one that its owner has made current; both outlive the calls here, which
//! go through cudarc's functions of those names. Trimming releases only what nobody has allocated.
#![cfg_attr(feature = "cuda", allow(unsafe_code))]

use crate::error::{Result, VmmError};
use candle_core::Device;

/// Gives back to the driver what Candle has freed and the device's memory pool still keeps (`cuDeviceGetMemPool`,
/// `cuMemPoolTrimTo`).
///
/// Waits for Candle's stream, as what was freed on it and has not been seen to be past stays in the pool. While the stream is
/// captured nothing is done.
///
/// # Errors
/// [`UnsupportedDevice`](VmmError::UnsupportedDevice) for a device that has no such pool: any but a CUDA device. What
/// [`core_device`](crate::device::core_device) returns; [`CudaError`](VmmError::CudaError) if the driver refuses.
pub fn trim_candle_memory(device: &Device) -> Result<()> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(candle) => trim(&candle.cuda_stream()),
        _ => Err(VmmError::UnsupportedDevice),
    }
}

/// Has [`trim_candle_memory`] called when a pool of this device runs out of the device's memory although its budget had room,
/// and after all pools of the device have given up what they can spare; then the driver is asked once more.
///
/// It holds for all pools on the device, until the last of them is gone, in place of what was set before
/// (`cuda_vmm::Device::set_make_room`; `None` there takes it away). It keeps the Candle device's stream alive. A refusal to trim
/// is logged, and then the allocation fails as it would have.
///
/// # Errors
/// [`UnsupportedDevice`](VmmError::UnsupportedDevice) for any but a CUDA device; what
/// [`core_device`](crate::device::core_device) returns.
pub fn let_candle_make_room(device: &Device) -> Result<()> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(candle) => {
            let core = crate::device::core_device(device)?;
            // No more of it: where this goes is where the last owner of the core's device does, on whichever thread.
            let candle = candle.cuda_stream();
            core.set_make_room(Some(std::sync::Arc::new(move |_bytes| {
                if let Err(error) = trim(&candle) {
                    tracing::warn!(%error, "Candle's memory could not be trimmed");
                }
            })));
            Ok(())
        }
        _ => Err(VmmError::UnsupportedDevice),
    }
}

#[cfg(feature = "cuda")]
fn trim(candle: &std::sync::Arc<candle_core::cuda::cudarc::driver::CudaStream>) -> Result<()> {
    use candle_core::cuda::cudarc::driver::result;

    let core = crate::device::core_of(candle)?;
    // Through the core, since calls of Candle's own context object would raise, and so lose, what is parked there.
    let stream = crate::lease::stream_of(&core, candle);
    if stream.is_capturing()? {
        return Ok(());
    }
    stream.synchronize()?;
    // SAFETY: Candle has opened the device, and holds its context.
    let pool = unsafe { result::device::get_mem_pool(candle.context().cu_device()) };
    let pool = pool.map_err(VmmError::from_cuda_result)?;
    // SAFETY: the pool is the device's current one, so it is alive.
    unsafe { result::mem_pool::trim_to(pool, 0) }.map_err(VmmError::from_cuda_result)
}
