//! The table of driver calls, real or simulated, and the one door from its codes to errors.
//!
//! # Safety
//! The unsafe code here calls entry points that take no memory of ours but out-parameters on the
//! stack, and the invariant is that of [`Driver::from_table`]: the table's pointers stay valid
//! while any clone of the driver lives.
#![allow(unsafe_code)]

use crate::process::{Here, Opener, PerProcess, Process};
use crate::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use crate::sys::{self, CUresult, DriverFunction, DriverTable};
use crate::{DriverError, Result, VmmError};
use core::any::Any;
use core::ffi::CStr;
use core::fmt;

#[cfg(feature = "simulator")]
use crate::REQUIRE_GPU_VARIABLE;
#[cfg(feature = "simulator")]
use cuda_vmm_sim::{SimConfig, Simulator};

/// Whether a driver drives a GPU or stands in for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DriverKind {
    /// NVIDIA's driver.
    Real,
    /// A table whose calls work on host memory.
    Simulated,
}

impl fmt::Display for DriverKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Real => "real driver",
            Self::Simulated => "simulated driver",
        })
    }
}

/// The CUDA version that a driver implements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DriverVersion {
    /// 13 of 13.0.
    pub major: u32,
    /// 0 of 13.0.
    pub minor: u32,
}

impl fmt::Display for DriverVersion {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}.{}", self.major, self.minor)
    }
}

/// A device that was opened. The driver knows no more of it, as devices are built on the driver.
pub(crate) type Opened = Weak<dyn Any + Send + Sync>;

/// An opened driver; a cheap clone around its table of calls.
#[derive(Clone)]
pub struct Driver(Arc<Inner>);

struct Inner {
    table: DriverTable,
    kind: DriverKind,
    version: DriverVersion,
    process: Process,
    /// By number.
    devices: Here<Mutex<Vec<Opened>>>,
    #[cfg(feature = "simulator")]
    simulator: Option<Simulator>,
}

impl Driver {
    /// Opens NVIDIA's driver ([`sys::load`]), and calls `cuInit`: the library that
    /// `CUDA_VMM_DRIVER_PATH` names, or else `libcuda.so.1`, or else that of WSL 2.
    ///
    /// The driver is opened once; later calls return clones of the first.
    ///
    /// # Errors
    /// [`VmmError::Load`] if the library or an entry point is missing, with the places that were
    /// searched; [`VmmError::Driver`] if `cuInit` fails, with `CUDA_ERROR_NO_DEVICE` if there is no
    /// GPU.
    pub fn cuda() -> Result<Self> {
        static OPENED: PerProcess<std::sync::Mutex<Option<Driver>>> = PerProcess::new();
        // A process forked from one that opens, or has opened, the driver cannot have it any more.
        static OPENED_BY: Opener = Opener::none();
        let mut opened = OPENED.get().lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(driver) = &*opened {
            return Ok(driver.clone());
        }
        let opener = OPENED_BY.begin()?;
        let table = sys::load()?;
        // SAFETY: `load` fills the table from the driver library and never unloads it.
        let driver = unsafe { Self::from_table(table, DriverKind::Real) }?;
        opener.has_opened();
        Ok(opened.insert(driver).clone())
    }

    /// Starts a simulated driver of its own memory and devices; it ends with its last clone.
    ///
    /// # Errors
    /// [`VmmError::Simulator`] if too many live at once or the host refuses memory.
    #[cfg(feature = "simulator")]
    pub fn simulated(config: SimConfig) -> Result<Self> {
        let simulator = Simulator::new(config)?;
        // SAFETY: the simulator's table is valid while a clone of it lives, and `Inner` keeps one.
        unsafe {
            Self::open(
                simulator.table(),
                DriverKind::Simulated,
                Some(simulator.clone()),
            )
        }
    }

    /// The real driver if it finds a GPU, otherwise a simulated one, with a warning.
    ///
    /// It simulates only if there is no driver library, or if the driver reports no device; any
    /// other failure is returned, also that `CUDA_VMM_DRIVER_PATH` names nothing usable. With
    /// [`REQUIRE_GPU_VARIABLE`] set it never simulates. [`kind`](Self::kind) says what was chosen.
    /// Meant for demonstrations and tests: a program that wants a GPU calls [`cuda`](Self::cuda).
    ///
    /// # Errors
    /// As [`cuda`](Self::cuda), except for a missing library and for no device;
    /// [`VmmError::GpuRequired`] for these, if the variable is set.
    #[cfg(feature = "simulator")]
    pub fn detect() -> Result<Self> {
        let found = Self::cuda().and_then(|driver| match driver.device_count()? {
            0 => Err(VmmError::InvalidDevice {
                ordinal: 0,
                count: 0,
            }),
            _ => Ok(driver),
        });
        let required = std::env::var_os(REQUIRE_GPU_VARIABLE);
        Self::found_or_simulated(
            found,
            required.is_some_and(|value| !value.is_empty() && value != "0"),
        )
    }

