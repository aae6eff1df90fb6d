//! The check at the end of every test finds what a test leaves behind.

use crate::common::{GRANULE, MIB, open};
use candle_cuda_vmm::cuda_vmm::{DriverKind, Stream};
use candle_cuda_vmm::{PhysicalMemoryHandle, SharedMemoryPool, VirtualMemoryPool};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

const AT_ONCE: Duration = Duration::ZERO;
/// As long as the check at the end of a test waits.
const A_MOMENT_LATER: Duration = Duration::from_secs(5);

#[test]
fn memory_that_is_kept_is_a_leak_until_it_is_given_back() {
    let test = open();
    assert_eq!(test.leak_after(AT_ONCE), None);
    // More than a GPU's driver may allocate for itself.
    let memory = PhysicalMemoryHandle::new(64 * MIB, &test.device).unwrap();
    let leak = test.leak_after(AT_ONCE).expect("the memory is kept");
    let device = format!("device {}", test.core.ordinal());
    assert!(leak.contains(&device), "{leak}");
    drop(memory);
    assert_eq!(test.leak_after(A_MOMENT_LATER), None);
}

#[test]
fn a_pool_with_backed_pages_is_a_leak_until_it_is_dropped() {
    let test = open();
    let mut pool = SharedMemoryPool::new(64 * MIB, test.device.clone()).unwrap();
    pool.register_model("model", 64 * MIB).unwrap();
    pool.allocate_for_model("model", 64 * MIB).unwrap();
    assert!(test.leak_after(AT_ONCE).is_some());
    drop(pool);
    assert_eq!(test.leak_after(A_MOMENT_LATER), None);
}

#[test]
fn what_takes_no_memory_is_a_leak_where_everything_is_counted() {
    let test = open();
    if test.kind == DriverKind::Real {
        // A GPU reports its free memory, but not its addresses and streams.
        let _stream = Stream::new(&test.core).unwrap();
        assert_eq!(test.leak_after(AT_ONCE), None);
        return;
    }
    let stream = Stream::new(&test.core).unwrap();
    assert!(test.leak_after(AT_ONCE).is_some());
    drop(stream);
    assert_eq!(test.leak_after(A_MOMENT_LATER), None);

    let fence = Stream::new(&test.core).unwrap().record().unwrap();
    assert!(test.leak_after(AT_ONCE).is_some());
    drop(fence);
    assert_eq!(test.leak_after(A_MOMENT_LATER), None);

    let pool = VirtualMemoryPool::new(GRANULE, GRANULE, test.device.clone()).unwrap();
    assert!(test.leak_after(AT_ONCE).is_some());
    drop(pool);
    assert_eq!(test.leak_after(A_MOMENT_LATER), None);
}

#[test]
fn a_leak_fails_the_test() {
    let test = open();
    let memory = PhysicalMemoryHandle::new(64 * MIB, &test.device).unwrap();
    let check = AssertUnwindSafe(|| test.expect_no_leak_after(AT_ONCE));
    let payload = catch_unwind(check).expect_err("the memory is kept");
    let message = payload.downcast_ref::<String>().unwrap();
    assert!(message.contains("left something behind"), "{message}");
    drop(memory);
}
