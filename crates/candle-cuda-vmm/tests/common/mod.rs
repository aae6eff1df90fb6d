//! What the tests share: sizes, the device under test, and a check for exact errors.

// Each test binary uses its own part of this.
#![allow(dead_code)]

use candle_core::Device;
use candle_cuda_vmm::cuda_vmm::{self, Driver, DriverKind};
use candle_cuda_vmm::device::core_device;
use std::io::Write;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

pub const KIB: usize = 1 << 10;
pub const MIB: usize = 1 << 20;
pub const GIB: usize = 1 << 30;

/// The page size of the tests; [`open`] checks that it is the device's granularity.
pub const PAGE: usize = 2 * MIB;

/// Fails unless the result is an error of this very pattern.
#[macro_export]
macro_rules! refused {
    ($result:expr, $pattern:pat $(if $guard:expr)?) => {
        match $result.map(|_| ()) {
            Err($pattern) $(if $guard)? => {}
            other => panic!("expected {}, got {other:?}", stringify!($pattern)),
        }
    };
}

/// The device under test, for one test at a time: all look at the memory of one device.
pub struct UnderTest {
    pub device: Device,
    pub core: cuda_vmm::Device,
    pub kind: DriverKind,
    _alone: MutexGuard<'static, ()>,
}

impl UnderTest {
    /// Memory of the device that is not in use, in bytes.
    pub fn free_bytes(&self) -> usize {
        self.core.free_bytes().unwrap()
    }

    /// Fails unless `bytes` bytes of the device are in use beyond those of a moment when `free_before` were
    /// free. A real driver keeps tables of its own, which come and go: there 32 MiB are allowed for them.
    pub fn expect_in_use(&self, free_before: usize, bytes: usize) {
        let tolerance = match self.kind {
            DriverKind::Simulated => 0,
            DriverKind::Real => 32 * MIB,
        };
        let expected = free_before - bytes;
        let free = self.free_bytes();
        assert!(
            free.abs_diff(expected) <= tolerance,
            "{free} bytes are free, {expected} should be"
        );
    }

    /// Whether functions without a device argument reach this device.
    pub fn is_default(&self) -> bool {
        candle_cuda_vmm::device::default_driver()
            .is_ok_and(|driver| driver.is_same(self.core.driver()))
    }

    /// All devices of the driver under test.
    pub fn all(&self) -> Vec<Device> {
        match self.kind {
            DriverKind::Simulated => vec![self.device.clone()],
            DriverKind::Real => (0..self.core.driver().device_count().unwrap())
                .map(|ordinal| Device::new_cuda(ordinal).unwrap())
                .collect(),
        }
    }
}

/// The device that `CUDA_VMM_TEST_DRIVER` chooses: `real`, `simulated`, or without it a GPU if the
/// feature `cuda` is on and one answers, otherwise the CPU.
///
/// Where `real` was asked for and no GPU answers, the test fails.
pub fn open() -> UnderTest {
    static ALONE: Mutex<()> = Mutex::new(());
    static SAID: OnceLock<()> = OnceLock::new();
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let kind = match std::env::var("CUDA_VMM_TEST_DRIVER").as_deref() {
        Ok("real") => DriverKind::Real,
        Ok("simulated") => DriverKind::Simulated,
        Ok(other) => {
            panic!("CUDA_VMM_TEST_DRIVER is {other:?}; it may be \"real\" or \"simulated\"")
        }
        Err(_) if cfg!(feature = "cuda") => Driver::detect()
            .expect("the driver answers, or there is none")
            .kind(),
        Err(_) => DriverKind::Simulated,
    };
    let device = match kind {
        DriverKind::Simulated => Device::Cpu,
        DriverKind::Real => Device::new_cuda(0)
            .expect("a GPU answers, and the tests are built with the feature `cuda`"),
    };
    let core = core_device(&device).unwrap();
    assert_eq!(core.driver().kind(), kind);
    assert_eq!(core.granularity_bytes(), PAGE);
    SAID.get_or_init(|| {
        // Written past the test harness, which would swallow it.
        let _ = writeln!(
            std::io::stderr(),
            "device under test: {} on the {}, CUDA {}",
            core.name(),
            kind,
            core.driver().version()
        );
    });
    UnderTest {
        device,
        core,
        kind,
        _alone: alone,
    }
}
