//! The simulator of the CPU device.

use candle_core::Device;
use candle_cuda_vmm::Result;
use candle_cuda_vmm::cuda_vmm::DriverKind;
use candle_cuda_vmm::cuda_vmm::sim::{Books, Fault, Simulator};
use candle_cuda_vmm::cuda_vmm::sys;
use candle_cuda_vmm::device::core_device;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The simulator of the CPU device, for one test at a time.
pub struct Bench {
    pub device: candle_cuda_vmm::cuda_vmm::Device,
    _alone: MutexGuard<'static, ()>,
}

impl Bench {
    pub fn new() -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let device = core_device(&Device::Cpu).unwrap();
        assert_eq!(device.driver().kind(), DriverKind::Simulated);
        Self {
            device,
            _alone: alone,
        }
    }

    pub fn simulator(&self) -> &Simulator {
        self.device.driver().simulator().unwrap()
    }

    pub fn books(&self) -> Books {
        self.simulator().books(0)
    }

    /// Waits until the books are these. The worker of an engine may be in a step while the last
    /// owner of the engine is dropped; then its fences end a moment later.
    pub fn await_books(&self, expected: Books) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.books() != expected && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(self.books(), expected);
    }

    /// Runs `work` with its first driver call failing, then with its second, until it makes fewer
    /// calls than that. Runs `unchanged` after each failure. Returns the number of calls, and what
    /// `work` returned.
    pub fn fail_each_call<T>(
        &self,
        mut work: impl FnMut() -> Result<T>,
        mut unchanged: impl FnMut(usize),
    ) -> (usize, T) {
        for call in 1..10_000 {
            self.simulator()
                .inject(Fault::nth_call(call as u64, sys::CUDA_ERROR_UNKNOWN));
            let result = work();
            self.simulator().clear_faults();
            match result {
                Ok(made) => return (call - 1, made),
                Err(error) => {
                    assert_eq!(
                        error.driver_code(),
                        Some(sys::CUDA_ERROR_UNKNOWN),
                        "call {call}: {error}"
                    );
                    unchanged(call);
                }
            }
        }
        panic!("the work never ends");
    }
}
