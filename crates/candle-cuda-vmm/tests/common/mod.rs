//! Shared by the tests: sizes, the device under test, and checks for exact errors.

// Each test binary uses a part of this.
#![allow(dead_code)]

mod holdings;
pub mod layouts;
pub mod settings;

use candle_core::Device;
use candle_cuda_vmm::cuda_vmm::{self, Driver, DriverKind, Stream};
use candle_cuda_vmm::device::core_device;
use candle_cuda_vmm::{Result, VirtualMemoryPool, VmmError};
use holdings::{Holdings, table_bytes};
use settings::{CandleStream, Settings};
use std::io::Write;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

pub const KIB: usize = 1 << 10;
pub const MIB: usize = 1 << 20;
pub const GIB: usize = 1 << 30;

/// The devices' granularity, which is their smallest page; [`open`] checks that.
pub const GRANULE: usize = 2 * MIB;

/// How long worker threads may take to free what they hold.
const PATIENCE: Duration = Duration::from_secs(30);

/// The page of the elastic pools under test, in bytes.
pub fn page() -> usize {
    Settings::of_process().page_bytes.unwrap_or(GRANULE)
}

/// The page of block tables, in bytes. On a CPU device block tensors hold all blocks, so large
/// pages would only make them large.
pub fn block_page() -> usize {
    if cfg!(feature = "cuda") {
        page()
    } else {
        GRANULE
    }
}

/// Fails unless the result is an error that matches this pattern.
#[macro_export]
macro_rules! refused {
    ($result:expr, $pattern:pat $(if $guard:expr)?) => {
        match $result.map(|_| ()) {
            Err($pattern) $(if $guard)? => {}
            other => panic!("expected {}, got {other:?}", stringify!($pattern)),
        }
    };
}

/// Fails unless the result is exactly this error, with these numbers.
#[track_caller]
pub fn refused_with<T>(result: Result<T>, expected: VmmError) {
    match result.map(|_| ()) {
        Err(error) => assert_eq!(format!("{error:?}"), format!("{expected:?}")),
        Ok(()) => panic!("expected {expected:?}, got success"),
    }
}

/// The device under test, for one test at a time, because each test measures the device's memory.
///
/// When it is dropped at the end of the test, the device must hold what it held before.
pub struct UnderTest {
    pub device: Device,
    pub core: cuda_vmm::Device,
    pub kind: DriverKind,
    all: Vec<Device>,
    before: Vec<Holdings>,
    _alone: MutexGuard<'static, ()>,
}

impl UnderTest {
    /// Returns the free memory of the device, in bytes.
    pub fn free_bytes(&self) -> usize {
        self.core.free_bytes().unwrap()
    }

    /// Fails unless `bytes` more bytes of the device are in use than when `free_before` bytes were
    /// free. A real driver has tables of its own that vary, for which 32 MiB are allowed.
    #[track_caller]
    pub fn expect_in_use(&self, free_before: usize, bytes: usize) {
        let expected = free_before - bytes;
        let free = self.free_bytes();
        assert!(
            free.abs_diff(expected) <= table_bytes(self.kind),
            "{free} bytes are free, {expected} should be"
        );
    }

    /// Fails unless at least `bytes` bytes of the device are free, up to the tables of a real
    /// driver.
    #[track_caller]
    pub fn expect_free(&self, bytes: usize) {
        let free = self.free_bytes();
        let is_free = free + table_bytes(self.kind) >= bytes;
        assert!(is_free, "{free} bytes are free, {bytes} should be");
    }

    /// Returns whether functions without a device argument use this device.
    pub fn is_default(&self) -> bool {
        candle_cuda_vmm::device::default_driver()
            .is_ok_and(|driver| driver.is_same(self.core.driver()))
    }

    /// Returns the device's number, as the type of the raw calls.
    pub fn ordinal(&self) -> i32 {
        self.core.ordinal().try_into().unwrap()
    }

    /// Returns the devices that `CUDA_VMM_TEST_DEVICES` asks for, this one last.
    pub fn all(&self) -> Vec<Device> {
        self.all.clone()
    }

    /// Takes the devices' present holdings as the baseline: objects that Candle keeps for the life
    /// of the process are no leak.
    pub fn begin_again(&mut self) {
        let held = |before: &Holdings| before.again();
        self.before = self.before.iter().map(held).collect();
    }

    /// Describes what the devices hold beyond the baseline, after waiting up to `patience`.
    pub fn leak_after(&self, patience: Duration) -> Option<String> {
        let leak = |before: &Holdings| before.leak_after(patience);
        self.before.iter().find_map(leak)
    }

    /// Fails if the devices hold more than the baseline.
    pub fn expect_no_leak_after(&self, patience: Duration) {
        if let Some(leak) = self.leak_after(patience) {
            panic!("the test left something behind: {leak}");
        }
    }
}

