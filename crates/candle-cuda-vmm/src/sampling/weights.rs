//! Weights of tokens, as whole numbers. `kernels/sampling/weights.cuh` has the same functions, with
//! the same bits.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

/// Added to a number, it leaves the nearest integer in the low bits.
const ROUNDS: f32 = 12_582_912.;
/// Octaves below the largest logit, beyond which weights are 0 for certain.
const OCTAVES: f32 = 64.;
/// What a power of two is multiplied by, but for the integer part, the highest power first.
const POLYNOMIAL: [f32; 6] = [
    0.001_112_550_7,
    0.009_666_283,
    0.055_574_004,
    0.240_223_51,
    0.693_142_83,
    1.,
];

/// The weight of a logit: `2^45 exp((logit - largest) / temperature)`, rounded.
#[derive(Clone, Copy, Debug)]
pub struct Weights {
    largest: f32,
    /// Octaves of a unit of logits.
    scale: f32,
    /// A difference from the largest logit for which the weight is 0.
    farthest: f32,
}

impl Weights {
    pub fn new(largest: f32, temperature: f32) -> Self {
        let power = |exponent: u32| f32::from_bits(exponent << 23);
        let temperature = temperature.clamp(power(127 - 100), power(127 + 100));
        let scale = std::f32::consts::LOG2_E / temperature;
        Self {
            largest,
            scale,
            farthest: -OCTAVES / scale,
        }
    }

    /// Returns a logit below which there are no weights.
    pub fn bottom(&self) -> f32 {
        self.largest + self.farthest
    }

    pub fn weight(&self, logit: f32) -> u64 {
        let distance = (logit - self.largest).max(self.farthest);
        let integer = distance.mul_add(self.scale, ROUNDS);
        let left = distance.mul_add(self.scale, -(integer - ROUNDS));
        let terms = POLYNOMIAL.into_iter();
        let power = terms.reduce(|sum, term| left.mul_add(sum, term));
        let power = power.unwrap_or_default();
        let power = f32::from_bits(power.to_bits().wrapping_add(integer.to_bits() << 23));
        // It is at most 1. So a sum with 1 has it in units of 2^-23, and what is left goes the same
        // way.
        let high = power + 1.;
        let rest = power - (high - 1.);
        let low = rest.mul_add(4_194_304., 1.5);
        let units = |number: f32, none: f32| number.to_bits() as i32 - none.to_bits() as i32;
        let weight = (i64::from(units(high, 1.)) << 22) + i64::from(units(low, 1.5));
        weight.cast_unsigned()
    }
}

/// Returns the weight that a set must have, for `p` below 1: `p` of the whole, rounded up.
pub fn target(p: f32, whole: u64) -> u64 {
    // Of 2^64.
    let ratio = (p.max(0.) * 18_446_744_073_709_551_616.) as u64;
    let least = (u128::from(whole) * u128::from(ratio)).div_ceil(1 << 64);
    (least as u64).max(1)
}

/// Returns an integer for a number, in the same order.
pub fn ordered(number: f32) -> u32 {
    let bits = number.to_bits();
    match number.is_sign_negative() {
        true => !bits,
        false => bits ^ (1 << 31),
    }
}

/// Returns the number of such an integer.
pub fn number_of(ordered: u32) -> f32 {
    f32::from_bits(match ordered >> 31 {
        0 => !ordered,
        _ => ordered ^ (1 << 31),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_the_exponential_function_and_have_the_bits_of_the_kernels() {
        let mut all = 0u64;
        for temperature in [1e-3f32, 0.3, 1., 7., 1e4] {
            let weights = Weights::new(3., temperature);
            assert_eq!(weights.weight(3.), 1 << 45);
            for step in 0..20_000u16 {
                let logit = (-0.003 * f32::from(step)).mul_add(temperature, 3.);
                let weight = weights.weight(logit);
                let distance = f64::from(logit) - 3.;
                let expected = (distance / f64::from(temperature)).exp() * 2f64.powi(45);
                let off = (weight as f64 - expected).abs();
                assert!(off <= 1e-5 * expected + 0.5, "{logit}, {temperature}");
                all = all.wrapping_mul(31).wrapping_add(weight);
            }
        }
        // `tests/host_kernels/sample.cpp` has the same number.
        assert_eq!(all, 0x0bb3_cb67_cf98_5dd1);
    }

    #[test]
    fn what_is_far_or_no_number_has_no_weight() {
        for temperature in [0.5, 1e-38, f32::INFINITY] {
            let weights = Weights::new(3., temperature);
            for logit in [f32::NEG_INFINITY, f32::NAN] {
                assert_eq!(weights.weight(logit), 0, "{temperature}");
            }
        }
        let weights = Weights::new(3., 0.5);
        assert_eq!((weights.weight(-1e30), weights.weight(f32::MIN)), (0, 0));
        assert!(weights.weight(weights.bottom()) == 0 && weights.weight(-12.) > 0);
    }

    #[test]
    fn integers_have_the_order_of_numbers() {
        let numbers = [f32::MIN, -2., -1e-40, -0., 0., 1e-40, 1., f32::INFINITY];
        assert!(numbers.is_sorted_by_key(|number| ordered(*number)));
        for number in numbers {
            assert_eq!(number_of(ordered(number)).to_bits(), number.to_bits());
        }
    }

    #[test]
    fn a_target_is_rounded_up_and_at_least_1() {
        assert_eq!(target(0.5, 7), 4);
        assert_eq!(target(0.5, 8), 4);
        assert_eq!(target(0.25, 1 << 63), 1 << 61);
        for p in [0., -1., 1e-30] {
            assert_eq!(target(p, 1000), 1);
        }
    }
}
