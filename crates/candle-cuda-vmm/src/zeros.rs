//! Tensors of zeros in host memory, with an error if there is no memory.
//!
//! # Safety
//! Each vector owns memory that the allocator returned for exactly its elements. All bytes are
//! zero, which is a valid value of each element type: integers, and floating-point numbers of all
//! widths.
#![allow(unsafe_code)]

use crate::error::{Result, VmmError};
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, Error, Storage, Tensor};
use std::alloc::{Layout, alloc_zeroed};

/// Makes a tensor of zeros on the CPU. Fails with `OutOfPhysicalMemory` if the host has no memory
/// for it. Candle's own function ends the process in that case.
pub(crate) fn zeros(shape: &[usize], dtype: DType) -> Result<Tensor> {
    let Some(count) = (shape.iter()).try_fold(1_usize, |count, dim| count.checked_mul(*dim)) else {
        return Err(shortage(usize::MAX));
    };
    // SAFETY: each of these types is an integer or a floating-point number.
    let storage = unsafe {
        match dtype {
            DType::U8 => zeroed(count).map(CpuStorage::U8),
            DType::U32 => zeroed(count).map(CpuStorage::U32),
            DType::I16 => zeroed(count).map(CpuStorage::I16),
            DType::I32 => zeroed(count).map(CpuStorage::I32),
            DType::I64 => zeroed(count).map(CpuStorage::I64),
            DType::BF16 => zeroed(count).map(CpuStorage::BF16),
            DType::F16 => zeroed(count).map(CpuStorage::F16),
            DType::F32 => zeroed(count).map(CpuStorage::F32),
            DType::F64 => zeroed(count).map(CpuStorage::F64),
            DType::F8E4M3 => zeroed(count).map(CpuStorage::F8E4M3),
            _ => return Err(Error::UnsupportedDTypeForOp(dtype, "zeros").into()),
        }
    };
    let bytes = count.saturating_mul(dtype.size_in_bytes());
    let storage = Storage::Cpu(storage.ok_or_else(|| shortage(bytes))?);
    Ok(Tensor::from_storage(
        storage,
        shape,
        BackpropOp::none(),
        false,
    ))
}

/// The error if the host has no memory for a tensor.
fn shortage(asked_bytes: usize) -> VmmError {
    VmmError::Vmm(cuda_vmm::VmmError::OutOfPhysicalMemory {
        asked_bytes,
        free_bytes: 0,
        retiring_bytes: 0,
        reclaimable_bytes: 0,
        // The host makes no allocation larger than this.
        limit_bytes: isize::MAX as usize,
    })
}

/// Allocates `count` elements with all bytes zero. The system provides large ones lazily, so they
/// take no memory before they are written.
///
/// # Safety
/// All bytes zero are a valid value of the type.
unsafe fn zeroed<T>(count: usize) -> Option<Vec<T>> {
    let layout = Layout::array::<T>(count).ok()?;
    if layout.size() == 0 {
        return Some(Vec::new());
    }
    // SAFETY: the layout is not empty.
    let elements = unsafe { alloc_zeroed(layout) };
    if elements.is_null() {
        return None;
    }
    // SAFETY: the allocator returned this memory for a vector of `count` elements; all are zero and
    // this is the only owner.
    Some(unsafe { Vec::from_raw_parts(elements.cast(), count, count) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_zeros_of_each_type() {
        for dtype in [
            DType::U8,
            DType::U32,
            DType::I16,
            DType::I32,
            DType::I64,
            DType::BF16,
            DType::F16,
            DType::F32,
            DType::F64,
            DType::F8E4M3,
        ] {
            let tensor = zeros(&[2, 3], dtype).unwrap();
            assert_eq!((tensor.dims(), tensor.dtype()), (&[2, 3][..], dtype));
            let values = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
            assert_eq!(values.to_vec1::<f32>().unwrap(), [0.; 6]);
            assert_eq!(zeros(&[0, 3], dtype).unwrap().dims(), [0, 3]);
        }
        assert!(zeros(&[1], DType::F4).is_err());
    }

    #[test]
    fn what_the_host_has_not_is_out_of_memory() {
        for shape in [
            &[usize::MAX][..],
            &[usize::MAX, 2],
            &[isize::MAX as usize],
            &[1 << 61],
            &[1 << 46],
        ] {
            let error = zeros(shape, DType::F64).unwrap_err();
            let asked = shape
                .iter()
                .fold(8_usize, |all, dim| all.saturating_mul(*dim));
            assert!(error.is_out_of_memory(), "{shape:?}: {error}");
            assert_eq!(error.shortage().unwrap().requested_bytes, asked);
        }
    }
}
