//! Keys and values appended by one launch.
//!
//! A decode step appends one token to each cache of each layer. Two copies for each layer cost more time to launch than to
//! run, so one kernel lays down both; where answers are to be contiguous it makes them on the way: `kernels/append.cu`.
//!
//! # Safety
//! The kernel writes where [`Side`]s say: to rows that are live, in no view and owned by the caller's borrow, and to answers
//! that were allocated here for exactly what it writes. It reads the tokens that come, whose storage stays borrowed until it
//! is queued, and rows that are live. All of it is queued on Candle's stream, behind which memory is freed.
#![allow(unsafe_code)]

use crate::error::{Result, VmmError};
use crate::kernels;
use candle_core::backend::BackendDevice;
use candle_core::cuda::cudarc::driver::{
    CudaFunction, CudaStream, DevicePtr, DevicePtrMut, LaunchConfig, PushKernelArg, SyncOnDrop,
};
use candle_core::cuda::{CudaStorage, CudaStorageSlice as Slice, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, Layout, Shape, Storage, Tensor};
use std::fmt;
use std::sync::Arc;

/// Threads of a block.
const THREADS: u32 = 256;
/// What a thread copies, in bytes.
const PIECE: usize = 16;

/// Tokens `[outer…, tokens, run…]` in bytes: what lies before the sequence's dimension is one stride apart, and what lies
/// behind it one behind the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shaped {
    tokens: usize,
    outer: usize,
    run_bytes: usize,
    outer_stride: usize,
    token_stride: usize,
}

impl Shaped {
    /// None for tokens that are laid out in another way, or not in whole pieces.
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
        let shaped = Self {
            tokens: dims[dim],
            outer,
            run_bytes: run * element,
            outer_stride: outer_stride * element,
            token_stride: token_stride * element,
        };
        let bytes = [
            shaped.run_bytes,
            shaped.outer_stride,
            shaped.token_stride,
            layout.start_offset() * element,
        ];
        (bytes.iter().all(|bytes| bytes % PIECE == 0)).then_some(shaped)
    }
}

/// Where one of the two, keys or values, comes from and goes.
pub(crate) struct Side<'a> {
    /// The tokens that come.
    pub(crate) tokens: &'a Tensor,
    /// The address of the first row, in live memory for all rows, the new ones included.
    pub(crate) rows: u64,
}

/// What came of it.
pub(crate) enum Queued {
    /// Nothing: it is not for this kernel.
    Not,
    /// The rows.
    Rows,
    /// The rows, and all keys and values as contiguous tensors.
    Answers([Tensor; 2]),
}

/// Appends keys and values, of one shape and type, on one Candle device.
pub(crate) struct Append {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    /// None where the driver would not have it.
    function: Option<CudaFunction>,
}

impl fmt::Debug for Append {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Append")
    }
}

impl Append {
    /// Loads the kernel. Where that fails, nothing is ever queued.
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

