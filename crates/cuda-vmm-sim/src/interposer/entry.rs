//! The functions of an interposer's table.
//!
//! A driver's functions have no context pointer. So each of a few slots has its own functions,
//! which look up the slot's interposer.
//!
//! A call that frees something removes it from the books before the driver's call, and adds it
//! again if the driver refuses. Otherwise another thread could get the same address or handle from
//! the driver before it is removed.
//!
//! # Safety
//! The functions have the contracts of the driver's functions of their names, and pass them on.
//! They read out-parameters only after the driver has written them.

#![allow(non_snake_case)]

use super::State;
use super::holdings::{Handles, Holdings};
use crate::slot::try_write;
use cuda_vmm_sys::*;
use std::ffi::{c_char, c_int, c_uchar, c_uint, c_ulonglong, c_void};
use std::sync::{Arc, PoisonError, RwLock};

/// The most interposers that may be alive in a process.
pub(super) const SLOTS: usize = 8;

static STATES: [RwLock<Option<Arc<State>>>; SLOTS] = [const { RwLock::new(None) }; SLOTS];

pub(super) fn occupy(state: &Arc<State>) -> Option<usize> {
    STATES.iter().position(|occupant| {
        let Some(mut occupant) = try_write(occupant) else {
            return false;
        };
        let free = occupant.is_none();
        if free {
            *occupant = Some(Arc::clone(state));
        }
        free
    })
}

pub(super) fn vacate(slot: usize) {
    let mut occupant = STATES[slot].write().unwrap_or_else(PoisonError::into_inner);
    *occupant = None;
}

/// Returns the functions of a slot.
pub(super) fn table(slot: usize) -> DriverTable {
    const TABLES: [fn() -> DriverTable; SLOTS] = [
        Slot::<0>::table,
        Slot::<1>::table,
        Slot::<2>::table,
        Slot::<3>::table,
        Slot::<4>::table,
        Slot::<5>::table,
        Slot::<6>::table,
        Slot::<7>::table,
    ];
    TABLES[slot]()
}

/// Counts a call and makes it, unless a fault fails it.
fn forward_call(
    slot: usize,
    function: DriverFunction,
    call: impl FnOnce(&State) -> CUresult,
) -> CUresult {
    let occupant = STATES[slot].read().unwrap_or_else(PoisonError::into_inner);
    let Some(state) = occupant.clone() else {
        return CUDA_ERROR_DEINITIALIZED;
    };
    drop(occupant);
    match state.begin(function) {
        Ok(()) => call(&state),
        Err(code) => code,
    }
}

/// Adds what a call created to the books, if the call succeeded.
fn note_created(state: &State, code: CUresult, note: impl FnOnce(&mut Holdings)) -> CUresult {
    if code == CUDA_SUCCESS {
        note(&mut state.lock().holdings);
    }
    code
}

/// Removes something from the books, makes the call, and adds it again if the driver refuses.
fn release<T>(
    state: &State,
    take: impl FnOnce(&mut Holdings) -> Option<T>,
    call: impl FnOnce() -> CUresult,
    put: impl FnOnce(&mut Holdings, T),
) -> CUresult {
    let taken = take(&mut state.lock().holdings);
    let code = call();
    if code != CUDA_SUCCESS
        && let Some(taken) = taken
    {
        put(&mut state.lock().holdings, taken);
    }
    code
}

/// [`release`] for an object that is identified by its pointer.
fn destroy<T>(
    state: &State,
    pointer: *mut T,
    handles: fn(&mut Holdings) -> &mut Handles,
    call: impl FnOnce() -> CUresult,
) -> CUresult {
    let handle = pointer.addr();
    release(
        state,
        |holdings| handles(holdings).remove(&handle).then_some(()),
        call,
        |holdings, ()| {
            handles(holdings).insert(handle);
        },
    )
}

/// Returns whether a stream of the caller is being captured.
fn is_captured(state: &State, stream: CUstream) -> bool {
    let mut status = CU_STREAM_CAPTURE_STATUS_NONE;
    // SAFETY: the place for the status is valid, and the driver has just accepted the stream.
    let code = unsafe { (state.driver.cuStreamIsCapturing)(stream, &mut status) };
    code == CUDA_SUCCESS && status != CU_STREAM_CAPTURE_STATUS_NONE
}