impl Drop for UnderTest {
    fn drop(&mut self) {
        // Dropping Candle's devices closes the libraries that they opened, which frees their
        // memory.
        self.device = Device::Cpu;
        self.all.clear();
        // A failed test may leave anything behind.
        if !std::thread::panicking() {
            self.expect_no_leak_after(PATIENCE);
        }
    }
}

/// Opens the device that the [`settings`] select. Fails the test if there is no such device.
pub fn open() -> UnderTest {
    static ALONE: Mutex<()> = Mutex::new(());
    static CORES: OnceLock<Vec<cuda_vmm::Device>> = OnceLock::new();
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let settings = Settings::of_process();
    let kind = driver_kind(&settings);
    if let Some(reason) = settings.unsuited(kind, device_count(kind)) {
        panic!("{reason}");
    }
    let all: Vec<_> = (0..settings.devices)
        .map(|ordinal| candle_device(kind, ordinal, settings.candle_stream))
        .collect();
    // Kept for the life of the process, to keep the contexts alive.
    let cores = CORES.get_or_init(|| all.iter().map(|device| first_use(device, kind)).collect());
    UnderTest {
        device: all[all.len() - 1].clone(),
        core: cores[cores.len() - 1].clone(),
        kind,
        all,
        before: cores.iter().map(Holdings::of).collect(),
        _alone: alone,
    }
}

/// Lets an engine give back until it holds at most so many bytes. Its own thread may be in the midst
/// of that, so one step of the caller's is not enough.
#[track_caller]
pub fn settle_to(device: &Device, engine: &cuda_vmm::Engine, bytes_max: usize) {
    let until = Instant::now() + Duration::from_secs(60);
    while engine.stats().committed_bytes > bytes_max {
        assert!(Instant::now() < until, "{}", engine.stats());
        device.synchronize().unwrap();
        engine.step();
    }
}

fn driver_kind(settings: &Settings) -> DriverKind {
    match settings.driver {
        Some(kind) => kind,
        None if cfg!(feature = "cuda") => Driver::detect()
            .expect("the driver answers, or there is none")
            .kind(),
        None => DriverKind::Simulated,
    }
}

/// Returns how many devices Candle has for this kind of driver.
fn device_count(kind: DriverKind) -> usize {
    match kind {
        DriverKind::Simulated => 1,
        DriverKind::Real => Driver::cuda()
            .and_then(|driver| driver.device_count())
            .unwrap_or_else(|error| panic!("the real driver does not answer: {error}")),
    }
}

fn candle_device(kind: DriverKind, ordinal: usize, stream: Option<CandleStream>) -> Device {
    let device = match (kind, stream) {
        (DriverKind::Simulated, _) => Ok(Device::Cpu),
        (DriverKind::Real, Some(CandleStream::Own)) => Device::new_cuda_with_stream(ordinal),
        (DriverKind::Real, _) => Device::new_cuda(ordinal),
    };
    device.expect("the GPU answers, and the tests are built with the feature `cuda`")
}

/// Prints the device, and uses everything once that the tests use, so that the driver has allocated
/// what it keeps.
fn first_use(device: &Device, kind: DriverKind) -> cuda_vmm::Device {
    let core = core_device(device).unwrap();
    assert_eq!(core.driver().kind(), kind);
    assert_eq!(core.granularity_bytes(), GRANULE);
    // Only the devices' names tell a program which driver library it has opened.
    let driver = match kind {
        DriverKind::Real if core.name().starts_with("Simulated device ") => {
            "simulated driver's libcuda.so.1".to_owned()
        }
        _ => kind.to_string(),
    };
    // Written directly, because the test harness captures standard output.
    let _ = writeln!(
        std::io::stderr(),
        "device: {} ({}) on the {driver}, CUDA {}; pages of {} MiB",
        core.ordinal(),
        core.name(),
        core.driver().version(),
        page() / MIB
    );
    let before = Holdings::of(&core);
    let stream = Stream::new(&core).unwrap();
    let mut pool = VirtualMemoryPool::new(2 * page(), page(), device.clone()).unwrap();
    let address = pool.allocate(0, 2 * page()).unwrap() as u64;
    // SAFETY: the bytes are live until they are freed below, after the work on them has completed.
    unsafe {
        stream.memset(address, 1, page()).unwrap();
        stream.write(address, &[2; 64]).unwrap();
        stream.read(address, &mut [0; 64]).unwrap();
    }
    stream.record().unwrap().wait().unwrap();
    core.synchronize().unwrap();
    pool.deallocate(0, 2 * page()).unwrap();
    drop((pool, stream));
    // Worker threads have ended. What is held now belongs to the driver; the simulated one holds
    // nothing.
    if let Some(kept) = before.leak_after(PATIENCE) {
        assert_eq!(kind, DriverKind::Real, "{kept}");
    }
    core
}
