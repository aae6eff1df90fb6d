//! Names and descriptions of the driver's codes.

use cuda_vmm_sys::*;
use std::ffi::CStr;

macro_rules! codes {
    ($($code:ident $description:literal)*) => {
        /// The codes that have a name.
        #[cfg(test)]
        const ALL: &[CUresult] = &[$($code),*];

        /// Returns the name of a code, such as `CUDA_ERROR_OUT_OF_MEMORY`.
        pub(crate) fn name(code: CUresult) -> Option<&'static CStr> {
            match code {
                $($code => CStr::from_bytes_with_nul(concat!(stringify!($code), "\0").as_bytes()).ok(),)*
                _ => None,
            }
        }

        /// Returns the description of a code.
        pub(crate) fn description(code: CUresult) -> Option<&'static CStr> {
            match code {
                $($code => CStr::from_bytes_with_nul(concat!($description, "\0").as_bytes()).ok(),)*
                _ => None,
            }
        }
    };
}

codes! {
    CUDA_SUCCESS "the call succeeded"
    CUDA_ERROR_INVALID_VALUE "an argument is not acceptable"
    CUDA_ERROR_OUT_OF_MEMORY "not enough memory or address space"
    CUDA_ERROR_NOT_INITIALIZED "cuInit was not called"
    CUDA_ERROR_DEINITIALIZED "the driver is shutting down"
    CUDA_ERROR_STUB_LIBRARY "the loaded library is a stub"
    CUDA_ERROR_NO_DEVICE "there is no device"
    CUDA_ERROR_INVALID_DEVICE "there is no device of this number"
    CUDA_ERROR_INVALID_CONTEXT "no valid context is current"
    CUDA_ERROR_MAP_FAILED "memory could not be mapped"
    CUDA_ERROR_ECC_UNCORRECTABLE "uncorrectable memory error"
    CUDA_ERROR_OPERATING_SYSTEM "the operating system refused"
    CUDA_ERROR_INVALID_HANDLE "the handle is not valid"
    CUDA_ERROR_ILLEGAL_STATE "not possible in the present state"
    CUDA_ERROR_NOT_FOUND "there is no such symbol"
    CUDA_ERROR_NOT_READY "work is still under way"
    CUDA_ERROR_ILLEGAL_ADDRESS "the device touched memory that it may not touch"
    CUDA_ERROR_LAUNCH_TIMEOUT "the work took too long"
    CUDA_ERROR_CONTEXT_IS_DESTROYED "the current context was destroyed"
    CUDA_ERROR_ASSERT "an assertion failed on the device"
    CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED "some of the host memory is registered already"
    CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED "no registered host memory begins there"
    CUDA_ERROR_HARDWARE_STACK_ERROR "error in a call stack on the device"
    CUDA_ERROR_ILLEGAL_INSTRUCTION "illegal instruction on the device"
    CUDA_ERROR_MISALIGNED_ADDRESS "misaligned access on the device"
    CUDA_ERROR_INVALID_ADDRESS_SPACE "access to the wrong address space on the device"
    CUDA_ERROR_INVALID_PC "the device's program counter is invalid"
    CUDA_ERROR_LAUNCH_FAILED "the work failed on the device"
    CUDA_ERROR_NOT_PERMITTED "the operation is not permitted"
    CUDA_ERROR_NOT_SUPPORTED "the operation is not supported"
    CUDA_ERROR_SYSTEM_NOT_READY "the system is not ready for CUDA"
    CUDA_ERROR_SYSTEM_DRIVER_MISMATCH "driver and library do not match"
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED "not allowed while a stream is captured"
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED "an earlier call has invalidated the capture"
    CUDA_ERROR_STREAM_CAPTURE_MERGE "the call would merge two captures"
    CUDA_ERROR_STREAM_CAPTURE_UNMATCHED "the capture did not begin on this stream"
    CUDA_ERROR_STREAM_CAPTURE_UNJOINED "the capture has a branch that was not joined"
    CUDA_ERROR_STREAM_CAPTURE_ISOLATION "the call would make captured work wait for other work"
    CUDA_ERROR_STREAM_CAPTURE_IMPLICIT "the call would wait for a captured stream through the legacy stream"
    CUDA_ERROR_CAPTURED_EVENT "the event was last recorded in a capture"
    CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD "the capture began on another thread"
    CUDA_ERROR_UNKNOWN "unknown error"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_its_own_name_and_a_description() {
        let mut names: Vec<_> = ALL
            .iter()
            .map(|&code| name(code).expect("a name"))
            .collect();
        assert_eq!(
            name(CUDA_ERROR_OUT_OF_MEMORY),
            Some(c"CUDA_ERROR_OUT_OF_MEMORY")
        );
        assert!(
            ALL.iter()
                .all(|&code| description(code).is_some_and(|text| !text.is_empty()))
        );
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
        assert_eq!((name(12345), description(12345)), (None, None));
    }
}
