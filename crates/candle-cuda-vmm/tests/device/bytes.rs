//! Bytes in a device's memory: writes, reads and compares them.

use candle_cuda_vmm::cuda_vmm::Stream;

pub fn write(stream: &Stream, address: usize, bytes: &[u8]) {
    // SAFETY: the tests write to bytes that they have allocated, and free them only later.
    unsafe { stream.write(address as u64, bytes) }.unwrap();
}

fn read(stream: &Stream, address: usize, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    // SAFETY: the tests read bytes that they have allocated, and free them only later.
    unsafe { stream.read(address as u64, &mut bytes) }.unwrap();
    bytes
}

/// Makes bytes that differ by seed. They repeat after a prime number of bytes, so that each page
/// differs.
pub fn pattern(seed: usize, size: usize) -> Vec<u8> {
    const PERIOD: usize = 4099;
    let mut state = seed as u64;
    let period: Vec<u8> = (0..PERIOD.min(size))
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .collect();
    let mut bytes = period.repeat(size.div_ceil(PERIOD));
    bytes.truncate(size);
    bytes
}

/// Fails unless these bytes are the pattern of this seed.
#[track_caller]
pub fn expect_pattern(stream: &Stream, address: usize, seed: usize, size: usize) {
    // Not `assert_eq`, which would print all bytes.
    let same = read(stream, address, size) == pattern(seed, size);
    assert!(
        same,
        "the {size} bytes at {address:#x} are not those of {seed}"
    );
}
