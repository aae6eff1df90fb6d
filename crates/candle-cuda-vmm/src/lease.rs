//! Candle tensors over memory of a pool. Only this module makes them.
//!
//! # How a lease ends
//! Candle frees a `CudaSlice` with `cuMemFreeAsync` and knows no other owner of memory. So each
//! tensor is made over a `CudaSlice` of exactly its extent, on a stream object of its own:
//!
//! ```text
//! tensor, views, clones ──► CudaSlice ──► stream object (the token) ──► context object
//!                                             stands for Candle's stream  of its own
//! ```
//!
//! - Every slice, view and clone holds the stream object. Once the token holds the last reference,
//!   the lease has ended, and the core may free the memory.
//! - Both objects are cudarc's. They stand for Candle's stream in the primary context. The token
//!   also holds Candle's stream, which may outlive the rest of Candle's device.
//! - When the slice is dropped, the driver refuses `cuMemFreeAsync` for such memory. cudarc stores
//!   that error in the slice's context object, where Candle never looks. The token clears it when
//!   it is dropped.
//!
//! # Safety
//! Slices are made of memory that is mapped and leased to their token, or that is written and
//! released within one call while the pool is borrowed. This crate queues its own work on Candle's
//! stream, or, between two waits, on that of a tensor of another device object. Others may queue
//! work on leased memory on any stream of any device: the core frees memory that was leased behind
//! all of them.
#![allow(unsafe_code)]

use crate::error::{GraphError, Result, VmmError};
use crate::order::StreamOrder;
use candle_core::backend::BackendStorage;
use candle_core::cuda::cudarc::driver::{CudaContext, CudaStream, DriverError};
use candle_core::cuda::{CudaStorage, CudaStorageSlice as Slice};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, DType, Layout, Storage, Tensor};
use cuda_vmm::pool::blocks::{BlockBacking, BlockTensor};
use cuda_vmm::{Driver, LeaseToken, Stream, VirtualMemoryPool};
use std::cell::Cell;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{fmt, iter, mem};

thread_local! {
    /// Whether this thread captures a step.
    static CAPTURES: Cell<bool> = const { Cell::new(false) };
}

/// Has this thread make no tensor over memory of a pool, nor write to such memory, while the result
/// lives. A captured step would keep the address when the lease is over.
pub(crate) fn refuse_on_this_thread() -> impl Sized {
    struct Refused(bool);

    impl Drop for Refused {
        fn drop(&mut self) {
            CAPTURES.set(self.0);
        }
    }

    Refused(CAPTURES.replace(true))
}

/// Fails if this thread captures a step.
pub(crate) fn check_not_captured() -> Result<()> {
    match CAPTURES.get() {
        true => Err(GraphError::PoolInStep.into()),
        false => Ok(()),
    }
}

/// Returns Candle's stream as a stream of the core, which keeps Candle's stream alive.
pub(crate) fn core_stream(core: &cuda_vmm::Device, candle: &Arc<CudaStream>) -> Stream {
    let raw = candle.cu_stream();
    // SAFETY: the stream is destroyed with the last clone of the owner; it is of the primary
    // context, which `core_device` has checked.
    unsafe { Stream::borrow_with(core, raw.cast(), candle.clone()) }
}

/// Makes tensors over memory of pools for one Candle device, and reuses tokens.
pub(crate) struct Leases {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    free: Arc<FreeStreams>,
}

/// Stream objects that nothing shares. They may outlive Candle's device; then they are not used
/// again.
#[derive(Debug)]
struct FreeStreams {
    driver: Driver,
    streams: Mutex<Vec<Arc<CudaStream>>>,
}

impl FreeStreams {
    /// Locks the stream objects. Fails in a forked process, where the lock may never be released.
    fn lock(&self) -> cuda_vmm::Result<MutexGuard<'_, Vec<Arc<CudaStream>>>> {
        self.driver.check_process()?;
        let locked = self.streams.lock();
        Ok(locked.unwrap_or_else(PoisonError::into_inner))
    }
}

