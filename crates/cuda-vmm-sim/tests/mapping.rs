//! Reservations, handles and mappings: the rules of each call.
#![allow(
    clippy::macro_metavars_in_unsafe,
    reason = "every call of the table is unsafe"
)]

mod common;
use common::*;

fn rules() -> (Driver, u64) {
    let driver = Driver::small();
    let address = driver.reserve(8 * PAGE).expect("addresses");
    (driver, address)
}

#[test]
fn map_with_an_offset_or_part_of_a_handle_is_not_supported() {
    let (driver, address) = rules();
    let handle = driver.create(4 * PAGE).unwrap();
    assert_eq!(
        call!(driver, cuMemMap(address, 2 * PAGE, PAGE, handle, 0)),
        Err(CUDA_ERROR_NOT_SUPPORTED)
    );
    assert_eq!(
        call!(driver, cuMemMap(address, 3 * PAGE, PAGE, handle, 0)),
        Err(CUDA_ERROR_NOT_SUPPORTED)
    );
    assert_eq!(
        driver.map(address, 2 * PAGE, handle),
        Err(CUDA_ERROR_NOT_SUPPORTED)
    );
    assert_eq!(
        driver.map(address, 5 * PAGE, handle),
        Err(CUDA_ERROR_INVALID_VALUE),
        "more than it has"
    );
    assert_eq!(driver.map(address, 4 * PAGE, handle), Ok(()));
    assert_eq!(driver.books().mappings, 1);
}

#[test]
fn access_is_set_over_whole_mappings_only() {
    let (driver, address) = rules();
    driver
        .map(address, 4 * PAGE, driver.create(4 * PAGE).unwrap())
        .unwrap();
    assert_eq!(
        driver.open(address, 2 * PAGE),
        Err(CUDA_ERROR_INVALID_VALUE),
        "half a mapping"
    );
    assert_eq!(
        driver.open(address, 5 * PAGE),
        Err(CUDA_ERROR_INVALID_VALUE),
        "mapped and unmapped"
    );
    assert_eq!(
        driver.open(address + 4 * PAGE as u64, PAGE),
        Err(CUDA_ERROR_INVALID_VALUE),
        "unmapped"
    );
    assert_eq!(driver.open(address, 4 * PAGE), Ok(()));
    driver
        .map(
            address + 4 * PAGE as u64,
            PAGE,
            driver.create(PAGE).unwrap(),
        )
        .unwrap();
    assert_eq!(
        driver.open(address, 5 * PAGE),
        Ok(()),
        "two mappings in one call"
    );
    assert_eq!(
        driver.set_access(address, 5 * PAGE, &[]),
        Err(CUDA_ERROR_INVALID_VALUE)
    );
    let none = [descriptor(0, 3)];
    assert_eq!(
        call!(driver, cuMemSetAccess(address, 5 * PAGE, none.as_ptr(), 0)),
        Err(CUDA_ERROR_INVALID_VALUE),
        "no descriptors"
    );
    assert_eq!(driver.open(address, 0), Err(CUDA_ERROR_INVALID_VALUE));
    assert_eq!(
        driver.set_access(address, 5 * PAGE, &[descriptor(0, 2)]),
        Err(CUDA_ERROR_INVALID_VALUE)
    );
}

#[test]
fn unmap_takes_whole_mappings_and_holes() {
    let (driver, address) = rules();
    driver.back(address, 4 * PAGE).unwrap();
    driver.back(address + 6 * PAGE as u64, PAGE).unwrap();
    assert_eq!(
        driver.unmap(address + PAGE as u64, PAGE),
        Err(CUDA_ERROR_INVALID_VALUE),
        "the middle"
    );
    assert_eq!(
        driver.unmap(address, 2 * PAGE),
        Err(CUDA_ERROR_INVALID_VALUE),
        "the front"
    );
    assert_eq!(
        driver.unmap(address, 9 * PAGE),
        Err(CUDA_ERROR_INVALID_VALUE),
        "past the reservation"
    );
    assert_eq!(driver.books().mapped_bytes, 5 * PAGE);
    assert_eq!(
        driver.unmap(address, 8 * PAGE),
        Ok(()),
        "both mappings and the holes"
    );
    assert_eq!(driver.books().mapped_bytes, 0);
    assert_eq!(driver.books().physical_bytes, 0);
}

