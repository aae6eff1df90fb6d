//! The driver's calls with C's arguments: they check pointers for null, read through them and write
//! results.
//!
//! # Safety
//! Every function has the contract of the C function of its name: a pointer is null, or valid for
//! what the call reads or writes through it. Null pointers are refused. Handles are never
//! dereferenced.

#![allow(non_snake_case)]
#![allow(
    clippy::too_many_arguments,
    reason = "the driver's functions have as many"
)]

use crate::location::{read_kind, write_properties};
use crate::state::graphs::{Endpoint, Node};
use crate::state::{DriverResult, State};
use cuda_vmm_sys::*;
use std::ffi::{c_char, c_int, c_uchar, c_uint, c_ulonglong, c_void};
use std::ptr::NonNull;
use std::sync::Arc;

type Sim = Arc<State>;

/// The out-parameter of a call.
struct Out<T>(NonNull<T>);

impl<T> Out<T> {
    /// # Safety
    /// A pointer that is not null is valid for one write of a `T` until the call ends.
    unsafe fn new(pointer: *mut T) -> DriverResult<Self> {
        NonNull::new(pointer)
            .map(Self)
            .ok_or(CUDA_ERROR_INVALID_VALUE)
    }

    fn set(self, value: T) -> DriverResult {
        // SAFETY: the caller of `new` guarantees that the pointer is valid for this write.
        unsafe { self.0.write(value) };
        Ok(())
    }
}

/// # Safety
/// A pointer that is not null is valid for reads until the call ends.
unsafe fn get<'a, T>(pointer: *const T) -> DriverResult<&'a T> {
    // SAFETY: the caller guarantees that the pointer is null or valid.
    unsafe { pointer.as_ref() }.ok_or(CUDA_ERROR_INVALID_VALUE)
}

fn no_flags(flags: c_ulonglong) -> DriverResult {
    if flags == 0 {
        Ok(())
    } else {
        Err(CUDA_ERROR_INVALID_VALUE)
    }
}

/// Declares calls that are unsafe only because of their pointer arguments.
macro_rules! calls {
    ($(fn $name:ident($sim:ident $(, $argument:ident: $type:ty)*) $body:block)*) => {$(
        /// # Safety
        /// As the module says.
        pub(crate) unsafe fn $name($sim: &Sim $(, $argument: $type)*) -> DriverResult $body
    )*};
}

/// Reads an argument through its pointer, refusing null.
macro_rules! read {
    ($pointer:expr) => {
        // SAFETY: the contract of the module.
        unsafe { get($pointer) }?
    };
}

/// Takes an out-parameter, and refuses null before the call has any effect.
macro_rules! out {
    ($pointer:expr) => {
        // SAFETY: the contract of the module.
        unsafe { Out::new($pointer) }?
    };
}

