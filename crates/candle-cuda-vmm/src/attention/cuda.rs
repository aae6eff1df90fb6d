//! Attention on a GPU: two strided-batched products of cuBLAS with a softmax between them.
//!
//! # Safety
//! cuBLAS reads and writes as pointers, sizes and strides say. It reads a tensor through a view
//! from the tensor's first to its last element, which is checked to lie within the tensor's memory.
//! It writes to memory that was allocated here for exactly the product's size. Both stay borrowed
//! until the product is queued, on the stream that orders the device's allocations.
#![allow(unsafe_code)]

use super::options::{GqaOptions, Mask};
use super::sizes::{NAME, Sizes};
use super::softmax;
use crate::order::StreamOrder;
use candle_core::backend::BackendStorage;
use candle_core::cuda::cudarc::cublas::{result::gemm_strided_batched_ex, sys};
use candle_core::cuda::cudarc::driver::{CudaSlice, CudaView, DevicePtr, DevicePtrMut, DeviceRepr};
use candle_core::cuda::{CudaDType, WrapErr, gemm_reduced_precision_f32};
use candle_core::op::BackpropOp;
use candle_core::{
    CudaDevice, CudaStorage, DType, Error, Layout, Result, Storage, Tensor, WithDType,
};
use half::{bf16, f16};
use std::ffi::{c_int, c_longlong, c_void};

/// An element type that cuBLAS multiplies.
trait Element: DeviceRepr + CudaDType + WithDType {
    /// cuBLAS's name of the type.
    const TYPE: sys::cudaDataType;
    /// The softmax kernel with this output type.
    const SOFTMAX: &str;
}

impl Element for f32 {
    const TYPE: sys::cudaDataType = sys::cudaDataType::CUDA_R_32F;
    const SOFTMAX: &str = "softmax_f32";
}

impl Element for f16 {
    const TYPE: sys::cudaDataType = sys::cudaDataType::CUDA_R_16F;
    const SOFTMAX: &str = "softmax_f16";
}

impl Element for bf16 {
    const TYPE: sys::cudaDataType = sys::cudaDataType::CUDA_R_16BF;
    const SOFTMAX: &str = "softmax_bf16";
}

/// Computes the attention of q, K and V. q is contiguous.
pub fn attend(
    sizes: &Sizes,
    options: &GqaOptions,
    inputs: [(&CudaStorage, &Layout); 3],
) -> Result<CudaStorage> {
    // All work is queued on q's stream, ordered with the streams of K and V if they differ.
    let [stream, keys, values] = inputs.map(|(storage, _)| storage.device.cuda_stream());
    let orders = [
        StreamOrder::begin(&stream, &keys)?,
        StreamOrder::begin(&stream, &values)?,
    ];
    let outcome = match inputs[0].0.dtype() {
        DType::F32 => attend_typed::<f32>(sizes, options, inputs),
        DType::F16 => attend_typed::<f16>(sizes, options, inputs),
        DType::BF16 => attend_typed::<bf16>(sizes, options, inputs),
        other => Err(Error::UnsupportedDTypeForOp(other, NAME)),
    };
    for order in orders {
        order.end()?;
    }
    outcome
}

fn attend_typed<T: Element>(
    sizes: &Sizes,
    options: &GqaOptions,
    [q, k, v]: [(&CudaStorage, &Layout); 3],
) -> Result<CudaStorage> {
    let device = &q.0.device;
    let queries = extent::<T>(sizes, q.1, q)?;
    let keys = Heads::<T>::new(sizes, sizes.dim, q.1, k)?;
    let values = Heads::<T>::new(sizes, sizes.value_dim, q.1, v)?;
    let scale = options.scale;
    let scores = multiply::<T, f32>(device, sizes, Product::Scores { scale }, &keys, &queries)?;
    let weights = weights::<T>(sizes, options, wrap(sizes, scores, device))?;
    let (storage, layout) = weights.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        return Err(Error::UnsupportedDTypeForOp(T::DTYPE, NAME));
    };
    let weights = extent::<T>(sizes, q.1, (storage, layout))?;
    let result = multiply::<T, T>(device, sizes, Product::Output, &values, &weights)?;
    Ok(CudaStorage::wrap_cuda_slice(result, device.clone()))
}

