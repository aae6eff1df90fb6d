//! Device memory: allocation handles, their owners, and where their bytes are kept.

use crate::host_memory::{FileIdentity, HostFile};
use crate::state::Answer;
use cuda_vmm_sys::*;
use std::collections::{BTreeMap, HashMap};
use std::os::raw::c_int;

/// Where the bytes of an allocation are.
#[derive(Debug)]
pub(crate) enum Storage {
    /// In the device's own file, from this offset.
    Device { offset: u64 },
    /// In a file of its own, which other processes may map.
    Shareable(HostFile),
    /// Nowhere.
    Unbacked,
}

/// One piece of device memory.
#[derive(Debug)]
pub(crate) struct Physical {
    pub(crate) device: usize,
    pub(crate) bytes: usize,
    pub(crate) shareable: bool,
    storage: Storage,
    identity: Option<FileIdentity>,
    /// Creates, imports and retains that were not released.
    references: usize,
    mappings: usize,
}

/// One device's memory.
#[derive(Debug)]
struct DeviceMemory {
    ordinal: usize,
    used_bytes: usize,
    file: Option<HostFile>,
    /// Unused parts of the file by offset. The file is far larger than the memory, so that fragments
    /// never stand in the way of an allocation for which there is memory.
    unused: BTreeMap<u64, u64>,
}

/// The file of a device, in bytes.
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

    /// Memory in use on a device, in bytes.
    pub(crate) fn used_bytes(&self, device: usize) -> usize {
        self.devices[device].used_bytes
    }

    /// References to handles of a device that were not released.
    pub(crate) fn references(&self, device: usize) -> usize {
        let mine = self
            .allocations
            .values()
            .filter(|physical| physical.device == device);
        mine.map(|physical| physical.references).sum()
    }

    /// The allocation of a handle that was not released.
    pub(crate) fn get(&self, handle: u64) -> Answer<&Physical> {
        let physical = self.allocations.get(&handle);
        physical
            .filter(|physical| physical.references > 0)
            .ok_or(CUDA_ERROR_INVALID_VALUE)
    }

    /// The device that an allocation is on, released or not.
    pub(crate) fn device_of(&self, handle: u64) -> Option<usize> {
        Some(self.allocations.get(&handle)?.device)
    }

    /// Takes memory of a device; the new handle has one reference.
    pub(crate) fn create(&mut self, device: usize, bytes: usize, shareable: bool) -> Answer<u64> {
        self.charge(device, bytes)?;
        let made = match (self.backed, shareable) {
            (false, _) => Ok((Storage::Unbacked, None)),
            (true, true) => crate::export::shareable_file(device, bytes)
                .map(|(file, identity)| (Storage::Shareable(file), Some(identity))),
            (true, false) => self.devices[device]
                .take(bytes)
                .map(|offset| (Storage::Device { offset }, None)),
        };
        match made {
            Ok((storage, identity)) => Ok(self.insert(device, bytes, shareable, storage, identity)),
            Err(code) => {
                self.devices[device].used_bytes -= bytes;
                Err(code)
            }
        }
    }

    fn charge(&mut self, device: usize, bytes: usize) -> Answer {
        let used = &mut self.devices[device].used_bytes;
        match used.checked_add(bytes) {
            Some(sum) if sum <= self.limit_bytes => *used = sum,
            _ => return Err(CUDA_ERROR_OUT_OF_MEMORY),
        }
        Ok(())
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
            references: 1,
            mappings: 0,
        };
        self.allocations.insert(handle, physical);
        handle
    }

    /// Takes up memory that another simulator exported, or adds a reference to our own.
    pub(crate) fn import(&mut self, descriptor: c_int) -> Answer<u64> {
        if !self.backed {
            return Err(CUDA_ERROR_NOT_SUPPORTED);
        }
        let imported = crate::export::import(descriptor)?;
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

    /// A descriptor by which another process may import the memory.
    pub(crate) fn export(&self, handle: u64) -> Answer<c_int> {
        let physical = self.get(handle)?;
        match &physical.storage {
            _ if !physical.shareable => Err(CUDA_ERROR_INVALID_VALUE),
            Storage::Shareable(file) => file.duplicate().map_err(|_| CUDA_ERROR_OPERATING_SYSTEM),
            Storage::Device { .. } | Storage::Unbacked => Err(CUDA_ERROR_NOT_SUPPORTED),
        }
    }

    /// Adds a reference to memory that is allocated or mapped, though its owner may have released it.
    pub(crate) fn retain(&mut self, handle: u64) -> Answer {
        let physical = self
            .allocations
            .get_mut(&handle)
            .ok_or(CUDA_ERROR_INVALID_VALUE)?;
        physical.references += 1;
        Ok(())
    }

    /// Takes a reference away; the bytes are freed once nothing refers to them.
    pub(crate) fn release(&mut self, handle: u64) -> Answer {
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

    /// Counts one mapping less.
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
        device.used_bytes -= physical.bytes;
        if let Storage::Device { offset } = physical.storage {
            device.put_back(offset, physical.bytes);
        }
    }

    /// The file and offset at which an allocation's bytes are, if they are anywhere.
    pub(crate) fn place(&self, handle: u64) -> Option<(&HostFile, u64)> {
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
    /// Takes the first unused part of the file that is large enough, so that what is allocated in a row
    /// lies in a row.
    fn take(&mut self, bytes: usize) -> Answer<u64> {
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

    /// Gives a part of the file back, its bytes with it.
    fn put_back(&mut self, offset: u64, bytes: usize) {
        // If the hole cannot be punched the part is never used again: fresh memory must read zero.
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
