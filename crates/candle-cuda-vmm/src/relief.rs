//! Moves memory between Candle's own allocations and the pools when the device runs out of memory.
//!
//! Candle allocates from the device's memory pool (`cuMemAllocAsync`). That pool may keep memory
//! that Candle has freed, and the pools of this crate cannot use it. The reverse holds too. So one
//! side may run out of memory that the other keeps unused:
//! - If *Candle* runs out, call [`SharedMemoryPool::relieve`](crate::SharedMemoryPool::relieve) or
//!   [`Engine::relieve`](crate::Engine::relieve), and retry.
//! - If *a pool* runs out, [`let_candle_make_room`] handles it. Call that once for each device.
//!
//! It is better to leave memory to Candle from the start, by
//! [`EngineOptions::headroom_bytes`](crate::EngineOptions::headroom_bytes).
//!
//! # Safety
//! The device's memory pool is the driver's default, or one that its owner has made current. Both
//! outlive the calls here. Trimming releases only memory that is not allocated.
#![cfg_attr(feature = "cuda", allow(unsafe_code))]

use crate::error::{Result, VmmError};
use candle_core::Device;

/// Returns to the driver the memory that Candle has freed and the device's memory pool still keeps
/// (`cuDeviceGetMemPool`, `cuMemPoolTrimTo`).
///
/// It waits for Candle's stream first (`cuStreamSynchronize`), because memory freed on that stream
/// stays in the pool until then. It does nothing while the stream is being captured.
///
/// # Errors
/// - [`UnsupportedDevice`](VmmError::UnsupportedDevice) for any device but a CUDA device; no other
///   has such a pool.
/// - [`CudaError`](VmmError::CudaError) if the driver fails to trim.
/// - [`Vmm`](VmmError::Vmm) if another driver call fails.
/// - Any error of [`core_device`](crate::device::core_device).
pub fn trim_candle_memory(device: &Device) -> Result<()> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(candle) => trim(&candle.cuda_stream()),
        _ => Err(VmmError::UnsupportedDevice),
    }
}

/// Calls [`trim_candle_memory`] whenever a pool of this device finds no device memory although its
/// budget has room.
///
/// The pools of the device first release what they can spare. Then Candle's memory is trimmed, and
/// the driver is asked once more.
///
/// The setting holds for all pools of the device until the last of them is dropped. It replaces an
/// earlier one (`cuda_vmm::Device::set_make_room`; `None` removes it). It keeps the Candle device's
/// stream alive. If trimming fails, the error is logged and the allocation fails as it would have.
///
/// # Errors
/// - [`UnsupportedDevice`](VmmError::UnsupportedDevice) for any device but a CUDA device.
/// - Any error of [`core_device`](crate::device::core_device).
pub fn let_candle_make_room(device: &Device) -> Result<()> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(candle) => {
            let core = crate::device::core_device(device)?;
            // The closure holds the stream only. It is dropped with the core's device, on any
            // thread.
            let candle = candle.cuda_stream();
            core.set_make_room(Some(std::sync::Arc::new(move |_bytes| {
                if let Err(error) = trim(&candle) {
                    tracing::warn!(%error, "cannot trim Candle's memory");
                }
            })));
            Ok(())
        }
        _ => Err(VmmError::UnsupportedDevice),
    }
}

/// Has the device's memory pool keep up to so many bytes that Candle has freed
/// (`CU_MEMPOOL_ATTR_RELEASE_THRESHOLD`), for all of this process's work on the device.
///
/// The driver's default is 0: each time a thread waits for a stream, what Candle has freed goes back
/// to the driver, and the next tensor needs memory from it again. A program that takes step after
/// step is faster if the pool keeps the memory of a step. What it keeps is lost to other processes;
/// pools of this one get it by [`let_candle_make_room`].
///
/// # Errors
/// - [`UnsupportedDevice`](VmmError::UnsupportedDevice) for any device but a CUDA device; no other
///   has such a pool.
/// - [`CudaError`](VmmError::CudaError) if the driver refuses.
pub fn keep_candle_memory(device: &Device, bytes: u64) -> Result<()> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(candle) => keep(&candle.cuda_stream(), bytes),
        _ => {
            let _ = bytes;
            Err(VmmError::UnsupportedDevice)
        }
    }
}

#[cfg(feature = "cuda")]
fn keep(candle: &candle_core::cuda::cudarc::driver::CudaStream, mut bytes: u64) -> Result<()> {
    use candle_core::cuda::cudarc::driver::result;
    use candle_core::cuda::cudarc::driver::sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;

    // SAFETY: Candle has opened the device and retains its context.
    let pool = unsafe { result::device::get_mem_pool(candle.context().cu_device()) };
    let pool = pool.map_err(VmmError::from_cuda_result)?;
    let value = core::ptr::from_mut(&mut bytes).cast();
    // SAFETY: the pool is the device's current one, so it is alive. The attribute is of this type,
    // and is read before the call returns.
    unsafe { result::mem_pool::set_attribute(pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, value) }
        .map_err(VmmError::from_cuda_result)
}

#[cfg(feature = "cuda")]
fn trim(candle: &std::sync::Arc<candle_core::cuda::cudarc::driver::CudaStream>) -> Result<()> {
    use candle_core::cuda::cudarc::driver::result;

    let core = crate::device::device_of_stream(candle)?;
    // Through the core: calls of Candle's own context object would return, and so lose, the errors
    // that are stored there.
    let stream = crate::lease::core_stream(&core, candle);
    if stream.is_capturing()? {
        return Ok(());
    }
    stream.synchronize()?;
    // SAFETY: Candle has opened the device and retains its context.
    let pool = unsafe { result::device::get_mem_pool(candle.context().cu_device()) };
    let pool = pool.map_err(VmmError::from_cuda_result)?;
    // SAFETY: the pool is the device's current one, so it is alive.
    unsafe { result::mem_pool::trim_to(pool, 0) }.map_err(VmmError::from_cuda_result)
}
