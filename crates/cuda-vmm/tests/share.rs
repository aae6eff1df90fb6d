//! Sharing memory by file descriptor, in one process and between two.

mod common;

use common::{PAGE, Simulated, failure, under_test};
use cuda_vmm::sim::Fault;
use cuda_vmm::sys::{CUDA_ERROR_OPERATING_SYSTEM, DriverFunction};
use cuda_vmm::{Access, Device, Mapping, PhysicalMemory, Reservation, Stream, VmmError};
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
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

/// A page of exportable memory, mapped, and its descriptor.
fn exported(device: &Device) -> (Mapping, OwnedFd) {
    let memory = PhysicalMemory::exportable(device, under_test().page_bytes).expect("memory");
    let descriptor = memory.export().expect("a descriptor");
    (map(device, memory), descriptor)
}

#[test]
fn what_one_side_writes_the_other_reads() {
    let device = under_test().device();
    let page = under_test().page_bytes;
    under_test().unchanged(|| {
        let stream = Stream::new(device).expect("a stream");
        let before = device.free_bytes().expect("a number");
        let (ours, descriptor) = exported(device);
        let used = before - device.free_bytes().expect("a number");
        let theirs = map(device, import(device, descriptor.as_fd(), page));
        assert_eq!(theirs.bytes(), page);
        let used_twice = before - device.free_bytes().expect("a number");
        assert!(
            used_twice < used + page,
            "counted once: {used}, {used_twice}"
        );
        write(&stream, &ours, b"from here");
        assert_eq!(&read(&stream, &theirs), b"from here");
        // The importer keeps the memory after the exporter is gone, and so does the descriptor.
        drop(ours);
        assert_eq!(&read(&stream, &theirs), b"from here");
        let again = map(device, import(device, descriptor.as_fd(), page));
        write(&stream, &again, b"from there");
        assert_eq!(&read(&stream, &theirs), b"from there");
    });
}

/// Both processes use the same driver: on a GPU both are real. The descriptor is the second
/// process's standard input.
#[test]
fn a_second_process_has_the_same_bytes() {
    const TEST: &str = "a_second_process_has_the_same_bytes";
    let device = under_test().device();
    if common::role().as_deref() == Some("importer") {
        let stream = Stream::new(device).expect("a stream");
        // Number 0, which the real driver would take for a null pointer.
        let memory = import(device, std::io::stdin().as_fd(), under_test().page_bytes);
        let mapping = map(device, memory);
        assert_eq!(&read(&stream, &mapping), b"question");
        write(&stream, &mapping, b"answer: ");
        return;
    }
    under_test().unchanged(|| {
        let stream = Stream::new(device).expect("a stream");
        let (mapping, descriptor) = exported(device);
        write(&stream, &mapping, b"question");
        let mut command = common::alone(TEST, "importer");
        common::run_alone(under_test().choose_for(&mut command).stdin(descriptor));
        assert_eq!(&read(&stream, &mapping), b"answer: ");
    });
}

/// The importer ends by a signal with the memory mapped and work of its own on it.
#[test]
fn an_importer_that_is_killed_takes_nothing_with_it() {
    const TEST: &str = "an_importer_that_is_killed_takes_nothing_with_it";
    const READY: &str = "the importer has it";
    let device = under_test().device();
    if common::role().as_deref() == Some("importer") {
        let stream = Stream::new(device).expect("a stream");
        let memory = import(device, std::io::stdin().as_fd(), under_test().page_bytes);
        let mapping = map(device, memory);
        write(&stream, &mapping, b"imported");
        println!("{READY}");
        loop {
            // SAFETY: all of the mapping, which lives as long as the process, behind its first
            // eight bytes.
            unsafe { stream.memset(mapping.address() + 8, 1, mapping.bytes() - 8) }
                .expect("queued");
            stream.synchronize().expect("done");
        }
    }
    under_test().unchanged(|| {
        let stream = Stream::new(device).expect("a stream");
        let (mapping, descriptor) = exported(device);
        write(&stream, &mapping, b"exported");
        let mut command = common::alone(TEST, "importer");
        let mut child = under_test()
            .choose_for(&mut command)
            .stdin(descriptor)
            .stdout(Stdio::piped())
            .spawn()
            .expect("a second process");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let ready = lines
            .map_while(Result::ok)
            .any(|line| line.ends_with(READY));
        child.kill().expect("it still runs");
        let status = child.wait().expect("it ended");
        assert!(ready && !status.success(), "{status}");
        // Its last bytes are there, ours go on, and when we let go the memory is free.
        assert_eq!(&read(&stream, &mapping), b"imported");
        write(&stream, &mapping, b"lives on");
        assert_eq!(&read(&stream, &mapping), b"lives on");
    });
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
