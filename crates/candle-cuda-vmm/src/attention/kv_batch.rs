//! K and V of a batch of sequences.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::kv_memory::{KvMemory, KvSizes, KvStrides};
use super::stream::check_device;
use crate::elastic_blocks::ElasticBlocks;
use crate::error::{Result, VmmError};
use candle_core::{DType, Device, Error, Tensor};

/// The name of this type's operations in Candle's errors.
pub(super) const NAME: &str = "kv_batch";

/// The smallest block of a paged cache, in tokens. Sizes are multiples of it.
const BLOCK_SIZE_STEP: usize = 16;
/// The largest block of a paged cache, in tokens.
const BLOCK_SIZE_MAX: usize = 256;

/// K and V of a batch of sequences, where [`decode`](super::decode), [`write`](super::write) and
/// [`prompt`](super::prompt) find them. Cloning is cheap.
///
/// It holds clones of the tensors, so their memory stays leased while it lives. There are three
/// layouts, with one constructor each:
///
/// | constructor | memory |
/// |---|---|
/// | [`rows`](Self::rows) | one tensor with room for the same number of tokens for each sequence |
/// | [`sequences`](Self::sequences) | one cache for each sequence |
/// | [`blocks`](Self::blocks) | a paged cache, with a table of blocks for each sequence |
///
/// [`lengths`](Self::lengths) says how many tokens of each sequence count. They are in device
/// memory and are read when the work runs. So a captured launch stays valid while sequences grow:
/// write the new lengths, and the new tables, to the same tensors before each launch.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_cuda_vmm::attention::{DecodePlan, GqaOptions, KvBatch, decode};
///
/// # fn main() -> candle_core::Result<()> {
/// let device = Device::Cpu;
/// // Two sequences with room for 64 tokens. They have 10 and 33.
/// let kv = Tensor::randn(0f32, 1., (2, 8, 64, 128), &device)?;
/// let lengths = Tensor::new(&[10u32, 33], &device)?;
/// let kv = KvBatch::rows(&kv, &kv)?.lengths(&lengths)?;
/// let plan = DecodePlan::new(&device, 2, 32)?;
/// let q = Tensor::randn(0f32, 1., (2, 32, 128), &device)?;
/// let out = decode(&q, &kv, &GqaOptions::new(1. / 128f32.sqrt()), &plan)?;
/// assert_eq!(out.dims(), [2, 32, 128]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct KvBatch {
    pub(super) memory: KvMemory,
    pub(super) sizes: KvSizes,
    /// The strides of K and of V.
    pub(super) strides: [KvStrides; 2],
    pub(super) dtype: DType,
    /// U32 `[batch]`, contiguous.
    pub(super) lengths: Option<Tensor>,
    /// What stored values of K and of V are multiplied by. 1 unless they are F8E4M3.
    pub(super) scales: [f32; 2],
    /// The blocks that back a paged cache, to check tables.
    pub(super) backing: Option<ElasticBlocks>,
}

impl KvBatch {
    /// K and V of all sequences in one tensor each.
    ///
    /// # Shapes
    /// `k` is `[batch, kv_heads, capacity, dim]`, and `v` is `[batch, kv_heads, capacity,
    /// value_dim]`. They may have any strides whose last is 1. A view of token-major memory, as
    /// [`ElasticKvCache`](crate::ElasticKvCache) returns it, works.
    ///
    /// # Errors
    /// [`CandleError`](VmmError::CandleError) with one of Candle's errors:
    /// - `UnsupportedDTypeForOp` unless the dtype is F16, BF16, F32 or F8E4M3.
    /// - `DTypeMismatchBinaryOp` or `DeviceMismatchBinaryOp` if K and V differ in it.
    /// - `UnexpectedNumberOfDims` unless both have four dimensions.
    /// - `ShapeMismatchBinaryOp` if they differ in more than the last dimension.
    /// - `EmptyTensor` if a size is 0.
    /// - `RequiresContiguous` if the last stride is not 1.
    pub fn rows(k: &Tensor, v: &Tensor) -> Result<Self> {
        let [batch, kv_heads, capacity, dim] = checked_pair(k, v)?;
        let strides = [k, v].map(|tensor| KvStrides {
            outer: tensor.stride()[0],
            head: tensor.stride()[1],
            token: tensor.stride()[2],
        });
        let sizes = KvSizes {
            batch,
            kv_heads,
            capacity,
            dim,
            value_dim: v.dims()[3],
        };
        let (k, v) = (k.clone(), v.clone());
        Ok(Self::new(KvMemory::Rows { k, v }, sizes, strides))
    }

