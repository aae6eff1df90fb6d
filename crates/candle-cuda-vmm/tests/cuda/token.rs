//! Memory of a pool as a tensor, and a token that shows whether anything is left of it.

use crate::bytes;
use crate::common::{UnderTest, open, page};
use candle_core::cuda::cudarc::driver::{CudaContext, CudaStream, sys};
use candle_core::cuda::{CudaDType, CudaStorage};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, Device, Storage, Tensor};
use candle_cuda_vmm::VirtualMemoryPool;
use candle_cuda_vmm::cuda_vmm::Stream;
use std::sync::Arc;

/// A page of a pool on the device under test, which is a CUDA device.
pub struct Page {
    pub candle: CudaDevice,
    /// Address of the page.
    pub address: usize,
    /// A stream of the core, to read the memory without Candle.
    pub stream: Stream,
    _pool: VirtualMemoryPool,
    // Checks for leaks, so it is dropped last.
    _test: UnderTest,
}

impl Page {
    pub fn new() -> Self {
        let test = open();
        let Device::Cuda(candle) = &test.device else {
            panic!("these tests are for CUDA devices; CUDA_VMM_TEST_DRIVER must be \"real\"");
        };
        let mut pool = VirtualMemoryPool::new(page(), page(), test.device.clone()).unwrap();
        Self {
            candle: candle.clone(),
            address: pool.allocate(0, page()).unwrap(),
            stream: Stream::new(&test.core).unwrap(),
            _pool: pool,
            _test: test,
        }
    }

    /// Makes a tensor of one dimension over the first `length` elements, whose storage holds the
    /// token.
    pub fn tensor<T: CudaDType>(&self, token: &Token, length: usize) -> Tensor {
        assert!(length * size_of::<T>() <= page());
        // SAFETY: the elements are mapped while the pool lives, which the tests drop after every
        // tensor. Every bit pattern is a valid element. The slice frees its address when it is
        // dropped, which the driver refuses; the tests check that.
        let slice = unsafe {
            token
                .stream
                .upgrade_device_ptr::<T>(self.address as sys::CUdeviceptr, length)
        };
        let storage = CudaStorage::wrap_cuda_slice(slice, self.candle.clone());
        Tensor::from_storage(Storage::Cuda(storage), length, BackpropOp::none(), false)
    }

    /// Writes to the beginning of the page after Candle's work there has completed.
    pub fn write(&self, bytes: &[u8]) {
        self.candle.cuda_stream().synchronize().unwrap();
        bytes::write(&self.stream, self.address, bytes);
    }

    /// Returns the error that Candle's own context object has stored for a later call.
    pub fn parked_at_candle(&self) -> Option<sys::CUresult> {
        parked(self.candle.cuda_stream().context())
    }
}

/// A separate stream object in a separate context object. Every slice on it holds a reference to
/// it, and the errors of their drops are stored there and not in Candle's context object.
pub struct Token {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
}

impl Token {
    /// Makes a token for tensors whose work is on Candle's own stream.
    pub fn new(candle: &CudaDevice) -> Self {
        let stream = candle.cuda_stream();
        let context = CudaContext::new(stream.context().ordinal()).unwrap();
        assert_eq!(context.cu_ctx(), stream.context().cu_ctx());
        // SAFETY: all work on the slices is on Candle's one stream, so no events are needed to
        // order it.
        unsafe { context.disable_event_tracking() };
        // SAFETY: the stream belongs to this context, as just checked. Candle's device outlives the
        // token in these tests. Work that is queued through both objects is on one stream, and so
        // in order.
        let stream = unsafe { context.wrap_borrowed_stream(stream.cu_stream()) };
        Self { context, stream }
    }

    /// Returns whether all slices on it were dropped.
    pub fn is_free(&mut self) -> bool {
        Arc::get_mut(&mut self.stream).is_some()
    }

    /// Takes the error that a drop has stored.
    pub fn take_parked(&self) -> Option<sys::CUresult> {
        parked(&self.context)
    }

    /// Returns whether frees are queued on the stream instead of waiting for the device.
    pub fn frees_on_the_stream(&self) -> bool {
        self.context.has_async_alloc()
    }
}

fn parked(context: &CudaContext) -> Option<sys::CUresult> {
    context.check_err().err().map(|error| error.0)
}
