//! Numbers that go to the device in one copy, to where a captured step reads them.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Error, InplaceOp1, Layout, Result, Tensor};

/// Writes numbers to a contiguous U32 tensor of one dimension, from this place on. It allocates
/// nothing and launches nothing: on a GPU it is one copy on the device's stream.
///
/// # Errors
///
/// `UnsupportedDTypeForOp` for another dtype; Candle's if the numbers do not fit, or the copy fails.
pub fn upload(tensor: &Tensor, first: usize, numbers: &[u32]) -> Result<()> {
    if tensor.dtype() != DType::U32 {
        return Err(Error::UnsupportedDTypeForOp(tensor.dtype(), NAME));
    }
    let part = tensor.narrow(0, first, numbers.len())?;
    part.inplace_op1(&Upload(numbers))
}

const NAME: &str = "upload";

struct Upload<'a>(&'a [u32]);

impl Upload<'_> {
    /// Where they go.
    fn place(&self, layout: &Layout) -> Result<std::ops::Range<usize>> {
        match layout.contiguous_offsets() {
            Some((first, end)) => Ok(first..end),
            None => Err(Error::RequiresContiguous { op: NAME }),
        }
    }
}

impl InplaceOp1 for Upload<'_> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let place = self.place(layout)?;
        match storage {
            CpuStorage::U32(elements) => elements[place].copy_from_slice(self.0),
            other => return Err(Error::UnsupportedDTypeForOp(other.dtype(), NAME)),
        }
        Ok(())
    }

    #[cfg(feature = "attention")]
    fn cuda_fwd(&self, storage: &mut candle_core::CudaStorage, layout: &Layout) -> Result<()> {
        let (place, device) = (self.place(layout)?, storage.device.clone());
        let mut part = storage.as_cuda_slice_mut::<u32>()?.slice_mut(place);
        device.memcpy_htod(self.0, &mut part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn numbers_go_where_they_belong_and_nowhere_else() {
        let tensor = Tensor::zeros(6, DType::U32, &Device::Cpu).expect("a tensor");
        upload(&tensor, 2, &[7, 8, 9]).expect("they fit");
        assert_eq!(
            tensor.to_vec1::<u32>().expect("numbers"),
            [0, 0, 7, 8, 9, 0]
        );
        upload(&tensor, 4, &[1, 2, 3]).expect_err("they do not fit");
        let wide = Tensor::zeros(6, DType::F32, &Device::Cpu).expect("a tensor");
        let error = upload(&wide, 0, &[1]).expect_err("of another dtype");
        assert!(matches!(
            error,
            Error::UnsupportedDTypeForOp(DType::F32, NAME)
        ));
        assert_eq!(
            tensor.to_vec1::<u32>().expect("numbers"),
            [0, 0, 7, 8, 9, 0]
        );
    }
}