#[test]
fn unmap_of_reserved_addresses_with_nothing_mapped_succeeds() {
    let (driver, address) = rules();
    driver.back(address + 4 * PAGE as u64, PAGE).unwrap();
    for bytes in [4096, PAGE, 4 * PAGE] {
        assert_eq!(driver.unmap(address, bytes), Ok(()), "{bytes}");
    }
    for (place, bytes, why) in [
        (address, 0, "no bytes"),
        (address + 4 * PAGE as u64, 0, "no bytes of a mapping"),
        (address + 4 * PAGE as u64, 4096, "part of a mapping"),
        (0x1000, PAGE, "never reserved"),
        (0x1000, 4096, "never reserved"),
    ] {
        let refused = Err(CUDA_ERROR_INVALID_VALUE);
        assert_eq!(driver.unmap(place, bytes), refused, "{why}");
    }
    assert_eq!(driver.books().mapped_bytes, PAGE);
}

#[test]
fn nothing_is_mapped_over_a_mapping() {
    let (driver, address) = rules();
    driver.back(address, 4 * PAGE).unwrap();
    let other = driver.create(PAGE).unwrap();
    for page in 0..4 {
        assert_eq!(
            driver.map(address + page * PAGE as u64, PAGE, other),
            Err(CUDA_ERROR_INVALID_VALUE)
        );
    }
    let long = driver.create(4 * PAGE).unwrap();
    assert_eq!(
        driver.map(address + 3 * PAGE as u64, 4 * PAGE, long),
        Err(CUDA_ERROR_INVALID_VALUE)
    );
    assert_eq!(
        driver.map(address + 4 * PAGE as u64, 4 * PAGE, long),
        Ok(())
    );
}

#[test]
fn mappings_lie_in_one_reservation_and_are_aligned() {
    let (driver, address) = rules();
    let handle = driver.create(PAGE).unwrap();
    assert_eq!(
        driver.map(address + 4096, PAGE, handle),
        Err(CUDA_ERROR_INVALID_VALUE)
    );
    assert_eq!(
        driver.map(address + 8 * PAGE as u64, PAGE, handle),
        Err(CUDA_ERROR_INVALID_VALUE)
    );
    assert_eq!(driver.map(0, PAGE, handle), Err(CUDA_ERROR_INVALID_VALUE));
    assert_eq!(
        driver.map(u64::MAX - PAGE as u64 + 1, PAGE, handle),
        Err(CUDA_ERROR_INVALID_VALUE)
    );
    assert_eq!(
        driver.map(address, PAGE, handle + 1),
        Err(CUDA_ERROR_INVALID_VALUE),
        "no such handle"
    );
    assert_eq!(
        call!(driver, cuMemMap(address, PAGE, 0, handle, 1)),
        Err(CUDA_ERROR_INVALID_VALUE),
        "flags"
    );
}

#[test]
fn one_handle_at_two_addresses_is_the_same_memory() {
    let (driver, address) = rules();
    let (first, second) = (address, address + 4 * PAGE as u64);
    let handle = driver.create(PAGE).unwrap();
    for place in [first, second] {
        driver.map(place, PAGE, handle).unwrap();
        driver.open(place, PAGE).unwrap();
    }
    driver
        .write(first + 100, b"seen through the other")
        .unwrap();
    assert_eq!(
        driver.read(second + 100, 22).unwrap(),
        b"seen through the other"
    );
    // SAFETY: the address is mapped with access, and no work is queued.
    assert_eq!(unsafe { *((second + 100) as *const u8) }, b's');
    assert_eq!(driver.books().mapped_bytes, 2 * PAGE);
    assert_eq!(driver.books().physical_bytes, PAGE);
}

#[test]
fn handles_are_released_once_and_sized_in_pages() {
    let driver = Driver::small();
    let handle = driver.create(PAGE).unwrap();
    assert_eq!(driver.release(handle), Ok(()));
    assert_eq!(
        driver.release(handle),
        Err(CUDA_ERROR_INVALID_VALUE),
        "twice"
    );
    for bytes in [0, 1, PAGE - 1, PAGE + 4096] {
        assert_eq!(
            driver.create(bytes),
            Err(CUDA_ERROR_INVALID_VALUE),
            "{bytes}"
        );
    }
    assert_eq!(driver.create(1 << 40), Err(CUDA_ERROR_OUT_OF_MEMORY));
    let handles: Vec<u64> = (0..128).map(|_| driver.create(PAGE).unwrap()).collect();
    assert_eq!(
        driver.create(PAGE),
        Err(CUDA_ERROR_OUT_OF_MEMORY),
        "all 256 MiB are taken"
    );
    for (index, handle) in handles
        .iter()
        .enumerate()
        .filter(|(index, _)| index % 2 == 0)
    {
        driver
            .release(*handle)
            .unwrap_or_else(|code| panic!("{index}: {code}"));
    }
    assert!(
        driver.create(64 * PAGE).is_ok(),
        "scattered pages are as good as neighbouring ones"
    );
}

