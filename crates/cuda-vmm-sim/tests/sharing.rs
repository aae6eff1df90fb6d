//! Memory that another process imports.
#![allow(
    clippy::macro_metavars_in_unsafe,
    reason = "every call of the table is unsafe"
)]

mod common;
use common::*;
use std::ffi::c_void;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

/// The descriptor of the memory in the importing process.
const IMPORTER: &str = "CUDA_VMM_SIM_TEST_IMPORTER";

fn export(driver: &Driver, handle: u64) -> Answer<OwnedFd> {
    let mut descriptor = -1i32;
    let place = (&raw mut descriptor).cast();
    call!(
        driver,
        cuMemExportToShareableHandle(place, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0)
    )?;
    // SAFETY: the call has created the descriptor for this caller only.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn import(driver: &Driver, descriptor: i32) -> Answer<u64> {
    let mut handle = 0;
    let pointer = std::ptr::without_provenance_mut::<c_void>(descriptor as usize);
    call!(
        driver,
        cuMemImportFromShareableHandle(
            &mut handle,
            pointer,
            CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        )
    )?;
    Ok(handle)
}

fn exportable(driver: &Driver, bytes: usize) -> (u64, u64) {
    let handle = driver.create_with(bytes, &properties(0, true)).unwrap();
    let address = driver.reserve(bytes).unwrap();
    driver.map(address, bytes, handle).unwrap();
    driver.open(address, bytes).unwrap();
    (handle, address)
}

/// Returns whether a test started this process as the importer.
fn is_importer() -> bool {
    std::env::var_os(IMPORTER).is_some()
}

