//! What the driver answers to each call that manages memory.

use crate::common::{current_context, set_current_context, with_context};
use crate::{case, ends, fill};
use core::ptr::null_mut;
use cuda_vmm::sys::*;
use cuda_vmm::{Access, Device, Mapping, PhysicalMemory, Reservation, Stream};
use std::sync::Arc;

fn reserve(device: &Device, pages: usize) -> Arc<Reservation> {
    let bytes = pages * device.granularity_bytes();
    Arc::new(Reservation::new(device, bytes).expect("address space"))
}

fn create(device: &Device, pages: usize) -> Arc<PhysicalMemory> {
    let bytes = pages * device.granularity_bytes();
    Arc::new(PhysicalMemory::new(device, bytes).expect("memory"))
}

fn map(reservation: &Arc<Reservation>, page: usize, memory: &Arc<PhysicalMemory>) -> Mapping {
    let device = reservation.device();
    let offset = page * device.granularity_bytes();
    let access = [(device.clone(), Access::ReadWrite)];
    Mapping::new(reservation, offset, memory, &access).expect("mapped")
}

fn properties(device: &Device) -> CUmemAllocationProp {
    // SAFETY: the struct holds integers and a pointer, for which all zeros is valid.
    let mut properties: CUmemAllocationProp = unsafe { core::mem::zeroed() };
    properties.type_ = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location.type_ = CU_MEM_LOCATION_TYPE_DEVICE;
    properties.location.id = device.raw();
    properties
}

fn raw_create(device: &Device, bytes: usize) -> CUresult {
    let mut handle = 0;
    // SAFETY: `handle` is a valid place; every caller expects a refusal.
    unsafe { (device.driver().table().cuMemCreate)(&mut handle, bytes, &properties(device), 0) }
}

fn raw_set_access(device: &Device, address: u64, bytes: usize) -> CUresult {
    let access = CUmemAccessDesc {
        location: properties(device).location,
        flags: CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
    };
    // SAFETY: the addresses are of a reservation of the test's own.
    unsafe { (device.driver().table().cuMemSetAccess)(address, bytes, &access, 1) }
}

fn raw_map(device: &Device, address: u64, bytes: usize, offset: usize, handle: u64) -> CUresult {
    // SAFETY: the addresses are of a reservation of the test's own; every caller expects a refusal.
    unsafe { (device.driver().table().cuMemMap)(address, bytes, offset, handle, 0) }
}

fn raw_unmap(device: &Device, address: u64, bytes: usize) -> CUresult {
    // SAFETY: the addresses are of a reservation of the test's own, and no work uses them.
    unsafe { (device.driver().table().cuMemUnmap)(address, bytes) }
}

#[test]
fn memory_is_created_in_whole_granules_and_no_more_than_there_is() {
    case(|device| {
        let page = device.granularity_bytes();
        assert_eq!(raw_create(device, 0), CUDA_ERROR_INVALID_VALUE);
        assert_eq!(raw_create(device, page + 1), CUDA_ERROR_INVALID_VALUE);
        let more = device.total_bytes().next_multiple_of(page) + page;
        assert_eq!(raw_create(device, more), CUDA_ERROR_OUT_OF_MEMORY);
        let error = PhysicalMemory::new(device, more).expect_err("more than there is");
        assert_eq!(error.driver_code(), Some(CUDA_ERROR_OUT_OF_MEMORY));
        assert!(error.is_out_of_memory() && error.is_later());
    });
}

#[test]
fn only_whole_mappings_are_unmapped_and_made_accessible() {
    case(|device| {
        let page = device.granularity_bytes();
        let stream = Stream::new(device).expect("a stream");
        let (reservation, memory) = (reserve(device, 4), create(device, 2));
        let mapping = map(&reservation, 0, &memory);
        let address = mapping.address();
        assert_eq!(raw_unmap(device, address, page), CUDA_ERROR_INVALID_VALUE);
        let middle = address + page as u64;
        assert_eq!(raw_unmap(device, middle, page), CUDA_ERROR_INVALID_VALUE);
        assert_eq!(
            raw_set_access(device, address, page),
            CUDA_ERROR_INVALID_VALUE,
            "a part"
        );
        assert_eq!(
            raw_set_access(device, address, 3 * page),
            CUDA_ERROR_INVALID_VALUE,
            "mapped and unmapped"
        );
        fill(&stream, address, 2 * page, 11);
        assert_eq!(ends(&stream, address, 2 * page), [11; 2], "still intact");
    });
}

#[test]
fn one_call_unmaps_whole_mappings_and_the_holes_between_them() {
    case(|device| {
        let page = device.granularity_bytes();
        let (reservation, memory) = (reserve(device, 4), create(device, 1));
        let mappings = [0, 2].map(|at| map(&reservation, at, &memory));
        let code = raw_unmap(device, reservation.address(), 4 * page);
        assert_eq!(code, CUDA_SUCCESS);
        // Both are undone already, so the objects must not undo them again. Their addresses and their
        // memory are then given back here, by hand.
        let (address, bytes) = (reservation.address(), reservation.bytes());
        let handle = memory.handle();
        for mapping in mappings {
            core::mem::forget(mapping);
        }
        core::mem::forget((reservation, memory));
        // SAFETY: nothing is mapped there any more, and the objects that owned these are forgotten.
        unsafe {
            drop(Reservation::from_raw(device, address, bytes));
            drop(PhysicalMemory::from_raw(device, handle, page));
        }
    });
}

