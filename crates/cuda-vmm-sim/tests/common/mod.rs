//! A simulator with a context, and short forms of its calls.
#![allow(
    clippy::macro_metavars_in_unsafe,
    dead_code,
    unused_imports,
    clippy::missing_safety_doc,
    missing_docs
)]

pub use cuda_vmm_sim::{Books, CostModel, Fault, SimConfig, SimError, Simulator};
pub use cuda_vmm_sys::*;
use std::ptr::null_mut;

/// One page of the simulated devices.
pub const PAGE: usize = 2 << 20;

/// The result of a call: its code on failure.
pub type Answer<T = ()> = Result<T, CUresult>;

/// A simulator whose first device's context is current on the thread that made it.
#[derive(Clone, Debug)]
pub struct Driver {
    pub simulator: Simulator,
    pub table: DriverTable,
}

/// Lets raw handles move to the threads of a test. The simulator never dereferences them.
#[derive(Clone, Copy, Debug)]
pub struct Shared<T>(pub T);
// SAFETY: the value is a handle of the simulator, which is a number.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T: Copy> Shared<T> {
    /// Returns the handle. A closure that calls this captures the whole wrapper.
    pub fn get(self) -> T {
        self.0
    }
}

pub fn answer(code: CUresult) -> Answer {
    if code == CUDA_SUCCESS {
        Ok(())
    } else {
        Err(code)
    }
}

/// Calls an entry point of the table.
#[macro_export]
macro_rules! call {
    ($driver:expr, $name:ident($($argument:expr),* $(,)?)) => {
        // SAFETY: the arguments are valid for the call, or numbers that the simulator checks.
        $crate::common::answer(unsafe { ($driver.table.$name)($($argument),*) })
    };
}

/// Returns the `CUmemLocation` of a device, by layout.
pub fn location(device: i32) -> CUmemLocation {
    // SAFETY: a location is two 32-bit integers in every header.
    unsafe {
        std::mem::transmute::<[i32; 2], CUmemLocation>([CU_MEM_LOCATION_TYPE_DEVICE as i32, device])
    }
}

pub fn properties(device: i32, exportable: bool) -> CUmemAllocationProp {
    // SAFETY: the structure holds integers and a pointer, for which zero is valid.
    let mut properties: CUmemAllocationProp = unsafe { std::mem::zeroed() };
    properties.type_ = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location = location(device);
    if exportable {
        properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    }
    properties
}

pub fn descriptor(device: i32, flags: CUmemAccess_flags) -> CUmemAccessDesc {
    CUmemAccessDesc {
        location: location(device),
        flags,
    }
}

impl Driver {
    pub fn new(config: SimConfig) -> Self {
        let simulator = Simulator::new(config).expect("a free slot");
        let driver = Self {
            table: simulator.table(),
            simulator,
        };
        call!(driver, cuInit(0)).expect("cuInit");
        driver.retain(0).expect("a context");
        driver.set_current(0).expect("current");
        driver
    }

    /// One device of 256 MiB.
    pub fn small() -> Self {
        Self::new(SimConfig::new().memory_bytes(256 << 20))
    }

    pub fn retain(&self, device: i32) -> Answer<CUcontext> {
        let mut context = null_mut();
        call!(self, cuDevicePrimaryCtxRetain(&mut context, device))?;
        Ok(context)
    }

    /// Makes a device's context current without keeping a retain.
    pub fn set_current(&self, device: i32) -> Answer {
        let context = self.retain(device)?;
        let set = call!(self, cuCtxSetCurrent(context));
        call!(self, cuDevicePrimaryCtxRelease(device))?;
        set
    }

    pub fn books(&self) -> Books {
        self.simulator.books(0)
    }

    pub fn reserve(&self, bytes: usize) -> Answer<u64> {
        let mut address = 0;
        call!(self, cuMemAddressReserve(&mut address, bytes, 0, 0, 0))?;
        Ok(address)
    }

