//! One GPU: its numbers, its primary context, its quarantine and its engines.
//!
//! # Safety
//! The unsafe code here passes out-parameters on the stack, and a context that this device retained
//! and releases in `Drop` only.
#![allow(unsafe_code)]

mod quarantine;
mod room;

pub use room::MakeRoom;
pub(crate) use room::MemoryHolder;

use crate::driver::{Driver, Opened, call};
use crate::process::Here;
use crate::quarantine::Quarantine;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Arc, Mutex, Weak};
use crate::sys::{self, CUcontext, CUdevice, CUmemAllocationProp};
use crate::{CaptureGuard, Result, VmmError};
use core::ffi::{CStr, c_char, c_int};
use core::ptr::null_mut;
use room::Room;
use std::sync::OnceLock;

/// A GPU of a [`Driver`]; a cheap clone.
///
/// It retains the device's primary context (`cuDevicePrimaryCtxRetain`), the one that Candle and
/// the CUDA runtime use, makes it current only around the calls that need one, and restores what
/// was current before.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    driver: Driver,
    ordinal: usize,
    raw: CUdevice,
    context: CUcontext,
    name: String,
    total_bytes: usize,
    granularity_bytes: usize,
    recommended_granularity_bytes: usize,
    exports: bool,
    quarantine: Here<Mutex<Quarantine>>,
    room: Room,
    /// Calls that manage memory.
    memory_calls: AtomicU64,
    /// The error by which the driver first said that the context is poisoned.
    lost: OnceLock<VmmError>,
}

// SAFETY: the context is used through the driver's calls only, which may be made from any thread.
unsafe impl Send for Inner {}
// SAFETY: as above; all other fields are `Sync` themselves.
unsafe impl Sync for Inner {}

impl Driver {
    /// The device of this number, with its primary context retained while any clone lives.
    ///
    /// # Errors
    /// [`VmmError::InvalidDevice`]; [`VmmError::UnsupportedDevice`] if it has no virtual memory
    /// management; [`VmmError::Driver`], [`VmmError::Forked`].
    pub fn device(&self, ordinal: usize) -> Result<Device> {
        // Held while the device is opened, so that a device is opened once and its quarantine and
        // its engines are known in one place.
        let mut devices = self.devices()?;
        let count = self.device_count()?;
        if ordinal >= count {
            return Err(VmmError::InvalidDevice { ordinal, count });
        }
        let known = devices.len();
        devices.resize_with(count.max(known), || -> Opened { Weak::<Inner>::new() });
        let opened = devices[ordinal].upgrade().map(Arc::downcast::<Inner>);
        if let Some(Ok(inner)) = opened {
            return Ok(Device(inner));
        }
        let device = Device::open(self.clone(), ordinal)?;
        let opened: Weak<Inner> = Arc::downgrade(&device.0);
        devices[ordinal] = opened;
        Ok(device)
    }
}

