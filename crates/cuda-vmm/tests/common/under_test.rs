//! The driver, the devices and the page that the environment chooses for a test binary.
//!
//! | variable | values | where it is unset |
//! |---|---|---|
//! | `CUDA_VMM_TEST_DRIVER` | `real`, `simulated` | what `Driver::detect()` finds |
//! | `CUDA_VMM_TEST_DEVICES` | `1`, `2` | 1 |
//! | `CUDA_VMM_TEST_PAGE_BYTES` | the page of pools and the size of most memory, in bytes | the granularity |
//! | `CUDA_VMM_TEST_GRANULARITY_BYTES` | the granularity of a simulated device, in bytes | 2 MiB |
//!
//! What is demanded and not there makes the tests fail; nothing is left out for it.

use cuda_vmm::sim::{Books, Interposer, SimConfig, Simulator};
use cuda_vmm::{Device, Driver, DriverKind};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

const DRIVER: &str = "CUDA_VMM_TEST_DRIVER";
const DEVICES: &str = "CUDA_VMM_TEST_DEVICES";
const PAGE_BYTES: &str = "CUDA_VMM_TEST_PAGE_BYTES";
const GRANULARITY_BYTES: &str = "CUDA_VMM_TEST_GRANULARITY_BYTES";

/// What a real driver may take for tables of its own while a test runs, in bytes.
const OWN_TABLES_BYTES: usize = 32 << 20;

/// For how long what is given back may take to be so.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// The driver under test, behind an interposer that counts and can make it fail.
pub struct UnderTest {
    pub driver: Driver,
    pub interposer: Interposer,
    pub simulator: Option<Simulator>,
    /// Open for as long as the process lives. The last is the one that tests of one device use.
    pub devices: Vec<Device>,
    /// The page of pools, in bytes.
    pub page_bytes: usize,
    /// What the process held when all of this was opened.
    opened: Books,
}

/// What is held at a moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holdings {
    /// By this process, of all devices.
    pub books: Books,
    /// Of each device, whatever holds the rest, in bytes.
    pub free_bytes: Vec<usize>,
}

/// The driver under test, one for each process. The first to ask is told which on the standard
/// output.
pub fn under_test() -> &'static UnderTest {
    UNDER_TEST.get_or_init(|| UnderTest::open(SimConfig::new()))
}

/// The same where no test looks at what is in the memory: a simulated driver keeps books only.
pub fn under_test_without_contents() -> &'static UnderTest {
    UNDER_TEST.get_or_init(|| UnderTest::open(SimConfig::new().unbacked()))
}

static UNDER_TEST: OnceLock<UnderTest> = OnceLock::new();

/// Keeps tests apart that look at what the whole process holds.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The number in a variable.
pub fn number(variable: &str) -> Option<usize> {
    let text = std::env::var(variable).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{variable}={text} is no number")))
}

impl UnderTest {
    fn open(config: SimConfig) -> Self {
        let count = number(DEVICES).unwrap_or(1);
        assert!(
            [1, 2].contains(&count),
            "{DEVICES}={count} is neither 1 nor 2"
        );
        let chosen = std::env::var(DRIVER).ok();
        let detected = match chosen.as_deref() {
            Some("real") => Driver::cuda().expect("the real driver was demanded"),
            Some("simulated") => simulated(config, count),
            Some(other) => panic!("{DRIVER}={other} is neither real nor simulated"),
            None => {
                let detected = Driver::detect().expect("a GPU that fails to answer is an error");
                match detected.kind() {
                    DriverKind::Real => detected,
                    DriverKind::Simulated => simulated(config, count),
                }
            }
        };
        let (kind, simulator) = (detected.kind(), detected.simulator().cloned());
        // SAFETY: the real driver's functions stay for good, and the simulator is kept beside the
        // interposer.
        let interposer = unsafe { Interposer::new(*detected.table()) }.expect("a free slot");
        // SAFETY: the interposer is kept beside the driver.
        let driver = unsafe { Driver::from_table(interposer.table(), kind) }.expect("a driver");
        let there = driver.device_count().expect("a count of devices");
        assert!(
            count <= there,
            "{DEVICES}={count}, but the driver has {there}"
        );
        let devices: Vec<_> = (0..count)
            .map(|ordinal| driver.device(ordinal).expect("a device"))
            .collect();
        let page_bytes = number(PAGE_BYTES).unwrap_or(devices[0].granularity_bytes());
        let (version, name) = (driver.version(), devices[0].name());
        println!(
            "{kind} {version}, {count} × {}, pages of {page_bytes} bytes",
            name.trim()
        );
        Self {
            opened: interposer.books(),
            driver,
            interposer,
            simulator,
            devices,
            page_bytes,
        }
    }

