//! Ranges, physical memory, and mapping by hand, of the default driver.

use crate::common::{GIB, PAGE, UnderTest, open};
use crate::refused;
use candle_cuda_vmm::cuda_vmm::{DriverKind, Stream, VmmError as Core, sys};
use candle_cuda_vmm::{
    AccessFlags, PhysicalMemoryHandle, VirtualAddressRange, VmmError, cuda_ffi, map_memory,
    set_memory_access, unmap_memory,
};

const SIZE: usize = 64 * PAGE;

/// The device under test, if functions without a device argument reach it. With the feature `cuda` they
/// reach the GPU, so with the CPU device under test there is nothing to see but that the two do not mix.
fn open_default() -> Option<UnderTest> {
    let test = open();
    if test.is_default() {
        return Some(test);
    }
    assert!(cfg!(feature = "cuda") && test.kind == DriverKind::Simulated);
    let memory = PhysicalMemoryHandle::new(PAGE, &test.device).unwrap();
    if let Ok(range) = VirtualAddressRange::new(SIZE, PAGE) {
        refused!(
            map_memory(&range, 0, &memory, 0, PAGE),
            VmmError::Vmm(Core::WrongDriver)
        );
    }
    None
}

fn range() -> VirtualAddressRange {
    VirtualAddressRange::new(SIZE, PAGE).unwrap()
}

fn memory(test: &UnderTest, pages: usize) -> PhysicalMemoryHandle {
    PhysicalMemoryHandle::new(pages * PAGE, &test.device).unwrap()
}

/// Maps memory of `pages` pages at `offset`, readable and writable.
fn map(test: &UnderTest, range: &VirtualAddressRange, offset: usize, pages: usize) {
    let memory = memory(test, pages);
    map_memory(range, offset, &memory, 0, pages * PAGE).unwrap();
    set_memory_access(range, offset, pages * PAGE, 0, AccessFlags::ReadWrite).unwrap();
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
    let range = VirtualAddressRange::new(SIZE, 4 * PAGE).unwrap();
    assert_eq!((range.size(), range.alignment()), (SIZE, 4 * PAGE));
    assert_eq!(range.base_address() % (4 * PAGE), 0);
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
    const ODD: usize = 3 * PAGE;
    for alignment in [0, 3, ODD] {
        refused!(
            VirtualAddressRange::new(SIZE, alignment),
            VmmError::InvalidAlignment { actual, required: 0 } if actual == alignment
        );
    }
    refused!(
        VirtualAddressRange::new(0, PAGE),
        VmmError::Vmm(Core::ZeroSize { .. })
    );
    const MORE: usize = PAGE + 1;
    refused!(
        VirtualAddressRange::new(MORE, PAGE),
        VmmError::InvalidAlignment {
            actual: MORE,
            required: PAGE
        }
    );
    refused!(
        VirtualAddressRange::new(usize::MAX, PAGE),
        VmmError::InvalidAlignment {
            actual: usize::MAX,
            required: PAGE
        }
    );
    let error = VirtualAddressRange::new(1 << 47, PAGE).unwrap_err();
    assert_eq!(error.driver_code(), Some(sys::CUDA_ERROR_OUT_OF_MEMORY));
}

#[test]
fn physical_memory_knows_its_extent_and_goes_back() {
    let test = open();
    let free = test.free_bytes();
    let memory = memory(&test, 3);
    assert_eq!((memory.size(), memory.device_ordinal()), (3 * PAGE, 0));
    test.expect_in_use(free, 3 * PAGE);
    drop(memory);
    test.expect_in_use(free, 0);
}

#[test]
fn physical_memory_refuses_bad_sizes() {
    let test = open();
    let new = |size| PhysicalMemoryHandle::new(size, &test.device);
    refused!(new(0), VmmError::Vmm(Core::ZeroSize { .. }));
    refused!(
        new(1),
        VmmError::InvalidAlignment {
            actual: 1,
            required: PAGE
        }
    );
    refused!(
        new(usize::MAX),
        VmmError::InvalidAlignment {
            actual: usize::MAX,
            required: PAGE
        }
    );
    let free = test.free_bytes();
    let error = new(2 * test.core.total_bytes().next_multiple_of(PAGE)).unwrap_err();
    assert!(error.is_out_of_memory(), "{error}");
    test.expect_in_use(free, 0);
}

#[test]
fn raw_handles_can_be_given_up_and_taken_back() {
    let Some(test) = open_default() else { return };
    let free = test.free_bytes();
    let memory = memory(&test, 1);
    let handle = memory.as_raw();
    assert_eq!(memory.into_raw(), handle);
    test.expect_in_use(free, PAGE);
    // SAFETY: the handle was just given up, of this size, on device 0.
    let memory = unsafe { PhysicalMemoryHandle::from_raw(handle, PAGE, 0) };
    assert_eq!((memory.as_raw(), memory.size()), (handle, PAGE));
    drop(memory);
    test.expect_in_use(free, 0);

    let range = range();
    map(&test, &range, 0, 1);
    let (ptr, size) = range.into_raw();
    test.expect_in_use(free, PAGE);
    // SAFETY: the range was just given up, with this size and alignment.
    let range = unsafe { VirtualAddressRange::from_raw(ptr, size, PAGE) };
    assert_eq!((range.as_ptr(), range.size()), (ptr, SIZE));
    set_memory_access(&range, 0, PAGE, 0, AccessFlags::ReadWrite).unwrap();
    unmap_memory(&range, 0, PAGE).unwrap();
    drop(range);
    test.expect_in_use(free, 0);
}

