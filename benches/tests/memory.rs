//! How much host memory the bookkeeping takes: at most 64 KiB and 0.01% of the bytes mapped.

use cuda_vmm_benches::bookkeeping_memory;

#[test]
fn bookkeeping_stays_below_64_kib_and_a_ten_thousandth_of_the_bytes_mapped() {
    let fillings = bookkeeping_memory().expect("no call fails");
    for filling in fillings {
        println!(
            "{} bytes mapped: {} bytes of bookkeeping, {} allowed",
            filling.mapped_bytes,
            filling.held_bytes,
            filling.allowed_bytes()
        );
    }
    for filling in fillings {
        assert!(filling.held_bytes > 0, "nothing was counted: {filling:?}");
        assert!(
            filling.held_bytes <= filling.allowed_bytes(),
            "{filling:?}, at most {} bytes",
            filling.allowed_bytes()
        );
    }
}