#[test]
fn a_released_handle_lives_while_it_is_mapped() {
    let (driver, address) = rules();
    let handle = driver.create(PAGE).unwrap();
    driver.map(address, PAGE, handle).unwrap();
    driver.open(address, PAGE).unwrap();
    driver.release(handle).unwrap();
    assert_eq!(driver.books().handles, 0);
    assert_eq!(driver.books().physical_bytes, PAGE);
    assert_eq!(driver.memset(address, 7, PAGE), Ok(()));
    assert_eq!(
        driver.map(address + PAGE as u64, PAGE, handle),
        Err(CUDA_ERROR_INVALID_VALUE)
    );
    let mut again = 0;
    let inside = (address + 12345) as *mut std::ffi::c_void;
    call!(driver, cuMemRetainAllocationHandle(&mut again, inside)).unwrap();
    assert_eq!(driver.books().handles, 1);
    driver.unmap(address, PAGE).unwrap();
    driver.map(address + PAGE as u64, PAGE, again).unwrap();
    driver.open(address + PAGE as u64, PAGE).unwrap();
    assert_eq!(
        driver.read(address + PAGE as u64, 4).unwrap(),
        [7; 4],
        "the same memory"
    );
    driver.release(again).unwrap();
    driver.unmap(address + PAGE as u64, PAGE).unwrap();
    assert_eq!(driver.books().physical_bytes, 0);
    assert_eq!(
        call!(driver, cuMemRetainAllocationHandle(&mut again, inside)),
        Err(CUDA_ERROR_INVALID_VALUE)
    );
}

#[test]
fn fresh_memory_reads_zero() {
    let (driver, address) = rules();
    driver.back(address, 4 * PAGE).unwrap();
    driver.memset(address, 0xAB, 4 * PAGE).unwrap();
    driver.unmap(address, 4 * PAGE).unwrap();
    driver.back(address, 4 * PAGE).unwrap();
    assert!(
        driver
            .read(address, 4 * PAGE)
            .unwrap()
            .iter()
            .all(|&byte| byte == 0)
    );
}

#[test]
fn plain_frees_refuse_mapped_addresses() {
    let (driver, address) = rules();
    driver.back(address, PAGE).unwrap();
    driver.memset(address, 9, PAGE).unwrap();
    assert_eq!(
        call!(driver, cuMemFree(address)),
        Err(CUDA_ERROR_INVALID_VALUE)
    );
    assert_eq!(
        call!(driver, cuMemFreeAsync(address, driver.stream().unwrap())),
        Err(CUDA_ERROR_INVALID_VALUE)
    );
    assert_eq!(driver.memset(address, 3, 1), Ok(()));
    assert_eq!(driver.read(address, 2).unwrap(), [3, 9]);
    assert!(!driver.simulator.is_poisoned(0));
}

#[test]
fn properties_and_granularity_are_told() {
    let driver = Driver::new(SimConfig::new().devices(2).granularity_bytes(64 << 10));
    let mut bytes = 0;
    for option in [
        CU_MEM_ALLOC_GRANULARITY_MINIMUM,
        CU_MEM_ALLOC_GRANULARITY_RECOMMENDED,
    ] {
        call!(
            driver,
            cuMemGetAllocationGranularity(&mut bytes, &properties(1, false), option)
        )
        .unwrap();
        assert_eq!(bytes, 64 << 10);
        for unknown in [2, 77, -1] {
            bytes = 0;
            call!(
                driver,
                cuMemGetAllocationGranularity(&mut bytes, &properties(unknown, false), option)
            )
            .unwrap();
            assert_eq!(bytes, 64 << 10, "device {unknown}, which does not exist");
        }
    }
    let handle = driver.create_with(64 << 10, &properties(1, true)).unwrap();
    let mut told = properties(0, false);
    call!(
        driver,
        cuMemGetAllocationPropertiesFromHandle(&mut told, handle)
    )
    .unwrap();
    assert_eq!(
        told.requestedHandleTypes,
        CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    );
    // SAFETY: a location is two 32-bit integers.
    let [kind, device]: [i32; 2] = unsafe { std::mem::transmute(told.location) };
    assert_eq!((kind as u32, device), (CU_MEM_LOCATION_TYPE_DEVICE, 1));
    assert_eq!(
        driver.create_with(64 << 10, &properties(2, false)),
        Err(CUDA_ERROR_INVALID_DEVICE)
    );
    assert_eq!(
        driver.create_with(64 << 10, &properties(-1, false)),
        Err(CUDA_ERROR_INVALID_DEVICE)
    );
    let mut flagged = 0;
    let here = properties(0, false);
    assert_eq!(
        call!(driver, cuMemCreate(&mut flagged, 64 << 10, &here, 1)),
        Err(CUDA_ERROR_INVALID_VALUE)
    );
    assert_eq!(driver.simulator.books(1).physical_bytes, 64 << 10);
    assert_eq!(driver.simulator.books(0).physical_bytes, 0);
}

