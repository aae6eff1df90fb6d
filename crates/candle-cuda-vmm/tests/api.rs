//! Fixes every public name and signature of 0.1.1: code that compiles here compiled there, except
//! for the types of cudarc, which are now those of `cuda_vmm::sys`.

use candle_core::Device;
use candle_cuda_vmm::cuda_ffi::{
    self, AllocationProp, DevicePtr, MemGenericAllocationHandle, MemoryLocationType,
};
use candle_cuda_vmm::{
    AccessFlags, GlobalMemoryStats, MemoryStats, PhysicalMemoryHandle, Result, SharedMemoryPool,
    VERSION, VirtualAddressRange, VirtualMemoryPool, VmmError,
};
use cuda_vmm::sys;

/// States a value's type, so that a changed signature does not compile.
fn is<T>(_: T) {}

#[test]
fn names_stand_where_they_stood() {
    is::<fn(usize) -> candle_cuda_vmm::error::Result<usize>>(Ok);
    is::<fn(candle_cuda_vmm::error::VmmError) -> VmmError>(|error| error);
    is::<fn(candle_cuda_vmm::physical_memory::PhysicalMemoryHandle) -> PhysicalMemoryHandle>(|x| x);
    is::<fn(candle_cuda_vmm::mapping::VirtualAddressRange) -> VirtualAddressRange>(|x| x);
    is::<fn(candle_cuda_vmm::virtual_memory::VirtualMemoryPool) -> VirtualMemoryPool>(|x| x);
    is::<fn(candle_cuda_vmm::virtual_memory::SharedMemoryPool) -> SharedMemoryPool>(|x| x);
    is::<fn(candle_cuda_vmm::virtual_memory::MemoryStats) -> MemoryStats>(|x| x);
    is::<fn(candle_cuda_vmm::virtual_memory::GlobalMemoryStats) -> GlobalMemoryStats>(|x| x);
    is::<fn(cuda_ffi::AccessFlags) -> AccessFlags>(|x| x);
    is::<&str>(VERSION);
    assert_eq!(VERSION, env!("CARGO_PKG_VERSION"));
    is::<fn() -> bool>(candle_cuda_vmm::is_vmm_supported);
}

#[test]
fn the_elastic_pool_keeps_its_signatures() {
    type Pool = VirtualMemoryPool;
    is::<fn(usize, usize, Device) -> Result<Pool>>(Pool::new);
    is::<fn(&mut Pool, usize, usize) -> Result<usize>>(Pool::allocate);
    is::<fn(&mut Pool, usize, usize) -> Result<()>>(Pool::deallocate);
    is::<fn(&Pool) -> usize>(Pool::physical_memory_usage);
    is::<fn(&Pool) -> usize>(Pool::capacity);
    is::<fn(&Pool) -> usize>(Pool::base_address);
    is::<fn(&Pool) -> usize>(Pool::page_size);
    is::<fn(&Pool, usize, usize) -> bool>(Pool::is_mapped);
    is::<fn(&mut Pool) -> Result<()>>(Pool::compact);
    is::<fn(&Pool) -> MemoryStats>(Pool::stats);
}

#[test]
fn the_shared_pool_keeps_its_signatures() {
    type Pool = SharedMemoryPool;
    is::<fn(usize, Device) -> Result<Pool>>(Pool::new);
    is::<fn(&mut Pool, &str, usize) -> Result<()>>(Pool::register_model);
    is::<fn(&mut Pool, &str, usize) -> Result<usize>>(Pool::allocate_for_model);
    is::<fn(&mut Pool, &str, usize, usize) -> Result<()>>(Pool::deallocate_for_model);
    is::<fn(&Pool, &str) -> Option<MemoryStats>>(Pool::get_model_stats);
    is::<fn(&Pool) -> GlobalMemoryStats>(Pool::global_stats);
    is::<fn(&mut Pool, &str) -> Result<()>>(Pool::unregister_model);
}

#[test]
fn statistics_keep_their_fields() {
    let MemoryStats {
        virtual_capacity,
        physical_usage,
        mapped_pages,
        fragmentation_ratio,
    } = MemoryStats {
        virtual_capacity: 8,
        physical_usage: 4,
        mapped_pages: 1,
        fragmentation_ratio: 0.5,
    }
    .clone();
    is::<(usize, usize, usize, f32)>((
        virtual_capacity,
        physical_usage,
        mapped_pages,
        fragmentation_ratio,
    ));
    let GlobalMemoryStats {
        physical_limit,
        physical_usage,
        num_models,
    } = GlobalMemoryStats {
        physical_limit: 8,
        physical_usage: 4,
        num_models: 1,
    }
    .clone();
    is::<(usize, usize, usize)>((physical_limit, physical_usage, num_models));
}

