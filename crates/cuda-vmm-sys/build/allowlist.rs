//! What bindgen may generate: the types that the table's calls take, and the constants that we pass or
//! compare with. Function-pointer types come from the list in `src/functions.rs`.

/// Types by name. The types that their fields and arguments need come along.
pub const TYPES: &[&str] = &[
    "CUresult",
    "CUdevice",
    "CUdeviceptr",
    "CUcontext",
    "CUstream",
    "CUevent",
    "CUgraph",
    "CUgraphExec",
    "CUmodule",
    "CUfunction",
    "CUuuid",
    "CUhostFn",
    "CUmemGenericAllocationHandle",
    "CUmemAllocationProp",
    "CUmemLocation",
    "CUmemAccessDesc",
    "PFN_cuGetProcAddress_v11030",
    "CUdevice_attribute",
    "CUmemLocationType",
    "CUmemAllocationType",
    "CUmemAllocationHandleType",
    "CUmemAllocationGranularity_flags",
    "CUmemAccess_flags",
    "CUstreamCaptureStatus",
    "CUstreamCaptureMode",
    "CUstream_flags",
    "CUevent_flags",
    "CUdriverProcAddress_flags",
];

/// The header's own version.
pub const MACROS: &[&str] = &["CUDA_VERSION"];

/// Function-pointer types that `src/lib.rs` declares itself, because older headers lack them.
pub const DECLARED: &[&str] = &["PFN_cuCtxRecordEvent_v12050"];