/// Starts the test of this name again as the importer, with the memory as its standard input. It
/// replies line by line on a socket.
fn start_importer(test: &str, descriptor: OwnedFd) -> (Child, BufReader<UnixStream>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let child = Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env(IMPORTER, "1")
        .stdin(Stdio::from(descriptor))
        .stderr(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    (child, BufReader::new(ours))
}

fn line(importer: &mut BufReader<UnixStream>) -> String {
    let mut line = String::new();
    importer.read_line(&mut line).unwrap();
    line.trim().to_owned()
}

/// The other process: replies with what it reads, and waits for the next request.
fn import_and_answer() {
    // SAFETY: this process was started with the socket as its standard error, and uses it only
    // here.
    let mut exporter = unsafe { UnixStream::from_raw_fd(2) };
    let driver = Driver::new(SimConfig::new().memory_bytes(64 << 20));
    // The descriptor is 0, which the driver sees as a null pointer.
    assert_eq!(import(&driver, 0), Err(CUDA_ERROR_INVALID_VALUE));
    let memory = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let handle = import(&driver, memory.as_raw_fd()).unwrap();
    let address = driver.reserve(2 * PAGE).unwrap();
    driver.map(address, 2 * PAGE, handle).unwrap();
    driver.open(address, 2 * PAGE).unwrap();
    let seen = driver.read(address + PAGE as u64, 5).unwrap();
    driver.write(address, b"reply").unwrap();
    let books = driver.books();
    writeln!(
        exporter,
        "{} {}",
        String::from_utf8_lossy(&seen),
        books.physical_bytes / PAGE
    )
    .unwrap();
    let mut word = String::new();
    let mut commands = BufReader::new(exporter.try_clone().unwrap());
    commands.read_line(&mut word).unwrap();
    let seen = driver.read(address + PAGE as u64, 5).unwrap();
    writeln!(exporter, "still {}", String::from_utf8_lossy(&seen)).unwrap();
    // Waits to be killed, or until the other end is closed.
    let _ = commands.read_line(&mut word);
}

#[test]
fn another_process_sees_the_same_bytes_and_keeps_them() {
    if is_importer() {
        return import_and_answer();
    }
    let driver = Driver::small();
    let (handle, address) = exportable(&driver, 2 * PAGE);
    driver.write(address + PAGE as u64, b"hello").unwrap();
    let (mut child, mut importer) = start_importer(
        "another_process_sees_the_same_bytes_and_keeps_them",
        export(&driver, handle).unwrap(),
    );
    assert_eq!(line(&mut importer), "hello 2");
    assert_eq!(driver.read(address, 5).unwrap(), b"reply");
    driver.unmap(address, 2 * PAGE).unwrap();
    driver.release(handle).unwrap();
    assert_eq!(driver.books().physical_bytes, 0, "ours is given back");
    writeln!(importer.get_mut(), "look again").unwrap();
    assert_eq!(line(&mut importer), "still hello", "theirs is not");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_killed_importer_takes_nothing_with_it() {
    if is_importer() {
        return import_and_answer();
    }
    let driver = Driver::small();
    let (handle, address) = exportable(&driver, 2 * PAGE);
    driver.write(address + PAGE as u64, b"stays").unwrap();
    let (mut child, mut importer) = start_importer(
        "a_killed_importer_takes_nothing_with_it",
        export(&driver, handle).unwrap(),
    );
    assert_eq!(line(&mut importer), "stays 2");
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(driver.read(address + PAGE as u64, 5).unwrap(), b"stays");
    assert_eq!(driver.memset(address, 1, 2 * PAGE), Ok(()));
}

#[test]
fn an_import_in_the_same_process_is_the_same_memory() {
    let driver = Driver::small();
    let (handle, address) = exportable(&driver, 2 * PAGE);
    let descriptor = export(&driver, handle).unwrap();
    let again = import(&driver, descriptor.as_raw_fd()).unwrap();
    assert_eq!(driver.books().physical_bytes, 2 * PAGE, "counted once");
    assert_eq!(driver.books().handles, 2);
    let second = driver.reserve(2 * PAGE).unwrap();
    driver.map(second, 2 * PAGE, again).unwrap();
    driver.open(second, 2 * PAGE).unwrap();
    driver.write(address, b"one").unwrap();
    assert_eq!(driver.read(second, 3).unwrap(), b"one");
    driver.release(handle).unwrap();
    driver.release(again).unwrap();
    driver.unmap(address, 2 * PAGE).unwrap();
    driver.unmap(second, 2 * PAGE).unwrap();
    assert_eq!(driver.books().physical_bytes, 0);
    let late = import(&driver, descriptor.as_raw_fd()).expect("the descriptor keeps the memory");
    assert_eq!(driver.books().physical_bytes, 2 * PAGE);
    driver.release(late).unwrap();
}

#[test]
fn what_cannot_be_shared_is_refused() {
    let driver = Driver::small();
    let plain = driver.create(PAGE).unwrap();
    assert_eq!(
        export(&driver, plain).err(),
        Some(CUDA_ERROR_INVALID_VALUE),
        "not made for it"
    );
    assert_eq!(
        export(&driver, plain + 1).err(),
        Some(CUDA_ERROR_INVALID_VALUE)
    );
    let file = tempfile();
    for descriptor in [file.as_raw_fd(), -1, 1 << 20] {
        assert_eq!(
            import(&driver, descriptor),
            Err(CUDA_ERROR_INVALID_VALUE),
            "{descriptor}"
        );
    }
    let two = Driver::new(SimConfig::new().devices(2));
    let handle = two.create_with(PAGE, &properties(1, true)).unwrap();
    let descriptor = export(&two, handle).unwrap();
    assert_eq!(
        import(&driver, descriptor.as_raw_fd()),
        Err(CUDA_ERROR_INVALID_DEVICE),
        "no such device here"
    );
    let full = Driver::new(SimConfig::new().memory_bytes(PAGE));
    let (big, _) = exportable(&driver, 2 * PAGE);
    let descriptor = export(&driver, big).unwrap();
    assert_eq!(
        import(&full, descriptor.as_raw_fd()),
        Err(CUDA_ERROR_OUT_OF_MEMORY)
    );
    let unbacked = Driver::new(SimConfig::new().unbacked());
    assert_eq!(
        import(&unbacked, descriptor.as_raw_fd()),
        Err(CUDA_ERROR_NOT_SUPPORTED)
    );
}

/// Makes a file that is not simulated memory.
fn tempfile() -> std::fs::File {
    std::fs::File::open(std::env::current_exe().unwrap()).unwrap()
}
