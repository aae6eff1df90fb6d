//! How much host memory the bookkeeping takes: at most 64 KiB and 0.01% of the bytes mapped.

use cuda_vmm_benches::bookkeeping_memory;

#[test]
fn bookkeeping_stays_below_64_kib_and_a_ten_thousandth_of_the_bytes_mapped() {
    for filling in bookkeeping_memory().expect("no call fails") {
        assert!(filling.held_bytes > 0, "nothing was counted: {filling:?}");
        let allowed_bytes = filling.allowed_bytes();
        let is_allowed = filling.held_bytes <= allowed_bytes;
        assert!(is_allowed, "{filling:?}, at most {allowed_bytes} bytes");
    }
}