    #[cfg(feature = "simulator")]
    fn found_or_simulated(found: Result<Self>, is_gpu_required: bool) -> Result<Self> {
        let error = match found {
            Err(error) if error.is_no_gpu() => error,
            found => return found,
        };
        if is_gpu_required {
            return Err(VmmError::GpuRequired {
                reason: Box::new(error),
            });
        }
        crate::events::warn!(target: "cuda_vmm::driver", reason = %error, "no GPU: the driver is simulated");
        Self::simulated(SimConfig::new())
    }

    /// Makes a driver of any table, and calls its `cuInit`.
    ///
    /// # Errors
    /// What `cuInit` or `cuDriverGetVersion` return.
    ///
    /// # Safety
    /// Every pointer of the table must keep the contract of the CUDA function of that name and stay
    /// valid while any clone of the driver, or anything made from one, lives.
    pub unsafe fn from_table(table: DriverTable, kind: DriverKind) -> Result<Self> {
        // SAFETY: the caller's promise is the one that `open` asks for.
        unsafe {
            Self::open(
                table,
                kind,
                #[cfg(feature = "simulator")]
                None,
            )
        }
    }

    /// # Safety
    /// As [`from_table`](Self::from_table); a simulator given here keeps the table valid.
    unsafe fn open(
        table: DriverTable,
        kind: DriverKind,
        #[cfg(feature = "simulator")] simulator: Option<Simulator>,
    ) -> Result<Self> {
        let mut inner = Inner {
            table,
            kind,
            version: DriverVersion { major: 0, minor: 0 },
            process: Process::current(),
            devices: Here::new(Process::current(), Mutex::default()),
            #[cfg(feature = "simulator")]
            simulator,
        };
        // SAFETY: takes no pointers.
        inner.check(DriverFunction::cuInit, unsafe { (table.cuInit)(0) })?;
        let mut version = 0;
        // SAFETY: `version` is a valid place for the result.
        inner.check(DriverFunction::cuDriverGetVersion, unsafe {
            (table.cuDriverGetVersion)(&mut version)
        })?;
        let version = u32::try_from(version).unwrap_or_default();
        inner.version = DriverVersion {
            major: version / 1000,
            minor: version % 1000 / 10,
        };
        Ok(Self(Arc::new(inner)))
    }

    /// Real or simulated.
    pub fn kind(&self) -> DriverKind {
        self.0.kind
    }

    /// The CUDA version that the driver implements (`cuDriverGetVersion`).
    pub fn version(&self) -> DriverVersion {
        self.0.version
    }

    /// How many devices there are (`cuDeviceGetCount`).
    ///
    /// # Errors
    /// [`VmmError::Driver`], [`VmmError::Forked`].
    pub fn device_count(&self) -> Result<usize> {
        let mut count = 0;
        // SAFETY: `count` is a valid place for the result.
        unsafe { call!(self, cuDeviceGetCount(&mut count)) }?;
        Ok(usize::try_from(count).unwrap_or_default())
    }

    /// The devices that were opened, by number, for [`device`](Self::device).
    pub(crate) fn devices(&self) -> Result<MutexGuard<'_, Vec<Opened>>> {
        self.0.devices.lock()
    }

    /// The table of calls. Calling through it is as unsafe as calling CUDA.
    pub fn table(&self) -> &DriverTable {
        &self.0.table
    }

    /// The simulator behind a driver made by [`simulated`](Self::simulated), to observe and disturb
    /// it.
    #[cfg(feature = "simulator")]
    pub fn simulator(&self) -> Option<&Simulator> {
        self.0.simulator.as_ref()
    }

    /// Whether two drivers are clones of one.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Fails in a process that was forked from the one that opened the driver. For callers of the
    /// [`table`](Self::table); everything else in this crate asks by itself.
    ///
    /// # Errors
    /// [`VmmError::Forked`].
    pub fn check_process(&self) -> Result<()> {
        self.0.process.check()
    }

    /// The process that opened the driver.
    pub(crate) fn process(&self) -> Process {
        self.0.process
    }

    /// The one door from a driver's code to a result: success, or an error with the call, the code
    /// and the driver's name for it (`cuGetErrorName`).
    ///
    /// # Errors
    /// [`VmmError::Driver`] for every code but success.
    pub fn check(&self, call: DriverFunction, code: CUresult) -> Result<()> {
        self.0.check(call, code)
    }
}

impl Inner {
    fn check(&self, call: DriverFunction, code: CUresult) -> Result<()> {
        if code == sys::CUDA_SUCCESS {
            return Ok(());
        }
        let mut text = core::ptr::null();
        // SAFETY: `text` is a valid place; on success the driver puts a static C string there.
        let name = unsafe {
            if (self.table.cuGetErrorName)(code, &mut text) == sys::CUDA_SUCCESS && !text.is_null()
            {
                CStr::from_ptr(text).to_string_lossy().into_owned()
            } else {
                "unknown error".to_owned()
            }
        };
        crate::events::debug!(target: "cuda_vmm::driver", %call, code, name, "driver call failed");
        Err(VmmError::Driver(DriverError { call, code, name }))
    }
}

