//! Opening a driver and its devices: what is chosen, and what it says when it cannot be.

mod common;

use common::{Simulated, failure};
use core::ffi::c_int;
use cuda_vmm::sim::{SimConfig, SimError, Simulator};
use cuda_vmm::sys::{
    CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, CUDA_SUCCESS, CUdevice,
    CUdevice_attribute, CUresult, DRIVER_PATH_VARIABLE, DriverFunction, LoadError,
};
use cuda_vmm::{Driver, DriverKind, DriverVersion, PhysicalMemory, REQUIRE_GPU_VARIABLE, VmmError};
use std::path::PathBuf;

#[test]
fn a_simulated_driver_says_what_it_is() {
    let simulated = Simulated::new(SimConfig::new().devices(2).driver_version(12040));
    let driver = &simulated.driver;
    assert_eq!(driver.kind(), DriverKind::Simulated);
    assert_eq!(driver.kind().to_string(), "simulated driver");
    assert_eq!(DriverKind::Real.to_string(), "real driver");
    assert_eq!(
        driver.version(),
        DriverVersion {
            major: 12,
            minor: 4
        }
    );
    assert_eq!(driver.version().to_string(), "12.4");
    assert_eq!(format!("{driver:?}"), "Driver(simulated driver, CUDA 12.4)");
    assert!(driver.table().cuCtxRecordEvent.is_none(), "before 12.5");
    assert_eq!(driver.device_count(), Ok(2));
    assert!(driver.is_same(&driver.clone()));
    assert!(!driver.is_same(&Simulated::default().driver));
}

#[test]
fn a_device_says_what_it_is() {
    let config = SimConfig::new()
        .devices(2)
        .memory_bytes(3 << 30)
        .granularity_bytes(64 << 10);
    let simulated = Simulated::new(config);
    let device = simulated.driver.device(1).expect("a second device");
    assert_eq!(device.ordinal(), 1);
    assert_eq!(device.raw(), 1);
    assert!(!device.name().is_empty());
    assert_eq!(
        format!("{device:?}"),
        format!("Device(1, {:?})", device.name())
    );
    assert_eq!(device.total_bytes(), 3 << 30);
    assert_eq!(device.free_bytes(), Ok(3 << 30));
    assert_eq!(device.granularity_bytes(), 64 << 10);
    assert!(
        device
            .recommended_granularity_bytes()
            .is_multiple_of(64 << 10)
    );
    assert!(device.can_export());
    assert!(device.driver().is_same(&simulated.driver));
    assert_ne!(device, simulated.device);
    device.synchronize().expect("nothing to wait for");
}

#[test]
fn a_device_is_opened_once_and_its_context_released_with_the_last_clone() {
    let simulated = Simulated::default();
    let again = simulated.driver.device(0).expect("the same device");
    assert_eq!(again, simulated.device);
    assert_eq!(simulated.books().context_retains, 1);
    let Simulated {
        driver,
        simulator,
        device,
    } = simulated;
    drop(device);
    assert_eq!(simulator.books(0).context_retains, 1, "a clone lives");
    drop(again);
    assert_eq!(simulator.books(0).context_retains, 0);
    let device = driver.device(0).expect("opened again");
    assert_eq!(simulator.books(0).context_retains, 1);
    drop(device);
}

#[test]
fn a_device_that_is_not_there_is_named() {
    let simulated = Simulated::default();
    for ordinal in [1, usize::MAX] {
        let outcome = simulated.unchanged(|| simulated.driver.device(ordinal));
        assert_eq!(outcome, Err(VmmError::InvalidDevice { ordinal, count: 1 }));
    }
}

#[test]
fn a_driver_without_a_device_fails_to_start() {
    let error = Driver::simulated(SimConfig::new().devices(0)).expect_err("no device");
    assert_eq!(error, failure!(cuInit, CUDA_ERROR_NO_DEVICE));
    assert!(!error.is_retryable() && !error.is_poisoned());
}

