//! Memory of a pool as a tensor, and a token that tells whether anything is left of it.

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
    /// Where the page begins.
    pub address: usize,
    /// A stream of the core's own, to look at the memory without Candle.
    pub stream: Stream,
    _pool: VirtualMemoryPool,
    // Looks for what is left over, so it goes last.
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

    /// A tensor of one dimension over the first `length` elements, whose storage holds the token.
    pub fn tensor<T: CudaDType>(&self, token: &Token, length: usize) -> Tensor {
        assert!(length * size_of::<T>() <= page());
        // SAFETY: the elements are mapped while the pool lives, which the tests drop after every tensor; every
        // pattern of bits is a value of the numbers that Candle has. That the slice frees its address when it is
        // dropped is what the tests are about: the driver refuses.
        let slice = unsafe {
            token
                .stream
                .upgrade_device_ptr::<T>(self.address as sys::CUdeviceptr, length)
        };
        let storage = CudaStorage::wrap_cuda_slice(slice, self.candle.clone());
        Tensor::from_storage(Storage::Cuda(storage), length, BackpropOp::none(), false)
    }

    /// Writes to the beginning of the page once Candle has done its work there.
    pub fn write(&self, bytes: &[u8]) {
        self.candle.cuda_stream().synchronize().unwrap();
        bytes::write(&self.stream, self.address, bytes);
    }

    /// What Candle's own context object has parked, to be raised by an unrelated call.
    pub fn parked_at_candle(&self) -> Option<sys::CUresult> {
        parked(self.candle.cuda_stream().context())
    }
}

/// A stream object of our own in a context object of our own: every slice that is made on it holds a reference
/// to it, and the errors of their drops are parked there and not with Candle.
pub struct Token {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
}

impl Token {
    /// A token for tensors whose work is on Candle's own stream.
    pub fn new(candle: &CudaDevice) -> Self {
        let stream = candle.cuda_stream();
        let context = CudaContext::new(stream.context().ordinal()).unwrap();
        assert_eq!(context.cu_ctx(), stream.context().cu_ctx());
        // SAFETY: all work on the slices is on Candle's one stream, so there is nothing to order by events.
        unsafe { context.disable_event_tracking() };
        // SAFETY: the stream is of this very context, as was just checked; Candle's device outlives the token in
        // these tests; the work that is submitted through both objects is on one stream, and so in order.
        let stream = unsafe { context.wrap_borrowed_stream(stream.cu_stream()) };
        Self { context, stream }
    }

    /// Whether no slice is left that was made on it.
    pub fn is_free(&mut self) -> bool {
        Arc::get_mut(&mut self.stream).is_some()
    }

    /// The error that a drop has parked, which is then there no longer.
    pub fn take_parked(&self) -> Option<sys::CUresult> {
        parked(&self.context)
    }

    /// Whether freeing memory is queued on the stream instead of waiting for the device.
    pub fn frees_on_the_stream(&self) -> bool {
        self.context.has_async_alloc()
    }
}

fn parked(context: &CudaContext) -> Option<sys::CUresult> {
    context.check_err().err().map(|error| error.0)
}
