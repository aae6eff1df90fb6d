//! Sharing memory by file descriptor, in one process and between two.

mod common;

use common::{PAGE, Simulated, failure};
use cuda_vmm::sim::Fault;
use cuda_vmm::sys::{CUDA_ERROR_OPERATING_SYSTEM, DriverFunction};
use cuda_vmm::{Access, Device, Mapping, PhysicalMemory, Reservation, Stream, VmmError};
use std::os::fd::{AsFd, BorrowedFd};
use std::process::Stdio;
use std::sync::Arc;

fn map(device: &Device, memory: PhysicalMemory) -> Mapping {
    let reservation = Reservation::new(device, memory.bytes()).expect("address space");
    let access = [(device.clone(), Access::ReadWrite)];
    Mapping::new(&Arc::new(reservation), 0, &Arc::new(memory), &access).expect("mapped")
}

fn import(device: &Device, descriptor: BorrowedFd<'_>, bytes: usize) -> PhysicalMemory {
    // SAFETY: tests export what they import, with this size and on this device.
    unsafe { PhysicalMemory::import(device, descriptor, bytes) }.expect("imported")
}

fn write(stream: &Stream, mapping: &Mapping, bytes: &[u8]) {
    // SAFETY: the mapping is writable, longer than the bytes, and alive.
    unsafe { stream.write(mapping.address(), bytes) }.expect("written");
}

fn read<const N: usize>(stream: &Stream, mapping: &Mapping) -> [u8; N] {
    let mut bytes = [0; N];
    // SAFETY: the mapping is readable, longer than the bytes, and alive.
    unsafe { stream.read(mapping.address(), &mut bytes) }.expect("read");
    bytes
}

#[test]
fn what_one_side_writes_the_other_reads() {
    let simulated = Simulated::default();
    let device = &simulated.device;
    let stream = Stream::new(device).expect("a stream");
    simulated.unchanged(|| {
        let memory = PhysicalMemory::exportable(device, 2 * PAGE).expect("memory");
        let descriptor = memory.export().expect("a descriptor");
        let ours = map(device, memory);
        let theirs = map(device, import(device, descriptor.as_fd(), 2 * PAGE));
        assert_eq!(theirs.bytes(), 2 * PAGE);
        let books = simulated.books();
        assert_eq!(books.physical_bytes, 2 * PAGE, "counted once");
        assert_eq!(books.mapped_bytes, 4 * PAGE);
        write(&stream, &ours, b"from here");
        assert_eq!(&read(&stream, &theirs), b"from here");
        // The importer keeps the memory after the exporter is gone, and so does the descriptor.
        drop(ours);
        assert_eq!(&read(&stream, &theirs), b"from here");
        let again = map(device, import(device, descriptor.as_fd(), 2 * PAGE));
        write(&stream, &again, b"from there");
        assert_eq!(&read(&stream, &theirs), b"from there");
    });
}

/// Both processes use the driver that the environment chooses: on a GPU both are real. The descriptor is the
/// second process's standard input.
#[test]
fn a_second_process_has_the_same_bytes() {
    const TEST: &str = "a_second_process_has_the_same_bytes";
    let driver = common::driver();
    let device = driver.device(0).expect("a device");
    let page = device.granularity_bytes();
    let stream = Stream::new(&device).expect("a stream");
    if common::role().as_deref() == Some("importer") {
        // Number 0, which the real driver would take for a null pointer.
        let memory = import(&device, std::io::stdin().as_fd(), page);
        let mapping = map(&device, memory);
        assert_eq!(&read(&stream, &mapping), b"question");
        write(&stream, &mapping, b"answer: ");
        return;
    }
    let memory = PhysicalMemory::exportable(&device, page).expect("memory");
    let descriptor = memory.export().expect("a descriptor");
    let mapping = map(&device, memory);
    write(&stream, &mapping, b"question");
    let before = driver.simulator().map(|simulator| simulator.books(0));
    // What this process has detected is what the other must open.
    let chosen = if driver.simulator().is_some() {
        "simulated"
    } else {
        "real"
    };
    common::run_alone(
        common::alone(TEST, "importer")
            .env(common::DRIVER_VARIABLE, chosen)
            .stdin(Stdio::from(descriptor)),
    );
    assert_eq!(&read(&stream, &mapping), b"answer: ");
    if let Some(simulator) = driver.simulator() {
        assert_eq!(Some(simulator.books(0)), before, "nothing of it is left");
    }
}

#[test]
fn what_is_no_exported_memory_is_refused() {
    let simulated = Simulated::default();
    let device = &simulated.device;
    let file = std::fs::File::open("/dev/null").expect("a file");
    simulated.unchanged(|| {
        // SAFETY: the driver is to find out that this is no memory.
        let outcome = unsafe { PhysicalMemory::import(device, file.as_fd(), PAGE) };
        assert_eq!(
            outcome.expect_err("no memory"),
            failure!(cuMemImportFromShareableHandle, CUDA_ERROR_INVALID_VALUE)
        );
        let memory = PhysicalMemory::new(device, PAGE).expect("memory");
        assert_eq!(
            memory.export().expect_err("made without a handle type"),
            failure!(cuMemExportToShareableHandle, CUDA_ERROR_INVALID_VALUE)
        );
    });
}

#[test]
fn bad_sizes_are_refused_before_the_driver_is_asked() {
    let simulated = Simulated::default();
    let device = &simulated.device;
    let memory = PhysicalMemory::exportable(device, PAGE).expect("memory");
    let descriptor = memory.export().expect("a descriptor");
    let what = "physical size";
    for (bytes, expected) in [
        (0, VmmError::ZeroSize { what }),
        (
            PAGE - 1,
            VmmError::Misaligned {
                what,
                value: PAGE - 1,
                required: PAGE,
            },
        ),
        (
            usize::MAX,
            VmmError::Misaligned {
                what,
                value: usize::MAX,
                required: PAGE,
            },
        ),
    ] {
        let outcome = simulated.unchanged(|| {
            // SAFETY: refused for its size.
            unsafe { PhysicalMemory::import(device, descriptor.as_fd(), bytes) }
        });
        assert_eq!(outcome.expect_err("a bad size"), expected);
    }
    let calls = simulated
        .simulator
        .calls(DriverFunction::cuMemImportFromShareableHandle);
    assert_eq!(calls, 0);
}

#[test]
fn a_refused_export_or_import_changes_nothing() {
    let simulated = Simulated::default();
    let device = &simulated.device;
    let memory = PhysicalMemory::exportable(device, PAGE).expect("memory");
    let descriptor = memory.export().expect("a descriptor");
    for call in [
        DriverFunction::cuMemExportToShareableHandle,
        DriverFunction::cuMemImportFromShareableHandle,
    ] {
        let fault = Fault::nth_of(call, 1, CUDA_ERROR_OPERATING_SYSTEM);
        simulated.simulator.inject(fault);
    }
    simulated.unchanged(|| {
        assert_eq!(
            memory.export().expect_err("refused"),
            failure!(cuMemExportToShareableHandle, CUDA_ERROR_OPERATING_SYSTEM)
        );
        // SAFETY: exported above with this size.
        let outcome = unsafe { PhysicalMemory::import(device, descriptor.as_fd(), PAGE) };
        assert_eq!(
            outcome.expect_err("refused"),
            failure!(cuMemImportFromShareableHandle, CUDA_ERROR_OPERATING_SYSTEM)
        );
    });
}
