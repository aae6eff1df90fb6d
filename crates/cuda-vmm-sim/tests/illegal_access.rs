//! Work on memory without access: refused at the call, or an illegal access when it runs.
#![allow(
    clippy::macro_metavars_in_unsafe,
    reason = "every call of the table is unsafe"
)]

mod common;
use common::*;
use std::ffi::c_void;

/// Makes a driver with one accessible page.
fn page() -> (Driver, u64) {
    let driver = Driver::small();
    let address = driver.reserve(8 * PAGE).unwrap();
    driver.back(address, PAGE).unwrap();
    (driver, address)
}

fn query(driver: &Driver, stream: CUstream) -> Answer {
    call!(driver, cuStreamQuery(stream))
}

/// Enqueues a memset of the page, runs `change`, and returns whether the work then poisons the
/// context.
fn poisoned_by(change: impl FnOnce(&Driver, u64)) -> bool {
    let (driver, address) = page();
    let stream = driver.stream().unwrap();
    driver.simulator.hold_work();
    driver.memset_async(address, 5, PAGE, stream).unwrap();
    change(&driver, address);
    driver.simulator.release_work();
    let synchronized = call!(driver, cuStreamSynchronize(stream));
    let poisoned = driver.simulator.is_poisoned(0);
    assert_eq!(
        synchronized,
        if poisoned {
            Err(CUDA_ERROR_ILLEGAL_ADDRESS)
        } else {
            Ok(())
        }
    );
    poisoned
}

#[test]
fn changing_memory_under_work_is_an_illegal_access() {
    assert!(!poisoned_by(|_, _| ()));
    assert!(!poisoned_by(|driver, address| driver
        .back(address + PAGE as u64, PAGE)
        .unwrap()));
    assert!(
        poisoned_by(|driver, address| driver.unmap(address, PAGE).unwrap()),
        "unmapped"
    );
    let remap = |driver: &Driver, address| {
        driver.unmap(address, PAGE).unwrap();
        driver.back(address, PAGE).unwrap();
    };
    assert!(poisoned_by(remap), "another mapping at the same address");
    let remap_same = |driver: &Driver, address: u64| {
        let mut handle = 0;
        let pointer = address as *mut c_void;
        call!(driver, cuMemRetainAllocationHandle(&mut handle, pointer)).unwrap();
        driver.unmap(address, PAGE).unwrap();
        driver.map(address, PAGE, handle).unwrap();
        driver.open(address, PAGE).unwrap();
    };
    assert!(poisoned_by(remap_same), "the same memory mapped again");
    for flags in [CU_MEM_ACCESS_FLAGS_PROT_NONE, CU_MEM_ACCESS_FLAGS_PROT_READ] {
        let revoke = |driver: &Driver, address| {
            driver
                .set_access(address, PAGE, &[descriptor(0, flags)])
                .unwrap()
        };
        assert!(poisoned_by(revoke), "access revoked");
    }
}

/// Makes every call that writes the range, and every call that reads it, with an accessible page at
/// `open`.
fn touch(driver: &Driver, address: u64, open: u64, bytes: usize) -> (Vec<Answer>, Vec<Answer>) {
    let stream = driver.stream().unwrap();
    let mut host = vec![0u8; bytes];
    let (data, place) = (host.as_ptr().cast(), host.as_mut_ptr().cast());
    let writes = vec![
        driver.memset(address, 1, bytes),
        driver.memset_async(address, 1, bytes, stream),
        call!(driver, cuMemcpyHtoD(address, data, bytes)),
        call!(driver, cuMemcpyHtoDAsync(address, data, bytes, stream)),
        call!(driver, cuMemcpyDtoD(address, open, bytes)),
        call!(driver, cuMemcpyDtoDAsync(address, open, bytes, stream)),
    ];
    let reads = vec![
        call!(driver, cuMemcpyDtoH(place, address, bytes)),
        call!(driver, cuMemcpyDtoHAsync(place, address, bytes, stream)),
        call!(driver, cuMemcpyDtoD(open, address, bytes)),
        call!(driver, cuMemcpyDtoDAsync(open, address, bytes, stream)),
    ];
    call!(driver, cuStreamSynchronize(stream)).unwrap();
    call!(driver, cuStreamDestroy(stream)).unwrap();
    (writes, reads)
}