#[test]
fn a_handle_is_mapped_whole_and_where_nothing_is() {
    case(|device| {
        let page = device.granularity_bytes();
        let (reservation, memory) = (reserve(device, 4), create(device, 2));
        let handle = memory.handle();
        let address = reservation.address();
        for (bytes, offset) in [(page, page), (page, 0)] {
            assert_eq!(
                raw_map(device, address, bytes, offset, handle),
                CUDA_ERROR_NOT_SUPPORTED,
                "{bytes} bytes at offset {offset} of the handle"
            );
        }
        let mapping = map(&reservation, 1, &memory);
        for at in [0, 1, 2] {
            let over = address + (at * page) as u64;
            let code = raw_map(device, over, 2 * page, 0, handle);
            assert_eq!(code, CUDA_ERROR_INVALID_VALUE, "over page {at}");
        }
        let access = [(device.clone(), Access::ReadWrite)];
        let error = Mapping::new(&reservation, page, &memory, &access).expect_err("mapped");
        assert_eq!(error.driver_code(), Some(CUDA_ERROR_INVALID_VALUE));
        drop(mapping);
    });
}

#[test]
fn addresses_are_freed_only_when_nothing_is_mapped() {
    case(|device| {
        let (reservation, memory) = (reserve(device, 2), create(device, 1));
        let mapping = map(&reservation, 1, &memory);
        // SAFETY: refused while something is mapped.
        let code = unsafe {
            (device.driver().table().cuMemAddressFree)(reservation.address(), reservation.bytes())
        };
        assert_eq!(code, CUDA_ERROR_INVALID_VALUE);
        mapping.close().expect("still there to be unmapped");
    });
}

#[test]
fn one_handle_at_two_addresses_is_the_same_memory() {
    case(|device| {
        let page = device.granularity_bytes();
        let stream = Stream::new(device).expect("a stream");
        let (reservation, memory) = (reserve(device, 3), create(device, 1));
        let [first, second] = [0, 2].map(|at| map(&reservation, at, &memory));
        fill(&stream, first.address(), page, 21);
        assert_eq!(ends(&stream, second.address(), page), [21; 2]);
        fill(&stream, second.address(), page, 22);
        assert_eq!(ends(&stream, first.address(), page), [22; 2]);
    });
}

#[test]
fn released_memory_lives_while_it_is_mapped_and_can_be_retained_by_its_address() {
    case(|device| {
        let page = device.granularity_bytes();
        let table = *device.driver().table();
        let stream = Stream::new(device).expect("a stream");
        let reservation = reserve(device, 1);
        let memory = PhysicalMemory::new(device, page).expect("memory");
        let handle = memory.into_raw();
        let address = reservation.address();
        assert_eq!(raw_map(device, address, page, 0, handle), CUDA_SUCCESS);
        assert_eq!(raw_set_access(device, address, page), CUDA_SUCCESS);
        // SAFETY: the one reference to the handle, given up once.
        assert_eq!(unsafe { (table.cuMemRelease)(handle) }, CUDA_SUCCESS);
        fill(&stream, address, page, 31);
        let mut retained = 0;
        let pointer = core::ptr::without_provenance_mut(address as usize);
        // SAFETY: `retained` is a valid place, and the pointer is only looked up.
        let code = unsafe { (table.cuMemRetainAllocationHandle)(&mut retained, pointer) };
        assert_eq!(code, CUDA_SUCCESS);
        assert_eq!(raw_unmap(device, address, page), CUDA_SUCCESS);
        // SAFETY: a reference of our own, to memory of this size.
        let memory = unsafe { PhysicalMemory::from_raw(device, retained, page) };
        let mapping = map(&reservation, 0, &Arc::new(memory));
        assert_eq!(ends(&stream, mapping.address(), page), [31; 2]);
    });
}

#[test]
fn plain_frees_refuse_mapped_memory_and_leave_it_intact() {
    case(|device| {
        let page = device.granularity_bytes();
        let table = *device.driver().table();
        let stream = Stream::new(device).expect("a stream");
        let (reservation, memory) = (reserve(device, 1), create(device, 1));
        let mapping = map(&reservation, 0, &memory);
        fill(&stream, mapping.address(), page, 51);
        with_context(device, || {
            // SAFETY: refused for memory of this kind.
            let code = unsafe { (table.cuMemFree)(mapping.address()) };
            assert_eq!(code, CUDA_ERROR_INVALID_VALUE);
            // SAFETY: as above.
            let code = unsafe { (table.cuMemFreeAsync)(mapping.address(), stream.raw()) };
            assert_eq!(code, CUDA_ERROR_INVALID_VALUE);
        });
        assert_eq!(ends(&stream, mapping.address(), page), [51; 2]);
    });
}

#[test]
fn addresses_have_an_end() {
    case(|device| {
        let error = Reservation::new(device, 1 << 47).expect_err("more than 47 bits");
        assert_eq!(error.driver_code(), Some(CUDA_ERROR_OUT_OF_MEMORY));
    });
}

#[test]
fn mapping_needs_no_current_context_and_leaves_none_behind() {
    case(|device| {
        let before = current_context(device);
        set_current_context(device, null_mut());
        let (reservation, memory) = (reserve(device, 1), create(device, 1));
        map(&reservation, 0, &memory).close().expect("unmapped");
        let stream = Stream::new(device).expect("a stream");
        stream.record().expect("a fence").wait().expect("done");
        device.synchronize().expect("done");
        assert_eq!(current_context(device), null_mut());
        set_current_context(device, before);
    });
}
