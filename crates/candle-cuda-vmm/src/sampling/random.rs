//! Random bits that are a function of seed and position.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
const STEPS: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
const ROUNDS: usize = 10;

/// Returns 64 random bits. The seed's low half comes first.
pub fn random_bits(seed: [u32; 2], position: u32) -> u64 {
    let [low, high, ..] = philox([position, 0, 0, 0], seed);
    u64::from(high) << 32 | u64::from(low)
}

/// Philox4x32-10: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
/// 2011.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let product = |at: usize| u64::from(MULTIPLIERS[at]) * u64::from(counter[2 * at]);
        let [(high_0, low_0), (high_1, low_1)] =
            [product(0), product(1)].map(|product| ((product >> 32) as u32, product as u32));
        counter = [
            high_1 ^ counter[1] ^ key[0],
            low_1,
            high_0 ^ counter[3] ^ key[1],
            low_0,
        ];
        for (key, step) in key.iter_mut().zip(STEPS) {
            *key = key.wrapping_add(step);
        }
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the authors' library, Random123.
    #[test]
    fn the_bits_are_those_of_the_authors() {
        let zeros = [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8];
        assert_eq!(philox([0; 4], [0; 2]), zeros);
        let ones = [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd];
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), ones);
        let counter = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        let digits = [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1];
        assert_eq!(philox(counter, [0xa409_3822, 0x299f_31d0]), digits);
    }
}
