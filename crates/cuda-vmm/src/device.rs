//! One GPU: its numbers, its primary context, its quarantine and its engines.
//!
//! # Safety
//! The unsafe code here passes out-parameters on the stack, and a context that this device retained
//! and releases in `Drop` only.
#![allow(unsafe_code)]

use crate::driver::{Driver, Opened, call};
use crate::foreign::Foreign;
use crate::process::Here;
use crate::quarantine::{Quarantine, Stuck};
use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use crate::sync::{self, Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak, thread};
use crate::sys::{self, CUcontext, CUdevice, CUmemAllocationProp};
use crate::{CaptureGuard, Result, VmmError};
use core::ffi::{CStr, c_char, c_int};
use core::ptr::null_mut;
use core::time::Duration;
use std::sync::OnceLock;

/// A GPU of a [`Driver`]; a cheap clone.
///
/// It retains the device's primary context (`cuDevicePrimaryCtxRetain`), the one that Candle and the
/// CUDA runtime use, makes it current only around the calls that need one, and restores what was
/// current before.
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
    holders: Here<Mutex<Vec<Weak<dyn MemoryHolder>>>>,
    /// What others do to make room.
    make_room: Mutex<Option<Foreign<std::sync::Arc<MakeRoom>>>>,
    /// Threads that call the driver for someone who waits for memory.
    callers: AtomicUsize,
    /// Calls that manage memory.
    memory_calls: AtomicU64,
    /// By which error the driver first refused to take something back because the context is beyond use.
    lost: OnceLock<VmmError>,
    /// How often memory has come free.
    memory_events: AtomicU64,
    /// Threads that wait for memory of the device.
    short: AtomicUsize,
    shortage: Mutex<()>,
    memory: Condvar,
}

// SAFETY: the context is used through the driver's calls only, which may be made from any thread.
unsafe impl Send for Inner {}
// SAFETY: as above; all other fields are `Sync` themselves.
unsafe impl Sync for Inner {}

/// What others in the process do to make room on a device; see [`Device::set_make_room`]. It gets the bytes that are
/// wanted.
pub type MakeRoom = dyn Fn(usize) + Send + Sync;

/// What holds memory of a device and can spare some of it: an engine, as its device and the device's other engines see it.
///
/// The caller holds no lock. Nothing here waits for the device.
pub(crate) trait MemoryHolder: Send + Sync {
    /// Notes what the device has finished with.
    fn poll(self: Arc<Self>);

    /// Asks the driver again to take back what it refused.
    fn retry(self: Arc<Self>);

