//! Primary contexts: retain counts, the current context of each thread, and poisoned contexts.

use crate::state::{DriverResult, Inner, State};
use cuda_vmm_sys::*;

/// One device's primary context.
#[derive(Debug, Default)]
struct Context {
    retains: usize,
    /// The sticky error that every call in this context returns.
    poison: Option<CUresult>,
    /// How often the context was destroyed. Work from before stops.
    ended: u64,
}

/// The primary contexts of all devices.
#[derive(Debug)]
pub(crate) struct Contexts(Vec<Context>);

/// A context handle is this plus 256 times the device. It is never dereferenced.
const FIRST_HANDLE: usize = 0xC000_0000;

impl Contexts {
    pub(crate) fn new(devices: usize) -> Self {
        Self((0..devices).map(|_| Context::default()).collect())
    }

    pub(crate) fn retains(&self, device: usize) -> usize {
        self.0[device].retains
    }

    pub(crate) fn is_active(&self, device: usize) -> bool {
        self.0[device].retains > 0
    }

    /// Returns the handle of a device's context.
    pub(crate) fn handle(device: usize) -> CUcontext {
        std::ptr::without_provenance_mut(FIRST_HANDLE + 256 * device)
    }

    /// Returns the device of an active context.
    pub(crate) fn device(&self, handle: CUcontext) -> DriverResult<usize> {
        let offset = handle
            .addr()
            .checked_sub(FIRST_HANDLE)
            .filter(|offset| offset.is_multiple_of(256));
        offset
            .map(|offset| offset / 256)
            .filter(|&device| device < self.0.len() && self.is_active(device))
            .ok_or(CUDA_ERROR_INVALID_CONTEXT)
    }

    pub(crate) fn poison(&self, device: usize) -> Option<CUresult> {
        self.0[device].poison
    }

    /// Returns how often a context was destroyed.
    pub(crate) fn ended(&self, device: usize) -> u64 {
        self.0[device].ended
    }

    /// Poisons a context with `code`, unless it is already poisoned.
    pub(crate) fn set_poison(&mut self, device: usize, code: CUresult) {
        self.0[device].poison.get_or_insert(code);
    }

    /// Returns the context's error if it is poisoned.
    pub(crate) fn check(&self, device: usize) -> DriverResult {
        self.poison(device).map_or(Ok(()), Err)
    }
}

impl Inner {
    /// Returns the device whose context is current on the calling thread, if that context is still
    /// active.
    pub(crate) fn current_device(&self) -> DriverResult<usize> {
        let device = self
            .threads
            .get()
            .current
            .ok_or(CUDA_ERROR_INVALID_CONTEXT)?;
        if self.contexts.is_active(device) {
            Ok(device)
        } else {
            Err(CUDA_ERROR_CONTEXT_IS_DESTROYED)
        }
    }

    /// Begins a call in the current context: returns the device, or the error of a poisoned
    /// context.
    pub(crate) fn enter(&self) -> DriverResult<usize> {
        let device = self.current_device()?;
        self.contexts.check(device)?;
        Ok(device)
    }
}

impl State {
    pub(crate) fn retain_context(&self, device: usize) -> CUcontext {
        self.lock().contexts.0[device].retains += 1;
        Contexts::handle(device)
    }

    /// Releases one retain. The last release destroys the context's streams, events, graphs and
    /// plain allocations. A poisoned context stays poisoned.
    pub(crate) fn release_context(&self, device: usize) -> DriverResult {
        let mut inner = self.lock();
        let context = &mut inner.contexts.0[device];
        context.retains = context
            .retains
            .checked_sub(1)
            .ok_or(CUDA_ERROR_INVALID_CONTEXT)?;
        if context.retains == 0 {
            context.ended += 1;
            inner.streams.destroy_all(device);
            inner.events.destroy_all(device);
            inner.graphs.destroy_all(device);
            inner.free_all_plain(device);
            self.notify();
        }
        Ok(())
    }

    pub(crate) fn set_current(&self, context: CUcontext) -> DriverResult {
        let device = if context.is_null() {
            None
        } else {
            Some(self.lock().contexts.device(context)?)
        };
        self.threads.update(|thread| thread.current = device);
        Ok(())
    }

    pub(crate) fn current(&self) -> CUcontext {
        match self.threads.get().current {
            Some(device) => Contexts::handle(device),
            None => std::ptr::null_mut(),
        }
    }
}
