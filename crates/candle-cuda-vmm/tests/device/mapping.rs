//! Ranges and manual mapping, with the default driver.

use crate::common::{GIB, GRANULE, UnderTest, open};
use crate::refused;
use candle_cuda_vmm::cuda_vmm::{DriverKind, Stream, VmmError as Core, sys};
use candle_cuda_vmm::{
    AccessFlags, PhysicalMemoryHandle, VirtualAddressRange, VmmError, cuda_ffi, map_memory,
    set_memory_access, unmap_memory,
};

const SIZE: usize = 64 * GRANULE;

/// Returns the device under test, if functions without a device argument use it. With the feature
/// `cuda` they use the GPU. If the CPU device is under test then, only a check that the two do not
/// mix is possible.
fn open_default() -> Option<UnderTest> {
    let test = open();
    if test.is_default() {
        return Some(test);
    }
    assert!(cfg!(feature = "cuda") && test.kind == DriverKind::Simulated);
    let memory = PhysicalMemoryHandle::new(GRANULE, &test.device).unwrap();
    if let Ok(range) = VirtualAddressRange::new(SIZE, GRANULE) {
        refused!(
            map_memory(&range, 0, &memory, 0, GRANULE),
            VmmError::Vmm(Core::WrongDriver)
        );
    }
    None
}

fn range() -> VirtualAddressRange {
    VirtualAddressRange::new(SIZE, GRANULE).unwrap()
}

fn memory(test: &UnderTest, pages: usize) -> PhysicalMemoryHandle {
    PhysicalMemoryHandle::new(pages * GRANULE, &test.device).unwrap()
}

/// Maps memory of `pages` pages at `offset`, readable and writable.
fn map(test: &UnderTest, range: &VirtualAddressRange, offset: usize, pages: usize) {
    let memory = memory(test, pages);
    map_memory(range, offset, &memory, 0, pages * GRANULE).unwrap();
    set_memory_access(
        range,
        offset,
        pages * GRANULE,
        test.ordinal(),
        AccessFlags::ReadWrite,
    )
    .unwrap();
}

#[test]
fn memory_management_is_supported_here() {
    if let Some(_test) = open_default() {
        assert!(candle_cuda_vmm::is_vmm_supported());
    }
}

#[test]
fn a_range_knows_its_extent() {
    let Some(_test) = open_default() else { return };
    let range = VirtualAddressRange::new(SIZE, 4 * GRANULE).unwrap();
    assert_eq!((range.size(), range.alignment()), (SIZE, 4 * GRANULE));
    assert_eq!(range.base_address() % (4 * GRANULE), 0);
    assert_eq!(range.base_address() as u64, range.as_ptr());
    assert_eq!(range.ptr_at_offset(0).unwrap(), range.as_ptr());
    assert_eq!(
        range.ptr_at_offset(SIZE - 1).unwrap(),
        range.as_ptr() + SIZE as u64 - 1
    );
    for offset in [SIZE, SIZE + 1, usize::MAX] {
        refused!(
            range.ptr_at_offset(offset),
            VmmError::InvalidOffset { offset: at, size: 0, capacity: SIZE } if at == offset
        );
    }
}

#[test]
fn a_range_refuses_bad_sizes_and_alignments() {
    let Some(_test) = open_default() else { return };
    const ODD: usize = 3 * GRANULE;
    for alignment in [0, 3, ODD] {
        refused!(
            VirtualAddressRange::new(SIZE, alignment),
            VmmError::InvalidAlignment { actual, required: 0 } if actual == alignment
        );
    }
    refused!(
        VirtualAddressRange::new(0, GRANULE),
        VmmError::Vmm(Core::ZeroSize { .. })
    );
    const MORE: usize = GRANULE + 1;
    refused!(
        VirtualAddressRange::new(MORE, GRANULE),
        VmmError::InvalidAlignment {
            actual: MORE,
            required: GRANULE
        }
    );
    refused!(
        VirtualAddressRange::new(usize::MAX, GRANULE),
        VmmError::InvalidAlignment {
            actual: usize::MAX,
            required: GRANULE
        }
    );
    let error = VirtualAddressRange::new(1 << 47, GRANULE).unwrap_err();
    assert_eq!(error.driver_code(), Some(sys::CUDA_ERROR_OUT_OF_MEMORY));
}