    /// K and V of each sequence in a cache of its own.
    ///
    /// # Shapes
    /// The pair of sequence `i` is `[1, kv_heads, capacity_i, dim]` and `[1, kv_heads, capacity_i,
    /// value_dim]`. Capacities may differ. The strides of heads and of tokens must be the same for
    /// all sequences, and the last stride is 1. Token-major caches have such strides.
    ///
    /// # Errors
    /// - [`DifferentStrides`](VmmError::DifferentStrides) if strides differ between sequences.
    /// - The errors of [`rows`](Self::rows), also if a sequence differs from the first one in
    ///   dtype, device or shape. `EmptyTensor` if there is no sequence.
    pub fn sequences(pairs: &[(Tensor, Tensor)]) -> Result<Self> {
        let Some((first_k, first_v)) = pairs.first() else {
            return Err(Error::EmptyTensor { op: NAME }.into());
        };
        let [_, kv_heads, _, dim] = checked_pair(first_k, first_v)?;
        let value_dim = first_v.dims()[3];
        let mut capacities = Vec::with_capacity(pairs.len());
        for (k, v) in pairs {
            let [batch, heads, capacity, this_dim] = checked_pair(k, v)?;
            check_alike(first_k, k)?;
            for (this, first, is_alike) in [
                (k, first_k, (batch, heads, this_dim) == (1, kv_heads, dim)),
                (v, first_v, v.dims()[3] == value_dim),
            ] {
                if !is_alike {
                    return Err(mismatch(first, this));
                }
            }
            capacities.push(capacity);
        }
        let strides = KvStrides::of_sequences(pairs)?;
        let sizes = KvSizes {
            batch: pairs.len(),
            kv_heads,
            capacity: capacities.iter().copied().max().unwrap_or_default(),
            dim,
            value_dim,
        };
        let memory = KvMemory::Sequences {
            pairs: pairs.into(),
            addresses: address_table(pairs)?,
            capacities: capacities.into(),
        };
        Ok(Self::new(memory, sizes, strides))
    }

    /// K and V in blocks, which a table names for each sequence.
    ///
    /// # Shapes
    /// `k` is `[num_blocks, block_size, kv_heads, dim]`, and `v` is `[num_blocks, block_size,
    /// kv_heads, value_dim]`, such as the tensors of [`ElasticBlocks`]. The last stride is 1, the
    /// others may be any. `block_size` is a multiple of 16 from 16 to 256.
    ///
    /// `tables` is U32 `[batch, blocks_max]`, contiguous, on the same device. Token `t` of sequence
    /// `s` is row `t % block_size` of block `tables[s, t / block_size]`. Entries beyond the length
    /// of the sequence may hold anything.
    ///
    /// # Errors
    /// - [`UnsupportedBlockSize`](VmmError::UnsupportedBlockSize).
    /// - The errors of [`rows`](Self::rows), also for `tables`.
    pub fn blocks(k: &Tensor, v: &Tensor, tables: &Tensor) -> Result<Self> {
        let [_, block_size, kv_heads, dim] = checked_pair(k, v)?;
        if !block_size.is_multiple_of(BLOCK_SIZE_STEP) || block_size > BLOCK_SIZE_MAX {
            return Err(VmmError::UnsupportedBlockSize { size: block_size });
        }
        check_index(k, tables, 2)?;
        let (batch, blocks_max) = tables.dims2()?;
        if batch == 0 || blocks_max == 0 {
            return Err(Error::EmptyTensor { op: NAME }.into());
        }
        let strides = [k, v].map(|tensor| KvStrides {
            outer: tensor.stride()[0],
            head: tensor.stride()[2],
            token: tensor.stride()[1],
        });
        let sizes = KvSizes {
            batch,
            kv_heads,
            capacity: blocks_max * block_size,
            dim,
            value_dim: v.dims()[3],
        };
        let memory = KvMemory::Blocks {
            k: k.clone(),
            v: v.clone(),
            tables: tables.clone(),
            block_size,
        };
        Ok(Self::new(memory, sizes, strides))
    }

    fn new(memory: KvMemory, sizes: KvSizes, strides: [KvStrides; 2]) -> Self {
        Self {
            dtype: memory.first().dtype(),
            memory,
            sizes,
            strides,
            lengths: None,
            scales: [1.; 2],
            backing: None,
        }
    }

    /// Sets how many tokens of each sequence count: U32 `[batch]`, contiguous, on the same device.
    ///
    /// They are read when the work runs. Without lengths, the length of each sequence is its
    /// capacity. A paged cache needs lengths. A length of 0 is that of a row without a sequence:
    /// nothing of it is read or written, whatever its table names.
    ///
    /// # Errors
    /// [`CandleError`](VmmError::CandleError) with `UnsupportedDTypeForOp`,
    /// `DeviceMismatchBinaryOp`, `UnexpectedNumberOfDims`, `ShapeMismatchBinaryOp` or
    /// `RequiresContiguous` if the tensor is not as above.
    pub fn lengths(mut self, lengths: &Tensor) -> Result<Self> {
        check_index(self.memory.first(), lengths, 1)?;
        if lengths.dims() != [self.sizes.batch] {
            return Err(mismatch(self.memory.first(), lengths));
        }
        self.lengths = Some(lengths.clone());
        Ok(self)
    }

