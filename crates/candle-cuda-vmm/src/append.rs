//! Appends keys and values by one launch.
//!
//! A decode step appends one token to each cache of each layer. Two copies per layer take longer to
//! launch than to run, so one kernel, `kernels/append.cu`, writes both. If contiguous outputs are
//! wanted, the same kernel writes them.
//!
//! # Safety
//! The kernel writes to the rows of each [`Side`], which are live and owned by the caller's borrow.
//! They are in no view, or in views that are to show what is written. It writes to outputs that
//! were allocated here for exactly what it writes. It reads the new tokens, whose storage stays
//! borrowed until the kernel is queued, and live rows. All work is queued on Candle's stream, and
//! memory is freed behind that stream.
#![allow(unsafe_code)]

use crate::error::{Result, VmmError};
use crate::kernels;
use crate::lease;
use candle_core::backend::BackendDevice;
use candle_core::cuda::cudarc::driver::{
    CudaFunction, CudaStream, DevicePtr, DevicePtrMut, LaunchConfig, PushKernelArg, SyncOnDrop,
};
use candle_core::cuda::{CudaStorage, CudaStorageSlice as Slice, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, Layout, Shape, Storage, Tensor};
use std::fmt;
use std::sync::Arc;

/// Threads per block.
const THREADS: u32 = 256;
/// Bytes that a thread copies.
const PIECE: usize = 16;

/// The layout in bytes of tokens `[outer…, tokens, run…]`. The dimensions before the sequence have
/// one stride, and those after it are contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct TokenLayout {
    count: usize,
    outer: usize,
    run_bytes: usize,
    outer_stride: usize,
    token_stride: usize,
}

impl TokenLayout {
    /// Returns `None` for any other layout, and if a size or an offset is no multiple of 16 bytes.
    fn new(layout: &Layout, dim: usize, element: usize) -> Option<Self> {
        let (dims, strides) = (layout.dims(), layout.stride());
        let mut run = 1;
        for at in (dim + 1..dims.len()).rev() {
            if dims[at] > 1 && strides[at] != run {
                return None;
            }
            run *= dims[at];
        }
        let (mut outer, mut outer_stride) = (1, 0);
        for at in (0..dim).rev().filter(|at| dims[*at] > 1) {
            match outer {
                1 => outer_stride = strides[at],
                _ if strides[at] != outer * outer_stride => return None,
                _ => {}
            }
            outer *= dims[at];
        }
        let token_stride = match dims[dim] {
            0 | 1 => 0,
            _ => strides[dim],
        };
        let this = Self {
            count: dims[dim],
            outer,
            run_bytes: run * element,
            outer_stride: outer_stride * element,
            token_stride: token_stride * element,
        };
        let bytes = [
            this.run_bytes,
            this.outer_stride,
            this.token_stride,
            layout.start_offset() * element,
        ];
        (bytes.iter().all(|bytes| bytes % PIECE == 0)).then_some(this)
    }
}

/// One side of an append: keys or values.
pub(crate) struct Side<'a> {
    /// The new tokens.
    pub(crate) tokens: &'a Tensor,
    /// Address of the side's part of the first row, in live memory for all rows, including the new
    /// ones.
    pub(crate) rows: u64,
    /// Bytes from one row to the next.
    pub(crate) row_bytes: usize,
}

/// The result of an append.
pub(crate) enum AppendOutcome {
    /// Nothing was queued: the kernel does not support these tokens.
    Unsupported,
    /// The rows were appended.
    Appended,
    /// The rows were appended, and copied: all keys and all values, contiguous.
    Contiguous([Tensor; 2]),
}

/// Appends keys and values of one shape and dtype on one Candle device.
pub(crate) struct Append {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    /// `None` if the driver does not load it.
    function: Option<CudaFunction>,
}

impl fmt::Debug for Append {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Append")
    }
}

impl Append {
    /// Loads the kernel. If that fails, `queue` always returns `Unsupported`.
    pub(crate) fn new(device: &CudaDevice) -> Self {
        let function = kernels::APPEND.function(device, "append_tokens");
        let function =
            function.inspect_err(|error| tracing::debug!(%error, "tokens are appended by copies"));
        Self {
            device: device.clone(),
            stream: device.cuda_stream(),
            function: function.ok(),
        }
    }