/// Reads an out-parameter after a call that succeeded.
macro_rules! result {
    ($pointer:expr) => {
        // SAFETY: the call succeeded, so the driver has written the out-parameter, which the caller
        // guarantees to be valid.
        unsafe { $pointer.read() }
    };
}

/// Makes one call of the driver, and updates the books with what it creates or frees.
macro_rules! call {
    (cuMemCreate $state:ident ($handle:ident, $size:ident, $properties:ident, $flags:ident)) => {
        note_created($state, forward!(cuMemCreate $state ($handle, $size, $properties, $flags)), |holdings| {
            holdings.add_reference(result!($handle), $size)
        })
    };
    (cuMemImportFromShareableHandle $state:ident ($handle:ident, $os_handle:ident, $type:ident)) => {
        note_created($state, forward!(cuMemImportFromShareableHandle $state ($handle, $os_handle, $type)), |holdings| {
            holdings.add_reference(result!($handle), 0)
        })
    };
    (cuMemRetainAllocationHandle $state:ident ($handle:ident, $address:ident)) => {
        note_created($state, forward!(cuMemRetainAllocationHandle $state ($handle, $address)), |holdings| {
            holdings.add_reference(result!($handle), 0)
        })
    };
    (cuMemRelease $state:ident ($handle:ident)) => {
        release(
            $state,
            |holdings| holdings.release($handle),
            || forward!(cuMemRelease $state ($handle)),
            |holdings, bytes| holdings.add_reference($handle, bytes),
        )
    };
    (cuMemMap $state:ident ($pointer:ident, $size:ident, $offset:ident, $handle:ident, $flags:ident)) => {
        note_created($state, forward!(cuMemMap $state ($pointer, $size, $offset, $handle, $flags)), |holdings| {
            holdings.map($pointer, $size, $handle)
        })
    };
    (cuMemUnmap $state:ident ($pointer:ident, $size:ident)) => {
        release(
            $state,
            |holdings| Some(holdings.unmap($pointer, $size)),
            || forward!(cuMemUnmap $state ($pointer, $size)),
            Holdings::map_again,
        )
    };
    (cuMemAddressReserve $state:ident ($pointer:ident, $size:ident, $alignment:ident, $address:ident, $flags:ident)) => {
        note_created(
            $state,
            forward!(cuMemAddressReserve $state ($pointer, $size, $alignment, $address, $flags)),
            |holdings| holdings.reserve(result!($pointer), $size),
        )
    };
    (cuMemAddressFree $state:ident ($pointer:ident, $size:ident)) => {
        release(
            $state,
            |holdings| holdings.free($pointer),
            || forward!(cuMemAddressFree $state ($pointer, $size)),
            |holdings, bytes| holdings.reserve($pointer, bytes),
        )
    };
    (cuMemAlloc $state:ident ($pointer:ident, $size:ident)) => {
        note_created($state, forward!(cuMemAlloc $state ($pointer, $size)), |holdings| {
            holdings.plain_alloc(result!($pointer), $size)
        })
    };
    (cuMemAllocAsync $state:ident ($pointer:ident, $size:ident, $stream:ident)) => {{
        let code = forward!(cuMemAllocAsync $state ($pointer, $size, $stream));
        if code == CUDA_SUCCESS && is_captured($state, $stream) {
            // Its memory belongs to the graph.
            return code;
        }
        note_created($state, code, |holdings| holdings.plain_alloc(result!($pointer), $size))
    }};
    (cuMemFree $state:ident ($pointer:ident)) => {
        release(
            $state,
            |holdings| holdings.plain_free($pointer),
            || forward!(cuMemFree $state ($pointer)),
            |holdings, bytes| holdings.plain_alloc($pointer, bytes),
        )
    };
    (cuMemFreeAsync $state:ident ($pointer:ident, $stream:ident)) => {
        release(
            $state,
            |holdings| holdings.plain_free($pointer),
            || forward!(cuMemFreeAsync $state ($pointer, $stream)),
            |holdings, bytes| holdings.plain_alloc($pointer, bytes),
        )
    };
    (cuMemHostRegister $state:ident ($address:ident, $size:ident, $flags:ident)) => {
        note_created($state, forward!(cuMemHostRegister $state ($address, $size, $flags)), |holdings| {
            holdings.register($address.addr(), $size)
        })
    };
    (cuMemHostUnregister $state:ident ($address:ident)) => {
        release(
            $state,
            |holdings| holdings.unregister($address.addr()),
            || forward!(cuMemHostUnregister $state ($address)),
            |holdings, bytes| holdings.register($address.addr(), bytes),
        )
    };
    (cuStreamCreate $state:ident ($stream:ident, $flags:ident)) => {
        note_created($state, forward!(cuStreamCreate $state ($stream, $flags)), |holdings| {
            holdings.streams.insert(result!($stream).addr());
        })
    };
    (cuStreamDestroy $state:ident ($stream:ident)) => {
        destroy($state, $stream, |holdings| &mut holdings.streams, || {
            forward!(cuStreamDestroy $state ($stream))
        })
    };
    (cuEventCreate $state:ident ($event:ident, $flags:ident)) => {
        note_created($state, forward!(cuEventCreate $state ($event, $flags)), |holdings| {
            holdings.events.insert(result!($event).addr());
        })
    };
    (cuEventDestroy $state:ident ($event:ident)) => {
        destroy($state, $event, |holdings| &mut holdings.events, || {
            forward!(cuEventDestroy $state ($event))
        })
    };
    (cuStreamEndCapture $state:ident ($stream:ident, $graph:ident)) => {
        note_created($state, forward!(cuStreamEndCapture $state ($stream, $graph)), |holdings| {
            holdings.graphs.insert(result!($graph).addr());
        })
    };
    (cuGraphDestroy $state:ident ($graph:ident)) => {
        destroy($state, $graph, |holdings| &mut holdings.graphs, || {
            forward!(cuGraphDestroy $state ($graph))
        })
    };
    (cuGraphInstantiateWithFlags $state:ident ($exec:ident, $graph:ident, $flags:ident)) => {
        note_created($state, forward!(cuGraphInstantiateWithFlags $state ($exec, $graph, $flags)), |holdings| {
            holdings.graphs.insert(result!($exec).addr());
        })
    };
    (cuGraphExecDestroy $state:ident ($exec:ident)) => {
        destroy($state, $exec, |holdings| &mut holdings.graphs, || {
            forward!(cuGraphExecDestroy $state ($exec))
        })
    };
    (cuDevicePrimaryCtxRetain $state:ident ($context:ident, $device:ident)) => {
        note_created($state, forward!(cuDevicePrimaryCtxRetain $state ($context, $device)), |holdings| {
            holdings.context_retains += 1
        })
    };
    (cuDevicePrimaryCtxRelease $state:ident ($device:ident)) => {
        note_created($state, forward!(cuDevicePrimaryCtxRelease $state ($device)), |holdings| {
            holdings.context_retains = holdings.context_retains.saturating_sub(1)
        })
    };
    ($name:ident $state:ident ($($argument:ident),*)) => {
        forward!($name $state ($($argument),*))
    };
}