impl fmt::Debug for Leases {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Leases")
    }
}

impl Leases {
    /// The most stream objects that are kept for reuse.
    const FREE_STREAMS_MAX: usize = 256;

    /// Makes leases for a Candle device, whose driver is `driver`.
    pub(crate) fn new(device: &CudaDevice, driver: &Driver) -> Arc<Self> {
        Arc::new(Self {
            device: device.clone(),
            stream: device.cuda_stream(),
            free: Arc::new(FreeStreams {
                driver: driver.clone(),
                streams: Mutex::default(),
            }),
        })
    }

    fn token(&self) -> Result<Token> {
        check_not_captured()?;
        let free = self.free.lock()?.pop();
        let stream = match free {
            Some(stream) => stream,
            None => self.new_stream()?,
        };
        Ok(Token {
            stream,
            candle: self.stream.clone(),
            free: self.free.clone(),
        })
    }

    fn new_stream(&self) -> Result<Arc<CudaStream>> {
        let candle = &self.stream;
        let failed = |error: DriverError| VmmError::from(candle_core::Error::wrap(error));
        let context = CudaContext::new(candle.context().ordinal()).map_err(failed)?;
        // SAFETY: events would order frees, but the core frees leased memory behind every stream
        // that may use it. Code that passes tensors from one stream to another orders their reads
        // and writes.
        unsafe { context.disable_event_tracking() };
        // SAFETY: both context objects stand for the primary context, which `core_device` has
        // checked for Candle's. Each token, and Candle's storage beside every slice, keeps the
        // owner of the stream alive.
        Ok(unsafe { context.wrap_borrowed_stream(candle.cu_stream()) })
    }

    /// Makes a tensor of this shape over live bytes of the pool at `offset`, and leases them until
    /// nothing is left of the tensor.
    pub(crate) fn tensor(
        self: &Arc<Self>,
        pool: &VirtualMemoryPool,
        offset: usize,
        shape: &[usize],
        dtype: DType,
    ) -> Result<Tensor> {
        let token = self.token()?;
        let elements: usize = shape.iter().product();
        let stream = token.stream.clone();
        pool.lease(offset, elements * dtype.size_in_bytes(), token)?;
        // SAFETY: the bytes are live, and stay mapped while the slice shares the stream object.
        let slice = unsafe {
            slice(
                &stream,
                pool.base_address() + offset as u64,
                elements,
                dtype,
            )
        }?;
        Ok(self.wrap(slice, shape))
    }

    /// Makes a tensor `[blocks, block shape…]` over the first blocks of a block tensor, all of them
    /// backed, and leases them until nothing is left of the result.
    pub(crate) fn first_blocks(
        self: &Arc<Self>,
        backing: &BlockBacking,
        tensor: usize,
        blocks: usize,
        dtype: DType,
    ) -> Result<Tensor> {
        let token = self.token()?;
        let stream = token.stream.clone();
        backing.lease(tensor, 0..blocks, token)?;
        let tensor = &backing.tensors()[tensor];
        let shape: Vec<_> = iter::once(blocks)
            .chain(tensor.block_shape().iter().copied())
            .collect();
        let elements = shape.iter().product();
        // SAFETY: the blocks are backed, and stay mapped while the slice shares the stream object.
        // They are contiguous, with elements of this dtype's size.
        let slice = unsafe { slice(&stream, tensor.base_address(), elements, dtype) }?;
        Ok(self.wrap(slice, &shape))
    }

    /// Makes a tensor `[num_blocks, block shape…]` over all addresses of a block tensor. The token
    /// shows whether anything is left of it.
    ///
    /// # Safety
    /// Only backed blocks are touched through the tensor, and the addresses stay reserved while
    /// anything is left of it.
    pub(crate) unsafe fn reserved(
        self: &Arc<Self>,
        tensor: &BlockTensor,
        dtype: DType,
    ) -> Result<(Tensor, Token)> {
        let token = self.token()?;
        let shape = tensor.shape();
        let elements = shape.iter().product();
        // SAFETY: the caller's promise.
        let slice = unsafe { slice(&token.stream, tensor.base_address(), elements, dtype) }?;
        Ok((self.wrap(slice, &shape), token))
    }