#[test]
fn physical_memory_keeps_its_signatures() {
    type Handle = PhysicalMemoryHandle;
    is::<fn(usize, &Device) -> Result<Handle>>(Handle::new);
    is::<unsafe fn(MemGenericAllocationHandle, usize, i32) -> Handle>(Handle::from_raw);
    is::<fn(&Handle) -> usize>(Handle::size);
    is::<fn(&Handle) -> i32>(Handle::device_ordinal);
    is::<fn(&Handle) -> MemGenericAllocationHandle>(Handle::as_raw);
    is::<fn(Handle) -> MemGenericAllocationHandle>(Handle::into_raw);
}

#[test]
fn address_ranges_and_mapping_keep_their_signatures() {
    type Range = VirtualAddressRange;
    is::<fn(usize, usize) -> Result<Range>>(Range::new);
    is::<unsafe fn(DevicePtr, usize, usize) -> Range>(Range::from_raw);
    is::<fn(&Range) -> usize>(Range::base_address);
    is::<fn(&Range) -> usize>(Range::size);
    is::<fn(&Range) -> usize>(Range::alignment);
    is::<fn(&Range) -> DevicePtr>(Range::as_ptr);
    is::<fn(&Range, usize) -> Result<DevicePtr>>(Range::ptr_at_offset);
    is::<fn(Range) -> (DevicePtr, usize)>(Range::into_raw);

    type Map = fn(&Range, usize, &PhysicalMemoryHandle, usize, usize) -> Result<()>;
    is::<Map>(candle_cuda_vmm::map_memory);
    is::<Map>(candle_cuda_vmm::mapping::map_memory);
    type Unmap = fn(&Range, usize, usize) -> Result<()>;
    is::<Unmap>(candle_cuda_vmm::unmap_memory);
    is::<Unmap>(candle_cuda_vmm::mapping::unmap_memory);
    type SetAccess = fn(&Range, usize, usize, i32, AccessFlags) -> Result<()>;
    is::<SetAccess>(candle_cuda_vmm::set_memory_access);
    is::<SetAccess>(candle_cuda_vmm::mapping::set_memory_access);
}

#[test]
fn the_raw_calls_keep_their_signatures() {
    type Handle = MemGenericAllocationHandle;
    is::<fn(Handle) -> sys::CUmemGenericAllocationHandle>(|handle| handle);
    is::<fn(DevicePtr) -> sys::CUdeviceptr>(|pointer| pointer);
    is::<unsafe fn(usize, &AllocationProp) -> Result<Handle>>(cuda_ffi::mem_create);
    is::<unsafe fn(Handle) -> Result<()>>(cuda_ffi::mem_release);
    is::<unsafe fn(usize, usize, DevicePtr) -> Result<DevicePtr>>(cuda_ffi::mem_address_reserve);
    is::<unsafe fn(DevicePtr, usize) -> Result<()>>(cuda_ffi::mem_address_free);
    is::<unsafe fn(DevicePtr, usize, usize, Handle) -> Result<()>>(cuda_ffi::mem_map);
    is::<unsafe fn(DevicePtr, usize) -> Result<()>>(cuda_ffi::mem_unmap);
    is::<unsafe fn(DevicePtr, usize, i32, AccessFlags) -> Result<()>>(cuda_ffi::mem_set_access);
    type Granularity =
        unsafe fn(&AllocationProp, sys::CUmemAllocationGranularity_flags) -> Result<usize>;
    is::<Granularity>(cuda_ffi::mem_get_allocation_granularity);
    is::<fn(i32) -> Result<usize>>(cuda_ffi::get_recommended_granularity);
    is::<fn(i32) -> Result<usize>>(cuda_ffi::get_minimum_granularity);

    is::<fn(i32) -> AllocationProp>(AllocationProp::device);
    let AllocationProp {
        location_type,
        device_ordinal,
    } = AllocationProp::device(3).clone();
    assert_eq!(location_type, MemoryLocationType::Device);
    is::<i32>(device_ordinal);
    assert_eq!(device_ordinal, 3);
    let flags = [AccessFlags::None, AccessFlags::Read, AccessFlags::ReadWrite];
    assert_eq!(flags.map(|flag| flag as i32), [0, 1, 3]);
}