    /// The device that tests of one device use: with two of them the second, whose number is not 0.
    pub fn device(&self) -> &Device {
        self.devices.last().expect("at least one")
    }

    pub fn is_real(&self) -> bool {
        self.driver.kind() == DriverKind::Real
    }

    fn holdings(&self) -> Holdings {
        let free = |device: &Device| device.free_bytes().expect("a number");
        Holdings {
            books: self.interposer.books(),
            free_bytes: self.devices.iter().map(free).collect(),
        }
    }

    /// What is held when the process holds nothing but what it opened: the worker of an engine that
    /// is gone may have a last step to take before.
    #[track_caller]
    pub fn settled(&self) -> Holdings {
        let until = Instant::now() + PATIENCE;
        while self.interposer.books() != self.opened {
            let books = self.interposer.books();
            assert!(Instant::now() < until, "{books:?} is held from before");
            std::thread::sleep(Duration::from_millis(1));
        }
        self.holdings()
    }

    /// What is still held beyond `before` when everything should be given back; `None` if all is as
    /// it was, at once or within `patience`.
    ///
    /// A worker's last step and what the driver does for itself may take that moment. A real driver
    /// may have kept some memory for tables of its own; what this process holds is counted to the
    /// byte.
    pub fn left_of(&self, before: &Holdings, patience: Duration) -> Option<String> {
        let allowed_bytes = if self.is_real() { OWN_TABLES_BYTES } else { 0 };
        let until = Instant::now() + patience;
        loop {
            let now = self.holdings();
            let is_back = |(before, now): (&usize, &usize)| now + allowed_bytes >= *before;
            let mut free = before.free_bytes.iter().zip(&now.free_bytes);
            let quarantined: usize = self.devices.iter().map(Device::quarantined_bytes).sum();
            if now.books == before.books && free.all(is_back) && quarantined == 0 {
                return None;
            }
            if Instant::now() > until {
                return Some(format!(
                    "{before:?} before,\n{now:?} after, {quarantined} bytes in quarantine"
                ));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Does something alone that must give back all that it takes.
    #[track_caller]
    pub fn unchanged<T>(&self, act: impl FnOnce() -> T) -> T {
        let _turn = turn();
        self.unchanged_here(act)
    }

    /// The same for a caller whose turn it is already.
    #[track_caller]
    pub fn unchanged_here<T>(&self, act: impl FnOnce() -> T) -> T {
        let before = self.settled();
        let outcome = act();
        if let Some(left) = self.left_of(&before, PATIENCE) {
            panic!("not all is as it was: {left}");
        }
        outcome
    }

    /// Has another process choose as this one did.
    pub fn choose_for<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        let driver = if self.is_real() { "real" } else { "simulated" };
        command
            .env(DRIVER, driver)
            .env(DEVICES, self.devices.len().to_string())
            .env(PAGE_BYTES, self.page_bytes.to_string())
    }
}

fn simulated(config: SimConfig, devices: usize) -> Driver {
    let mut config = config.devices(devices);
    if let Some(bytes) = number(GRANULARITY_BYTES) {
        config = config.granularity_bytes(bytes);
    }
    Driver::simulated(config).expect("a simulator")
}