#[test]
fn raw_handles_can_be_given_up_and_taken_back() {
    let Some(test) = open_default() else { return };
    let free = test.free_bytes();
    let memory = memory(&test, 1);
    let handle = memory.as_raw();
    assert_eq!(memory.into_raw(), handle);
    test.expect_in_use(free, GRANULE);
    // SAFETY: `into_raw` just returned the handle, of this size, on this device.
    let memory = unsafe { PhysicalMemoryHandle::from_raw(handle, GRANULE, test.ordinal()) };
    assert_eq!((memory.as_raw(), memory.size()), (handle, GRANULE));
    drop(memory);
    test.expect_in_use(free, 0);

    let range = range();
    map(&test, &range, 0, 1);
    let (ptr, size) = range.into_raw();
    test.expect_in_use(free, GRANULE);
    // SAFETY: `into_raw` just returned the range, of this size and alignment.
    let range = unsafe { VirtualAddressRange::from_raw(ptr, size, GRANULE) };
    assert_eq!((range.as_ptr(), range.size()), (ptr, SIZE));
    set_memory_access(&range, 0, GRANULE, test.ordinal(), AccessFlags::ReadWrite).unwrap();
    unmap_memory(&range, 0, GRANULE).unwrap();
    drop(range);
    test.expect_in_use(free, 0);
}

#[test]
fn mapped_memory_can_be_written_and_read() {
    let Some(test) = open_default() else { return };
    let stream = Stream::new(&test.core).unwrap();
    let range = range();
    // The range keeps the memory; the handle need not live.
    map(&test, &range, 2 * GRANULE, 2);
    let address = range.ptr_at_offset(2 * GRANULE + 5).unwrap();
    let mut bytes = [0; 3];
    // SAFETY: two pages are mapped there, readable and writable, until the range is dropped.
    unsafe {
        stream.write(address, &[1, 2, 3]).unwrap();
        stream.read(address, &mut bytes).unwrap();
    }
    assert_eq!(bytes, [1, 2, 3]);
}

#[test]
fn one_memory_can_be_mapped_twice() {
    let Some(test) = open_default() else { return };
    let stream = Stream::new(&test.core).unwrap();
    let (range, memory) = (range(), memory(&test, 1));
    for offset in [0, 8 * GRANULE] {
        map_memory(&range, offset, &memory, 0, GRANULE).unwrap();
        set_memory_access(
            &range,
            offset,
            GRANULE,
            test.ordinal(),
            AccessFlags::ReadWrite,
        )
        .unwrap();
    }
    let mut byte = [0];
    // SAFETY: both pages are mapped, readable and writable.
    unsafe {
        stream.write(range.as_ptr(), &[42]).unwrap();
        stream
            .read(range.ptr_at_offset(8 * GRANULE).unwrap(), &mut byte)
            .unwrap();
    }
    assert_eq!(byte, [42]);
}

#[test]
fn dropping_a_range_unmaps_and_returns_every_byte() {
    let Some(test) = open_default() else { return };
    let free = test.free_bytes();
    let range = range();
    for page in [0, 1, 5] {
        map(&test, &range, page * GRANULE, 1);
    }
    test.expect_in_use(free, 3 * GRANULE);
    drop(range);
    test.expect_in_use(free, 0);
}

#[test]
fn map_memory_refuses_bad_arguments() {
    let Some(test) = open_default() else { return };
    let (range, memory) = (range(), memory(&test, 2));
    const TWO: usize = 2 * GRANULE;
    let try_map =
        |offset, physical_offset, size| map_memory(&range, offset, &memory, physical_offset, size);
    refused!(try_map(0, 0, 0), VmmError::Vmm(Core::ZeroSize { .. }));
    refused!(
        try_map(SIZE, 0, TWO),
        VmmError::InvalidOffset {
            offset: SIZE,
            size: TWO,
            capacity: SIZE
        }
    );
    refused!(
        try_map(usize::MAX, 0, TWO),
        VmmError::InvalidOffset {
            offset: usize::MAX,
            size: TWO,
            capacity: SIZE
        }
    );
    refused!(
        try_map(0, GRANULE, TWO),
        VmmError::InvalidOffset {
            offset: GRANULE,
            size: TWO,
            capacity: TWO
        }
    );
    refused!(
        try_map(0, usize::MAX, TWO),
        VmmError::InvalidOffset {
            offset: usize::MAX,
            size: TWO,
            capacity: TWO
        }
    );
    refused!(
        try_map(1, 0, TWO),
        VmmError::InvalidAlignment {
            actual: 1,
            required: GRANULE
        }
    );
    refused!(try_map(0, 0, GRANULE), VmmError::MappingFailed(_));
    refused!(try_map(0, GRANULE, GRANULE), VmmError::MappingFailed(_));
    refused!(
        unmap_memory(&range, 0, SIZE),
        VmmError::NotMapped {
            offset: 0,
            size: SIZE
        }
    );
    try_map(GRANULE, 0, TWO).unwrap();
    for offset in [0, GRANULE, TWO] {
        refused!(
            try_map(offset, 0, TWO),
            VmmError::AlreadyMapped { offset: at, size: TWO } if at == offset
        );
    }
}