impl Device {
    /// Opens the device; called by [`Driver::device`] once for each.
    pub(crate) fn open(driver: Driver, ordinal: usize) -> Result<Self> {
        let mut raw: CUdevice = 0;
        // SAFETY: `raw` is a valid place; the ordinal was checked against the device count.
        unsafe { call!(&driver, cuDeviceGet(&mut raw, ordinal as c_int)) }?;
        let attribute = |attribute| {
            let mut value: c_int = 0;
            // SAFETY: `value` is a valid place and `raw` a device of this driver.
            unsafe { call!(&driver, cuDeviceGetAttribute(&mut value, attribute, raw)) }?;
            Ok::<_, VmmError>(value)
        };
        if attribute(sys::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED)? == 0 {
            return Err(VmmError::UnsupportedDevice { ordinal });
        }
        let exports =
            attribute(sys::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED)? != 0;
        let mut name = [0 as c_char; 256];
        // SAFETY: the buffer has the length given and the driver ends the name with a zero.
        let name = unsafe {
            call!(
                &driver,
                cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int - 1, raw)
            )?;
            CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned()
        };
        let mut total_bytes = 0;
        // SAFETY: `total_bytes` is a valid place.
        unsafe { call!(&driver, cuDeviceTotalMem(&mut total_bytes, raw)) }?;
        let properties = properties(raw, false);
        let granularity = |option| {
            let mut bytes = 0;
            // SAFETY: `bytes` is a valid place and the properties are alive during the call.
            unsafe {
                call!(
                    &driver,
                    cuMemGetAllocationGranularity(&mut bytes, &properties, option)
                )
            }?;
            Ok::<_, VmmError>(bytes)
        };
        let granularity_bytes = granularity(sys::CU_MEM_ALLOC_GRANULARITY_MINIMUM)?;
        let recommended_granularity_bytes = granularity(sys::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED)?;
        let mut context = null_mut();
        // Last, so that nothing after it can fail and leave the context retained.
        // SAFETY: `context` is a valid place; `Drop` releases it.
        unsafe { call!(&driver, cuDevicePrimaryCtxRetain(&mut context, raw)) }?;
        let process = driver.process();
        Ok(Self(Arc::new(Inner {
            driver,
            ordinal,
            raw,
            context,
            name,
            total_bytes,
            granularity_bytes,
            recommended_granularity_bytes,
            exports,
            quarantine: Here::new(process, Mutex::default()),
            room: Room::new(process),
            memory_calls: AtomicU64::new(0),
            lost: OnceLock::new(),
        })))
    }

    /// The device's number.
    pub fn ordinal(&self) -> usize {
        self.0.ordinal
    }

    /// The driver's name for it (`cuDeviceGetName`).
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The driver that it belongs to.
    pub fn driver(&self) -> &Driver {
        &self.0.driver
    }

    /// The driver, for a call that reserves, makes, maps, opens, unmaps, releases or frees memory
    /// or addresses: it is counted.
    pub(crate) fn counted_driver(&self) -> &Driver {
        self.0.memory_calls.fetch_add(1, Ordering::Relaxed);
        &self.0.driver
    }

    /// The number of such calls that were made.
    pub(crate) fn memory_calls(&self) -> u64 {
        self.0.memory_calls.load(Ordering::Relaxed)
    }

    /// The driver's own handle of the device.
    pub fn raw(&self) -> CUdevice {
        self.0.raw
    }

    /// The primary context. It stays retained while any clone of the device lives.
    pub fn raw_context(&self) -> CUcontext {
        self.0.context
    }

    /// Memory of the device in bytes (`cuDeviceTotalMem`).
    pub fn total_bytes(&self) -> usize {
        self.0.total_bytes
    }

    /// The smallest size, and step of sizes, of a physical allocation in bytes
    /// (`cuMemGetAllocationGranularity`, minimum).
    pub fn granularity_bytes(&self) -> usize {
        self.0.granularity_bytes
    }

    /// The granularity in bytes that the driver recommends.
    pub fn recommended_granularity_bytes(&self) -> usize {
        self.0.recommended_granularity_bytes
    }

    /// Whether physical memory can be exported as a file descriptor.
    pub fn can_export(&self) -> bool {
        self.0.exports
    }

    /// Free memory of the device in bytes (`cuMemGetInfo`). Takes microseconds: not for hot paths.
    ///
    /// # Errors
    /// [`VmmError::Driver`], [`VmmError::Forked`].
    pub fn free_bytes(&self) -> Result<usize> {
        let _current = self.make_current()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both are valid places, and the context is current.
        unsafe { call!(self.driver(), cuMemGetInfo(&mut free, &mut total)) }?;
        Ok(free)
    }

    /// Waits for all work of the device's context (`cuCtxSynchronize`).
    ///
    /// This call kills any stream capture of the context that is under way, whatever its mode; it
    /// waits while a [`CaptureGuard`] lives.
    ///
    /// # Errors
    /// [`VmmError::Driver`], also for work that failed earlier; [`VmmError::Forked`].
    pub fn synchronize(&self) -> Result<()> {
        self.driver().check_process()?;
        let _no_capture = CaptureGuard::wait_for_none();
        self.synchronize_now()
    }

    /// As [`synchronize`](Self::synchronize), where the caller has made sure of captures.
    pub(crate) fn synchronize_now(&self) -> Result<()> {
        let _current = self.make_current()?;
        // SAFETY: the context is current; the call takes nothing.
        unsafe { call!(self.driver(), cuCtxSynchronize()) }
    }

    /// As [`synchronize_now`](Self::synchronize_now), or, where work of any device may count, of
    /// every device's context.
    pub(crate) fn finish_work(&self, all: bool) -> Result<()> {
        self.synchronize_now()?;
        let peers = if all { self.peers()? } else { Vec::new() };
        peers.iter().try_for_each(|peer| {
            match peer.synchronize_now() {
                // Nothing runs there any more.
                Err(error) if error.is_poisoned() => Ok(()),
                outcome => outcome,
            }
        })
    }

    /// The other devices whose primary context is in use in this process
    /// (`cuDevicePrimaryCtxGetState`), so that work of theirs may read this one's memory.
    pub(crate) fn peers(&self) -> Result<Vec<Self>> {
        let mut peers = Vec::new();
        for ordinal in (0..self.driver().device_count()?).filter(|at| *at != self.ordinal()) {
            let (mut raw, mut flags, mut active) = (0, 0, 0);
            // SAFETY: all are valid places; the ordinal is below the count.
            unsafe {
                call!(self.driver(), cuDeviceGet(&mut raw, ordinal as c_int))?;
                call!(
                    self.driver(),
                    cuDevicePrimaryCtxGetState(raw, &mut flags, &mut active)
                )?;
            }
            if active == 0 {
                continue;
            }
            match self.driver().device(ordinal) {
                Ok(device) => peers.push(device),
                // It has no virtual memory management, and so cannot reach memory of ours.
                Err(VmmError::UnsupportedDevice { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(peers)
    }

    /// Fails unless both are the same device of the same driver.
    ///
    /// # Errors
    /// [`VmmError::WrongDriver`], [`VmmError::WrongDevice`].
    pub fn expect_same(&self, other: &Self) -> Result<()> {
        if !self.driver().is_same(other.driver()) {
            return Err(VmmError::WrongDriver);
        }
        if self.ordinal() != other.ordinal() {
            return Err(VmmError::WrongDevice {
                expected: self.ordinal(),
                found: other.ordinal(),
            });
        }
        Ok(())
    }

    /// Makes the primary context current on this thread until the guard is dropped.
    pub(crate) fn make_current(&self) -> Result<Current<'_>> {
        let mut before = null_mut();
        // SAFETY: `before` is a valid place.
        unsafe { call!(self.driver(), cuCtxGetCurrent(&mut before)) }?;
        if before != self.0.context {
            // SAFETY: the context is retained while `self` lives.
            unsafe { call!(self.driver(), cuCtxSetCurrent(self.0.context)) }?;
        }
        Ok(Current {
            device: self,
            before,
        })
    }

    /// Allocation properties of pinned memory on this device.
    pub(crate) fn properties(&self, exportable: bool) -> CUmemAllocationProp {
        properties(self.0.raw, exportable)
    }
}

fn properties(device: CUdevice, exportable: bool) -> CUmemAllocationProp {
    // SAFETY: the struct holds integers and a pointer, for which all zeros is valid.
    let mut properties: CUmemAllocationProp = unsafe { core::mem::zeroed() };
    properties.type_ = sys::CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location.type_ = sys::CU_MEM_LOCATION_TYPE_DEVICE;
    properties.location.id = device;
    if exportable {
        properties.requestedHandleTypes = sys::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    }
    properties
}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Device {}

impl core::fmt::Debug for Device {
    fn fmt(&self, formatter: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(formatter, "Device({}, {:?})", self.ordinal(), self.name())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.driver.check_process().is_ok() {
            // Best effort: a driver that is shutting down refuses, and nothing is left to keep.
            // SAFETY: releases what `open` retained, once.
            let _ = unsafe { call!(&self.driver, cuDevicePrimaryCtxRelease(self.raw)) };
        }
    }
}

/// Restores the context that was current before.
pub(crate) struct Current<'a> {
    device: &'a Device,
    before: CUcontext,
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        if self.before != self.device.0.context {
            // Fails only if the earlier context is gone, and then there is nothing to restore.
            // SAFETY: the handle is the one that was current on this thread before.
            let _ = unsafe { call!(self.device.driver(), cuCtxSetCurrent(self.before)) };
        }
    }
}