    /// Makes a tensor of this shape without elements, over no memory. The driver cannot allocate 0
    /// bytes.
    pub(crate) fn empty(self: &Arc<Self>, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let token = self.token()?;
        // SAFETY: a slice without elements needs no memory.
        let slice = unsafe { slice(&token.stream, 0, 0, dtype) }?;
        Ok(self.wrap(slice, shape))
    }

    fn wrap(&self, slice: Slice, shape: &[usize]) -> Tensor {
        let device = self.device.clone();
        let storage = Storage::Cuda(CudaStorage { slice, device });
        Tensor::from_storage(storage, shape, BackpropOp::none(), false)
    }

    /// Queues a copy of a tensor, of any strides, to live bytes of the pool at `offset`, in the
    /// order of its elements.
    pub(crate) fn write(
        self: &Arc<Self>,
        pool: &VirtualMemoryPool,
        offset: usize,
        source: &Tensor,
    ) -> Result<()> {
        let elements = source.elem_count();
        self.copy_to(pool, offset, elements, source, |from, target, layout| {
            from.copy_strided_src(target, 0, layout)
        })
    }

    /// Queues a copy of rows `[count, row…]` to live bytes of the pool, `row_bytes` apart from one
    /// to the next. The first begins at `offset`.
    pub(crate) fn write_rows(
        self: &Arc<Self>,
        pool: &VirtualMemoryPool,
        offset: usize,
        row_bytes: usize,
        rows: &Tensor,
    ) -> Result<()> {
        /// As many plain copies take no longer than one launch.
        const COPIES_MAX: usize = 8;
        let (count, element) = (rows.dim(0)?, rows.dtype().size_in_bytes());
        let (width, stride) = (rows.elem_count() / count.max(1), row_bytes / element);
        if width == stride {
            return self.write(pool, offset, rows);
        }
        let is_short = count == 1 || count <= COPIES_MAX && rows.is_contiguous();
        // Candle has no such kernel for these types.
        if is_short || matches!(rows.dtype(), DType::I16 | DType::I32) {
            return (0..count).try_for_each(|row| {
                self.write(pool, offset + row * row_bytes, &rows.narrow(0, row, 1)?)
            });
        }
        // The kernel counts elements in 32 bits.
        let part = (u32::MAX as usize / stride).max(1);
        for first in (0..count).step_by(part) {
            let rows = rows.narrow(0, first, part.min(count - first))?;
            let (rows, count) = (rows.contiguous()?, rows.dim(0)?);
            let (offset, elements) = (offset + first * row_bytes, (count - 1) * stride + width);
            self.copy_to(pool, offset, elements, &rows, |from, target, layout| {
                from.copy2d(
                    target,
                    count,
                    width,
                    width,
                    stride,
                    layout.start_offset(),
                    0,
                )
            })?;
        }
        Ok(())
    }

    /// Queues a copy from a tensor to live bytes of the pool at `offset`, this many elements.
    fn copy_to(
        self: &Arc<Self>,
        pool: &VirtualMemoryPool,
        offset: usize,
        elements: usize,
        source: &Tensor,
        copy: impl FnOnce(&CudaStorage, &mut CudaStorage, &Layout) -> candle_core::Result<()>,
    ) -> Result<()> {
        let token = self.token()?;
        let address = pool.base_address() + offset as u64;
        // SAFETY: the bytes are live while the pool is borrowed. They are freed behind Candle's
        // stream, which waits for the copy.
        let slice = unsafe { slice(&token.stream, address, elements, source.dtype()) }?;
        let mut target = CudaStorage {
            slice,
            device: self.device.clone(),
        };
        let (storage, layout) = source.storage_and_layout();
        let outcome = match &*storage {
            // Candle queues the copy on the source's stream.
            Storage::Cuda(storage) => {
                StreamOrder::begin(&storage.device.cuda_stream(), &self.stream)
                    .and_then(|order| {
                        let copied = copy(storage, &mut target, layout);
                        order.end().and(copied)
                    })
                    .map_err(VmmError::from)
            }
            _ => Err(VmmError::UnsupportedDevice),
        };
        // A drop would call `cuMemFreeAsync`, which the driver refuses.
        leak(target.slice);
        outcome
    }
}

