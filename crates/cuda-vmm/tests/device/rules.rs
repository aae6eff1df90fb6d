//! How the core's objects report what the driver refuses. The driver's own answers are the
//! conformance suite's.

use crate::case;
use crate::common::{current_context, set_current_context};
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

#[test]
fn more_memory_than_there_is_is_refused_for_now() {
    case(|device| {
        let page = device.granularity_bytes();
        let more = device.total_bytes().next_multiple_of(page) + page;
        let error = PhysicalMemory::new(device, more).expect_err("more than there is");
        assert_eq!(error.driver_code(), Some(CUDA_ERROR_OUT_OF_MEMORY));
        assert!(error.is_out_of_memory() && error.is_retryable());
    });
}

#[test]
fn memory_is_mapped_where_nothing_is() {
    case(|device| {
        let page = device.granularity_bytes();
        let (reservation, memory) = (reserve(device, 4), create(device, 2));
        let mapping = map(&reservation, 1, &memory);
        let access = [(device.clone(), Access::ReadWrite)];
        let error = Mapping::new(&reservation, page, &memory, &access).expect_err("mapped");
        assert_eq!(error.driver_code(), Some(CUDA_ERROR_INVALID_VALUE));
        mapping.close().expect("still there to be unmapped");
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