    /// Queues copies of both sides' new tokens, which have one shape and dtype, behind their `old`
    /// rows. With `contiguous` it also copies all rows to outputs `[outer…, tokens, run…]`.
    ///
    /// # Safety
    /// The rows of both sides are live for the `old` and the new tokens. No view shows the new
    /// ones, except views that are to show what is written.
    pub(crate) unsafe fn queue(
        &self,
        sides: [Side<'_>; 2],
        dim: usize,
        old: usize,
        contiguous: bool,
    ) -> Result<AppendOutcome> {
        lease::check_not_captured()?;
        let Some(function) = &self.function else {
            return Ok(AppendOutcome::Unsupported);
        };
        let (device, stream) = (&self.device, &self.stream);
        let [(first, first_layout), (second, second_layout)] =
            [&sides[0], &sides[1]].map(|side| side.tokens.storage_and_layout());
        let (Storage::Cuda(first), Storage::Cuda(second)) = (&*first, &*second) else {
            return Err(VmmError::UnsupportedDevice);
        };
        // Tokens of other streams are copied, ordered with those streams.
        let is_ours =
            |storage: &CudaStorage| storage.device.cuda_stream().cu_stream() == stream.cu_stream();
        if !(is_ours(first) && is_ours(second)) {
            return Ok(AppendOutcome::Unsupported);
        }
        let dtype = sides[0].tokens.dtype();
        let element = dtype.size_in_bytes();
        let shapes =
            [first_layout, second_layout].map(|layout| TokenLayout::new(layout, dim, element));
        let [Some(keys), Some(values)] = shapes else {
            return Ok(AppendOutcome::Unsupported);
        };
        // Without outputs the kernel does not read the old rows, so it only gets the new ones.
        let (skipped, old) = if contiguous { (0, old) } else { (old, 0) };
        let row_bytes = sides[0].row_bytes;
        let is_aligned =
            |side: &Side<'_>| (side.rows | row_bytes as u64).is_multiple_of(PIECE as u64);
        if sides[1].row_bytes != row_bytes || !sides.iter().all(is_aligned) {
            return Ok(AppendOutcome::Unsupported);
        }
        let all = old + keys.count;
        let total = all * keys.outer * keys.run_bytes / PIECE;
        let counts = [keys.run_bytes / PIECE, all, old, total].map(u32::try_from);
        let [Ok(pieces), Ok(all), Ok(old), Ok(total)] = counts else {
            return Ok(AppendOutcome::Unsupported);
        };
        let mut outputs = match contiguous {
            true => {
                let mut dims = first_layout.dims().to_vec();
                dims[dim] = all as usize;
                let shape = Shape::from(dims);
                // SAFETY: the kernel writes all of it before later work reads it.
                let output = || unsafe { device.alloc_uninit(&shape, dtype) };
                Some((output()?, output()?, shape.clone()))
            }
            false => None,
        };
        {
            let (tokens_0, _first_read) = address(&first.slice, first_layout, stream, element);
            let (tokens_1, _second_read) = address(&second.slice, second_layout, stream, element);
            if (tokens_0 | tokens_1) % PIECE as u64 != 0 {
                return Ok(AppendOutcome::Unsupported);
            }
            let [row_0, row_1] =
                [&sides[0], &sides[1]].map(|side| side.rows + (skipped * row_bytes) as u64);
            let (mut output_0, mut output_1) = (0, 0);
            let mut _written = None;
            if let Some((keys, values, _)) = &mut outputs {
                let (keys, values) = (
                    address_mut(&mut keys.slice, stream),
                    address_mut(&mut values.slice, stream),
                );
                (output_0, output_1) = (keys.0, values.0);
                _written = Some((keys.1, values.1));
            }
            let [outer_0, token_0] = [keys.outer_stride as u64, keys.token_stride as u64];
            let [outer_1, token_1] = [values.outer_stride as u64, values.token_stride as u64];
            let row_bytes = row_bytes as u64;
            let mut launch = stream.launch_builder(function);
            launch
                .arg(&row_0)
                .arg(&tokens_0)
                .arg(&output_0)
                .arg(&outer_0)
                .arg(&token_0);
            launch
                .arg(&row_1)
                .arg(&tokens_1)
                .arg(&output_1)
                .arg(&outer_1)
                .arg(&token_1);
            launch
                .arg(&row_bytes)
                .arg(&pieces)
                .arg(&all)
                .arg(&old)
                .arg(&total);
            let config = LaunchConfig {
                grid_dim: (total.div_ceil(THREADS), 2, 1),
                block_dim: (THREADS, 1, 1),
                shared_mem_bytes: 0,
            };
            // SAFETY: the parameters match the kernel's. It reads new tokens by the strides of
            // borrowed tensors. It reads and writes `total` pieces of each side's rows, which the
            // caller guarantees, and of its output, which has that size.
            unsafe { launch.launch(config) }.w()?;
        }
        Ok(match outputs {
            None => AppendOutcome::Appended,
            Some((keys, values, shape)) => {
                AppendOutcome::Contiguous([keys, values].map(|storage| {
                    Tensor::from_storage(
                        Storage::Cuda(storage),
                        shape.clone(),
                        BackpropOp::none(),
                        false,
                    )
                }))
            }
        })
    }
}

/// Returns the address of a tensor's first element.
pub(crate) fn address<'a>(
    slice: &'a Slice,
    layout: &Layout,
    stream: &'a CudaStream,
    element: usize,
) -> (u64, SyncOnDrop<'a>) {
    macro_rules! addresses {
        ($($dtype:ident)*) => { match slice { $(Slice::$dtype(slice) => slice.device_ptr(stream),)* } };
    }
    let (first, read) =
        addresses!(U8 U32 I16 I32 I64 BF16 F16 F32 F64 F8E4M3 F6E2M3 F6E3M2 F4 F8E8M0);
    (first + (layout.start_offset() * element) as u64, read)
}

/// Returns the address of a slice, for writing.
pub(crate) fn address_mut<'a>(
    slice: &'a mut Slice,
    stream: &'a CudaStream,
) -> (u64, SyncOnDrop<'a>) {
    macro_rules! addresses {
        ($($dtype:ident)*) => { match slice { $(Slice::$dtype(slice) => slice.device_ptr_mut(stream),)* } };
    }
    addresses!(U8 U32 I16 I32 I64 BF16 F16 F32 F64 F8E4M3 F6E2M3 F6E3M2 F4 F8E8M0)
}