#[test]
fn raw_handles_of_no_device_can_be_held() {
    let _test = open();
    for ordinal in [-1, 1000] {
        // SAFETY: there is no such device, so nothing is ever done with the handle.
        let memory = unsafe { PhysicalMemoryHandle::from_raw(12345, PAGE, ordinal) };
        assert_eq!(
            (memory.as_raw(), memory.size(), memory.device_ordinal()),
            (12345, PAGE, ordinal)
        );
        if let Ok(range) = VirtualAddressRange::new(SIZE, PAGE) {
            refused!(
                map_memory(&range, 0, &memory, 0, PAGE),
                VmmError::UnsupportedDevice
            );
        }
        assert_eq!(memory.into_raw(), 12345);
    }
}

#[test]
fn mapped_memory_can_be_written_and_read() {
    let Some(test) = open_default() else { return };
    let stream = Stream::new(&test.core).unwrap();
    let range = range();
    // The range keeps the memory; the handle need not live.
    map(&test, &range, 2 * PAGE, 2);
    let address = range.ptr_at_offset(2 * PAGE + 5).unwrap();
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
    for offset in [0, 8 * PAGE] {
        map_memory(&range, offset, &memory, 0, PAGE).unwrap();
        set_memory_access(&range, offset, PAGE, 0, AccessFlags::ReadWrite).unwrap();
    }
    let mut byte = [0];
    // SAFETY: both pages are mapped, readable and writable.
    unsafe {
        stream.write(range.as_ptr(), &[42]).unwrap();
        stream
            .read(range.ptr_at_offset(8 * PAGE).unwrap(), &mut byte)
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
        map(&test, &range, page * PAGE, 1);
    }
    test.expect_in_use(free, 3 * PAGE);
    drop(range);
    test.expect_in_use(free, 0);
}

#[test]
fn map_memory_refuses_bad_arguments() {
    let Some(test) = open_default() else { return };
    let (range, memory) = (range(), memory(&test, 2));
    const TWO: usize = 2 * PAGE;
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
        try_map(0, PAGE, TWO),
        VmmError::InvalidOffset {
            offset: PAGE,
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
            required: PAGE
        }
    );
    refused!(try_map(0, 0, PAGE), VmmError::MappingFailed(_));
    refused!(try_map(0, PAGE, PAGE), VmmError::MappingFailed(_));
    refused!(
        unmap_memory(&range, 0, SIZE),
        VmmError::NotMapped {
            offset: 0,
            size: SIZE
        }
    );
    try_map(PAGE, 0, TWO).unwrap();
    for offset in [0, PAGE, TWO] {
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
    map(&test, &range, PAGE, 2);
    map(&test, &range, 4 * PAGE, 1);
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
        unmap_memory(&range, 3 * PAGE, PAGE),
        VmmError::NotMapped { size: PAGE, .. }
    );
    refused!(
        unmap_memory(&range, PAGE, PAGE),
        VmmError::UnmappingFailed(_)
    );
    refused!(
        unmap_memory(&range, 2 * PAGE, 4 * PAGE),
        VmmError::UnmappingFailed(_)
    );
    // Whole mappings with gaps between go in one call.
    unmap_memory(&range, 0, 8 * PAGE).unwrap();
    refused!(
        unmap_memory(&range, 0, 8 * PAGE),
        VmmError::NotMapped { .. }
    );
}

#[test]
fn set_memory_access_refuses_bad_arguments() {
    let Some(test) = open_default() else { return };
    let range = range();
    map(&test, &range, 0, 2);
    map(&test, &range, 2 * PAGE, 1);
    let set = |offset, size, device| {
        set_memory_access(&range, offset, size, device, AccessFlags::ReadWrite)
    };
    refused!(set(0, 0, 0), VmmError::Vmm(Core::ZeroSize { .. }));
    const MORE: usize = SIZE + 1;
    refused!(
        set(0, MORE, 0),
        VmmError::InvalidOffset {
            offset: 0,
            size: MORE,
            capacity: SIZE
        }
    );
    refused!(
        set(1, usize::MAX, 0),
        VmmError::InvalidOffset {
            offset: 1,
            size: usize::MAX,
            capacity: SIZE
        }
    );
    refused!(set(0, PAGE, 0), VmmError::MappingFailed(_));
    refused!(
        set(8 * PAGE, PAGE, 0),
        VmmError::NotMapped { size: PAGE, .. }
    );
    refused!(set(0, 4 * PAGE, 0), VmmError::NotMapped { offset: 0, .. });
    for device in [-1, 1000] {
        refused!(set(0, 2 * PAGE, device), VmmError::Vmm(Core::Driver(_)));
    }
    set(0, 3 * PAGE, 0).unwrap();
    // Whether a GPU takes less than full access is the driver's to say.
    if test.kind == DriverKind::Simulated {
        for flags in [AccessFlags::Read, AccessFlags::None] {
            set_memory_access(&range, 0, 3 * PAGE, 0, flags).unwrap();
        }
    }
}

#[test]
fn objects_cross_threads() {
    let Some(test) = open_default() else { return };
    let free = test.free_bytes();
    let range = VirtualAddressRange::new(GIB, PAGE).unwrap();
    let memory = memory(&test, 1);
    std::thread::spawn(move || {
        map_memory(&range, 0, &memory, 0, PAGE).unwrap();
    })
    .join()
    .unwrap();
    test.expect_in_use(free, 0);
    // The raw calls see the same driver.
    assert_eq!(cuda_ffi::get_minimum_granularity(0).unwrap(), PAGE);
}