#[test]
fn unmap_memory_refuses_bad_arguments() {
    let Some(test) = open_default() else { return };
    let range = range();
    map(&test, &range, GRANULE, 2);
    map(&test, &range, 4 * GRANULE, 1);
    refused!(
        unmap_memory(&range, 0, 0),
        VmmError::Vmm(Core::ZeroSize { .. })
    );
    const MORE: usize = SIZE + 1;
    refused!(
        unmap_memory(&range, 0, MORE),
        VmmError::InvalidOffset {
            offset: 0,
            size: MORE,
            capacity: SIZE
        }
    );
    refused!(
        unmap_memory(&range, 1, usize::MAX),
        VmmError::InvalidOffset {
            offset: 1,
            size: usize::MAX,
            capacity: SIZE
        }
    );
    refused!(
        unmap_memory(&range, 3 * GRANULE, GRANULE),
        VmmError::NotMapped { size: GRANULE, .. }
    );
    refused!(
        unmap_memory(&range, GRANULE, GRANULE),
        VmmError::UnmappingFailed(_)
    );
    refused!(
        unmap_memory(&range, 2 * GRANULE, 4 * GRANULE),
        VmmError::UnmappingFailed(_)
    );
    // One call unmaps whole mappings with gaps between them.
    unmap_memory(&range, 0, 8 * GRANULE).unwrap();
    refused!(
        unmap_memory(&range, 0, 8 * GRANULE),
        VmmError::NotMapped { .. }
    );
}

#[test]
fn set_memory_access_refuses_bad_arguments() {
    let Some(test) = open_default() else { return };
    let (range, here) = (range(), test.ordinal());
    map(&test, &range, 0, 2);
    map(&test, &range, 2 * GRANULE, 1);
    let set = |offset, size, device| {
        set_memory_access(&range, offset, size, device, AccessFlags::ReadWrite)
    };
    refused!(set(0, 0, here), VmmError::Vmm(Core::ZeroSize { .. }));
    const MORE: usize = SIZE + 1;
    refused!(
        set(0, MORE, here),
        VmmError::InvalidOffset {
            offset: 0,
            size: MORE,
            capacity: SIZE
        }
    );
    refused!(
        set(1, usize::MAX, here),
        VmmError::InvalidOffset {
            offset: 1,
            size: usize::MAX,
            capacity: SIZE
        }
    );
    refused!(set(0, GRANULE, here), VmmError::MappingFailed(_));
    refused!(
        set(8 * GRANULE, GRANULE, here),
        VmmError::NotMapped { size: GRANULE, .. }
    );
    refused!(
        set(0, 4 * GRANULE, here),
        VmmError::NotMapped { offset: 0, .. }
    );
    for device in [-1, 1000] {
        refused!(set(0, 2 * GRANULE, device), VmmError::Vmm(Core::Driver(_)));
    }
    set(0, 3 * GRANULE, here).unwrap();
    // Not every driver accepts less than full access.
    if test.kind == DriverKind::Simulated {
        for flags in [AccessFlags::Read, AccessFlags::None] {
            set_memory_access(&range, 0, 3 * GRANULE, here, flags).unwrap();
        }
    }
}

#[test]
fn objects_cross_threads() {
    let Some(test) = open_default() else { return };
    let free = test.free_bytes();
    let range = VirtualAddressRange::new(GIB, GRANULE).unwrap();
    let memory = memory(&test, 1);
    std::thread::spawn(move || {
        map_memory(&range, 0, &memory, 0, GRANULE).unwrap();
    })
    .join()
    .unwrap();
    test.expect_in_use(free, 0);
    // The raw calls use the same driver.
    assert_eq!(
        cuda_ffi::get_minimum_granularity(test.ordinal()).unwrap(),
        GRANULE
    );
}