#[test]
fn a_simulator_that_cannot_be_is_refused() {
    for (config, what, value) in [
        (
            SimConfig::new().granularity_bytes(3),
            "the granularity in bytes",
            3,
        ),
        (
            SimConfig::new().devices(SimConfig::MAX_DEVICES + 1),
            "the number of devices",
            SimConfig::MAX_DEVICES + 1,
        ),
    ] {
        let error = Driver::simulated(config).expect_err("an impossible configuration");
        let expected = SimError::InvalidConfig { what, value };
        assert_eq!(error, VmmError::Simulator(expected));
    }
}

#[test]
fn each_call_of_opening_a_device_can_fail_and_leaves_no_context_retained() {
    use DriverFunction::*;
    for (call, expected) in [
        (
            cuDeviceGetCount,
            failure!(cuDeviceGetCount, CUDA_ERROR_OPERATING_SYSTEM),
        ),
        (
            cuDeviceGet,
            failure!(cuDeviceGet, CUDA_ERROR_OPERATING_SYSTEM),
        ),
        (
            cuDeviceGetAttribute,
            failure!(cuDeviceGetAttribute, CUDA_ERROR_OPERATING_SYSTEM),
        ),
        (
            cuDeviceGetName,
            failure!(cuDeviceGetName, CUDA_ERROR_OPERATING_SYSTEM),
        ),
        (
            cuDeviceTotalMem,
            failure!(cuDeviceTotalMem, CUDA_ERROR_OPERATING_SYSTEM),
        ),
        (
            cuMemGetAllocationGranularity,
            failure!(cuMemGetAllocationGranularity, CUDA_ERROR_OPERATING_SYSTEM),
        ),
        (
            cuDevicePrimaryCtxRetain,
            failure!(cuDevicePrimaryCtxRetain, CUDA_ERROR_OPERATING_SYSTEM),
        ),
    ] {
        let driver = Driver::simulated(SimConfig::new()).expect("a simulator");
        let simulator = driver.simulator().expect("of a simulated driver");
        simulator.inject(cuda_vmm::sim::Fault::nth_of(
            call,
            1,
            cuda_vmm::sys::CUDA_ERROR_OPERATING_SYSTEM,
        ));
        assert_eq!(driver.device(0), Err(expected));
        assert_eq!(simulator.books(0).context_retains, 0);
        driver.device(0).expect("it failed once");
    }
}

/// The one attribute that opening a device demands, and none beside it.
unsafe extern "C" fn without_export(
    value: *mut c_int,
    attribute: CUdevice_attribute,
    _device: CUdevice,
) -> CUresult {
    let supported = attribute == CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED;
    // SAFETY: the caller of the driver gives a valid place for the answer.
    unsafe { *value = c_int::from(supported) };
    CUDA_SUCCESS
}

unsafe extern "C" fn without_anything(
    value: *mut c_int,
    _attribute: CUdevice_attribute,
    _device: CUdevice,
) -> CUresult {
    // SAFETY: as above.
    unsafe { *value = 0 };
    CUDA_SUCCESS
}

#[test]
fn a_device_without_virtual_memory_management_is_refused() {
    let simulator = Simulator::new(SimConfig::new().devices(2)).expect("a simulator");
    let mut table = simulator.table();
    table.cuDeviceGetAttribute = without_anything;
    // SAFETY: the simulator outlives the driver.
    let driver = unsafe { Driver::from_table(table, DriverKind::Simulated) }.expect("a driver");
    assert!(driver.simulator().is_none(), "it knows only the table");
    let error = driver.device(1).expect_err("not supported");
    assert_eq!(error, VmmError::UnsupportedDevice { ordinal: 1 });
    assert!(error.is_permanent());
    assert_eq!(simulator.books(1), cuda_vmm::sim::Books::default());
}

#[test]
fn a_device_that_cannot_export_refuses_exportable_memory_only() {
    let simulator = Simulator::new(SimConfig::new()).expect("a simulator");
    let mut table = simulator.table();
    table.cuDeviceGetAttribute = without_export;
    // SAFETY: the simulator outlives the driver.
    let driver = unsafe { Driver::from_table(table, DriverKind::Simulated) }.expect("a driver");
    let device = driver.device(0).expect("a device");
    assert!(!device.can_export());
    let outcome = PhysicalMemory::exportable(&device, common::PAGE);
    assert_eq!(
        outcome.expect_err("no export"),
        VmmError::UnsupportedDevice { ordinal: 0 }
    );
    assert_eq!(simulator.calls(DriverFunction::cuMemCreate), 0);
    PhysicalMemory::new(&device, common::PAGE).expect("memory");
}