/// Queues zeros over live bytes of the pool at `offset`, on Candle's stream.
pub(crate) fn zero(
    stream: &Stream,
    pool: &VirtualMemoryPool,
    offset: usize,
    bytes: usize,
) -> Result<()> {
    // SAFETY: the bytes are live while the pool is borrowed. They are freed behind Candle's stream.
    Ok(unsafe { stream.memset(pool.base_address() + offset as u64, 0, bytes) }?)
}

/// Queues a copy of live bytes of a pool to live bytes of another at the same offsets, on Candle's
/// stream.
pub(crate) fn copy(
    stream: &Stream,
    from: &VirtualMemoryPool,
    to: &VirtualMemoryPool,
    bytes: Range<usize>,
) -> Result<()> {
    let address = |pool: &VirtualMemoryPool| pool.base_address() + bytes.start as u64;
    // SAFETY: the bytes are live in both pools while these are borrowed. They are freed behind
    // Candle's stream.
    Ok(unsafe { stream.copy(address(to), address(from), bytes.len()) }?)
}

/// Makes a slice on this stream.
///
/// # Safety
/// The memory is mapped as long as the slice, or anything made from it, lives.
unsafe fn slice(
    stream: &Arc<CudaStream>,
    address: u64,
    elements: usize,
    dtype: DType,
) -> Result<Slice> {
    macro_rules! slices {
        ($($dtype:ident)*) => {
            match dtype {
                // SAFETY: the caller's promise; any bits are a value of these types.
                $(DType::$dtype => Slice::$dtype(unsafe { stream.upgrade_device_ptr(address, elements) }),)*
                other => return Err(unsupported(other)),
            }
        };
    }
    Ok(slices!(U8 U32 I16 I32 I64 BF16 F16 F32 F64 F8E4M3))
}

/// Returns the error for a dtype of which Candle has no CUDA tensors that it can compute with.
pub(crate) fn unsupported(dtype: DType) -> VmmError {
    candle_core::Error::UnsupportedDTypeForOp(dtype, "elastic-tensor").into()
}

/// Drops a slice without freeing its address.
fn leak(slice: Slice) {
    macro_rules! leaks {
        ($($dtype:ident)*) => { match slice { $(Slice::$dtype(slice) => { slice.leak(); })* } };
    }
    leaks!(U8 U32 I16 I32 I64 BF16 F16 F32 F64 F8E4M3 F6E2M3 F6E3M2 F4 F8E8M0);
}

/// A stream object that everything made under one lease shares, and nothing else does.
#[derive(Debug)]
pub(crate) struct Token {
    stream: Arc<CudaStream>,
    /// Candle's stream, for which `stream` stands. It must outlive the slices, which are freed on
    /// it.
    candle: Arc<CudaStream>,
    free: Arc<FreeStreams>,
}

impl LeaseToken for Token {
    fn is_released(&mut self) -> bool {
        Arc::get_mut(&mut self.stream).is_some()
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        if self.free.driver.check_process().is_err() {
            // The objects are the parent process's: they are leaked, so that no drop calls the
            // driver.
            mem::forget((self.stream.clone(), self.candle.clone()));
            return;
        }
        if Arc::get_mut(&mut self.stream).is_none() {
            // Something still uses the stream object, so the next lease must not share it.
            return;
        }
        // Clears the errors of the refused frees, so that the next lease does not see them.
        let _ = self.stream.context().check_err();
        if let Ok(mut free) = self.free.lock()
            && free.len() < Leases::FREE_STREAMS_MAX
        {
            free.push(self.stream.clone());
        }
    }
}
