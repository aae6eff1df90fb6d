//! Memory of a pool as a Candle tensor: the one place that knows how.
//!
//! Each tensor handed out is over a `CudaSlice` of exactly its extent, made on a stream object of its own in a context
//! object of its own (cudarc's; both stand for Candle's stream in the primary context). The stream object is the lease's
//! token: every slice, view and clone holds it, so it is ours alone when none is left. Beside it the token holds Candle's
//! stream, which it stands for, whatever else of Candle's device is gone. Dropping the slice calls
//! `cuMemFreeAsync`, which the driver refuses for such memory; cudarc parks the refusal in the private context object,
//! where Candle never looks, and whence it is taken when the token comes back.
//!
//! # Safety
//! Slices are made of memory that is mapped and leased to their token, or that is written and let go within one call
//! while the pool is borrowed. Our own work on them is queued on Candle's stream, or on that of a tensor of another device
//! object in between. What others queue on leased memory may be on any stream of any device: the core frees memory that was
//! leased behind all of them.
#![allow(unsafe_code)]

use crate::error::{Result, VmmError};
use crate::order::InTurn;
use candle_core::backend::BackendStorage;
use candle_core::cuda::cudarc::driver::{CudaContext, CudaStream, DriverError};
use candle_core::cuda::{CudaStorage, CudaStorageSlice as Slice};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, DType, Storage, Tensor};
use cuda_vmm::pool::blocks::{BlockBacking, BlockTensor};
use cuda_vmm::{Driver, LeaseToken, Stream, VirtualMemoryPool};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{fmt, iter, mem};

/// Candle's stream, as the core knows streams. It is kept alive by whatever holds the result.
pub(crate) fn stream_of(core: &cuda_vmm::Device, candle: &Arc<CudaStream>) -> Stream {
    let raw = candle.cu_stream();
    // SAFETY: the stream is destroyed with the last clone of the owner; it is of the primary context, which `core_device`
    // has checked.
    unsafe { Stream::borrow_with(core, raw.cast(), candle.clone()) }
}

/// Makes tensors over memory of pools, on one Candle device, and keeps tokens to be used again.
pub(crate) struct Leases {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    free: Arc<Free>,
}

/// Stream objects that nothing shares. They may outlive Candle's device, and then nobody takes them.
#[derive(Debug)]
struct Free {
    driver: Driver,
    streams: Mutex<Vec<Arc<CudaStream>>>,
}

impl Free {
    /// The one door to them. Fails in a forked process, where the lock may be held for good.
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
    /// So many free tokens are kept at most.
    const FREE_MAX: usize = 256;

    /// Of a Candle device, and the driver that serves it.
    pub(crate) fn new(device: &CudaDevice, driver: &Driver) -> Arc<Self> {
        Arc::new(Self {
            device: device.clone(),
            stream: device.cuda_stream(),
            free: Arc::new(Free {
                driver: driver.clone(),
                streams: Mutex::default(),
            }),
        })
    }

    fn token(&self) -> Result<Token> {
        let free = self.free.lock()?.pop();
        let stream = match free {
            Some(stream) => stream,
            None => self.make()?,
        };
        Ok(Token {
            stream,
            candle: self.stream.clone(),
            home: self.free.clone(),
        })
    }

    fn make(&self) -> Result<Arc<CudaStream>> {
        let candle = &self.stream;
        let failed = |error: DriverError| VmmError::from(candle_core::Error::wrap(error));
        let context = CudaContext::new(candle.context().ordinal()).map_err(failed)?;
        // SAFETY: what is freed waits for every stream that may use slices of this context object, so that needs no events.
        // Which of them reads what another writes is ordered by whoever hands tensors from one to another.
        unsafe { context.disable_event_tracking() };
        // SAFETY: both context objects are of the primary context, which `core_device` has checked for Candle's; the
        // stream lives while its owner does, which each token holds, and so does Candle's storage beside every slice.
        Ok(unsafe { context.wrap_borrowed_stream(candle.cu_stream()) })
    }

    /// A tensor of this shape over live bytes of the pool at `offset`, which are leased until nothing is left of it.
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
        // SAFETY: the bytes are live, and stay mapped while the stream object is shared, which the slice does.
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