calls! {
    fn cuInit(sim, flags: c_uint) {
        no_flags(flags.into())?;
        sim.initialize()
    }
    fn cuDriverGetVersion(sim, driver_version: *mut c_int) {
        out!(driver_version).set(sim.config.driver_version)
    }
    fn cuGetErrorName(_sim, error: CUresult, text: *mut *const c_char) {
        let text = out!(text);
        match crate::error_names::name(error) {
            Some(name) => text.set(name.as_ptr()),
            None => text.set(std::ptr::null()).and(Err(CUDA_ERROR_INVALID_VALUE)),
        }
    }
    fn cuGetErrorString(_sim, error: CUresult, text: *mut *const c_char) {
        let text = out!(text);
        match crate::error_names::description(error) {
            Some(description) => text.set(description.as_ptr()),
            None => text.set(std::ptr::null()).and(Err(CUDA_ERROR_INVALID_VALUE)),
        }
    }

    fn cuDeviceGet(sim, device: *mut CUdevice, ordinal: c_int) {
        let device = out!(device);
        device.set(sim.device(ordinal)? as CUdevice)
    }
    fn cuDeviceGetCount(sim, count: *mut c_int) {
        out!(count).set(sim.config.devices as c_int)
    }
    fn cuDeviceGetName(sim, name: *mut c_char, length: c_int, device: CUdevice) {
        let text = crate::device::name(sim.device(device)?);
        let room = usize::try_from(length).unwrap_or(0);
        if name.is_null() || room == 0 {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        let bytes = text.as_bytes();
        let shown = bytes.len().min(room - 1);
        // SAFETY: the caller gives `length` writable bytes at `name`, and one more than `shown`
        // fit.
        unsafe {
            name.cast::<u8>().copy_from_nonoverlapping(bytes.as_ptr(), shown);
            name.add(shown).write(0);
        }
        Ok(())
    }
    fn cuDeviceGetAttribute(sim, value: *mut c_int, attribute: CUdevice_attribute, device: CUdevice) {
        let value = out!(value);
        sim.device(device)?;
        value.set(crate::device::attribute(&sim.config, attribute)?)
    }
    fn cuDeviceTotalMem(sim, bytes: *mut usize, device: CUdevice) {
        let bytes = out!(bytes);
        sim.device(device)?;
        bytes.set(sim.config.memory_bytes)
    }
    fn cuDeviceGetUuid(sim, uuid: *mut CUuuid, device: CUdevice) {
        let uuid = out!(uuid);
        let bytes = crate::device::uuid(sim.device(device)?);
        uuid.set(CUuuid { bytes: bytes.map(|byte| byte as c_char) })
    }
    fn cuDeviceGetGraphMemAttribute(sim, device: CUdevice, attribute: CUgraphMem_attribute, value: *mut c_void) {
        let value = out!(value.cast::<u64>());
        value.set(sim.graph_memory_attribute(sim.device(device)?, attribute)? as u64)
    }
    fn cuDeviceGraphMemTrim(sim, device: CUdevice) {
        sim.graph_memory_trim(sim.device(device)?)
    }
    fn cuDeviceCanAccessPeer(sim, can_access: *mut c_int, device: CUdevice, peer: CUdevice) {
        let can_access = out!(can_access);
        can_access.set((sim.device(device)? != sim.device(peer)?).into())
    }
    fn cuDevicePrimaryCtxRetain(sim, context: *mut CUcontext, device: CUdevice) {
        let context = out!(context);
        context.set(sim.retain_context(sim.device(device)?))
    }
    fn cuDevicePrimaryCtxRelease(sim, device: CUdevice) {
        sim.release_context(sim.device(device)?)
    }
    fn cuDevicePrimaryCtxGetState(sim, device: CUdevice, flags: *mut c_uint, active: *mut c_int) {
        let (flags, active) = (out!(flags), out!(active));
        let device = sim.device(device)?;
        flags.set(0)?;
        active.set(sim.lock().contexts.is_active(device).into())
    }

    fn cuCtxGetCurrent(sim, context: *mut CUcontext) {
        out!(context).set(sim.current())
    }
    fn cuCtxSetCurrent(sim, context: CUcontext) {
        sim.set_current(context)
    }
    fn cuCtxGetDevice(sim, device: *mut CUdevice) {
        let device = out!(device);
        device.set(sim.lock().current_device()? as CUdevice)
    }
    fn cuCtxSynchronize(sim) {
        sim.synchronize()
    }
    fn cuCtxRecordEvent(sim, context: CUcontext, event: CUevent) {
        sim.context_record_event(context, event)
    }

    fn cuMemGetInfo(sim, free: *mut usize, total: *mut usize) {
        let (free_out, total_out) = (out!(free), out!(total));
        let (free, total) = sim.memory_info()?;
        free_out.set(free)?;
        total_out.set(total)
    }
    fn cuMemAlloc(sim, pointer: *mut CUdeviceptr, size: usize) {
        let pointer = out!(pointer);
        pointer.set(sim.plain_alloc(size)?)
    }
    fn cuMemFree(sim, pointer: CUdeviceptr) {
        sim.plain_free(pointer)
    }
    fn cuMemAllocAsync(sim, pointer: *mut CUdeviceptr, size: usize, stream: CUstream) {
        let pointer = out!(pointer);
        pointer.set(sim.plain_alloc_async(size, stream)?)
    }
    fn cuMemFreeAsync(sim, pointer: CUdeviceptr, stream: CUstream) {
        sim.plain_free_async(pointer, stream)
    }

    fn cuMemHostRegister(sim, address: *mut c_void, size: usize, flags: c_uint) {
        sim.host_register(address.expose_provenance(), size, flags)
    }
    fn cuMemHostUnregister(sim, address: *mut c_void) {
        sim.host_unregister(address.addr())
    }

    fn cuMemcpyHtoD(sim, destination: CUdeviceptr, source: *const c_void, size: usize) {
        sim.launch_and_wait(host_to_device(destination, source, size))
    }
    fn cuMemcpyDtoH(sim, destination: *mut c_void, source: CUdeviceptr, size: usize) {
        sim.launch_and_wait(device_to_host(destination, source, size))
    }
    fn cuMemcpyDtoD(sim, destination: CUdeviceptr, source: CUdeviceptr, size: usize) {
        sim.launch_and_wait(device_to_device(destination, source, size))
    }
    fn cuMemcpyHtoDAsync(sim, destination: CUdeviceptr, source: *const c_void, size: usize, stream: CUstream) {
        sim.launch(stream, host_to_device(destination, source, size))
    }
    fn cuMemcpyDtoHAsync(sim, destination: *mut c_void, source: CUdeviceptr, size: usize, stream: CUstream) {
        sim.launch(stream, device_to_host(destination, source, size))
    }
    fn cuMemcpyDtoDAsync(sim, destination: CUdeviceptr, source: CUdeviceptr, size: usize, stream: CUstream) {
        sim.launch(stream, device_to_device(destination, source, size))
    }
    fn cuMemsetD8(sim, destination: CUdeviceptr, value: c_uchar, size: usize) {
        sim.launch_and_wait(Node::Memset { address: destination, value, bytes: size })
    }
    fn cuMemsetD8Async(sim, destination: CUdeviceptr, value: c_uchar, size: usize, stream: CUstream) {
        sim.launch(stream, Node::Memset { address: destination, value, bytes: size })
    }

    fn cuMemAddressReserve(sim, pointer: *mut CUdeviceptr, size: usize, alignment: usize, address: CUdeviceptr, flags: c_ulonglong) {
        let pointer = out!(pointer);
        no_flags(flags)?;
        pointer.set(sim.reserve(size, alignment, address)?)
    }
    fn cuMemAddressFree(sim, pointer: CUdeviceptr, size: usize) {
        sim.address_free(pointer, size)
    }
    fn cuMemCreate(sim, handle: *mut CUmemGenericAllocationHandle, size: usize, properties: *const CUmemAllocationProp, flags: c_ulonglong) {
        let handle = out!(handle);
        no_flags(flags)?;
        let properties = sim.read_properties(read!(properties))?;
        handle.set(sim.create(size, properties)?)
    }
    fn cuMemRelease(sim, handle: CUmemGenericAllocationHandle) {
        sim.release(handle)
    }
    fn cuMemMap(sim, pointer: CUdeviceptr, size: usize, offset: usize, handle: CUmemGenericAllocationHandle, flags: c_ulonglong) {
        no_flags(flags)?;
        sim.map(pointer, size, offset, handle)
    }
    fn cuMemUnmap(sim, pointer: CUdeviceptr, size: usize) {
        sim.unmap(pointer, size)
    }
    fn cuMemSetAccess(sim, pointer: CUdeviceptr, size: usize, descriptors: *const CUmemAccessDesc, count: usize) {
        if descriptors.is_null() || count == 0 {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        // SAFETY: the contract of the module: there are `count` descriptors.
        let descriptors = unsafe { std::slice::from_raw_parts(descriptors, count) };
        let read = descriptors.iter().map(|descriptor| sim.read_descriptor(descriptor));
        sim.set_access(pointer, size, &read.collect::<DriverResult<Vec<_>>>()?)
    }
    fn cuMemGetAccess(sim, flags: *mut c_ulonglong, location: *const CUmemLocation, pointer: CUdeviceptr) {
        let flags = out!(flags);
        let device = sim.read_location(read!(location))?;
        flags.set(sim.access(device, pointer)?.into())
    }
    fn cuMemGetAllocationGranularity(sim, granularity: *mut usize, properties: *const CUmemAllocationProp, option: CUmemAllocationGranularity_flags) {
        let granularity = out!(granularity);
        read_kind(read!(properties))?;
        if ![CU_MEM_ALLOC_GRANULARITY_MINIMUM, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED].contains(&option) {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        granularity.set(sim.config.granularity_bytes)
    }
    fn cuMemGetAllocationPropertiesFromHandle(sim, properties: *mut CUmemAllocationProp, handle: CUmemGenericAllocationHandle) {
        let properties = out!(properties);
        properties.set(write_properties(sim.properties(handle)?))
    }
    fn cuMemExportToShareableHandle(sim, shareable_handle: *mut c_void, handle: CUmemGenericAllocationHandle, handle_type: CUmemAllocationHandleType, flags: c_ulonglong) {
        no_flags(flags)?;
        if handle_type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        let descriptor = out!(shareable_handle.cast::<c_int>());
        descriptor.set(sim.export(handle)?)
    }
    fn cuMemImportFromShareableHandle(sim, handle: *mut CUmemGenericAllocationHandle, os_handle: *mut c_void, handle_type: CUmemAllocationHandleType) {
        let handle = out!(handle);
        if handle_type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        // Descriptor 0 is a null pointer here, which the driver refuses.
        if os_handle.is_null() {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        let descriptor = c_int::try_from(os_handle.addr()).map_err(|_| CUDA_ERROR_INVALID_VALUE)?;
        handle.set(sim.import(descriptor)?)
    }
    fn cuMemRetainAllocationHandle(sim, handle: *mut CUmemGenericAllocationHandle, address: *mut c_void) {
        let handle = out!(handle);
        handle.set(sim.retain_at(address.addr() as u64)?)
    }

    fn cuStreamCreate(sim, stream: *mut CUstream, flags: c_uint) {
        let stream = out!(stream);
        stream.set(sim.stream_create(flags)?)
    }
    fn cuStreamDestroy(sim, stream: CUstream) {
        sim.stream_destroy(stream)
    }
    fn cuStreamSynchronize(sim, stream: CUstream) {
        sim.stream_synchronize(stream)
    }
    fn cuStreamQuery(sim, stream: CUstream) {
        sim.stream_query(stream)
    }
    fn cuStreamWaitEvent(sim, stream: CUstream, event: CUevent, flags: c_uint) {
        no_flags(flags.into())?;
        sim.stream_wait_event(stream, event)
    }
    fn cuStreamIsCapturing(sim, stream: CUstream, capture_status: *mut CUstreamCaptureStatus) {
        let status = out!(capture_status);
        status.set(sim.capture_status(stream)?)
    }
    fn cuStreamBeginCapture(sim, stream: CUstream, mode: CUstreamCaptureMode) {
        sim.begin_capture(stream, mode)
    }
    fn cuStreamEndCapture(sim, stream: CUstream, graph: *mut CUgraph) {
        let ended = sim.end_capture(stream);
        let graph = out!(graph);
        graph.set(*ended.as_ref().unwrap_or(&std::ptr::null_mut()))?;
        ended.map(|_| ())
    }
    fn cuThreadExchangeStreamCaptureMode(sim, mode: *mut CUstreamCaptureMode) {
        let new = *read!(mode.cast_const());
        let before = sim.exchange_capture_mode(new)?;
        out!(mode).set(before)
    }
    fn cuLaunchHostFunc(sim, stream: CUstream, function: CUhostFn, user_data: *mut c_void) {
        let function = function.ok_or(CUDA_ERROR_INVALID_VALUE)?;
        let data = user_data.expose_provenance();
        sim.launch(stream, Node::HostFunction { function, data })
    }

    fn cuModuleLoadData(_sim, _module: *mut CUmodule, _image: *const c_void) {
        Err(CUDA_ERROR_NOT_SUPPORTED)
    }
    fn cuModuleUnload(_sim, _module: CUmodule) {
        Err(CUDA_ERROR_NOT_SUPPORTED)
    }
    fn cuModuleGetFunction(_sim, _function: *mut CUfunction, _module: CUmodule, _name: *const c_char) {
        Err(CUDA_ERROR_NOT_SUPPORTED)
    }
    fn cuLaunchKernel(_sim, _function: CUfunction, _grid_x: c_uint, _grid_y: c_uint, _grid_z: c_uint, _block_x: c_uint, _block_y: c_uint, _block_z: c_uint, _shared_bytes: c_uint, _stream: CUstream, _parameters: *mut *mut c_void, _extra: *mut *mut c_void) {
        Err(CUDA_ERROR_NOT_SUPPORTED)
    }

    fn cuEventCreate(sim, event: *mut CUevent, flags: c_uint) {
        let event = out!(event);
        event.set(sim.event_create(flags)?)
    }
    fn cuEventDestroy(sim, event: CUevent) {
        sim.event_destroy(event)
    }
    fn cuEventRecord(sim, event: CUevent, stream: CUstream) {
        sim.event_record(event, stream)
    }
    fn cuEventQuery(sim, event: CUevent) {
        sim.event_query(event)
    }
    fn cuEventSynchronize(sim, event: CUevent) {
        sim.event_synchronize(event)
    }
    fn cuEventElapsedTime(sim, milliseconds: *mut f32, start: CUevent, end: CUevent) {
        let milliseconds = out!(milliseconds);
        milliseconds.set(sim.event_elapsed(start, end)?)
    }

    fn cuGraphInstantiateWithFlags(sim, exec: *mut CUgraphExec, graph: CUgraph, flags: c_ulonglong) {
        const AUTO_FREE: c_ulonglong = CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH as c_ulonglong;
        let exec = out!(exec);
        no_flags(flags & !AUTO_FREE)?;
        exec.set(sim.graph_instantiate(graph, flags & AUTO_FREE != 0)?)
    }
    fn cuGraphUpload(sim, graph: CUgraphExec, stream: CUstream) {
        sim.graph_upload(graph, stream)
    }
    fn cuGraphLaunch(sim, graph: CUgraphExec, stream: CUstream) {
        sim.graph_launch(graph, stream)
    }
    fn cuGraphExecDestroy(sim, exec: CUgraphExec) {
        sim.graph_destroy(exec.addr(), true)
    }
    fn cuGraphGetNodes(sim, graph: CUgraph, nodes: *mut CUgraphNode, count: *mut usize) {
        let listed = sim.graph_nodes(graph)?;
        if nodes.is_null() {
            return out!(count).set(listed.len());
        }
        let room = *read!(count.cast_const());
        for number in 0..room {
            let node = listed.get(number).copied().unwrap_or(std::ptr::null_mut());
            // SAFETY: the contract of the module: there is room for `count` handles.
            unsafe { nodes.add(number).write(node) };
        }
        out!(count).set(room.min(listed.len()))
    }
    fn cuGraphNodeGetType(sim, node: CUgraphNode, kind: *mut CUgraphNodeType) {
        let kind = out!(kind);
        kind.set(sim.lock().graphs.node_kind(node.addr())?)
    }
    fn cuGraphDestroy(sim, graph: CUgraph) {
        sim.graph_destroy(graph.addr(), false)
    }
}

fn host_to_device(destination: CUdeviceptr, source: *const c_void, bytes: usize) -> Node {
    Node::Copy {
        to: Endpoint::Device(destination),
        from: Endpoint::Host(source.expose_provenance()),
        bytes,
    }
}

fn device_to_host(destination: *mut c_void, source: CUdeviceptr, bytes: usize) -> Node {
    Node::Copy {
        to: Endpoint::Host(destination.expose_provenance()),
        from: Endpoint::Device(source),
        bytes,
    }
}

fn device_to_device(destination: CUdeviceptr, source: CUdeviceptr, bytes: usize) -> Node {
    Node::Copy {
        to: Endpoint::Device(destination),
        from: Endpoint::Device(source),
        bytes,
    }
}
