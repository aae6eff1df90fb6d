//! Work that blocks a stream until it is released, so that later work stays queued.

use candle_core::Device;
use candle_cuda_vmm::cuda_vmm::sys::{CUDA_SUCCESS, CUresult};
use candle_cuda_vmm::device::core_device;
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A host function on a Candle device's stream that waits until the gate is opened. Dropping the
/// gate opens it.
pub struct Gate(Arc<AtomicBool>);

impl Gate {
    /// Blocks the stream of this device object.
    pub fn close(device: &Device) -> Self {
        unsafe extern "C" fn wait(state: *mut c_void) {
            // SAFETY: the pointer is the reference that `close` passed to this call.
            let is_open = unsafe { Arc::from_raw(state.cast::<AtomicBool>()) };
            while !is_open.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
        }
        let stream = device.as_cuda_device().unwrap().cuda_stream();
        stream.context().bind_to_thread().unwrap();
        let core = core_device(device).unwrap();
        let is_open = Arc::new(AtomicBool::new(false));
        let state = Arc::into_raw(is_open.clone()).cast_mut().cast();
        // SAFETY: the stream is alive and its context is current. The function takes the reference.
        let code: CUresult = unsafe {
            (core.driver().table().cuLaunchHostFunc)(stream.cu_stream().cast(), Some(wait), state)
        };
        assert_eq!(code, CUDA_SUCCESS, "cuLaunchHostFunc");
        Self(is_open)
    }

    /// Returns whether the gate is still closed.
    pub fn is_closed(&self) -> bool {
        !self.0.load(Ordering::SeqCst)
    }

    /// Opens the gate.
    pub fn open(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Opens the gate from another thread after a while. Returns whether it was closed until then.
    pub fn opened_meanwhile<T>(&self, act: impl FnOnce() -> T) -> T {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(50));
                self.open();
            });
            act()
        })
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.open();
    }
}