    /// The first blocks of a tensor of block tables, `[blocks, block shape…]`, all of them backed, which are leased until
    /// nothing is left of the result.
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
        // SAFETY: the blocks are backed, and stay mapped while the stream object is shared, which the slice does. The
        // tensor has them one behind the other, of elements of this type's size.
        let slice = unsafe { slice(&stream, tensor.base_address(), elements, dtype) }?;
        Ok(self.wrap(slice, &shape))
    }

    /// A tensor over all addresses of a tensor of block tables, `[num_blocks, block shape…]`, and the token that tells
    /// whether something is left of it.
    ///
    /// # Safety
    /// Only backed blocks are touched through it, and while anything is left of it the addresses stay reserved.
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

    /// A tensor of this shape without elements, over no memory: the driver allocates none of no size.
    pub(crate) fn empty(self: &Arc<Self>, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let token = self.token()?;
        // SAFETY: there is nothing to be mapped.
        let slice = unsafe { slice(&token.stream, 0, 0, dtype) }?;
        Ok(self.wrap(slice, shape))
    }

    fn wrap(&self, slice: Slice, shape: &[usize]) -> Tensor {
        let device = self.device.clone();
        let storage = Storage::Cuda(CudaStorage { slice, device });
        Tensor::from_storage(storage, shape, BackpropOp::none(), false)
    }

    /// Queues a copy of a tensor, of any strides, to live bytes of the pool at `offset`, in the order of its elements.
    pub(crate) fn write(
        self: &Arc<Self>,
        pool: &VirtualMemoryPool,
        offset: usize,
        source: &Tensor,
    ) -> Result<()> {
        let token = self.token()?;
        let address = pool.base_address() + offset as u64;
        // SAFETY: the bytes are live while the pool is borrowed, and freed behind what is queued on Candle's stream, which
        // comes after the copy.
        let slice = unsafe { slice(&token.stream, address, source.elem_count(), source.dtype()) }?;
        let mut target = CudaStorage {
            slice,
            device: self.device.clone(),
        };
        let (storage, layout) = source.storage_and_layout();
        let outcome = match &*storage {
            // Candle queues the copy on the source's stream.
            Storage::Cuda(storage) => InTurn::new(&storage.device.cuda_stream(), &self.stream)
                .and_then(|turn| {
                    let copied = storage.copy_strided_src(&mut target, 0, layout);
                    turn.end().and(copied)
                })
                .map_err(VmmError::from),
            _ => Err(VmmError::UnsupportedDevice),
        };
        // Not dropped, which would ask the driver for what it refuses.
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
    // SAFETY: the bytes are live while the pool is borrowed, and freed behind what is queued on Candle's stream.
    Ok(unsafe { stream.memset(pool.base_address() + offset as u64, 0, bytes) }?)
}

/// A slice on this stream.
///
/// # Safety
/// The memory is mapped while the slice, or anything made of it, lives.
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

/// The error for a type of which Candle has no tensors on CUDA that can be computed with.
pub(crate) fn unsupported(dtype: DType) -> VmmError {
    candle_core::Error::UnsupportedDTypeForOp(dtype, "elastic-tensor").into()
}

/// Lets a slice go without freeing its address.
fn leak(slice: Slice) {
    macro_rules! leaks {
        ($($dtype:ident)*) => { match slice { $(Slice::$dtype(slice) => { slice.leak(); })* } };
    }
    leaks!(U8 U32 I16 I32 I64 BF16 F16 F32 F64 F8E4M3 F6E2M3 F6E3M2 F4 F8E8M0);
}

/// A stream object that is shared by what uses one lease, and by nothing else.
#[derive(Debug)]
pub(crate) struct Token {
    stream: Arc<CudaStream>,
    /// What `stream` stands for: slices are freed on it. It goes after them.
    candle: Arc<CudaStream>,
    home: Arc<Free>,
}

impl LeaseToken for Token {
    fn is_released(&mut self) -> bool {
        Arc::get_mut(&mut self.stream).is_some()
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        if self.home.driver.check_process().is_err() {
            // Both are the parent's: nothing is asked of the driver for the last of them.
            mem::forget((self.stream.clone(), self.candle.clone()));
            return;
        }
        if Arc::get_mut(&mut self.stream).is_none() {
            // Something is left that was made on it: the next lease must not share it.
            return;
        }
        // The refusals of the frees; nobody else is to see them.
        let _ = self.stream.context().check_err();
        if let Ok(mut free) = self.home.lock()
            && free.len() < Leases::FREE_MAX
        {
            free.push(self.stream.clone());
        }
    }
}
