//! The calls for primary contexts: retain, release, and the current context of a thread.

use crate::state::contexts::Contexts;
use crate::state::{DriverResult, Inner, State};
use cuda_vmm_sys::*;

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

    /// Releases one retain. The last release destroys the context's streams, events, graphs with
    /// their memory, and plain allocations, and unregisters host memory. A poisoned context stays poisoned.
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
            inner.free_all_graph_memory(device);
            inner.registrations.remove_all(device);
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