/// Returns a view of a tensor from its first to its last element.
fn extent<'a, T: Element>(
    sizes: &Sizes,
    q: &Layout,
    (storage, layout): (&'a CudaStorage, &Layout),
) -> Result<CudaView<'a, T>> {
    let first = layout.start_offset();
    let mut steps = layout.dims().iter().zip(layout.stride());
    let last = steps.try_fold(first, |last, (&size, &stride)| {
        last.checked_add(size.checked_sub(1)?.checked_mul(stride)?)
    });
    last.and_then(|last| storage.as_cuda_slice::<T>().ok()?.try_slice(first..=last))
        .ok_or_else(|| sizes.unexpected_strides(q, layout, "the tensor reaches beyond its memory"))
}

/// The heads of K or V.
struct Heads<'a, T> {
    elements: CudaView<'a, T>,
    /// Elements from one key to the next.
    key_stride: c_int,
    batches: Batches,
}

impl<'a, T: Element> Heads<'a, T> {
    /// The heads of K or V, whose rows have `dim` elements.
    fn new(
        sizes: &Sizes,
        dim: usize,
        q: &Layout,
        from: (&'a CudaStorage, &Layout),
    ) -> Result<Self> {
        let strides = from.1.stride();
        let key_stride = match sizes.keys {
            // Unused for one key, but cuBLAS checks it.
            1 => dim,
            _ => strides[2],
        };
        if key_stride < dim {
            let msg = "a key's stride must be at least the head's dimension";
            return Err(sizes.unexpected_strides(q, from.1, msg));
        }
        Ok(Self {
            elements: extent(sizes, q, from)?,
            key_stride: cublas_int(key_stride)?,
            batches: Batches::new(sizes, strides[0], strides[1]),
        })
    }
}

/// How the heads of all sequences are split into calls, and each call into matrices. One call has
/// one stride from matrix to matrix.
struct Batches {
    calls: BatchDimension,
    matrices: BatchDimension,
}

/// A number of heads or sequences, and the distance from one to the next: in elements of K and V,
/// and in heads of contiguous memory.
#[derive(Clone, Copy)]
struct BatchDimension {
    count: usize,
    elements: usize,
    heads: usize,
}

impl Batches {
    fn new(sizes: &Sizes, batch_stride: usize, head_stride: usize) -> Self {
        let (batch, heads) = (sizes.batch, sizes.kv_heads);
        let of_batch = BatchDimension {
            count: batch,
            elements: batch_stride,
            heads,
        };
        let of_heads = BatchDimension {
            count: heads,
            elements: head_stride,
            heads: 1,
        };
        if heads > 1 && batch > 1 && batch_stride == heads * head_stride {
            let all = BatchDimension {
                count: batch * heads,
                ..of_heads
            };
            let once = BatchDimension {
                count: 1,
                ..of_batch
            };
            return Self {
                calls: once,
                matrices: all,
            };
        }
        let (calls, matrices) = match batch <= heads {
            true => (of_batch, of_heads),
            false => (of_heads, of_batch),
        };
        Self { calls, matrices }
    }
}

/// One of the two products, for each head of K or V and its query rows.
#[derive(Clone, Copy)]
enum Product {
    /// `[rows, keys] = scale · queries[rows, dim] · K[keys, dim]ᵀ`
    Scores { scale: f32 },
    /// `[rows, value_dim] = weights[rows, keys] · V[keys, value_dim]`
    Output,
}

/// Multiplies all heads with their query rows. The result is contiguous, `[batch, kv_heads, rows,
/// keys or value_dim]`.
fn multiply<T: Element, R: Element>(
    device: &CudaDevice,
    sizes: &Sizes,
    product: Product,
    heads: &Heads<T>,
    rows: &CudaView<T>,
) -> Result<CudaSlice<R>> {
    // cuBLAS is column-major, so the operands are swapped: the heads come first.
    let (transpose, across, along, scale) = match product {
        Product::Scores { scale } => (
            sys::cublasOperation_t::CUBLAS_OP_T,
            sizes.keys,
            sizes.dim,
            scale,
        ),
        Product::Output => (
            sys::cublasOperation_t::CUBLAS_OP_N,
            sizes.value_dim,
            sizes.keys,
            1.,
        ),
    };
    // Elements of one head's query rows, and of their product.
    let (rows_of_head, result_of_head) = (sizes.rows() * along, sizes.rows() * across);
    let (m, n, k) = (
        cublas_int(across)?,
        cublas_int(sizes.rows())?,
        cublas_int(along)?,
    );
    let Batches { calls, matrices } = heads.batches;
    let batch_count = cublas_int(matrices.count)?;
    let heads_stride = cublas_stride(matrices.elements)?;
    let rows_stride = cublas_stride(matrices.heads * rows_of_head)?;
    let result_stride = cublas_stride(matrices.heads * result_of_head)?;
    let compute_type = match T::DTYPE == DType::F32 && gemm_reduced_precision_f32() {
        true => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
        false => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
    };
    let (stream, blas) = (device.cuda_stream(), device.cublas_handle());
    // SAFETY: the product writes all of it before anything reads it.
    let mut result = unsafe { device.alloc::<R>(sizes.batch * sizes.kv_heads * result_of_head)? };
    {
        let (heads_at, _heads_read) = heads.elements.device_ptr(&stream);
        let (rows_at, _rows_read) = rows.device_ptr(&stream);
        let (result_at, _result_written) = result.device_ptr_mut(&stream);
        for call in 0..calls.count {
            let heads_at = heads_at + (call * calls.elements * size_of::<T>()) as u64;
            let rows_at = rows_at + (call * calls.heads * rows_of_head * size_of::<T>()) as u64;
            let result_at =
                result_at + (call * calls.heads * result_of_head * size_of::<R>()) as u64;
            // SAFETY: the calls and their matrices are the heads of all sequences, once each. The
            // heads are read within their view, as the strides are the tensor's; rows and result
            // have `rows_of_head` and `result_of_head` elements for each. The factors are read
            // before the call reorders.
            unsafe {
                gemm_strided_batched_ex(
                    *blas.handle(),
                    transpose,
                    sys::cublasOperation_t::CUBLAS_OP_N,
                    m,
                    n,
                    k,
                    (&raw const scale).cast::<c_void>(),
                    heads_at as *const c_void,
                    T::TYPE,
                    heads.key_stride,
                    heads_stride,
                    rows_at as *const c_void,
                    T::TYPE,
                    k,
                    rows_stride,
                    (&raw const ZERO).cast::<c_void>(),
                    result_at as *mut c_void,
                    R::TYPE,
                    m,
                    result_stride,
                    batch_count,
                    compute_type,
                    sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
                )
            }
            .w()?;
        }
    }
    Ok(result)
}

/// The factor (beta) of the output's old content.
static ZERO: f32 = 0.;

/// Makes a contiguous tensor with one number for each query and key.
fn wrap<T: Element>(sizes: &Sizes, slice: CudaSlice<T>, device: &CudaDevice) -> Tensor {
    let shape = (sizes.batch, sizes.query_heads(), sizes.queries, sizes.keys);
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, device.clone()));
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

