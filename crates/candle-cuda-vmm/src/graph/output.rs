//! The tensor that the result of each step is copied to.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use crate::attention::is_same_stream;
use crate::error::{GraphError, Result};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, Device, InplaceOp2, Layout, Tensor};

/// Makes a tensor for results like this one.
pub(super) fn like(made: &Tensor, device: &Device, batch: usize) -> Result<Tensor> {
    if made.rank() == 0 || !is_same_stream(made.device(), device) {
        let error = GraphError::Output {
            batch,
            returned: describe(made),
            expected: "with a dimension, on the device and stream of the graph".to_owned(),
        };
        return Err(error.into());
    }
    Ok(Tensor::zeros(made.shape(), made.dtype(), device)?)
}

/// Copies a result of the same shape and dtype to the tensor, on the device's stream. A contiguous
/// one is copied without a kernel.
pub(super) fn write(output: &Tensor, made: &Tensor) -> Result<()> {
    Ok(output.inplace_op2(made, &Copied)?)
}

struct Copied;

impl InplaceOp2 for Copied {
    fn name(&self) -> &'static str {
        "decode-graph"
    }

    fn cpu_fwd(
        &self,
        output: &mut CpuStorage,
        at: &Layout,
        made: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<()> {
        made.copy_strided_src(output, at.start_offset(), layout)
    }

    fn cuda_fwd(
        &self,
        output: &mut CudaStorage,
        at: &Layout,
        made: &CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<()> {
        made.copy_strided_src(output, at.start_offset(), layout)
    }
}

/// Fails unless a result has the shape, the dtype and the stream of this tensor.
pub(super) fn check(made: &Tensor, output: &Tensor, batch: usize) -> Result<()> {
    let is_alike = made.shape() == output.shape() && made.dtype() == output.dtype();
    match is_alike && is_same_stream(made.device(), output.device()) {
        true => Ok(()),
        false => Err(GraphError::Output {
            batch,
            returned: describe(made),
            expected: describe(output),
        }
        .into()),
    }
}

fn describe(tensor: &Tensor) -> String {
    let (shape, dtype) = (tensor.shape(), tensor.dtype());
    format!("{shape:?} {dtype:?} on {:?}", tensor.device().location())
}
