//! Launches a kernel that begins while the one before it ends.
//!
//! # Safety
//! A launch with programmatic stream serialization may begin before earlier work of its stream has
//! ended. The kernel reads and writes nothing but its arguments before it waits for that work.
#![allow(unsafe_code)]

use crate::kernels::Kernel;
use candle_core::cuda::cudarc::driver::{CudaStream, DeviceRepr, DriverError, LaunchConfig, sys};

/// Queues a kernel with one argument, a struct. If it overlaps, it begins while earlier kernels of
/// the stream end, which GPUs of compute capability 9.0 and newer can do: `cuLaunchKernelEx` with
/// the attribute of programmatic stream serialization.
///
/// # Safety
/// - The kernel takes an `A`, and what it does with that is sound.
/// - If it overlaps, it waits for earlier work before it reads or writes memory.
pub unsafe fn launch<A: DeviceRepr>(
    kernel: &Kernel,
    stream: &CudaStream,
    config: LaunchConfig,
    arguments: &A,
) -> Result<(), DriverError> {
    let mut attribute = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        // SAFETY: all bits 0 are a value of this union of numbers.
        ..unsafe { std::mem::zeroed() }
    };
    attribute.value.programmaticStreamSerializationAllowed = 1;
    let config = sys::CUlaunchConfig {
        gridDimX: config.grid_dim.0,
        gridDimY: config.grid_dim.1,
        gridDimZ: config.grid_dim.2,
        blockDimX: config.block_dim.0,
        blockDimY: config.block_dim.1,
        blockDimZ: config.block_dim.2,
        sharedMemBytes: config.shared_mem_bytes,
        hStream: stream.cu_stream(),
        attrs: &raw mut attribute,
        numAttrs: u32::from(kernel.overlaps),
    };
    stream.context().bind_to_thread()?;
    let mut parameters = [(&raw const *arguments).cast_mut().cast()];
    // SAFETY: the kernel belongs to the stream's context, which is current; the configuration
    // and the argument are valid until the call returns, and the driver copies them. The rest is
    // the caller's promise.
    unsafe {
        sys::cuLaunchKernelEx(
            &raw const config,
            kernel.function.cu_function(),
            parameters.as_mut_ptr(),
            std::ptr::null_mut(),
        )
    }
    .result()
}