/// Computes the weight of each key for each query, from the scores.
fn weights<T: Element>(sizes: &Sizes, options: &GqaOptions, scores: Tensor) -> Result<Tensor> {
    let device = scores.device().as_cuda_device()?;
    let Some(kernel) = softmax::kernel(device, T::SOFTMAX) else {
        let scores = capped_and_masked(sizes, options, &scores)?;
        return candle_nn::ops::softmax_last_dim(&scores)?.to_dtype(T::DTYPE);
    };
    let (storage, _contiguous) = scores.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        return Err(Error::UnsupportedDTypeForOp(T::DTYPE, NAME));
    };
    let scores = storage.as_cuda_slice::<f32>()?;
    let weights = softmax::softmax::<T>(device, &kernel, scores, sizes, options)?;
    Ok(wrap(sizes, weights, device))
}

/// Returns the scores within the soft cap, with `-inf` for the keys that a query does not see. The
/// softmax kernel does the same.
fn capped_and_masked(sizes: &Sizes, options: &GqaOptions, scores: &Tensor) -> Result<Tensor> {
    let scores = match options.soft_cap {
        Some(cap) => {
            let cap = f64::from(cap);
            scores.affine(1. / cap, 0.)?.tanh()?.affine(cap, 0.)?
        }
        None => scores.clone(),
    };
    if options.mask == Mask::None {
        return Ok(scores);
    }
    let seen = (0..sizes.queries).flat_map(|query| {
        let seen = sizes.seen(options.mask, query);
        (0..sizes.keys).map(move |key| u8::from(seen.contains(&key)))
    });
    let device = scores.device();
    let seen = Tensor::from_vec(
        seen.collect::<Vec<_>>(),
        (sizes.queries, sizes.keys),
        device,
    )?;
    let unseen = Tensor::full(f32::NEG_INFINITY, (), device)?.broadcast_as(scores.shape())?;
    seen.broadcast_as(scores.shape())?
        .where_cond(&scores, &unseen)
}

/// Converts a number to cuBLAS's type.
fn cublas_int(number: usize) -> Result<c_int> {
    number.try_into().map_err(Error::wrap)
}

/// Converts a stride from matrix to matrix to cuBLAS's type.
fn cublas_stride(elements: usize) -> Result<c_longlong> {
    elements.try_into().map_err(Error::wrap)
}
