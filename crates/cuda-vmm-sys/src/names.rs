//! The names of the driver interface that this crate has with every header.
//!
//! The hand-written declarations, the selection from bindgen's output, and the test that asks the C
//! compiler are expansions of these lists. All names are in the headers since CUDA 11.4.

/// Constants, with type and value.
macro_rules! constants {
    ($callback:ident) => {
        $callback! {
            CUDA_SUCCESS: CUresult = 0;
            CUDA_ERROR_INVALID_VALUE: CUresult = 1;
            CUDA_ERROR_OUT_OF_MEMORY: CUresult = 2;
            CUDA_ERROR_NOT_INITIALIZED: CUresult = 3;
            CUDA_ERROR_DEINITIALIZED: CUresult = 4;
            CUDA_ERROR_STUB_LIBRARY: CUresult = 34;
            CUDA_ERROR_NO_DEVICE: CUresult = 100;
            CUDA_ERROR_INVALID_DEVICE: CUresult = 101;
            CUDA_ERROR_INVALID_IMAGE: CUresult = 200;
            CUDA_ERROR_INVALID_CONTEXT: CUresult = 201;
            CUDA_ERROR_MAP_FAILED: CUresult = 205;
            CUDA_ERROR_UNMAP_FAILED: CUresult = 206;
            CUDA_ERROR_ALREADY_MAPPED: CUresult = 208;
            CUDA_ERROR_NO_BINARY_FOR_GPU: CUresult = 209;
            CUDA_ERROR_NOT_MAPPED: CUresult = 211;
            CUDA_ERROR_ECC_UNCORRECTABLE: CUresult = 214;
            CUDA_ERROR_UNSUPPORTED_LIMIT: CUresult = 215;
            CUDA_ERROR_CONTEXT_ALREADY_IN_USE: CUresult = 216;
            CUDA_ERROR_PEER_ACCESS_UNSUPPORTED: CUresult = 217;
            CUDA_ERROR_INVALID_PTX: CUresult = 218;
            CUDA_ERROR_NVLINK_UNCORRECTABLE: CUresult = 220;
            CUDA_ERROR_JIT_COMPILER_NOT_FOUND: CUresult = 221;
            CUDA_ERROR_UNSUPPORTED_PTX_VERSION: CUresult = 222;
            CUDA_ERROR_JIT_COMPILATION_DISABLED: CUresult = 223;
            CUDA_ERROR_INVALID_SOURCE: CUresult = 300;
            CUDA_ERROR_FILE_NOT_FOUND: CUresult = 301;
            CUDA_ERROR_SHARED_OBJECT_SYMBOL_NOT_FOUND: CUresult = 302;
            CUDA_ERROR_SHARED_OBJECT_INIT_FAILED: CUresult = 303;
            CUDA_ERROR_OPERATING_SYSTEM: CUresult = 304;
            CUDA_ERROR_INVALID_HANDLE: CUresult = 400;
            CUDA_ERROR_ILLEGAL_STATE: CUresult = 401;
            CUDA_ERROR_NOT_FOUND: CUresult = 500;
            CUDA_ERROR_NOT_READY: CUresult = 600;
            CUDA_ERROR_ILLEGAL_ADDRESS: CUresult = 700;
            CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: CUresult = 701;
            CUDA_ERROR_LAUNCH_TIMEOUT: CUresult = 702;
            CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED: CUresult = 704;
            CUDA_ERROR_PEER_ACCESS_NOT_ENABLED: CUresult = 705;
            CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE: CUresult = 708;
            CUDA_ERROR_CONTEXT_IS_DESTROYED: CUresult = 709;
            CUDA_ERROR_ASSERT: CUresult = 710;
            CUDA_ERROR_TOO_MANY_PEERS: CUresult = 711;
            CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED: CUresult = 712;
            CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED: CUresult = 713;
            CUDA_ERROR_HARDWARE_STACK_ERROR: CUresult = 714;
            CUDA_ERROR_ILLEGAL_INSTRUCTION: CUresult = 715;
            CUDA_ERROR_MISALIGNED_ADDRESS: CUresult = 716;
            CUDA_ERROR_INVALID_ADDRESS_SPACE: CUresult = 717;
            CUDA_ERROR_INVALID_PC: CUresult = 718;
            CUDA_ERROR_LAUNCH_FAILED: CUresult = 719;
            CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE: CUresult = 720;
            CUDA_ERROR_NOT_PERMITTED: CUresult = 800;
            CUDA_ERROR_NOT_SUPPORTED: CUresult = 801;
            CUDA_ERROR_SYSTEM_NOT_READY: CUresult = 802;
            CUDA_ERROR_SYSTEM_DRIVER_MISMATCH: CUresult = 803;
            CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE: CUresult = 804;
            CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED: CUresult = 900;
            CUDA_ERROR_STREAM_CAPTURE_INVALIDATED: CUresult = 901;
            CUDA_ERROR_STREAM_CAPTURE_MERGE: CUresult = 902;
            CUDA_ERROR_STREAM_CAPTURE_UNMATCHED: CUresult = 903;
            CUDA_ERROR_STREAM_CAPTURE_UNJOINED: CUresult = 904;
            CUDA_ERROR_STREAM_CAPTURE_ISOLATION: CUresult = 905;
            CUDA_ERROR_STREAM_CAPTURE_IMPLICIT: CUresult = 906;
            CUDA_ERROR_CAPTURED_EVENT: CUresult = 907;
            CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD: CUresult = 908;
            CUDA_ERROR_TIMEOUT: CUresult = 909;
            CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE: CUresult = 910;
            CUDA_ERROR_UNKNOWN: CUresult = 999;
            CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: CUdevice_attribute = 16;
            CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: CUdevice_attribute = 41;
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: CUdevice_attribute = 75;
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: CUdevice_attribute = 76;
            CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: CUdevice_attribute = 102;
            CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED: CUdevice_attribute = 103;
            CU_DEVICE_ATTRIBUTE_GENERIC_COMPRESSION_SUPPORTED: CUdevice_attribute = 107;
            CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED: CUdevice_attribute = 110;
            CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: CUdevice_attribute = 115;
            CU_MEM_LOCATION_TYPE_INVALID: CUmemLocationType = 0;
            CU_MEM_LOCATION_TYPE_DEVICE: CUmemLocationType = 1;
            CU_MEM_ALLOCATION_TYPE_INVALID: CUmemAllocationType = 0;
            CU_MEM_ALLOCATION_TYPE_PINNED: CUmemAllocationType = 1;
            CU_MEM_HANDLE_TYPE_NONE: CUmemAllocationHandleType = 0;
            CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR: CUmemAllocationHandleType = 1;
            CU_MEM_HANDLE_TYPE_WIN32: CUmemAllocationHandleType = 2;
            CU_MEM_HANDLE_TYPE_WIN32_KMT: CUmemAllocationHandleType = 4;
            CU_MEM_ALLOC_GRANULARITY_MINIMUM: CUmemAllocationGranularity_flags = 0;
            CU_MEM_ALLOC_GRANULARITY_RECOMMENDED: CUmemAllocationGranularity_flags = 1;
            CU_MEM_ACCESS_FLAGS_PROT_NONE: CUmemAccess_flags = 0;
            CU_MEM_ACCESS_FLAGS_PROT_READ: CUmemAccess_flags = 1;
            CU_MEM_ACCESS_FLAGS_PROT_READWRITE: CUmemAccess_flags = 3;
            CU_MEMHOSTREGISTER_PORTABLE: c_uint = 1;
            CU_MEMHOSTREGISTER_DEVICEMAP: c_uint = 2;
            CU_MEMHOSTREGISTER_IOMEMORY: c_uint = 4;
            CU_MEMHOSTREGISTER_READ_ONLY: c_uint = 8;
            CU_STREAM_CAPTURE_STATUS_NONE: CUstreamCaptureStatus = 0;
            CU_STREAM_CAPTURE_STATUS_ACTIVE: CUstreamCaptureStatus = 1;
            CU_STREAM_CAPTURE_STATUS_INVALIDATED: CUstreamCaptureStatus = 2;
            CU_STREAM_CAPTURE_MODE_GLOBAL: CUstreamCaptureMode = 0;
            CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: CUstreamCaptureMode = 1;
            CU_STREAM_CAPTURE_MODE_RELAXED: CUstreamCaptureMode = 2;
            CU_STREAM_DEFAULT: CUstream_flags = 0;
            CU_STREAM_NON_BLOCKING: CUstream_flags = 1;
            CU_EVENT_DEFAULT: CUevent_flags = 0;
            CU_EVENT_BLOCKING_SYNC: CUevent_flags = 1;
            CU_EVENT_DISABLE_TIMING: CUevent_flags = 2;
            CU_EVENT_INTERPROCESS: CUevent_flags = 4;
            CU_GRAPH_NODE_TYPE_KERNEL: CUgraphNodeType = 0;
            CU_GRAPH_NODE_TYPE_MEMCPY: CUgraphNodeType = 1;
            CU_GRAPH_NODE_TYPE_MEMSET: CUgraphNodeType = 2;
            CU_GRAPH_NODE_TYPE_HOST: CUgraphNodeType = 3;
            CU_GRAPH_NODE_TYPE_EMPTY: CUgraphNodeType = 5;
            CU_GRAPH_NODE_TYPE_WAIT_EVENT: CUgraphNodeType = 6;
            CU_GRAPH_NODE_TYPE_EVENT_RECORD: CUgraphNodeType = 7;
            CU_GRAPH_NODE_TYPE_MEM_ALLOC: CUgraphNodeType = 10;
            CU_GRAPH_NODE_TYPE_MEM_FREE: CUgraphNodeType = 11;
            CU_GRAPH_MEM_ATTR_USED_MEM_CURRENT: CUgraphMem_attribute = 0;
            CU_GRAPH_MEM_ATTR_USED_MEM_HIGH: CUgraphMem_attribute = 1;
            CU_GRAPH_MEM_ATTR_RESERVED_MEM_CURRENT: CUgraphMem_attribute = 2;
            CU_GRAPH_MEM_ATTR_RESERVED_MEM_HIGH: CUgraphMem_attribute = 3;
            CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH: CUgraphInstantiate_flags = 1;
            CU_GET_PROC_ADDRESS_DEFAULT: CUdriverProcAddress_flags = 0;
            CU_GET_PROC_ADDRESS_LEGACY_STREAM: CUdriverProcAddress_flags = 1;
            CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM: CUdriverProcAddress_flags = 2;
        }
    };
}

/// Types of a known size: integers, then structures.
macro_rules! types {
    ($callback:ident) => {
        $callback! {
            CUresult,
            CUdevice,
            CUdeviceptr,
            CUmemGenericAllocationHandle,
            CUdevice_attribute,
            CUmemLocationType,
            CUmemAllocationType,
            CUmemAllocationHandleType,
            CUmemAllocationGranularity_flags,
            CUmemAccess_flags,
            CUstreamCaptureStatus,
            CUstreamCaptureMode,
            CUstream_flags,
            CUevent_flags,
            CUgraphNodeType,
            CUgraphMem_attribute,
            CUgraphInstantiate_flags,
            CUdriverProcAddress_flags,
            CUuuid,
            CUmemLocation,
            CUmemAllocationProp,
            CUmemAccessDesc,
        }
    };
}

/// Handles: pointers to opaque types.
macro_rules! handles {
    ($callback:ident) => {
        $callback! {
            CUcontext = CUctx_st;
            CUstream = CUstream_st;
            CUevent = CUevent_st;
            CUgraph = CUgraph_st;
            CUgraphExec = CUgraphExec_st;
            CUgraphNode = CUgraphNode_st;
            CUmodule = CUmod_st;
            CUfunction = CUfunc_st;
        }
    };
}
