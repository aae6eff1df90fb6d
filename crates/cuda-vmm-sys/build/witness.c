/* What the C compiler makes of the header: sizes, alignments, field offsets and enum values.
 * tests/layout.rs asks for each by name and compares it with the Rust side. */
#include <stddef.h>
#include <string.h>
#include <cuda.h>

struct witness_entry {
    const char *name;
    unsigned long long value;
};

#define SIZE(type) {"size " #type, sizeof(type)}, {"align " #type, _Alignof(type)}
#define OFFSET(type, field) {"offset " #type "." #field, offsetof(type, field)}
#define VALUE(constant) {"value " #constant, (unsigned long long)(constant)}

static const struct witness_entry entries[] = {
    SIZE(CUresult),
    SIZE(CUdevice),
    SIZE(CUdeviceptr),
    SIZE(CUmemGenericAllocationHandle),
    SIZE(CUdevice_attribute),
    SIZE(CUmemLocationType),
    SIZE(CUmemAllocationType),
    SIZE(CUmemAllocationHandleType),
    SIZE(CUmemAllocationGranularity_flags),
    SIZE(CUmemAccess_flags),
    SIZE(CUstreamCaptureStatus),
    SIZE(CUstreamCaptureMode),
    SIZE(CUstream_flags),
    SIZE(CUevent_flags),
    SIZE(CUdriverProcAddress_flags),
    SIZE(CUmemLocation),
    SIZE(CUmemAllocationProp),
    SIZE(CUmemAccessDesc),
    SIZE(CUuuid),
    OFFSET(CUmemLocation, type),
    OFFSET(CUmemAllocationProp, type),
    OFFSET(CUmemAllocationProp, requestedHandleTypes),
    OFFSET(CUmemAllocationProp, location),
    OFFSET(CUmemAllocationProp, win32HandleMetaData),
    OFFSET(CUmemAllocationProp, allocFlags),
    OFFSET(CUmemAllocationProp, allocFlags.compressionType),
    OFFSET(CUmemAllocationProp, allocFlags.gpuDirectRDMACapable),
    OFFSET(CUmemAllocationProp, allocFlags.usage),
    OFFSET(CUmemAccessDesc, location),
    OFFSET(CUmemAccessDesc, flags),
    OFFSET(CUuuid, bytes),
    OFFSET(CUmemLocation, id),
    VALUE(CUDA_SUCCESS),
    VALUE(CUDA_ERROR_INVALID_VALUE),
    VALUE(CUDA_ERROR_OUT_OF_MEMORY),
    VALUE(CUDA_ERROR_NOT_INITIALIZED),
    VALUE(CUDA_ERROR_DEINITIALIZED),
    VALUE(CUDA_ERROR_STUB_LIBRARY),
    VALUE(CUDA_ERROR_NO_DEVICE),
    VALUE(CUDA_ERROR_INVALID_DEVICE),
    VALUE(CUDA_ERROR_INVALID_CONTEXT),
    VALUE(CUDA_ERROR_MAP_FAILED),
    VALUE(CUDA_ERROR_ECC_UNCORRECTABLE),
    VALUE(CUDA_ERROR_OPERATING_SYSTEM),
    VALUE(CUDA_ERROR_INVALID_HANDLE),
    VALUE(CUDA_ERROR_ILLEGAL_STATE),
    VALUE(CUDA_ERROR_NOT_FOUND),
    VALUE(CUDA_ERROR_NOT_READY),
    VALUE(CUDA_ERROR_ILLEGAL_ADDRESS),
    VALUE(CUDA_ERROR_LAUNCH_TIMEOUT),
    VALUE(CUDA_ERROR_CONTEXT_IS_DESTROYED),
    VALUE(CUDA_ERROR_ASSERT),
    VALUE(CUDA_ERROR_HARDWARE_STACK_ERROR),
    VALUE(CUDA_ERROR_ILLEGAL_INSTRUCTION),
    VALUE(CUDA_ERROR_MISALIGNED_ADDRESS),
    VALUE(CUDA_ERROR_INVALID_ADDRESS_SPACE),
    VALUE(CUDA_ERROR_INVALID_PC),
    VALUE(CUDA_ERROR_LAUNCH_FAILED),
    VALUE(CUDA_ERROR_NOT_PERMITTED),
    VALUE(CUDA_ERROR_NOT_SUPPORTED),
    VALUE(CUDA_ERROR_SYSTEM_NOT_READY),
    VALUE(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH),
    VALUE(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED),
    VALUE(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED),
    VALUE(CUDA_ERROR_STREAM_CAPTURE_MERGE),
    VALUE(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED),
    VALUE(CUDA_ERROR_STREAM_CAPTURE_UNJOINED),
    VALUE(CUDA_ERROR_STREAM_CAPTURE_ISOLATION),
    VALUE(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT),
    VALUE(CUDA_ERROR_CAPTURED_EVENT),
    VALUE(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD),
    VALUE(CUDA_ERROR_UNKNOWN),
    VALUE(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
    VALUE(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
    VALUE(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
    VALUE(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED),
    VALUE(CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED),
    VALUE(CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED),
    VALUE(CU_MEM_LOCATION_TYPE_INVALID),
    VALUE(CU_MEM_LOCATION_TYPE_DEVICE),
    VALUE(CU_MEM_ALLOCATION_TYPE_INVALID),
    VALUE(CU_MEM_ALLOCATION_TYPE_PINNED),
    VALUE(CU_MEM_HANDLE_TYPE_NONE),
    VALUE(CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
    VALUE(CU_MEM_ALLOC_GRANULARITY_MINIMUM),
    VALUE(CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
    VALUE(CU_MEM_ACCESS_FLAGS_PROT_NONE),
    VALUE(CU_MEM_ACCESS_FLAGS_PROT_READ),
    VALUE(CU_MEM_ACCESS_FLAGS_PROT_READWRITE),
    VALUE(CU_STREAM_CAPTURE_STATUS_NONE),
    VALUE(CU_STREAM_CAPTURE_STATUS_ACTIVE),
    VALUE(CU_STREAM_CAPTURE_STATUS_INVALIDATED),
    VALUE(CU_STREAM_CAPTURE_MODE_GLOBAL),
    VALUE(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL),
    VALUE(CU_STREAM_CAPTURE_MODE_RELAXED),
    VALUE(CU_STREAM_DEFAULT),
    VALUE(CU_STREAM_NON_BLOCKING),
    VALUE(CU_EVENT_DEFAULT),
    VALUE(CU_EVENT_DISABLE_TIMING),
    VALUE(CU_GET_PROC_ADDRESS_DEFAULT),
    VALUE(CU_GET_PROC_ADDRESS_LEGACY_STREAM),
};

/* Returns 1 and writes the value if the witness knows the name, else 0. */
int cuda_vmm_witness(const char *name, unsigned long long *value)
{
    for (size_t i = 0; i < sizeof entries / sizeof entries[0]; i++) {
        if (strcmp(entries[i].name, name) == 0) {
            *value = entries[i].value;
            return 1;
        }
    }
    return 0;
}

unsigned long long cuda_vmm_witness_count(void)
{
    return sizeof entries / sizeof entries[0];
}