/// Calls the driver's function.
macro_rules! forward {
    ($name:ident $state:ident ($($argument:ident),*)) => {
        // SAFETY: the caller keeps the contract of the driver's function.
        unsafe { ($state.driver.$name)($($argument),*) }
    };
}

/// The functions of one slot.
struct Slot<const N: usize>;

macro_rules! define_slot {
    (
        required { $(fn $name:ident($($argument:ident: $type:ty),*) = $pfn:ident, $version:literal;)* }
        optional { $(fn $optional:ident($($optional_argument:ident: $optional_type:ty),*) = $optional_pfn:ident, $optional_version:literal;)* }
    ) => {
        impl<const N: usize> Slot<N> {
            $(
                unsafe extern "C" fn $name($($argument: $type),*) -> CUresult {
                    forward_call(N, DriverFunction::$name, |state| call!($name state ($($argument),*)))
                }
            )*
            $(
                unsafe extern "C" fn $optional($($optional_argument: $optional_type),*) -> CUresult {
                    forward_call(N, DriverFunction::$optional, |state| match state.driver.$optional {
                        // SAFETY: the caller keeps the contract of the driver's function.
                        Some(function) => unsafe { function($($optional_argument),*) },
                        None => CUDA_ERROR_NOT_SUPPORTED,
                    })
                }
            )*

            fn table() -> DriverTable {
                DriverTable {
                    $($name: Self::$name,)*
                    $($optional: Some(Self::$optional),)*
                }
            }
        }
    };
}

cuda_vmm_sys::driver_functions!(define_slot);
