//! Reserved addresses: sizes, alignment and freeing.
#![allow(
    clippy::macro_metavars_in_unsafe,
    reason = "every call of the table is unsafe"
)]

mod common;
use common::*;

#[test]
fn a_reservation_is_freed_whole_and_empty() {
    let driver = Driver::small();
    let address = driver.reserve(8 * PAGE).unwrap();
    driver.back(address + PAGE as u64, PAGE).unwrap();
    assert_eq!(
        driver.address_free(address, 8 * PAGE),
        Err(CUDA_ERROR_INVALID_VALUE),
        "mapped"
    );
    driver.unmap(address + PAGE as u64, PAGE).unwrap();
    for (base, bytes) in [
        (address, 4 * PAGE),
        (address, 9 * PAGE),
        (address + PAGE as u64, 7 * PAGE),
    ] {
        assert_eq!(
            driver.address_free(base, bytes),
            Err(CUDA_ERROR_INVALID_VALUE)
        );
    }
    assert_eq!(driver.books().reserved_bytes, 8 * PAGE);
    assert_eq!(driver.address_free(address, 8 * PAGE), Ok(()));
    assert_eq!(
        driver.address_free(address, 8 * PAGE),
        Err(CUDA_ERROR_INVALID_VALUE),
        "twice"
    );
    assert_eq!(driver.books().reservations, 0);
}

#[test]
fn reservations_reach_two_to_the_46() {
    let driver = Driver::small();
    let address = driver.reserve(1 << 46).expect("64 TiB");
    driver.address_free(address, 1 << 46).unwrap();
    for bytes in [1 << 47, 1 << 48, usize::MAX & !(PAGE - 1)] {
        assert_eq!(
            driver.reserve(bytes),
            Err(CUDA_ERROR_OUT_OF_MEMORY),
            "{bytes}"
        );
    }
    for bytes in [0, 1, PAGE + 4096] {
        assert_eq!(
            driver.reserve(bytes),
            Err(CUDA_ERROR_INVALID_VALUE),
            "{bytes}"
        );
    }
    assert_eq!(driver.books().reservations, 0);
}

#[test]
fn alignments_are_powers_of_two_and_flags_are_none() {
    let driver = Driver::small();
    let mut address = 0;
    for alignment in [3, 3 * PAGE] {
        assert_eq!(
            call!(
                driver,
                cuMemAddressReserve(&mut address, PAGE, alignment, 0, 0)
            ),
            Err(CUDA_ERROR_INVALID_VALUE)
        );
    }
    assert_eq!(
        call!(driver, cuMemAddressReserve(&mut address, PAGE, 0, 0, 1)),
        Err(CUDA_ERROR_INVALID_VALUE)
    );
    assert_eq!(driver.books().reservations, 0);
    call!(driver, cuMemAddressReserve(&mut address, PAGE, 4096, 0, 0)).unwrap();
    assert_eq!(address % PAGE as u64, 0, "a page's alignment all the same");
    call!(
        driver,
        cuMemAddressReserve(&mut address, PAGE, 1 << 30, 0, 0)
    )
    .unwrap();
    assert_eq!(address % (1 << 30), 0);
}
