//! The calls for streams: create, destroy, query and synchronize.

use crate::state::streams::Key;
use crate::state::{DriverResult, Inner, State};
use cuda_vmm_sys::*;

impl Inner {
    /// Begins a call on a stream: returns the handle's stream in the current context.
    pub(crate) fn enter_stream(&mut self, handle: CUstream) -> DriverResult<Key> {
        let device = self.enter()?;
        match handle.addr() {
            0 | 1 => Ok(self.streams.legacy(device)),
            2 => {
                let thread = (device, std::thread::current().id());
                if let Some(&key) = self.streams.per_thread.get(&thread) {
                    return Ok(key);
                }
                let key = self.streams.add(device, true, false);
                self.streams.per_thread.insert(thread, key);
                Ok(key)
            }
            address => {
                let key = address as Key;
                let stream = self.streams.get(key)?;
                if !stream.created || stream.destroyed {
                    return Err(CUDA_ERROR_INVALID_HANDLE);
                }
                self.contexts.check(stream.device)?;
                Ok(key)
            }
        }
    }

    /// Moves the calling thread's virtual clock to the completion of work that it waited for.
    pub(crate) fn advance_thread_to(&self, clock_ns: u64) {
        if self.cost.is_some() {
            self.threads
                .update(|thread| thread.clock_ns = thread.clock_ns.max(clock_ns));
        }
    }
}

impl State {
    pub(crate) fn stream_create(&self, flags: u32) -> DriverResult<CUstream> {
        if flags & !CU_STREAM_NON_BLOCKING != 0 {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        let mut inner = self.lock();
        let device = inner.enter()?;
        let key = inner
            .streams
            .add(device, flags & CU_STREAM_NON_BLOCKING == 0, true);
        Ok(std::ptr::without_provenance_mut(key as usize))
    }

    /// Invalidates the handle. Queued work still runs. In a poisoned context it does so too, but
    /// returns the context's error.
    pub(crate) fn stream_destroy(&self, handle: CUstream) -> DriverResult {
        let mut inner = self.lock();
        inner.current_device()?;
        let key = handle.addr() as Key;
        let stream = inner.streams.get_mut(key)?;
        if !stream.created || stream.destroyed {
            return Err(CUDA_ERROR_INVALID_HANDLE);
        }
        stream.destroyed = true;
        stream.capture = None;
        let device = stream.device;
        inner.streams.reap(key);
        self.notify();
        inner.contexts.check(device)
    }

    pub(crate) fn stream_query(&self, handle: CUstream) -> DriverResult {
        let mut inner = self.lock();
        let key = inner.enter_stream(handle)?;
        inner.check_not_captured(key)?;
        inner.check_implicit(key)?;
        inner.unsafe_call()?;
        let stream = inner.streams.get(key)?;
        if stream.completed >= stream.enqueued {
            Ok(())
        } else {
            Err(CUDA_ERROR_NOT_READY)
        }
    }

    pub(crate) fn stream_synchronize(&self, handle: CUstream) -> DriverResult {
        let mut inner = self.lock();
        let key = inner.enter_stream(handle)?;
        inner.check_not_captured(key)?;
        inner.check_implicit(key)?;
        inner.unsafe_call()?;
        let stream = inner.streams.get(key)?;
        let (device, sequence, clock_ns) = (stream.device, stream.enqueued, stream.clock_ns);
        let inner = self.wait_for(inner, device, &[(key, sequence)])?;
        inner.advance_thread_to(clock_ns);
        Ok(())
    }

    /// `cuCtxSynchronize`.
    pub(crate) fn synchronize(&self) -> DriverResult {
        let mut inner = self.lock();
        let device = inner.enter()?;
        inner.invalidate_captures_of(device)?;
        self.wait_for_device(inner, device).map(drop)
    }
}