    /// Queues the copies of both sides' tokens, which are of one shape and type, behind their `old` rows, and of all rows to
    /// answers where they are wanted: `[outer…, tokens, run…]`, contiguous.
    ///
    /// # Safety
    /// The rows of both sides are live for `old` tokens and those that come, the new ones in no view.
    pub(crate) unsafe fn queue(
        &self,
        sides: [Side<'_>; 2],
        dim: usize,
        old: usize,
        wants_answers: bool,
    ) -> Result<Queued> {
        let Some(function) = &self.function else {
            return Ok(Queued::Not);
        };
        let (device, stream) = (&self.device, &self.stream);
        let [(first, first_layout), (second, second_layout)] =
            [&sides[0], &sides[1]].map(|side| side.tokens.storage_and_layout());
        let (Storage::Cuda(first), Storage::Cuda(second)) = (&*first, &*second) else {
            return Err(VmmError::UnsupportedDevice);
        };
        // Others are copied, in turn with their streams.
        let is_ours =
            |storage: &CudaStorage| storage.device.cuda_stream().cu_stream() == stream.cu_stream();
        if !(is_ours(first) && is_ours(second)) {
            return Ok(Queued::Not);
        }
        let dtype = sides[0].tokens.dtype();
        let element = dtype.size_in_bytes();
        let shapes = [first_layout, second_layout].map(|layout| Shaped::new(layout, dim, element));
        let [Some(keys), Some(values)] = shapes else {
            return Ok(Queued::Not);
        };
        // Without answers the old rows are not touched: the new ones are all there is.
        let (skipped, old) = if wants_answers { (0, old) } else { (old, 0) };
        let row_bytes = keys.outer * keys.run_bytes;
        let all = old + keys.tokens;
        let total = all * row_bytes / PIECE;
        let counts = [keys.run_bytes / PIECE, all, old, total].map(u32::try_from);
        let [Ok(pieces), Ok(all), Ok(old), Ok(total)] = counts else {
            return Ok(Queued::Not);
        };
        let mut answers = match wants_answers {
            true => {
                let mut dims = first_layout.dims().to_vec();
                dims[dim] = all as usize;
                let shape = Shape::from(dims);
                // SAFETY: the kernel writes all of it before anything that is queued later reads it.
                let answer = || unsafe { device.alloc_uninit(&shape, dtype) };
                Some((answer()?, answer()?, shape.clone()))
            }
            false => None,
        };
        {
            let (come_0, _first_read) = address(&first.slice, first_layout, stream, element);
            let (come_1, _second_read) = address(&second.slice, second_layout, stream, element);
            if (come_0 | come_1) % PIECE as u64 != 0 {
                return Ok(Queued::Not);
            }
            let [row_0, row_1] =
                [&sides[0], &sides[1]].map(|side| side.rows + (skipped * row_bytes) as u64);
            let (mut answer_0, mut answer_1) = (0, 0);
            let mut _written = None;
            if let Some((keys, values, _)) = &mut answers {
                let (keys, values) = (
                    address_mut(&mut keys.slice, stream),
                    address_mut(&mut values.slice, stream),
                );
                (answer_0, answer_1) = (keys.0, values.0);
                _written = Some((keys.1, values.1));
            }
            let [outer_0, token_0] = [keys.outer_stride as u64, keys.token_stride as u64];
            let [outer_1, token_1] = [values.outer_stride as u64, values.token_stride as u64];
            let row_bytes = row_bytes as u64;
            let mut launch = stream.launch_builder(function);
            launch
                .arg(&row_0)
                .arg(&come_0)
                .arg(&answer_0)
                .arg(&outer_0)
                .arg(&token_0);
            launch
                .arg(&row_1)
                .arg(&come_1)
                .arg(&answer_1)
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
            // SAFETY: the parameters are those of the kernel. It reads `come` by the strides of tensors that are borrowed,
            // and reads and writes `total` pieces of each side's rows and answer: the rows are the caller's promise, the
            // answers have as many.
            unsafe { launch.launch(config) }.w()?;
        }
        Ok(match answers {
            None => Queued::Rows,
            Some((keys, values, shape)) => Queued::Answers([keys, values].map(|storage| {
                Tensor::from_storage(
                    Storage::Cuda(storage),
                    shape.clone(),
                    BackpropOp::none(),
                    false,
                )
            })),
        })
    }
}

/// Where a tensor's first element is.
fn address<'a>(
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

/// Where a slice is, to be written.
fn address_mut<'a>(slice: &'a mut Slice, stream: &'a CudaStream) -> (u64, SyncOnDrop<'a>) {
    macro_rules! addresses {
        ($($dtype:ident)*) => { match slice { $(Slice::$dtype(slice) => slice.device_ptr_mut(stream),)* } };
    }
    addresses!(U8 U32 I16 I32 I64 BF16 F16 F32 F64 F8E4M3 F6E2M3 F6E3M2 F4 F8E8M0)
}