    /// Gives one piece of spare memory back to the driver; returns whether it did.
    fn give_a_piece(self: Arc<Self>) -> bool;
}

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
            holders: Here::new(process, Mutex::default()),
            make_room: Mutex::default(),
            callers: AtomicUsize::new(0),
            memory_calls: AtomicU64::new(0),
            lost: OnceLock::new(),
            memory_events: AtomicU64::new(0),
            short: AtomicUsize::new(0),
            shortage: Mutex::default(),
            memory: Condvar::new(),
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

    /// The driver, for a call that reserves, makes, maps, opens, unmaps, releases or frees memory or addresses: it is
    /// counted.
    pub(crate) fn counted_driver(&self) -> &Driver {
        self.0.memory_calls.fetch_add(1, Ordering::Relaxed);
        &self.0.driver
    }

    /// So many such calls were made.
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

    /// As [`synchronize_now`](Self::synchronize_now), or, where work of any device may count, of every device's context.
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

    /// The other devices whose primary context is in use in this process (`cuDevicePrimaryCtxGetState`), so that work of
    /// theirs may read this one's memory.
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

    /// Bytes that the driver refused to take back when an object was dropped. They are retried by
    /// [`retry_quarantine`](Self::retry_quarantine) and never handed out. 0 in a forked process.
    pub fn quarantined_bytes(&self) -> usize {
        self.quarantine(|quarantine| quarantine.bytes())
    }

    /// As [`quarantined_bytes`](Self::quarantined_bytes), for addresses that could not be freed.
    pub fn quarantined_address_bytes(&self) -> usize {
        self.quarantine(|quarantine| quarantine.address_bytes())
    }

    /// Tries again to give back what is in quarantine; returns the bytes of memory that went.
    ///
    /// Where an engine ended with memory that the device might still use, this waits for the device
    /// ([`synchronize`](Self::synchronize)), unless a capture is declared. In a forked process it does nothing.
    pub fn retry_quarantine(&self) -> usize {
        if self.driver().check_process().is_err() {
            return 0;
        }
        let before = self.quarantined_bytes();
        let unfinished = self.quarantine(Quarantine::take_unfinished);
        if !unfinished.is_empty() {
            let finished = CaptureGuard::try_none().is_some_and(|_no_capture| {
                match self.finish_work(true) {
                    Ok(()) => true,
                    // Nothing runs on a poisoned context any more.
                    Err(error) => error.is_poisoned(),
                }
            });
            if finished {
                drop(unfinished);
            } else {
                self.quarantine(|quarantine| quarantine.push_unfinished(unfinished));
            }
        }
        self.retry_refused();
        before.saturating_sub(self.quarantined_bytes())
    }

    /// Tries again to give back what the driver refused; returns the bytes that went. Waits for nothing.
    pub(crate) fn retry_refused(&self) -> usize {
        // Taken out while the driver is called, so that no lock is held meanwhile; what fails again
        // puts itself back when it is dropped.
        let refused = self.quarantine(Quarantine::take_refused);
        let refused_bytes: usize = refused.iter().map(|stuck| stuck.bytes()).sum();
        drop(refused);
        let left_bytes = self.quarantine(|quarantine| quarantine.refused_bytes());
        if self.quarantine(Quarantine::is_over) {
            crate::events::info!("the driver has taken back all that was quarantined");
        }
        refused_bytes.saturating_sub(left_bytes)
    }

    /// What dropping does with the driver's answer: what the driver refused goes to the quarantine. After a fork, and on a
    /// context beyond use, there is nothing to keep.
    pub(crate) fn after_drop<S: Stuck + 'static>(
        &self,
        outcome: Result<()>,
        stuck: impl FnOnce() -> S,
    ) {
        match outcome {
            Ok(()) | Err(VmmError::Forked) => {}
            Err(error) if error.is_poisoned() => {}
            Err(error) => self.keep(stuck(), Some(&error)),
        }
    }

    /// Keeps what could not be destroyed, because of this error if it is known, until it is retried.
    pub(crate) fn keep(&self, stuck: impl Stuck + 'static, error: Option<&VmmError>) {
        if self.is_lost() {
            // Its drop calls no driver, and keeps nothing.
            return drop(stuck);
        }
        let bytes = stuck.bytes();
        if self.quarantine(|quarantine| quarantine.push(Box::new(stuck))) {
            match error {
                Some(error) => {
                    crate::events::warn!(%error, bytes, "the driver did not take an object back, which is quarantined");
                }
                None => crate::events::warn!(bytes, "an engine left memory, which is quarantined"),
            }
        }
    }

    /// Keeps what the device may still use until a context synchronise.
    pub(crate) fn keep_unfinished<S: Stuck + 'static>(&self, unfinished: Vec<S>) {
        let boxed = |stuck| -> Box<dyn Stuck> { Box::new(stuck) };
        let unfinished = unfinished.into_iter().map(boxed);
        self.quarantine(|quarantine| quarantine.push_unfinished(unfinished));
    }

    /// Has the driver take something back. If it answers that the context is beyond use, it is asked no more: that answer
    /// stands for all later calls of this kind.
    pub(crate) fn give_to_driver(&self, call: impl FnOnce(&Driver) -> Result<()>) -> Result<()> {
        if let Some(error) = self.0.lost.get() {
            return Err(error.clone());
        }
        call(self.counted_driver()).inspect_err(|error| {
            if error.is_poisoned() {
                let _ = self.0.lost.set(error.clone());
            }
        })
    }

    /// Some memory of the device has come free, or can be given up now: those who wait for it ask again.
    pub(crate) fn note_memory(&self) {
        self.0.memory_events.fetch_add(1, Ordering::SeqCst);
        if self.0.short.load(Ordering::SeqCst) > 0 {
            // With the lock, so that a thread that is about to wait has seen the event or is woken.
            drop(self.lock_shortage());
            self.0.memory.notify_all();
        }
    }

    /// How often memory has come free until now.
    pub(crate) fn memory_events(&self) -> u64 {
        self.0.memory_events.load(Ordering::SeqCst)
    }

    /// Waits until more memory has come free than `seen` says, for so long at most. The caller holds no lock.
    pub(crate) fn await_memory(&self, seen: u64, at_most: Duration) {
        self.0.short.fetch_add(1, Ordering::SeqCst);
        let guard = self.lock_shortage();
        let is_unchanged = |_: &mut ()| self.memory_events() == seen;
        let waited = sync::wait_timeout_while(
            &self.0.memory,
            &self.0.shortage,
            guard,
            at_most,
            is_unchanged,
        );
        drop(waited);
        self.0.short.fetch_sub(1, Ordering::SeqCst);
    }

    fn lock_shortage(&self) -> MutexGuard<'_, ()> {
        let guard = self.0.shortage.lock();
        guard.unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the driver takes nothing back any more, since the context is beyond use.
    pub(crate) fn is_lost(&self) -> bool {
        self.0.lost.get().is_some()
    }

    /// Looks at the quarantine; a forked process has none.
    pub(crate) fn quarantine<T: Default>(&self, use_it: impl FnOnce(&mut Quarantine) -> T) -> T {
        let locked = self.0.quarantine.lock();
        locked.map_or_else(|_| T::default(), |mut quarantine| use_it(&mut quarantine))
    }

    /// Remembers an engine, so that memory it can spare is given up when the device runs out.
    pub(crate) fn register(&self, holder: Weak<dyn MemoryHolder>) -> Result<()> {
        let mut holders = self.0.holders.lock()?;
        holders.retain(|holder| holder.strong_count() > 0);
        holders.push(holder);
        Ok(())
    }

    /// Says what others in the process do to make room on this device, such as trimming a framework's pool; `None` for
    /// nothing. There is one for each device, whichever engine runs out.
    ///
    /// It is called if the driver has no memory for an allocation although the budget had room, after all engines of
    /// the device have given up what they can spare; then the driver is asked again. While
    /// [`allocate_timeout`](crate::VirtualMemoryPool::allocate_timeout) waits for the device, it is called again now and then.
    /// It gets the bytes that are wanted, and runs on the thread that allocates, with no lock held. A panic in it, or in its drop, is
    /// caught.
    ///
    /// It may call the pools, also to unregister the model for which it makes room: that allocation is then
    /// [`VmmError::Closed`], and what is left of the model goes when it ends. What it allocates waits for no other thread, and if
    /// there is no memory it is not called for that.
    ///
    /// The device keeps it until another takes its place. Capture a `Weak`, of an `Arc<SharedMemoryPool>` for
    /// instance: a pool keeps its device, so with a pool in here neither would ever end.
    /// In a forked process this does nothing.
    pub fn set_make_room(&self, make_room: Option<std::sync::Arc<MakeRoom>>) {
        if self.driver().check_process().is_err() {
            return;
        }
        let mut held = self.held_make_room();
        let before = core::mem::replace(&mut *held, make_room.map(Foreign::new));
        drop(held);
        // Without the lock: it is not ours.
        drop(before);
    }

    pub(crate) fn make_room(&self) -> Option<Foreign<std::sync::Arc<MakeRoom>>> {
        let held = self.held_make_room();
        held.as_ref().map(|held| Foreign::new((**held).clone()))
    }

    fn held_make_room(&self) -> MutexGuard<'_, Option<Foreign<std::sync::Arc<MakeRoom>>>> {
        let held = self.0.make_room.lock();
        held.unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts this thread among those that call the driver for someone who waits, until the guard is dropped.
    pub(crate) fn call_for_someone(&self) -> CallsForSomeone<'_> {
        self.0.callers.fetch_add(1, Ordering::Relaxed);
        CallsForSomeone(self)
    }

    /// Lets those go first, for a while, who call the driver for someone who waits: it does one call at a time.
    pub(crate) fn give_way(&self) {
        for _ in 0..TURNS_GIVEN {
            if self.0.callers.load(Ordering::Relaxed) == 0 {
                return;
            }
            thread::yield_now();
        }
    }

    /// The engines of this device in this process.
    pub(crate) fn holders(&self) -> Vec<Arc<dyn MemoryHolder>> {
        let holders = self.0.holders.lock();
        holders.map_or(Vec::new(), |holders| {
            holders.iter().filter_map(Weak::upgrade).collect()
        })
    }

    /// Fails unless both are the same device of the same driver.
    pub(crate) fn expect_same(&self, other: &Self) -> Result<()> {
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
            // Best effort: a driver that is shutting down refuses, and then nothing is left to keep.
            // SAFETY: releases what `open` retained, once.
            let _ = unsafe { call!(&self.driver, cuDevicePrimaryCtxRelease(self.raw)) };
        }
    }
}

/// How often a thread that nobody waits for looks whether it may go on.
const TURNS_GIVEN: usize = if cfg!(model_check) { 3 } else { 1_000 };

/// Counted among the threads that call the driver for someone who waits.
pub(crate) struct CallsForSomeone<'a>(&'a Device);

impl Drop for CallsForSomeone<'_> {
    fn drop(&mut self) {
        self.0.0.callers.fetch_sub(1, Ordering::Relaxed);
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
