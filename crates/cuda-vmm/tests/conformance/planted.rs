//! The suite itself: a driver that answers wrongly is found out.

use crate::common::{turn, under_test};
use crate::kit::Kit;
use crate::{Case, capture, differences, host_memory, rules};
use cuda_vmm::sys::*;
use std::ffi::{c_uint, c_void};
use std::sync::OnceLock;

/// The table that the wrong answers are made from.
static HONEST: OnceLock<DriverTable> = OnceLock::new();

/// A function that answers success where the honest one refuses a value, or what else is named.
macro_rules! lenient {
    ($name:ident($($argument:ident: $type:ty),*)) => {
        lenient!($name($($argument: $type),*), CUDA_ERROR_INVALID_VALUE);
    };
    ($name:ident($($argument:ident: $type:ty),*), $refusal:ident) => {
        #[allow(non_snake_case)]
        unsafe extern "C" fn $name($($argument: $type),*) -> CUresult {
            let honest = HONEST.get().expect("set before the table is used");
            // SAFETY: the caller's promise is the one that the driver's function asks for.
            match unsafe { (honest.$name)($($argument),*) } {
                $refusal => CUDA_SUCCESS,
                code => code,
            }
        }
    };
}

lenient!(cuMemUnmap(pointer: CUdeviceptr, size: usize));
lenient!(cuMemFree(pointer: CUdeviceptr));
lenient!(cuMemSetAccess(pointer: CUdeviceptr, size: usize, descriptors: *const CUmemAccessDesc, count: usize));
lenient!(cuMemHostRegister(address: *mut c_void, size: usize, flags: c_uint), CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);

/// An event query that captures need not fear.
unsafe extern "C" fn event_query(_: CUevent) -> CUresult {
    CUDA_SUCCESS
}

/// Fails unless a table with a wrong answer differs in a case of this name, and in no case of
/// others.
#[track_caller]
fn is_found(cases: &[Case], name: &str, plant: impl Fn(&mut DriverTable)) {
    let _turn = turn();
    let device = under_test().device();
    let mut table = *HONEST.get_or_init(|| *device.driver().table());
    plant(&mut table);
    let cases: Vec<_> = cases
        .iter()
        .filter(|case| case.name.contains(name))
        .collect();
    assert!(!cases.is_empty(), "no case is named {name}");
    for case in cases {
        let honest = differences(std::slice::from_ref(case), |case| {
            Kit::run(device, &case.run)
        });
        assert_eq!(honest, Vec::<String>::new(), "without a wrong answer");
        let found = differences(std::slice::from_ref(case), |case| {
            Kit::run_with(device, table, &case.run)
        });
        let [difference] = &found[..] else {
            panic!("{}: {} differences: {found:?}", case.name, found.len());
        };
        // Both answers are shown.
        assert!(difference.starts_with(&case.name), "{difference}");
        for part in ["expected ", "this driver answered "] {
            assert!(difference.contains(part), "{difference}");
        }
    }
}

#[test]
fn a_driver_that_unmaps_parts_of_mappings_is_found_out() {
    is_found(&rules::cases(), "unmap a part of a mapping", |table| {
        table.cuMemUnmap = cuMemUnmap;
    });
}

#[test]
fn a_driver_that_opens_parts_of_mappings_is_found_out() {
    is_found(&rules::cases(), "set access: the first half", |table| {
        table.cuMemSetAccess = cuMemSetAccess;
    });
}

#[test]
fn a_driver_that_frees_mapped_memory_is_found_out() {
    is_found(&rules::cases(), "cuMemFree of mapped memory", |table| {
        table.cuMemFree = cuMemFree;
    });
}

#[test]
fn a_driver_that_registers_host_memory_twice_is_found_out() {
    is_found(
        &host_memory::cases(),
        "register what is registered",
        |table| table.cuMemHostRegister = cuMemHostRegister,
    );
}

#[test]
fn a_driver_whose_captures_survive_a_query_is_found_out() {
    let name = "cuEventQuery: capture mode GLOBAL, by another thread";
    let cases = capture::cases(false);
    // A thread that is itself RELAXED may ask.
    let exposed: Vec<_> = cases.into_iter().filter(|case| case.name == name).collect();
    is_found(&exposed, name, |table| table.cuEventQuery = event_query);
}
