//! Device memory: allocation handles, their references, and the storage of their bytes.

use super::DriverResult;
use crate::host_memory::{FileIdentity, HostFile};
use cuda_vmm_sys::*;
use std::collections::{BTreeMap, HashMap};
use std::os::raw::c_int;

/// Where the bytes of an allocation are stored.
#[derive(Debug)]
pub(crate) enum Storage {
    /// In the device's file, from this offset.
    Device { offset: u64 },
    /// In a separate file, which other processes may map.
    Shareable(HostFile),
    /// Not stored.
    Unbacked,
}

/// One allocation of device memory.
#[derive(Debug)]
pub(crate) struct Physical {
    pub(crate) device: usize,
    pub(crate) bytes: usize,
    pub(crate) shareable: bool,
    storage: Storage,
    identity: Option<FileIdentity>,
    /// Whether it lies in what the device reserves for its graphs, which is charged as a whole.
    of_graph: bool,
    /// Creates, imports and retains that were not released.
    references: usize,
    mappings: usize,
}

/// The memory of one device.
#[derive(Debug)]
struct DeviceMemory {
    ordinal: usize,
    used_bytes: usize,
    file: Option<HostFile>,
    /// Unused parts of the file by offset. The file is far larger than the memory, so that
    /// fragmentation never fails an allocation.
    unused: BTreeMap<u64, u64>,
}

/// Size of a device's file, in bytes.
const FILE_BYTES: u64 = 1 << 50;

/// The memory of all devices.
#[derive(Debug)]
pub(crate) struct PhysicalMemory {
    backed: bool,
    limit_bytes: usize,
    devices: Vec<DeviceMemory>,
    allocations: HashMap<u64, Physical>,
    by_file: HashMap<FileIdentity, u64>,
    next_handle: u64,
}

impl PhysicalMemory {
    pub(crate) fn new(devices: usize, limit_bytes: usize, backed: bool) -> Self {
        let device = |ordinal| DeviceMemory {
            ordinal,
            used_bytes: 0,
            file: None,
            unused: BTreeMap::from([(0, FILE_BYTES)]),
        };
        Self {
            backed,
            limit_bytes,
            devices: (0..devices).map(device).collect(),
            allocations: HashMap::new(),
            by_file: HashMap::new(),
            next_handle: 0x5100_0000,
        }
    }

    /// Returns the memory in use on a device, in bytes.
    pub(crate) fn used_bytes(&self, device: usize) -> usize {
        self.devices[device].used_bytes
    }

    /// Returns the memory of a device that is not in use, in bytes.
    pub(crate) fn free_bytes(&self, device: usize) -> usize {
        self.limit_bytes.saturating_sub(self.used_bytes(device))
    }

    /// Returns the references to handles of a device that were not released, without the internal
    /// ones of graphs.
    pub(crate) fn references(&self, device: usize) -> usize {
        let mine = self
            .allocations
            .values()
            .filter(|physical| physical.device == device && !physical.of_graph);
        mine.map(|physical| physical.references).sum()
    }

    /// Returns the allocation of a handle that was not released.
    pub(crate) fn get(&self, handle: u64) -> DriverResult<&Physical> {
        let physical = self.allocations.get(&handle);
        physical
            .filter(|physical| physical.references > 0)
            .ok_or(CUDA_ERROR_INVALID_VALUE)
    }

    /// Returns the device of an allocation, even if the handle was released.
    pub(crate) fn device_of(&self, handle: u64) -> Option<usize> {
        Some(self.allocations.get(&handle)?.device)
    }

    /// Allocates memory of a device. The new handle has one reference.
    pub(crate) fn create(
        &mut self,
        device: usize,
        bytes: usize,
        shareable: bool,
    ) -> DriverResult<u64> {
        self.charge(device, bytes)?;
        let made = match (self.backed, shareable) {
            (false, _) => Ok((Storage::Unbacked, None)),
            (true, true) => super::export::shareable_file(device, bytes)
                .map(|(file, identity)| (Storage::Shareable(file), Some(identity))),
            (true, false) => self.devices[device]
                .take(bytes)
                .map(|offset| (Storage::Device { offset }, None)),
        };
        match made {
            Ok((storage, identity)) => Ok(self.insert(device, bytes, shareable, storage, identity)),
            Err(code) => {
                self.discharge(device, bytes);
                Err(code)
            }
        }
    }

    /// Creates memory for a graph's allocation. It lies in what was charged for graphs before.
    pub(crate) fn create_for_graph(&mut self, device: usize, bytes: usize) -> DriverResult<u64> {
        let storage = match self.backed {
            true => Storage::Device {
                offset: self.devices[device].take(bytes)?,
            },
            false => Storage::Unbacked,
        };
        let handle = self.insert(device, bytes, false, storage, None);
        if let Some(physical) = self.allocations.get_mut(&handle) {
            physical.of_graph = true;
        }
        Ok(handle)
    }

    /// Takes memory of a device into use.
    pub(crate) fn charge(&mut self, device: usize, bytes: usize) -> DriverResult {
        let used = &mut self.devices[device].used_bytes;
        match used.checked_add(bytes) {
            Some(sum) if sum <= self.limit_bytes => *used = sum,
            _ => return Err(CUDA_ERROR_OUT_OF_MEMORY),
        }
        Ok(())
    }

    /// Gives back what was charged.
    pub(crate) fn discharge(&mut self, device: usize, bytes: usize) {
        self.devices[device].used_bytes -= bytes;
    }

    fn insert(
        &mut self,
        device: usize,
        bytes: usize,
        shareable: bool,
        storage: Storage,
        identity: Option<FileIdentity>,
    ) -> u64 {
        self.next_handle += 16;
        let handle = self.next_handle;
        if let Some(identity) = identity {
            self.by_file.insert(identity, handle);
        }
        let physical = Physical {
            device,
            bytes,
            shareable,
            storage,
            identity,
            of_graph: false,
            references: 1,
            mappings: 0,
        };
        self.allocations.insert(handle, physical);
        handle
    }

