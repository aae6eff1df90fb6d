//! The list of the driver entry points that this project calls.

/// Passes every entry point of the driver table to the macro named `$callback`.
///
/// The callback receives two groups, `required { … }` and `optional { … }`. Their items have the
/// form `fn name(argument: type, …) = PFN_type, version;`. `PFN_type` is the header's
/// function-pointer type, and `version` the CUDA version that `cuGetProcAddress` is called with.
/// Argument types are names of this crate, so the code around the expansion imports
/// `cuda_vmm_sys::*` and the C types of [`core::ffi`].
///
/// The table, the loader and the simulated driver are expansions of this list. A signature that
/// differs from the header's does not compile.
#[macro_export]
macro_rules! driver_functions {
    ($callback:ident) => {
        $callback! {
            required {
                fn cuInit(flags: c_uint) = PFN_cuInit_v2000, 2000;
                fn cuDriverGetVersion(driver_version: *mut c_int) = PFN_cuDriverGetVersion_v2020, 2020;
                fn cuGetErrorName(error: CUresult, text: *mut *const c_char) = PFN_cuGetErrorName_v6000, 6000;
                fn cuGetErrorString(error: CUresult, text: *mut *const c_char) = PFN_cuGetErrorString_v6000, 6000;
                fn cuDeviceGet(device: *mut CUdevice, ordinal: c_int) = PFN_cuDeviceGet_v2000, 2000;
                fn cuDeviceGetCount(count: *mut c_int) = PFN_cuDeviceGetCount_v2000, 2000;
                fn cuDeviceGetName(name: *mut c_char, length: c_int, device: CUdevice) = PFN_cuDeviceGetName_v2000, 2000;
                fn cuDeviceGetAttribute(value: *mut c_int, attribute: CUdevice_attribute, device: CUdevice) = PFN_cuDeviceGetAttribute_v2000, 2000;
                fn cuDeviceTotalMem(bytes: *mut usize, device: CUdevice) = PFN_cuDeviceTotalMem_v3020, 3020;
                fn cuDeviceGetUuid(uuid: *mut CUuuid, device: CUdevice) = PFN_cuDeviceGetUuid_v9020, 9020;
                fn cuDeviceGetGraphMemAttribute(device: CUdevice, attribute: CUgraphMem_attribute, value: *mut c_void) = PFN_cuDeviceGetGraphMemAttribute_v11040, 11040;
                fn cuDeviceGraphMemTrim(device: CUdevice) = PFN_cuDeviceGraphMemTrim_v11040, 11040;
                fn cuDeviceCanAccessPeer(can_access: *mut c_int, device: CUdevice, peer: CUdevice) = PFN_cuDeviceCanAccessPeer_v4000, 4000;
                fn cuDevicePrimaryCtxRetain(context: *mut CUcontext, device: CUdevice) = PFN_cuDevicePrimaryCtxRetain_v7000, 7000;
                fn cuDevicePrimaryCtxRelease(device: CUdevice) = PFN_cuDevicePrimaryCtxRelease_v11000, 11000;
                fn cuDevicePrimaryCtxGetState(device: CUdevice, flags: *mut c_uint, active: *mut c_int) = PFN_cuDevicePrimaryCtxGetState_v7000, 7000;
                fn cuCtxGetCurrent(context: *mut CUcontext) = PFN_cuCtxGetCurrent_v4000, 4000;
                fn cuCtxSetCurrent(context: CUcontext) = PFN_cuCtxSetCurrent_v4000, 4000;
                fn cuCtxGetDevice(device: *mut CUdevice) = PFN_cuCtxGetDevice_v2000, 2000;
                fn cuCtxSynchronize() = PFN_cuCtxSynchronize_v2000, 2000;
                fn cuMemGetInfo(free: *mut usize, total: *mut usize) = PFN_cuMemGetInfo_v3020, 3020;
                fn cuMemAlloc(pointer: *mut CUdeviceptr, size: usize) = PFN_cuMemAlloc_v3020, 3020;
                fn cuMemFree(pointer: CUdeviceptr) = PFN_cuMemFree_v3020, 3020;
                fn cuMemAllocAsync(pointer: *mut CUdeviceptr, size: usize, stream: CUstream) = PFN_cuMemAllocAsync_v11020, 11020;
                fn cuMemFreeAsync(pointer: CUdeviceptr, stream: CUstream) = PFN_cuMemFreeAsync_v11020, 11020;
                fn cuMemHostRegister(address: *mut c_void, size: usize, flags: c_uint) = PFN_cuMemHostRegister_v6050, 6050;
                fn cuMemHostUnregister(address: *mut c_void) = PFN_cuMemHostUnregister_v4000, 4000;
                fn cuMemcpyHtoD(destination: CUdeviceptr, source: *const c_void, size: usize) = PFN_cuMemcpyHtoD_v3020, 3020;
                fn cuMemcpyDtoH(destination: *mut c_void, source: CUdeviceptr, size: usize) = PFN_cuMemcpyDtoH_v3020, 3020;
                fn cuMemcpyDtoD(destination: CUdeviceptr, source: CUdeviceptr, size: usize) = PFN_cuMemcpyDtoD_v3020, 3020;
                fn cuMemcpyHtoDAsync(destination: CUdeviceptr, source: *const c_void, size: usize, stream: CUstream) = PFN_cuMemcpyHtoDAsync_v3020, 3020;
                fn cuMemcpyDtoHAsync(destination: *mut c_void, source: CUdeviceptr, size: usize, stream: CUstream) = PFN_cuMemcpyDtoHAsync_v3020, 3020;
                fn cuMemcpyDtoDAsync(destination: CUdeviceptr, source: CUdeviceptr, size: usize, stream: CUstream) = PFN_cuMemcpyDtoDAsync_v3020, 3020;
                fn cuMemsetD8(destination: CUdeviceptr, value: c_uchar, size: usize) = PFN_cuMemsetD8_v3020, 3020;
                fn cuMemsetD8Async(destination: CUdeviceptr, value: c_uchar, size: usize, stream: CUstream) = PFN_cuMemsetD8Async_v3020, 3020;
                fn cuMemAddressReserve(pointer: *mut CUdeviceptr, size: usize, alignment: usize, address: CUdeviceptr, flags: c_ulonglong) = PFN_cuMemAddressReserve_v10020, 10020;
                fn cuMemAddressFree(pointer: CUdeviceptr, size: usize) = PFN_cuMemAddressFree_v10020, 10020;
                fn cuMemCreate(handle: *mut CUmemGenericAllocationHandle, size: usize, properties: *const CUmemAllocationProp, flags: c_ulonglong) = PFN_cuMemCreate_v10020, 10020;
                fn cuMemRelease(handle: CUmemGenericAllocationHandle) = PFN_cuMemRelease_v10020, 10020;
                fn cuMemMap(pointer: CUdeviceptr, size: usize, offset: usize, handle: CUmemGenericAllocationHandle, flags: c_ulonglong) = PFN_cuMemMap_v10020, 10020;
                fn cuMemUnmap(pointer: CUdeviceptr, size: usize) = PFN_cuMemUnmap_v10020, 10020;
                fn cuMemSetAccess(pointer: CUdeviceptr, size: usize, descriptors: *const CUmemAccessDesc, count: usize) = PFN_cuMemSetAccess_v10020, 10020;
                fn cuMemGetAccess(flags: *mut c_ulonglong, location: *const CUmemLocation, pointer: CUdeviceptr) = PFN_cuMemGetAccess_v10020, 10020;
                fn cuMemGetAllocationGranularity(granularity: *mut usize, properties: *const CUmemAllocationProp, option: CUmemAllocationGranularity_flags) = PFN_cuMemGetAllocationGranularity_v10020, 10020;
                fn cuMemGetAllocationPropertiesFromHandle(properties: *mut CUmemAllocationProp, handle: CUmemGenericAllocationHandle) = PFN_cuMemGetAllocationPropertiesFromHandle_v10020, 10020;
                fn cuMemExportToShareableHandle(shareable_handle: *mut c_void, handle: CUmemGenericAllocationHandle, handle_type: CUmemAllocationHandleType, flags: c_ulonglong) = PFN_cuMemExportToShareableHandle_v10020, 10020;
                fn cuMemImportFromShareableHandle(handle: *mut CUmemGenericAllocationHandle, os_handle: *mut c_void, handle_type: CUmemAllocationHandleType) = PFN_cuMemImportFromShareableHandle_v10020, 10020;
                fn cuMemRetainAllocationHandle(handle: *mut CUmemGenericAllocationHandle, address: *mut c_void) = PFN_cuMemRetainAllocationHandle_v11000, 11000;
                fn cuStreamCreate(stream: *mut CUstream, flags: c_uint) = PFN_cuStreamCreate_v2000, 2000;
                fn cuStreamDestroy(stream: CUstream) = PFN_cuStreamDestroy_v4000, 4000;
                fn cuStreamSynchronize(stream: CUstream) = PFN_cuStreamSynchronize_v2000, 2000;
                fn cuStreamQuery(stream: CUstream) = PFN_cuStreamQuery_v2000, 2000;
                fn cuStreamWaitEvent(stream: CUstream, event: CUevent, flags: c_uint) = PFN_cuStreamWaitEvent_v3020, 3020;
                fn cuStreamIsCapturing(stream: CUstream, capture_status: *mut CUstreamCaptureStatus) = PFN_cuStreamIsCapturing_v10000, 10000;
                fn cuStreamBeginCapture(stream: CUstream, mode: CUstreamCaptureMode) = PFN_cuStreamBeginCapture_v10010, 10010;
                fn cuStreamEndCapture(stream: CUstream, graph: *mut CUgraph) = PFN_cuStreamEndCapture_v10000, 10000;
                fn cuThreadExchangeStreamCaptureMode(mode: *mut CUstreamCaptureMode) = PFN_cuThreadExchangeStreamCaptureMode_v10010, 10010;
                fn cuLaunchHostFunc(stream: CUstream, function: CUhostFn, user_data: *mut c_void) = PFN_cuLaunchHostFunc_v10000, 10000;
                fn cuModuleLoadData(module: *mut CUmodule, image: *const c_void) = PFN_cuModuleLoadData_v2000, 2000;
                fn cuModuleUnload(module: CUmodule) = PFN_cuModuleUnload_v2000, 2000;
                fn cuModuleGetFunction(function: *mut CUfunction, module: CUmodule, name: *const c_char) = PFN_cuModuleGetFunction_v2000, 2000;
                fn cuLaunchKernel(function: CUfunction, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint, block_z: c_uint, shared_bytes: c_uint, stream: CUstream, parameters: *mut *mut c_void, extra: *mut *mut c_void) = PFN_cuLaunchKernel_v4000, 4000;
                fn cuEventCreate(event: *mut CUevent, flags: c_uint) = PFN_cuEventCreate_v2000, 2000;
                fn cuEventDestroy(event: CUevent) = PFN_cuEventDestroy_v4000, 4000;
                fn cuEventRecord(event: CUevent, stream: CUstream) = PFN_cuEventRecord_v2000, 2000;
                fn cuEventQuery(event: CUevent) = PFN_cuEventQuery_v2000, 2000;
                fn cuEventSynchronize(event: CUevent) = PFN_cuEventSynchronize_v2000, 2000;
                fn cuEventElapsedTime(milliseconds: *mut f32, start: CUevent, end: CUevent) = PFN_cuEventElapsedTime_v2000, 2000;
                fn cuGraphInstantiateWithFlags(exec: *mut CUgraphExec, graph: CUgraph, flags: c_ulonglong) = PFN_cuGraphInstantiateWithFlags_v11040, 11040;
                fn cuGraphUpload(graph: CUgraphExec, stream: CUstream) = PFN_cuGraphUpload_v11010, 11010;
                fn cuGraphLaunch(graph: CUgraphExec, stream: CUstream) = PFN_cuGraphLaunch_v10000, 10000;
                fn cuGraphExecDestroy(exec: CUgraphExec) = PFN_cuGraphExecDestroy_v10000, 10000;
                fn cuGraphGetNodes(graph: CUgraph, nodes: *mut CUgraphNode, count: *mut usize) = PFN_cuGraphGetNodes_v10000, 10000;
                fn cuGraphNodeGetType(node: CUgraphNode, kind: *mut CUgraphNodeType) = PFN_cuGraphNodeGetType_v10000, 10000;
                fn cuGraphDestroy(graph: CUgraph) = PFN_cuGraphDestroy_v10000, 10000;
            }
            optional {
                fn cuCtxRecordEvent(context: CUcontext, event: CUevent) = PFN_cuCtxRecordEvent_v12050, 12050;
            }
        }
    };
}