/// Has no wildcard, so it names every variant and every field.
fn describe(error: VmmError) -> String {
    match error {
        VmmError::CudaError(text)
        | VmmError::MappingFailed(text)
        | VmmError::UnmappingFailed(text)
        | VmmError::ModelNotFound(text)
        | VmmError::ModelAlreadyExists(text)
        | VmmError::Other(text) => text,
        VmmError::OutOfVirtualMemory {
            requested,
            available,
        }
        | VmmError::OutOfPhysicalMemory {
            requested,
            available,
        } => format!("{requested} {available}"),
        VmmError::InvalidOffset {
            offset,
            size,
            capacity,
        } => format!("{offset} {size} {capacity}"),
        VmmError::InvalidAlignment { actual, required } => format!("{actual} {required}"),
        VmmError::AlreadyMapped { offset, size } | VmmError::NotMapped { offset, size } => {
            format!("{offset} {size}")
        }
        VmmError::InvalidPageSize(bytes) => bytes.to_string(),
        VmmError::UnsupportedDevice => String::new(),
        VmmError::CandleError(error) => error.to_string(),
        VmmError::Vmm(error) => error.to_string(),
        VmmError::UnknownShape { layer } => layer.to_string(),
        VmmError::UnknownLayer { layer, layers } => format!("{layer} {layers}"),
        VmmError::InvalidAttention { option, value } => format!("{option} {value}"),
        VmmError::LengthBeyondCapacity {
            sequence,
            length,
            capacity,
        } => format!("{sequence} {length} {capacity}"),
        VmmError::Graph(error) => error.to_string(),
        VmmError::Weights(error) => error.to_string(),
        VmmError::MissingLengths | VmmError::PlanOnAnotherDevice | VmmError::NoAttentionKernels => {
            String::new()
        }
        VmmError::RowBeyondCapacity {
            token,
            sequence,
            row,
            capacity,
        } => format!("{token} {sequence} {row} {capacity}"),
        VmmError::UnknownSequence { sequence, batch } => format!("{sequence} {batch}"),
        VmmError::UnknownPosition {
            token,
            position,
            positions_max,
        } => format!("{token} {position} {positions_max}"),
        VmmError::InvalidSpan {
            span,
            queries,
            keys,
        } => format!("{span} {queries} {keys}"),
        VmmError::UnsupportedHead {
            dim,
            value_dim,
            dtype,
        } => format!("{dim} {value_dim} {dtype:?}"),
        VmmError::UnsupportedBlockSize { size } => size.to_string(),
        VmmError::DifferentStrides {
            sequence,
            strides,
            expected,
        } => format!("{sequence} {strides:?} {expected:?}"),
        VmmError::BeyondPlan { heads, heads_max } => format!("{heads} {heads_max}"),
    }
}

#[test]
fn errors_keep_their_variants_and_constructors() {
    is::<fn(&'static str) -> VmmError>(VmmError::cuda::<&'static str>);
    is::<fn(String) -> VmmError>(VmmError::other::<String>);
    is::<fn(candle_core::Error) -> VmmError>(VmmError::from);
    is::<fn(cuda_vmm::VmmError) -> VmmError>(VmmError::from);
    #[cfg(feature = "cuda")]
    is::<fn(candle_core::cuda::cudarc::driver::result::DriverError) -> VmmError>(
        VmmError::from_cuda_result,
    );
    assert_eq!(describe(VmmError::cuda("a call")), "a call");
    assert_eq!(describe(VmmError::other("words")), "words");
}

#[test]
fn types_cross_threads() {
    fn crosses<T: Send + Sync + 'static>() {}
    crosses::<VirtualMemoryPool>();
    crosses::<candle_cuda_vmm::ElasticBlocks>();
    crosses::<SharedMemoryPool>();
    crosses::<PhysicalMemoryHandle>();
    crosses::<VirtualAddressRange>();
    fn is_error<E: std::error::Error + Send + Sync + 'static>() {}
    is_error::<VmmError>();
}

/// Uses the core's types by this crate's names, which a program without the core in its manifest
/// needs.
#[test]
fn the_types_of_the_core_that_signatures_use_are_here() {
    use candle_cuda_vmm::{
        Account, BlockBacking, BlockError, BlockId, BlockPin, BlockStats, Driver, ElasticBlocks,
        Engine, EngineOptions, EngineStats, PoolStats, Quota, ReclaimPlan, TensorPool,
        TensorPoolOptions,
    };

    is::<fn() -> Result<Driver>>(candle_cuda_vmm::device::default_driver);
    is::<fn(&TensorPool) -> &Engine>(TensorPool::engine);
    is::<fn(TensorPoolOptions, EngineOptions) -> TensorPoolOptions>(TensorPoolOptions::engine);
    is::<fn(&ElasticBlocks, Vec<BlockId>) -> Result<BlockPin>>(ElasticBlocks::pin);
    is::<fn(&ElasticBlocks, &ReclaimPlan) -> Result<()>>(ElasticBlocks::commit);
    is::<fn(&ElasticBlocks) -> BlockStats>(ElasticBlocks::stats);
    is::<fn(&BlockBacking) -> usize>(BlockBacking::backed_prefix);
    is::<fn(BlockError) -> String>(|error| error.to_string());
    is::<fn(&mut SharedMemoryPool, &str, usize, Quota) -> Result<()>>(
        SharedMemoryPool::register_model_with,
    );
    is::<fn(&SharedMemoryPool, &str) -> Result<Account>>(SharedMemoryPool::model);
    is::<fn(&TensorPool) -> &Account>(TensorPool::account);
    is::<fn(&SharedMemoryPool) -> EngineStats>(SharedMemoryPool::detailed_stats);
    is::<fn(&VirtualMemoryPool) -> PoolStats>(VirtualMemoryPool::detailed_stats);
    is::<fn(&VmmError) -> Option<candle_cuda_vmm::sys::CUresult>>(VmmError::driver_code);
}
