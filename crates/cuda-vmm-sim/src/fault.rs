//! Faults: calls that are made to fail.

use cuda_vmm_sys::{CUDA_SUCCESS, CUresult, DriverFunction};

/// One planned failure of a call.
///
/// Calls are counted from the moment the fault is added, starting at 1. A call that fails this way
/// is counted and traced but has no other effect. A fault with the code `CUDA_SUCCESS` is ignored:
/// a call that reports success and does nothing would break what safe code relies on.
#[derive(Clone, Debug)]
pub struct Fault {
    calls: Calls,
    code: CUresult,
}

#[derive(Clone, Debug)]
enum Calls {
    Nth { left: u64 },
    NthOf { function: DriverFunction, left: u64 },
    Always { function: DriverFunction },
}

impl Fault {
    /// Fails the `n`th call from now with `code`, once. 0 fails no call.
    ///
    /// All entry points count, except pure queries: `cuInit`, `cuDriverGetVersion`,
    /// `cuGetErrorName`, `cuGetErrorString`, `cuDevice*` without `cuDeviceGraphMemTrim`,
    /// `cuCtxGetCurrent`, `cuCtxSetCurrent`, `cuCtxGetDevice` and
    /// `cuThreadExchangeStreamCaptureMode`.
    pub fn nth_call(n: u64, code: CUresult) -> Self {
        Self {
            calls: Calls::Nth { left: n },
            code,
        }
    }

    /// Fails the `n`th call of `function` from now with `code`, once. 0 fails no call.
    pub fn nth_of(function: DriverFunction, n: u64, code: CUresult) -> Self {
        Self {
            calls: Calls::NthOf { function, left: n },
            code,
        }
    }

    /// Fails every call of `function` with `code`, until the faults are cleared.
    pub fn always(function: DriverFunction, code: CUresult) -> Self {
        Self {
            calls: Calls::Always { function },
            code,
        }
    }

    /// Counts a call, and returns whether it must fail.
    fn applies_to(&mut self, called: DriverFunction) -> bool {
        let left = match &mut self.calls {
            Calls::Always { function } => return *function == called,
            Calls::Nth { left } if is_counted(called) => left,
            Calls::NthOf { function, left } if *function == called => left,
            _ => return false,
        };
        if *left == 0 {
            return false;
        }
        *left -= 1;
        *left == 0
    }
}

/// The faults of one simulator.
#[derive(Debug, Default)]
pub(crate) struct FaultPlan {
    faults: Vec<Fault>,
}

impl FaultPlan {
    pub(crate) fn add(&mut self, fault: Fault) {
        if fault.code != CUDA_SUCCESS {
            self.faults.push(fault);
        }
    }

    pub(crate) fn clear(&mut self) {
        self.faults.clear();
    }

    /// Counts the call for every fault, and returns the code of the first one that applies.
    pub(crate) fn call(&mut self, function: DriverFunction) -> Option<CUresult> {
        let mut code = None;
        for fault in &mut self.faults {
            if fault.applies_to(function) && code.is_none() {
                code = Some(fault.code);
            }
        }
        self.faults.retain(|fault| {
            !matches!(
                fault.calls,
                Calls::Nth { left: 0 } | Calls::NthOf { left: 0, .. }
            )
        });
        code
    }
}

/// Returns whether [`Fault::nth_call`] and the trace count this entry point.
pub(crate) fn is_counted(function: DriverFunction) -> bool {
    use DriverFunction::*;
    !matches!(
        function,
        cuInit
            | cuDriverGetVersion
            | cuGetErrorName
            | cuGetErrorString
            | cuDeviceGet
            | cuDeviceGetCount
            | cuDeviceGetName
            | cuDeviceGetAttribute
            | cuDeviceTotalMem
            | cuDeviceGetUuid
            | cuDeviceGetGraphMemAttribute
            | cuDeviceCanAccessPeer
            | cuDevicePrimaryCtxRetain
            | cuDevicePrimaryCtxRelease
            | cuDevicePrimaryCtxGetState
            | cuCtxGetCurrent
            | cuCtxSetCurrent
            | cuCtxGetDevice
            | cuThreadExchangeStreamCaptureMode
    )
}
