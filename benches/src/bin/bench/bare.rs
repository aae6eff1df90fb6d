//! The driver's own calls, with nothing of ours between: the floor and the peers.
//!
//! # Safety
//! Everything here owns what it made, gives it back once, and names only addresses and handles that it owns to
//! the driver.

use anyhow::{Result, ensure};
use cuda_vmm::sys::*;
use cuda_vmm::{Device, Stream};

/// Turns an answer of the driver into a result.
pub fn check(code: CUresult, call: DriverFunction) -> Result<()> {
    ensure!(code == CUDA_SUCCESS, "{call:?} answers {code}");
    Ok(())
}

/// Makes the device's context current on this thread for good, as programs have it that use the CUDA runtime.
pub fn make_current(device: &Device) -> Result<()> {
    // SAFETY: the context is retained while the device lives, which is as long as the program.
    let code = unsafe { (device.driver().table().cuCtxSetCurrent)(device.raw_context()) };
    check(code, DriverFunction::cuCtxSetCurrent)
}

struct Chunk {
    address: CUdeviceptr,
    bytes: usize,
    handle: CUmemGenericAllocationHandle,
}

/// Reserved addresses, backed from their beginning by bare calls.
pub struct Range {
    device: Device,
    properties: CUmemAllocationProp,
    access: CUmemAccessDesc,
    address: CUdeviceptr,
    bytes: usize,
    chunks: Vec<Chunk>,
}

impl Range {
    /// Reserves addresses.
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
        // SAFETY: `address` is a valid place for the answer.
        let code =
            unsafe { (device.driver().table().cuMemAddressReserve)(&mut address, bytes, 0, 0, 0) };
        check(code, DriverFunction::cuMemAddressReserve)?;
        Ok(Self {
            device: device.clone(),
            properties,
            access,
            address,
            bytes,
            chunks: Vec::with_capacity(bytes / device.granularity_bytes()),
        })
    }

    /// The first address.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Creates, maps and makes accessible chunks of these sizes, one after the other, behind those that are there.
    pub fn back(&mut self, chunks: &[usize]) -> Result<()> {
        for bytes in chunks {
            self.create(*bytes)?;
            self.map_last()?;
        }
        Ok(())
    }

    /// Creates memory behind the chunks that are there, without mapping it.
    pub fn create(&mut self, bytes: usize) -> Result<()> {
        let end = self
            .chunks
            .last()
            .map(|chunk| chunk.address + chunk.bytes as u64);
        let address = end.unwrap_or(self.address);
        ensure!(
            address + bytes as u64 <= self.address + self.bytes as u64,
            "the reservation is too short"
        );
        let mut handle = 0;
        // SAFETY: the place for the answer and the properties are valid during the call.
        let code = unsafe {
            (self.device.driver().table().cuMemCreate)(&mut handle, bytes, &self.properties, 0)
        };
        check(code, DriverFunction::cuMemCreate)?;
        self.chunks.push(Chunk {
            address,
            bytes,
            handle,
        });
        Ok(())
    }

    /// Maps the last chunk and makes it accessible.
    pub fn map_last(&mut self) -> Result<()> {
        let table = self.device.driver().table();
        let Some(chunk) = self.chunks.last() else {
            return Ok(());
        };
        // SAFETY: the addresses lie in our reservation, behind all chunks before, and the handle is ours.
        let code = unsafe { (table.cuMemMap)(chunk.address, chunk.bytes, 0, chunk.handle, 0) };
        check(code, DriverFunction::cuMemMap)?;
        // SAFETY: the descriptor is valid during the call, and the addresses were mapped just now.
        let code = unsafe { (table.cuMemSetAccess)(chunk.address, chunk.bytes, &self.access, 1) };
        check(code, DriverFunction::cuMemSetAccess)
    }

    /// Unmaps the last chunk and keeps its memory.
    pub fn unmap_last(&mut self) -> Result<()> {
        let Some(chunk) = self.chunks.last() else {
            return Ok(());
        };
        // SAFETY: the addresses are those of our chunk.
        let code = unsafe { (self.device.driver().table().cuMemUnmap)(chunk.address, chunk.bytes) };
        check(code, DriverFunction::cuMemUnmap)
    }

    /// Unmaps and releases all chunks, one after the other.
    pub fn give_back(&mut self) -> Result<()> {
        let table = self.device.driver().table();
        for chunk in self.chunks.drain(..) {
            // SAFETY: the chunk is ours, and forgotten after this.
            let code = unsafe { (table.cuMemUnmap)(chunk.address, chunk.bytes) };
            check(code, DriverFunction::cuMemUnmap)?;
            // SAFETY: as above.
            let code = unsafe { (table.cuMemRelease)(chunk.handle) };
            check(code, DriverFunction::cuMemRelease)?;
        }
        Ok(())
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        // Nobody is left to tell; the driver takes all back when the program ends.
        let _ = self.give_back();
        // SAFETY: the reservation is ours, and this is its end.
        unsafe { (self.device.driver().table().cuMemAddressFree)(self.address, self.bytes) };
    }
}

/// Memory of `cuMemAlloc`.
pub struct Plain<'a> {
    device: &'a Device,
    address: CUdeviceptr,
}

impl<'a> Plain<'a> {
    /// Allocates.
    pub fn new(device: &'a Device, bytes: usize) -> Result<Self> {
        let mut address = 0;
        // SAFETY: `address` is a valid place for the answer, and the context is current.
        let code = unsafe { (device.driver().table().cuMemAlloc)(&mut address, bytes) };
        check(code, DriverFunction::cuMemAlloc)?;
        Ok(Self { device, address })
    }

    /// The first address.
    pub fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Plain<'_> {
    fn drop(&mut self) {
        // SAFETY: the memory is ours, and this is its end.
        unsafe { (self.device.driver().table().cuMemFree)(self.address) };
    }
}

/// Memory of `cuMemAllocAsync`, which the driver takes back for good when its stream is synchronised after.
pub struct Ordered<'a> {
    stream: &'a Stream,
    address: CUdeviceptr,
}

impl<'a> Ordered<'a> {
    /// Allocates in the order of the stream.
    pub fn new(stream: &'a Stream, bytes: usize) -> Result<Self> {
        let mut address = 0;
        let table = stream.device().driver().table();
        // SAFETY: `address` is a valid place for the answer, and the stream is alive.
        let code = unsafe { (table.cuMemAllocAsync)(&mut address, bytes, stream.raw()) };
        check(code, DriverFunction::cuMemAllocAsync)?;
        Ok(Self { stream, address })
    }
}

impl Drop for Ordered<'_> {
    fn drop(&mut self) {
        let table = self.stream.device().driver().table();
        // SAFETY: the memory is ours, and this is its end.
        unsafe { (table.cuMemFreeAsync)(self.address, self.stream.raw()) };
    }
}