/// Runs `there` in a process of its own, in which the driver library is `path`.
fn with_library(test: &str, path: &str, there: impl FnOnce()) {
    match common::role() {
        Some(role) if role == test => there(),
        Some(_) => {}
        None => common::run_alone(common::alone(test, test).env(DRIVER_PATH_VARIABLE, path)),
    }
}

/// What `CUDA_VMM_DRIVER_PATH` names is used or is an error, for each way to open a driver.
fn is_refused(expected: LoadError) {
    let expected = VmmError::Load(LoadError::Variable {
        reason: Box::new(expected),
    });
    let error = Driver::cuda().expect_err("no driver");
    assert_eq!(error, expected);
    assert!(error.is_permanent() && !error.is_poisoned());
    assert_eq!(error.driver_code(), None);
    assert!(error.to_string().starts_with(DRIVER_PATH_VARIABLE));
    assert_eq!(Driver::detect().expect_err("not simulated"), expected);
}

#[test]
fn a_variable_that_names_no_library_is_an_error_and_not_a_reason_to_simulate() {
    const PATH: &str = "/nowhere/libcuda.so.1";
    with_library(
        "a_variable_that_names_no_library_is_an_error_and_not_a_reason_to_simulate",
        PATH,
        || {
            let reason = match Driver::cuda() {
                Err(VmmError::Load(LoadError::Variable { reason })) => match *reason {
                    LoadError::LibraryMissing { reason, .. } => reason,
                    reason => panic!("{reason:?}"),
                },
                outcome => panic!("{outcome:?}"),
            };
            assert!(reason.contains(PATH), "the loader's own words: {reason}");
            is_refused(LoadError::LibraryMissing {
                path: PathBuf::from(PATH),
                reason,
            });
        },
    );
}

#[test]
fn an_empty_variable_is_an_error() {
    with_library("an_empty_variable_is_an_error", "", || {
        is_refused(LoadError::LibraryMissing {
            path: PathBuf::new(),
            reason: "the path is empty".to_owned(),
        });
    });
}

#[test]
fn a_library_that_is_no_driver_is_an_error_and_not_a_reason_to_simulate() {
    const PATH: &str = "libm.so.6";
    with_library(
        "a_library_that_is_no_driver_is_an_error_and_not_a_reason_to_simulate",
        PATH,
        || {
            is_refused(LoadError::SymbolMissing {
                path: PathBuf::from(PATH),
                symbol: "cuGetProcAddress",
            });
        },
    );
}

#[test]
fn with_the_variable_set_detect_never_simulates() {
    const TEST: &str = "with_the_variable_set_detect_never_simulates";
    match common::role() {
        // Each of these is what a machine with or without a GPU must see.
        Some(role) if role == TEST => match (Driver::cuda(), Driver::detect()) {
            (Ok(_), Ok(driver)) => assert_eq!(driver.kind(), DriverKind::Real),
            (Err(error), Err(VmmError::GpuRequired { reason })) => assert_eq!(*reason, error),
            outcome => panic!("{outcome:?}"),
        },
        Some(_) => {}
        None => {
            let mut there = common::alone(TEST, TEST);
            there
                .env(REQUIRE_GPU_VARIABLE, "1")
                .env_remove(DRIVER_PATH_VARIABLE);
            common::run_alone(&mut there);
        }
    }
}

#[test]
fn too_many_simulators_are_refused_until_one_ends() {
    const TEST: &str = "too_many_simulators_are_refused_until_one_ends";
    match common::role() {
        Some(role) if role == TEST => {
            let simulate = || Driver::simulated(SimConfig::new());
            let mut alive: Vec<Driver> = (0..Simulator::LIMIT)
                .map(|_| simulate().expect("within the limit"))
                .collect();
            assert_eq!(
                simulate().expect_err("one too many"),
                VmmError::Simulator(SimError::TooMany {
                    limit: Simulator::LIMIT
                })
            );
            alive.pop();
            simulate().expect("one has ended");
        }
        Some(_) => {}
        // Alone, because the limit is the process's.
        None => common::run_alone(&mut common::alone(TEST, TEST)),
    }
}
