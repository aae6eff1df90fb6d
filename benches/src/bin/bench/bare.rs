//! The driver's own calls, with nothing of ours between: the floor and the peers.
//!
//! # Safety
//! All here owns what it made, gives it back once, and names only what it owns to the driver.
//! Places for what the driver writes are valid during the call.

use anyhow::{Result, ensure};
use core::ffi::c_void;
use core::ptr::null_mut;
use cuda_vmm::sys::*;
use cuda_vmm::{Device, Stream};
use cuda_vmm_benches::time;
use std::time::Duration;

/// Calls a function of a device's driver. A code other than success is an error that names it.
macro_rules! call {
    ($device:expr, $function:ident($($argument:expr),*)) => {
        $crate::bare::check(
            ($device.driver().table().$function)($($argument),*),
            ::cuda_vmm::sys::DriverFunction::$function,
        )
    };
}
pub(crate) use call;

pub fn check(code: CUresult, function: DriverFunction) -> Result<()> {
    ensure!(code == CUDA_SUCCESS, "{function:?} returns {code}");
    Ok(())
}

/// Memory behind a part of a range.
#[derive(Clone, Copy)]
pub struct Chunk {
    address: CUdeviceptr,
    bytes: usize,
    handle: CUmemGenericAllocationHandle,
}

/// Reserved addresses, backed from their beginning by bare calls.
pub struct Range {
    device: Device,
    properties: CUmemAllocationProp,
    access: CUmemAccessDesc,
    pub address: CUdeviceptr,
    bytes: usize,
    chunks: Vec<Chunk>,
}

impl Range {
    pub fn reserve(device: &Device, bytes: usize) -> Result<Self> {
        // SAFETY: the structs hold integers and pointers, for which all zeros is valid.
        let (mut properties, mut access): (CUmemAllocationProp, CUmemAccessDesc) =
            unsafe { (core::mem::zeroed(), core::mem::zeroed()) };
        properties.type_ = CU_MEM_ALLOCATION_TYPE_PINNED;
        properties.location.type_ = CU_MEM_LOCATION_TYPE_DEVICE;
        properties.location.id = device.raw();
        access.location = properties.location;
        access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        let mut address = 0;
        // SAFETY: see the module's documentation.
        unsafe { call!(device, cuMemAddressReserve(&mut address, bytes, 0, 0, 0)) }?;
        Ok(Self {
            device: device.clone(),
            properties,
            access,
            address,
            bytes,
            chunks: Vec::with_capacity(bytes / device.granularity_bytes()),
        })
    }

    /// Creates and maps chunks of these sizes, one after the other.
    pub fn back(&mut self, chunks: &[usize]) -> Result<()> {
        for bytes in chunks {
            let chunk = self.create(*bytes)?;
            self.map(chunk)?;
        }
        Ok(())
    }

    /// Creates memory for the addresses after the chunks that are there, without mapping it.
    pub fn create(&mut self, bytes: usize) -> Result<Chunk> {
        let last = self.chunks.last();
        let address = last.map_or(self.address, |chunk| chunk.address + chunk.bytes as u64);
        let fits = address + bytes as u64 <= self.address + self.bytes as u64;
        ensure!(fits, "the reservation is too short");
        let (mut handle, properties) = (0, &self.properties);
        // SAFETY: see the module's documentation; the properties are valid during the call.
        unsafe { call!(self.device, cuMemCreate(&mut handle, bytes, properties, 0)) }?;
        let chunk = Chunk {
            address,
            bytes,
            handle,
        };
        self.chunks.push(chunk);
        Ok(chunk)
    }

    /// Maps a chunk of this range and makes it accessible.
    pub fn map(&self, chunk: Chunk) -> Result<()> {
        let (address, bytes) = (chunk.address, chunk.bytes);
        // SAFETY: addresses of our reservation behind all chunks before, our handle and descriptor.
        unsafe {
            call!(self.device, cuMemMap(address, bytes, 0, chunk.handle, 0))?;
            call!(self.device, cuMemSetAccess(address, bytes, &self.access, 1))
        }
    }

    /// Unmaps a chunk of this range and keeps its memory.
    pub fn unmap(&self, chunk: Chunk) -> Result<()> {
        // SAFETY: the addresses are those of our chunk.
        unsafe { call!(self.device, cuMemUnmap(chunk.address, chunk.bytes)) }
    }