    /// Imports memory that another simulator exported, or adds a reference if this simulator did.
    pub(crate) fn import(&mut self, descriptor: c_int) -> DriverResult<u64> {
        if !self.backed {
            return Err(CUDA_ERROR_NOT_SUPPORTED);
        }
        let imported = super::export::import(descriptor)?;
        if let Some(&handle) = self.by_file.get(&imported.identity)
            && let Some(physical) = self.allocations.get_mut(&handle)
        {
            physical.references += 1;
            return Ok(handle);
        }
        if imported.device >= self.devices.len() {
            return Err(CUDA_ERROR_INVALID_DEVICE);
        }
        self.charge(imported.device, imported.bytes)?;
        let storage = Storage::Shareable(imported.file);
        Ok(self.insert(
            imported.device,
            imported.bytes,
            true,
            storage,
            Some(imported.identity),
        ))
    }

    /// Returns a descriptor by which another process can import the memory.
    pub(crate) fn export(&self, handle: u64) -> DriverResult<c_int> {
        let physical = self.get(handle)?;
        match &physical.storage {
            _ if !physical.shareable => Err(CUDA_ERROR_INVALID_VALUE),
            Storage::Shareable(file) => file.duplicate().map_err(|_| CUDA_ERROR_OPERATING_SYSTEM),
            Storage::Device { .. } | Storage::Unbacked => Err(CUDA_ERROR_NOT_SUPPORTED),
        }
    }

    /// Adds a reference to memory that is still allocated or mapped, even if its handle was
    /// released.
    pub(crate) fn retain(&mut self, handle: u64) -> DriverResult {
        let physical = self
            .allocations
            .get_mut(&handle)
            .ok_or(CUDA_ERROR_INVALID_VALUE)?;
        physical.references += 1;
        Ok(())
    }

    /// Removes a reference. The bytes are freed with the last reference and mapping.
    pub(crate) fn release(&mut self, handle: u64) -> DriverResult {
        let physical = self
            .allocations
            .get_mut(&handle)
            .ok_or(CUDA_ERROR_INVALID_VALUE)?;
        physical.references = physical
            .references
            .checked_sub(1)
            .ok_or(CUDA_ERROR_INVALID_VALUE)?;
        self.free_if_unused(handle);
        Ok(())
    }

    /// Counts one more mapping.
    pub(crate) fn add_mapping(&mut self, handle: u64) {
        if let Some(physical) = self.allocations.get_mut(&handle) {
            physical.mappings += 1;
        }
    }

    /// Counts one fewer mapping.
    pub(crate) fn remove_mapping(&mut self, handle: u64) {
        if let Some(physical) = self.allocations.get_mut(&handle) {
            physical.mappings = physical.mappings.saturating_sub(1);
        }
        self.free_if_unused(handle);
    }

    fn free_if_unused(&mut self, handle: u64) {
        let unused = |physical: &Physical| physical.references == 0 && physical.mappings == 0;
        if !self.allocations.get(&handle).is_some_and(unused) {
            return;
        }
        let Some(physical) = self.allocations.remove(&handle) else {
            return;
        };
        if let Some(identity) = physical.identity {
            self.by_file.remove(&identity);
        }
        let device = &mut self.devices[physical.device];
        if !physical.of_graph {
            device.used_bytes -= physical.bytes;
        }
        if let Storage::Device { offset } = physical.storage {
            device.put_back(offset, physical.bytes);
        }
    }

    /// Returns the file and offset of an allocation's bytes; `None` if they are not stored.
    pub(crate) fn storage(&self, handle: u64) -> Option<(&HostFile, u64)> {
        let physical = self.allocations.get(&handle)?;
        match &physical.storage {
            Storage::Device { offset } => {
                Some((self.devices[physical.device].file.as_ref()?, *offset))
            }
            Storage::Shareable(file) => Some((file, 0)),
            Storage::Unbacked => None,
        }
    }
}

impl DeviceMemory {
    /// Takes the first unused part of the file that is large enough, so that consecutive
    /// allocations are adjacent.
    fn take(&mut self, bytes: usize) -> DriverResult<u64> {
        if self.file.is_none() {
            let name = format!("cuda-vmm-sim:memory:device={}", self.ordinal);
            let file = HostFile::create(&name, FILE_BYTES, false);
            self.file = Some(file.map_err(|_| CUDA_ERROR_OUT_OF_MEMORY)?);
        }
        let bytes = bytes as u64;
        let mut parts = self.unused.iter();
        let (offset, length) = parts
            .find_map(|(&offset, &length)| (length >= bytes).then_some((offset, length)))
            .ok_or(CUDA_ERROR_OUT_OF_MEMORY)?;
        self.unused.remove(&offset);
        if length > bytes {
            self.unused.insert(offset + bytes, length - bytes);
        }
        Ok(offset)
    }

    /// Returns a part of the file to the unused parts, and frees its bytes.
    fn put_back(&mut self, offset: u64, bytes: usize) {
        // If the bytes cannot be freed, the part is never used again: new memory must read as zero.
        if let Some(file) = &self.file
            && file.punch(offset, bytes).is_err()
        {
            return;
        }
        let (mut start, mut end) = (offset, offset + bytes as u64);
        if let Some((&before, &length)) = self.unused.range(..offset).next_back()
            && before + length == start
        {
            self.unused.remove(&before);
            start = before;
        }
        if let Some(length) = self.unused.remove(&end) {
            end += length;
        }
        self.unused.insert(start, end - start);
    }
}