/// Makes a range that is not mapped with access, and returns its first address and its bytes.
type Case = (&'static str, fn(&Driver, u64) -> (u64, usize));

#[test]
fn work_on_memory_that_is_not_open_is_refused_at_the_call() {
    let cases: [Case; 8] = [
        ("unmapped", |driver, address| {
            driver.unmap(address, PAGE).unwrap();
            (address, 4096)
        }),
        ("mapped without access", |driver, address| {
            driver.unmap(address, PAGE).unwrap();
            driver
                .map(address, PAGE, driver.create(PAGE).unwrap())
                .unwrap();
            (address, 4096)
        }),
        ("access taken away", |driver, address| {
            driver
                .set_access(address, PAGE, &[descriptor(0, 0)])
                .unwrap();
            (address, 4096)
        }),
        ("nothing mapped behind", |_, address| (address, 2 * PAGE)),
        ("nothing mapped before", |driver, address| {
            driver.unmap(address, PAGE).unwrap();
            driver.back(address + PAGE as u64, PAGE).unwrap();
            (address, 2 * PAGE)
        }),
        ("no access behind", |driver, address| {
            let next = address + PAGE as u64;
            driver
                .map(next, PAGE, driver.create(PAGE).unwrap())
                .unwrap();
            (address, 2 * PAGE)
        }),
        ("never reserved", |_, _| (0x1000, 4096)),
        ("past the last address", |_, _| (u64::MAX - 100, 4096)),
    ];
    for (case, prepare) in cases {
        let (driver, address) = page();
        let open = address + 4 * PAGE as u64;
        driver.back(open, 2 * PAGE).unwrap();
        let (address, bytes) = prepare(&driver, address);
        let (writes, reads) = touch(&driver, address, open, bytes);
        let answers: Vec<_> = writes.into_iter().chain(reads).collect();
        assert_eq!(answers, [Err(CUDA_ERROR_INVALID_VALUE); 10], "{case}");
        assert!(!driver.simulator.is_poisoned(0), "{case}");
        assert_eq!(driver.memset(open, 1, PAGE), Ok(()), "{case}: intact");
    }
}

#[test]
fn read_only_memory_is_read_and_not_written() {
    let (driver, address) = page();
    let open = address + 4 * PAGE as u64;
    driver.back(open, PAGE).unwrap();
    driver.memset(address, 7, PAGE).unwrap();
    let read = [descriptor(0, CU_MEM_ACCESS_FLAGS_PROT_READ)];
    driver.set_access(address, PAGE, &read).unwrap();
    let (writes, reads) = touch(&driver, address, open, PAGE);
    assert_eq!(writes, [Err(CUDA_ERROR_INVALID_VALUE); 6]);
    assert_eq!(reads, [Ok(()); 4]);
    assert_eq!(
        driver.read(address, 2),
        Ok(vec![7, 7]),
        "nothing was written"
    );
    assert_eq!(driver.read(open, 2), Ok(vec![7, 7]));
    assert!(!driver.simulator.is_poisoned(0));
}

#[test]
fn refused_work_leaves_nothing_in_the_stream() {
    let (driver, address) = page();
    let stream = driver.stream().unwrap();
    driver.simulator.hold_work();
    assert_eq!(
        driver.memset_async(address, 1, 2 * PAGE, stream),
        Err(CUDA_ERROR_INVALID_VALUE)
    );
    assert_eq!(query(&driver, stream), Ok(()), "nothing to wait for");
    driver.simulator.release_work();
    assert_eq!(driver.memset(address - 1, 1, 0), Ok(()), "no bytes");
}

#[test]
fn a_poisoned_context_stays_so() {
    let (driver, address) = page();
    let (stream, event) = (driver.stream().unwrap(), driver.event().unwrap());
    let mut plain = 0;
    call!(driver, cuMemAlloc(&mut plain, PAGE)).unwrap();
    driver.poison(address);
    let sticky = Err(CUDA_ERROR_ILLEGAL_ADDRESS);
    assert_eq!(query(&driver, stream), sticky);
    assert_eq!(call!(driver, cuStreamSynchronize(stream)), sticky);
    assert_eq!(call!(driver, cuCtxSynchronize()), sticky);
    assert_eq!(call!(driver, cuEventQuery(event)), sticky);
    assert_eq!(call!(driver, cuEventSynchronize(event)), sticky);
    assert_eq!(call!(driver, cuEventRecord(event, stream)), sticky);
    assert_eq!(driver.memset(address, 1, 1), sticky);
    assert_eq!(driver.read(address, 1), Err(CUDA_ERROR_ILLEGAL_ADDRESS));
    assert_eq!(call!(driver, cuMemFree(plain)), sticky);
    assert_eq!(call!(driver, cuMemAlloc(&mut plain, PAGE)), sticky);
    let (mut free, mut total) = (0, 0);
    assert_eq!(call!(driver, cuMemGetInfo(&mut free, &mut total)), sticky);
    assert_eq!(driver.stream(), Err(CUDA_ERROR_ILLEGAL_ADDRESS));
    assert_eq!(driver.event(), Err(CUDA_ERROR_ILLEGAL_ADDRESS));
    // Memory can still be allocated and freed.
    assert_eq!(driver.back(address, PAGE), Ok(()));
    assert_eq!(driver.unmap(address, PAGE), Ok(()));
    let other = driver.reserve(PAGE).unwrap();
    assert_eq!(driver.address_free(other, PAGE), Ok(()));
    assert_eq!(driver.address_free(address, 8 * PAGE), Ok(()));
    assert_eq!(call!(driver, cuStreamDestroy(stream)), sticky);
    assert_eq!(call!(driver, cuEventDestroy(event)), sticky);
    assert_eq!(
        (driver.books().streams, driver.books().events),
        (0, 0),
        "they are gone all the same"
    );
}