    /// The time of backing by chunks of these sizes, which are given back.
    pub fn round(&mut self, chunks: &[usize]) -> Result<Duration> {
        let ((), elapsed) = time(|| self.back(chunks))?;
        self.give_back()?;
        Ok(elapsed)
    }

    /// The time of unmapping and releasing chunks of these sizes.
    pub fn release(&mut self, chunks: &[usize]) -> Result<Duration> {
        self.back(chunks)?;
        Ok(time(|| self.give_back())?.1)
    }

    /// Unmaps and releases all chunks, one after the other.
    fn give_back(&mut self) -> Result<()> {
        for chunk in self.chunks.drain(..) {
            // SAFETY: the chunk is ours, and forgotten after this.
            unsafe {
                call!(self.device, cuMemUnmap(chunk.address, chunk.bytes))?;
                call!(self.device, cuMemRelease(chunk.handle))?;
            }
        }
        Ok(())
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        // An error here has no reader; the driver takes all back when the program ends.
        let _ = self.give_back();
        // SAFETY: the reservation is ours, and this is its end.
        let _ = unsafe { call!(self.device, cuMemAddressFree(self.address, self.bytes)) };
    }
}

/// Memory of `cuMemAlloc`.
pub struct Plain(Device, CUdeviceptr);

impl Plain {
    pub fn new(device: &Device, bytes: usize) -> Result<Self> {
        let mut address = 0;
        // SAFETY: see the module's documentation.
        unsafe { call!(device, cuMemAlloc(&mut address, bytes)) }?;
        Ok(Self(device.clone(), address))
    }

    pub fn address(&self) -> u64 {
        self.1
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        // SAFETY: the memory is ours, and this is its end.
        let _ = unsafe { call!(self.0, cuMemFree(self.1)) };
    }
}

/// Host memory that is pinned for copies.
pub struct Pinned {
    device: Device,
    memory: *mut c_void,
    bytes: usize,
}

impl Pinned {
    /// Maps, touches and registers memory.
    pub fn new(device: &Device, bytes: usize) -> Result<Self> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
        // SAFETY: new memory, at an address of the system's choice.
        let memory = unsafe { libc::mmap(null_mut(), bytes, access, kind, -1, 0) };
        ensure!(memory != libc::MAP_FAILED, "no host memory: {bytes} bytes");
        let this = Self {
            device: device.clone(),
            memory,
            bytes,
        };
        // SAFETY: see the module's documentation.
        unsafe { call!(device, cuMemHostRegister(memory, bytes, 0)) }?;
        Ok(this)
    }

    /// The time of copying all of it to the device, or from there.
    pub fn copy(&self, stream: &Stream, address: u64, is_in: bool) -> Result<Duration> {
        let (memory, bytes, raw) = (self.memory, self.bytes, stream.raw());
        let ((), elapsed) = time(|| {
            // SAFETY: the caller's addresses are mapped, and both ends stay until the stream was
            // synchronised.
            unsafe {
                match is_in {
                    true => call!(self.device, cuMemcpyHtoDAsync(address, memory, bytes, raw)),
                    false => call!(self.device, cuMemcpyDtoHAsync(memory, address, bytes, raw)),
                }
            }?;
            anyhow::Ok(stream.synchronize()?)
        })?;
        Ok(elapsed)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: the memory is ours, and this is its end. What was not registered is refused.
        unsafe {
            let _ = call!(self.device, cuMemHostUnregister(self.memory));
            libc::munmap(self.memory, self.bytes);
        }
    }
}

/// The time of `cuMemAllocAsync` and of synchronising its stream. The memory is given back.
pub fn ordered_round(stream: &Stream, bytes: usize) -> Result<Duration> {
    let (device, queue, mut address) = (stream.device(), stream.raw(), 0);
    let ((), elapsed) = time(|| {
        // SAFETY: see the module's documentation; the stream is alive.
        unsafe { call!(device, cuMemAllocAsync(&mut address, bytes, queue)) }?;
        anyhow::Ok(stream.synchronize()?)
    })?;
    // SAFETY: the memory is ours, and this is its end.
    unsafe { call!(device, cuMemFreeAsync(address, queue)) }?;
    stream.synchronize()?;
    Ok(elapsed)
}
