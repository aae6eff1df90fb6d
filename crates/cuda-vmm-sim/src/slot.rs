//! Function tables for many simulators in one process.
//!
//! The driver's functions have no context pointer. So each of a fixed number of slots has its own
//! functions, which look up the slot's simulator and call code that all slots share.
//!
//! # Safety
//! The functions have the contracts of the driver's functions of their names, and pass them on.

#![allow(non_snake_case)]
#![allow(
    clippy::too_many_arguments,
    reason = "the driver's functions have as many"
)]

use crate::calls;
use crate::state::{DriverResult, State};
use cuda_vmm_sys::*;
use std::ffi::{c_char, c_int, c_uchar, c_uint, c_ulonglong, c_void};
use std::sync::{Arc, PoisonError, RwLock, RwLockWriteGuard, TryLockError};

/// The most simulators that may be alive in a process.
pub(crate) const SLOTS: usize = 64;

static STATES: [RwLock<Option<Arc<State>>>; SLOTS] = [const { RwLock::new(None) }; SLOTS];

/// Makes a simulator for a free slot and puts it there; `None` if no slot is free.
pub(crate) fn occupy(make: impl FnOnce(usize) -> Arc<State>) -> Option<Arc<State>> {
    for (slot, occupant) in STATES.iter().enumerate() {
        // A locked slot is in use, or was a moment ago. In a forked process its lock may never be
        // released.
        let Some(mut occupant) = try_write(occupant) else {
            continue;
        };
        if occupant.is_none() {
            let state = make(slot);
            *occupant = Some(Arc::clone(&state));
            return Some(state);
        }
    }
    None
}

/// Locks if that needs no waiting.
pub(crate) fn try_write<T>(occupant: &RwLock<T>) -> Option<RwLockWriteGuard<'_, T>> {
    match occupant.try_write() {
        Ok(occupant) => Some(occupant),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// Frees a slot. Its functions return `CUDA_ERROR_DEINITIALIZED` until the slot is used again.
pub(crate) fn vacate(slot: usize) {
    let mut occupant = STATES[slot].write().unwrap_or_else(PoisonError::into_inner);
    *occupant = None;
}

fn call_slot(
    slot: usize,
    function: DriverFunction,
    call: impl FnOnce(&Arc<State>) -> DriverResult,
) -> CUresult {
    let state = STATES[slot]
        .read()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    let Some(state) = state else {
        return CUDA_ERROR_DEINITIALIZED;
    };
    match state.begin(function).and_then(|()| call(&state)) {
        Ok(()) => CUDA_SUCCESS,
        Err(code) => code,
    }
}

/// The functions of one slot.
struct Slot<const N: usize>;

macro_rules! define_slots {
    (
        required { $(fn $name:ident($($argument:ident: $type:ty),*) = $pfn:ident, $version:literal;)* }
        optional { $(fn $optional:ident($($optional_argument:ident: $optional_type:ty),*) = $optional_pfn:ident, $optional_version:literal;)* }
    ) => {
        /// The calls, by slot.
        mod entry {
            use super::*;

            define_slots!(@entries $($name($($argument: $type),*);)* $($optional($($optional_argument: $optional_type),*);)*);
        }

        impl<const N: usize> Slot<N> {
            define_slots!(@thunks $($name($($argument: $type),*);)* $($optional($($optional_argument: $optional_type),*);)*);

            fn table() -> DriverTable {
                DriverTable {
                    $($name: Self::$name,)*
                    $($optional: Some(Self::$optional),)*
                }
            }
        }
    };
    (@entries $($name:ident($($argument:ident: $type:ty),*);)*) => {$(
        /// # Safety
        /// As the driver's function of this name.
        pub(crate) unsafe fn $name(slot: usize $(, $argument: $type)*) -> CUresult {
            call_slot(slot, DriverFunction::$name, |state| {
                // SAFETY: the caller keeps the contract of the driver's function.
                unsafe { calls::$name(state $(, $argument)*) }
            })
        }
    )*};
    (@thunks $($name:ident($($argument:ident: $type:ty),*);)*) => {$(
        unsafe extern "C" fn $name($($argument: $type),*) -> CUresult {
            // SAFETY: the caller keeps the contract of the driver's function.
            unsafe { entry::$name(N $(, $argument)*) }
        }
    )*};
}

cuda_vmm_sys::driver_functions!(define_slots);

macro_rules! tables {
    ($($slot:literal)*) => {
        const TABLES: [fn() -> DriverTable; SLOTS] = [$(Slot::<$slot>::table),*];
    };
}

tables! {
    0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
    32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63
}

/// Returns the functions of a slot.
pub(crate) fn table(slot: usize) -> DriverTable {
    TABLES[slot]()
}