    pub fn address_free(&self, address: u64, bytes: usize) -> Answer {
        call!(self, cuMemAddressFree(address, bytes))
    }

    pub fn create(&self, bytes: usize) -> Answer<u64> {
        self.create_with(bytes, &properties(0, false))
    }

    pub fn create_with(&self, bytes: usize, properties: &CUmemAllocationProp) -> Answer<u64> {
        let mut handle = 0;
        call!(self, cuMemCreate(&mut handle, bytes, properties, 0))?;
        Ok(handle)
    }

    pub fn release(&self, handle: u64) -> Answer {
        call!(self, cuMemRelease(handle))
    }

    pub fn map(&self, address: u64, bytes: usize, handle: u64) -> Answer {
        call!(self, cuMemMap(address, bytes, 0, handle, 0))
    }

    pub fn unmap(&self, address: u64, bytes: usize) -> Answer {
        call!(self, cuMemUnmap(address, bytes))
    }

    pub fn set_access(
        &self,
        address: u64,
        bytes: usize,
        descriptors: &[CUmemAccessDesc],
    ) -> Answer {
        call!(
            self,
            cuMemSetAccess(address, bytes, descriptors.as_ptr(), descriptors.len())
        )
    }

    /// Returns a descriptor with read and write access for device 0.
    pub fn open(&self, address: u64, bytes: usize) -> Answer {
        self.set_access(
            address,
            bytes,
            &[descriptor(0, CU_MEM_ACCESS_FLAGS_PROT_READWRITE)],
        )
    }

    /// Maps a new handle with access, and releases the handle.
    pub fn back(&self, address: u64, bytes: usize) -> Answer {
        let handle = self.create(bytes)?;
        self.map(address, bytes, handle)?;
        self.open(address, bytes)?;
        self.release(handle)
    }

    pub fn memset(&self, address: u64, value: u8, bytes: usize) -> Answer {
        call!(self, cuMemsetD8(address, value, bytes))
    }

    pub fn memset_async(&self, address: u64, value: u8, bytes: usize, stream: CUstream) -> Answer {
        call!(self, cuMemsetD8Async(address, value, bytes, stream))
    }

    /// Poisons the first device's context: unmaps the accessible page at `address` while a memset
    /// of it is queued.
    pub fn poison(&self, address: u64) {
        let stream = self.stream().unwrap();
        self.simulator.hold_work();
        self.memset_async(address, 1, PAGE, stream).unwrap();
        self.unmap(address, PAGE).unwrap();
        self.simulator.release_work();
        let synchronized = call!(self, cuStreamSynchronize(stream));
        assert_eq!(synchronized, Err(CUDA_ERROR_ILLEGAL_ADDRESS));
        let destroyed = call!(self, cuStreamDestroy(stream));
        assert_eq!(destroyed, Err(CUDA_ERROR_ILLEGAL_ADDRESS));
    }

    pub fn read(&self, address: u64, bytes: usize) -> Answer<Vec<u8>> {
        let mut data = vec![0xEE; bytes];
        call!(self, cuMemcpyDtoH(data.as_mut_ptr().cast(), address, bytes))?;
        Ok(data)
    }

    pub fn write(&self, address: u64, data: &[u8]) -> Answer {
        call!(
            self,
            cuMemcpyHtoD(address, data.as_ptr().cast(), data.len())
        )
    }

    pub fn stream(&self) -> Answer<CUstream> {
        self.stream_with(CU_STREAM_NON_BLOCKING)
    }

    pub fn stream_with(&self, flags: CUstream_flags) -> Answer<CUstream> {
        let mut stream = null_mut();
        call!(self, cuStreamCreate(&mut stream, flags))?;
        Ok(stream)
    }

    pub fn event(&self) -> Answer<CUevent> {
        let mut event = null_mut();
        call!(self, cuEventCreate(&mut event, CU_EVENT_DEFAULT))?;
        Ok(event)
    }
}