impl fmt::Debug for Driver {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "Driver({}, CUDA {})",
            self.0.kind, self.0.version
        )
    }
}

/// Calls an entry point of the driver's table and turns its code into a `Result`.
macro_rules! call {
    ($driver:expr, $function:ident($($argument:expr),* $(,)?)) => {{
        let driver: &$crate::driver::Driver = $driver;
        match driver.check_process() {
            Ok(()) => driver.check(
                $crate::sys::DriverFunction::$function,
                (driver.table().$function)($($argument),*),
            ),
            Err(error) => Err(error),
        }
    }};
}
pub(crate) use call;

#[cfg(all(test, feature = "simulator"))]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use tracing::field::{Field, Visit};
    use tracing::span::{Attributes, Id, Record};
    use tracing::{Event, Level, Metadata};

    /// Keeps the warnings, with their fields.
    #[derive(Default)]
    struct Warnings(std::sync::Arc<Mutex<Vec<String>>>);

    struct Text(String);

    impl Visit for Text {
        fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
            self.0 += &format!("{}={value:?};", field.name());
        }
    }

    impl tracing::Subscriber for Warnings {
        fn enabled(&self, metadata: &Metadata<'_>) -> bool {
            *metadata.level() == Level::WARN
        }

        fn event(&self, event: &Event<'_>) {
            let mut text = Text(String::new());
            event.record(&mut text);
            self.0.lock().expect("no panic").push(text.0);
        }

        fn new_span(&self, _: &Attributes<'_>) -> Id {
            Id::from_u64(1)
        }

        fn record(&self, _: &Id, _: &Record<'_>) {}
        fn record_follows_from(&self, _: &Id, _: &Id) {}
        fn enter(&self, _: &Id) {}
        fn exit(&self, _: &Id) {}
    }

    /// What `detect` makes of what it found, and what it warns of.
    fn choose(found: Result<Driver>, is_gpu_required: bool) -> (Result<Driver>, Vec<String>) {
        let warnings = Warnings::default();
        let told = warnings.0.clone();
        let outcome = tracing::subscriber::with_default(warnings, || {
            Driver::found_or_simulated(found, is_gpu_required)
        });
        let told = told.lock().expect("no panic").clone();
        (outcome, told)
    }

    /// The ways in which there is no GPU.
    fn no_gpu() -> [VmmError; 4] {
        let not_found = sys::LoadError::NotFound {
            attempts: vec![("libcuda.so.1".into(), "no such file".to_owned())],
        };
        let no_device = DriverError {
            call: DriverFunction::cuInit,
            code: sys::CUDA_ERROR_NO_DEVICE,
            name: "CUDA_ERROR_NO_DEVICE".to_owned(),
        };
        [
            not_found.into(),
            sys::LoadError::Unsupported.into(),
            no_device.into(),
            VmmError::InvalidDevice {
                ordinal: 0,
                count: 0,
            },
        ]
    }

    #[test]
    fn a_simulated_driver_says_why_there_is_no_gpu() {
        for error in no_gpu() {
            let (outcome, warnings) = choose(Err(error.clone()), false);
            assert_eq!(outcome.expect("simulated").kind(), DriverKind::Simulated);
            let [warning] = &warnings[..] else {
                panic!("{warnings:?}");
            };
            assert!(warning.contains(&error.to_string()), "{warning}");
        }
    }

    #[test]
    fn a_gpu_that_is_required_is_not_simulated() {
        for error in no_gpu() {
            let (outcome, warnings) = choose(Err(error.clone()), true);
            let refused = outcome.expect_err("no GPU");
            let text = refused.to_string();
            assert!(text.contains(REQUIRE_GPU_VARIABLE), "{text}");
            assert!(text.contains(&error.to_string()), "{text}");
            let reason = Box::new(error);
            assert_eq!(refused, VmmError::GpuRequired { reason });
            assert!(warnings.is_empty(), "{warnings:?}");
        }
    }

    #[test]
    fn any_other_failure_is_returned_and_a_driver_that_is_there_is_taken() {
        let other = DriverError {
            call: DriverFunction::cuInit,
            code: sys::CUDA_ERROR_UNKNOWN,
            name: "CUDA_ERROR_UNKNOWN".to_owned(),
        };
        for is_gpu_required in [false, true] {
            let (outcome, warnings) = choose(Err(other.clone().into()), is_gpu_required);
            assert_eq!(outcome.expect_err("unknown"), other.clone().into());
            assert!(warnings.is_empty(), "{warnings:?}");
            let driver = Driver::simulated(SimConfig::new().devices(3)).expect("a driver");
            let (outcome, warnings) = choose(Ok(driver.clone()), is_gpu_required);
            assert!(outcome.expect("a driver").is_same(&driver));
            assert!(warnings.is_empty(), "{warnings:?}");
        }
    }
}