    /// Sets the scales of F8E4M3 K and V: the number is the stored value times the scale. Both are
    /// 1 by default.
    ///
    /// # Errors
    /// - [`InvalidAttention`](VmmError::InvalidAttention) if a scale is not more than 0 or not
    ///   finite.
    /// - [`CandleError`](VmmError::CandleError) with `UnsupportedDTypeForOp` if K and V are not
    ///   F8E4M3.
    pub fn scales(mut self, k_scale: f32, v_scale: f32) -> Result<Self> {
        if self.dtype != DType::F8E4M3 {
            return Err(Error::UnsupportedDTypeForOp(self.dtype, "scales").into());
        }
        for (option, value) in [("scale of K", k_scale), ("scale of V", v_scale)] {
            if !(value > 0. && value.is_finite()) {
                return Err(VmmError::InvalidAttention { option, value });
            }
        }
        self.scales = [k_scale, v_scale];
        Ok(self)
    }

    /// Names the blocks that back the tensors of a paged cache. Then [`check`](Self::check) also
    /// finds blocks that are not backed. It has no effect on other layouts.
    pub fn checked_by(mut self, blocks: &ElasticBlocks) -> Self {
        self.backing = Some(blocks.clone());
        self
    }

    /// Returns the number of sequences.
    pub fn batch(&self) -> usize {
        self.sizes.batch
    }

    /// Returns the number of heads of K and V.
    pub fn kv_heads(&self) -> usize {
        self.sizes.kv_heads
    }

    /// Returns the elements of a head of K.
    pub fn dim(&self) -> usize {
        self.sizes.dim
    }

    /// Returns the elements of a head of V.
    pub fn value_dim(&self) -> usize {
        self.sizes.value_dim
    }

    /// Returns the most tokens that a sequence can have; the largest if capacities differ.
    pub fn capacity(&self) -> usize {
        self.sizes.capacity
    }

    /// Returns the dtype of K and V.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Returns the device of K and V.
    pub fn device(&self) -> &Device {
        self.memory.first().device()
    }
}

/// Checks a pair of K and V, and returns the sizes of K.
fn checked_pair(k: &Tensor, v: &Tensor) -> Result<[usize; 4]> {
    use DType::{BF16, F8E4M3, F16, F32};
    if !matches!(k.dtype(), F16 | BF16 | F32 | F8E4M3) {
        return Err(Error::UnsupportedDTypeForOp(k.dtype(), NAME).into());
    }
    check_alike(k, v)?;
    let (sizes, value_sizes) = (k.dims4()?.into(), v.dims4()?.into());
    let ([a, b, c, dim], [value_a, value_b, value_c, value_dim]): ([usize; 4], [usize; 4]) =
        (sizes, value_sizes);
    if (a, b, c) != (value_a, value_b, value_c) {
        return Err(mismatch(k, v));
    }
    if [a, b, c, dim, value_dim].contains(&0) {
        return Err(Error::EmptyTensor { op: NAME }.into());
    }
    for tensor in [k, v] {
        if tensor.dims()[3] > 1 && tensor.stride()[3] != 1 {
            return Err(Error::RequiresContiguous { op: NAME }.into());
        }
    }
    Ok([a, b, c, dim])
}

/// Checks that two tensors have one dtype and one device.
fn check_alike(left: &Tensor, right: &Tensor) -> Result<()> {
    let (lhs, rhs, op) = (left.dtype(), right.dtype(), NAME);
    if lhs != rhs {
        return Err(Error::DTypeMismatchBinaryOp { lhs, rhs, op }.into());
    }
    Ok(check_device(left, right, NAME)?)
}

/// Checks a tensor of lengths or of block numbers.
fn check_index(k: &Tensor, index: &Tensor, rank: usize) -> Result<()> {
    if index.dtype() != DType::U32 {
        return Err(Error::UnsupportedDTypeForOp(index.dtype(), NAME).into());
    }
    check_device(k, index, NAME)?;
    if index.rank() != rank {
        let error = Error::UnexpectedNumberOfDims {
            expected: rank,
            got: index.rank(),
            shape: index.shape().clone(),
        };
        return Err(error.into());
    }
    match index.is_contiguous() {
        true => Ok(()),
        false => Err(Error::RequiresContiguous { op: NAME }.into()),
    }
}

fn mismatch(left: &Tensor, right: &Tensor) -> VmmError {
    let error = Error::ShapeMismatchBinaryOp {
        lhs: left.shape().clone(),
        rhs: right.shape().clone(),
        op: NAME,
    };
    error.into()
}

/// Returns the table that kernels follow, I64 `[batch, 3]` on the device: the address of K, the
/// address of V, and the capacity of each sequence. `None` if the CPU reads the tensors.
fn address_table(pairs: &[(Tensor, Tensor)]) -> Result<Option<Tensor>> {
    #[cfg(feature = "attention")]
    if pairs[0].0.device().is_cuda() {
        return super::cuda_addresses::table(pairs).map(Some);
    }
    let _ = pairs;
    Ok(None)
}
