//! Addresses of tensors, for kernels.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use crate::append::address;
use crate::error::VmmError;
use candle_core::backend::BackendStorage;
use candle_core::cuda::cudarc::driver::CudaStream;
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, Error, Result, Shape, Storage, Tensor};
use std::sync::Arc;

/// What addresses and strides of K and V are multiples of, in bytes.
pub const UNIT_BYTES: usize = 16;

/// Converts a size to a kernel's type.
pub fn number(size: usize) -> Result<u32> {
    u32::try_from(size).map_err(Error::wrap)
}

/// Calls `launch` with the address of the first element of each tensor. The tensors' storage stays
/// borrowed until it returns, and work of other streams on them comes before what it queues.
pub fn with_addresses<R>(
    stream: &Arc<CudaStream>,
    tensors: &[&Tensor],
    launch: impl FnOnce(&[u64]) -> Result<R>,
) -> Result<R> {
    let borrowed: Vec<_> = tensors.iter().map(|it| it.storage_and_layout()).collect();
    let (mut addresses, mut reads) = (Vec::new(), Vec::new());
    for (storage, layout) in &borrowed {
        let Storage::Cuda(storage) = &**storage else {
            return Err(VmmError::UnsupportedDevice.into());
        };
        let element = storage.dtype().size_in_bytes();
        let (first, read) = address(&storage.slice, layout, stream, element);
        addresses.push(first);
        reads.push(read);
    }
    launch(&addresses)
}

/// Fails unless an address or a stride is one that a kernel reads at.
pub fn check_multiple(bytes: usize, required: usize) -> Result<()> {
    match bytes.is_multiple_of(required) {
        true => Ok(()),
        false => Err(VmmError::InvalidAlignment {
            actual: bytes,
            required,
        }
        .into()),
    }
}

/// Makes a contiguous tensor of memory that a kernel fills.
pub fn wrap(storage: CudaStorage, shape: Shape) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

/// Returns the table of sequences with caches of their own, I64 `[batch, 3]`: the address of K, the
/// address of V, and the capacity in tokens. It is copied to the device.
pub fn table(pairs: &[(Tensor, Tensor)]) -> crate::error::Result<Tensor> {
    let device = pairs[0].0.device();
    let stream = device.as_cuda_device()?.cuda_stream();
    let mut table = Vec::with_capacity(3 * pairs.len());
    for (k, v) in pairs {
        with_addresses(&stream, &[k, v], |addresses| {
            for address in addresses {
                check_multiple(*address as usize, UNIT_BYTES)?;
                table.push(address.cast_signed());
            }
            Ok(())
        })?;
        table.push(i64::from(number(k.dims()[2])?));
    }
    Ok(Tensor::from_vec(table, (pairs.len(), 3), device)?)
}