#[test]
fn access_is_kept_for_each_device() {
    let driver = Driver::new(SimConfig::new().devices(3).memory_bytes(256 << 20));
    let address = driver.reserve(PAGE).unwrap();
    driver
        .map(address, PAGE, driver.create(PAGE).unwrap())
        .unwrap();
    let both = [descriptor(0, 3), descriptor(2, 1)];
    driver.set_access(address, PAGE, &both).unwrap();
    let access = |device| {
        let mut flags = 99;
        call!(
            driver,
            cuMemGetAccess(&mut flags, &location(device), address + 5)
        )
        .map(|()| flags)
    };
    assert_eq!([0, 1, 2].map(access), [Ok(3), Ok(0), Ok(1)]);
    assert_eq!(access(3), Err(CUDA_ERROR_INVALID_DEVICE));
    for ordinal in [3, 77, -1] {
        let unknown = [descriptor(0, 0), descriptor(ordinal, 3)];
        assert_eq!(
            driver.set_access(address, PAGE, &unknown),
            Err(CUDA_ERROR_INVALID_VALUE)
        );
    }
    assert_eq!(access(0), Ok(3), "a refused call changes nothing");
    driver
        .set_access(address, PAGE, &[descriptor(0, 0)])
        .unwrap();
    assert_eq!(
        [0, 1, 2].map(access),
        [Ok(0), Ok(0), Ok(1)],
        "devices that are not named keep theirs"
    );
}

#[test]
fn neighbouring_pages_merge_into_few_host_mappings() {
    let driver = Driver::new(SimConfig::new().granularity_bytes(4096));
    let pages = 70_000;
    let address = driver.reserve(pages * 4096).unwrap();
    for page in 0..pages as u64 {
        let handle = driver.create(4096).unwrap();
        driver.map(address + page * 4096, 4096, handle).unwrap();
        driver.open(address + page * 4096, 4096).unwrap();
    }
    assert_eq!(
        driver.books().mappings,
        pages,
        "more than the host allows single mappings"
    );
    driver.write(address + 40_000 * 4096 - 2, b"over").unwrap();
    assert_eq!(
        driver.read(address + 40_000 * 4096 - 2, 4).unwrap(),
        b"over"
    );
    driver.unmap(address, pages * 4096).unwrap();
    assert_eq!(driver.books().mapped_bytes, 0);
}

#[test]
fn unbacked_simulators_keep_the_same_books() {
    let driver = Driver::new(SimConfig::new().memory_bytes(1 << 45).unbacked());
    let address = driver.reserve(1 << 45).unwrap();
    driver.back(address, 1 << 44).unwrap();
    assert_eq!(driver.books().physical_bytes, 1 << 44);
    assert_eq!(driver.memset(address, 1, 1 << 44), Ok(()));
    assert_eq!(driver.open(address, 1 << 43), Err(CUDA_ERROR_INVALID_VALUE));
    assert_eq!(
        driver.unmap(address, 1 << 43),
        Err(CUDA_ERROR_INVALID_VALUE)
    );
    assert_eq!(driver.unmap(address, 1 << 45), Ok(()));
    assert_eq!(driver.address_free(address, 1 << 45), Ok(()));
    assert_eq!(
        driver.memset(address, 1, 1),
        Err(CUDA_ERROR_INVALID_VALUE),
        "no such address"
    );
    let retains = driver.books().context_retains;
    assert_eq!(
        driver.books(),
        Books {
            context_retains: retains,
            ..Books::default()
        }
    );
}
