//! Elements of K, V and queries on the CPU, and their numbers in F32.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use candle_core::WithDType;
use float8::F8E4M3;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::sync::LazyLock;

/// An element type that converts to F32 and back.
pub trait Element: WithDType {
    fn widen(self) -> f32;
    /// Rounds to the nearest. F8E4M3 saturates at its largest number.
    fn narrow(wide: f32) -> Self;

    /// Converts elements to as many numbers.
    fn widen_all(narrow: &[Self], wide: &mut [f32]) {
        for (wide, narrow) in wide.iter_mut().zip(narrow) {
            *wide = narrow.widen();
        }
    }
}

impl Element for f32 {
    fn widen(self) -> f32 {
        self
    }

    fn narrow(wide: f32) -> Self {
        wide
    }

    fn widen_all(narrow: &[Self], wide: &mut [f32]) {
        wide.copy_from_slice(narrow);
    }
}

macro_rules! element_of_16_bits {
    ($($type:ty),*) => {$(
        impl Element for $type {
            fn widen(self) -> f32 {
                self.to_f32()
            }

            fn narrow(wide: f32) -> Self {
                Self::from_f32(wide)
            }

            fn widen_all(narrow: &[Self], wide: &mut [f32]) {
                narrow.convert_to_f32_slice(wide);
            }
        }
    )*};
}

element_of_16_bits!(f16, bf16);

impl Element for F8E4M3 {
    fn widen(self) -> f32 {
        static NUMBERS: LazyLock<[f32; 256]> =
            LazyLock::new(|| std::array::from_fn(|bits| F8E4M3::from_bits(bits as u8).to_f32()));
        NUMBERS[usize::from(self.to_bits())]
    }

    fn narrow(wide: f32) -> Self {
        Self::from_f32(wide)
    }
}

/// Returns the sum of products.
pub fn dot(left: &[f32], right: &[f32]) -> f32 {
    // Several sums, so that the compiler can use a vector register.
    const LANES: usize = 16;
    let mut sums = [0.; LANES];
    let (lefts, rights) = (left.chunks_exact(LANES), right.chunks_exact(LANES));
    let rest = lefts.remainder().iter().zip(rights.remainder());
    let rest: f32 = rest.map(|(left, right)| left * right).sum();
    for (left, right) in lefts.zip(rights) {
        for ((sum, left), right) in sums.iter_mut().zip(left).zip(right) {
            *sum += left * right;
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// Bounds a score to between `-cap` and `cap`.
pub fn capped(score: f32, cap: Option<f32>) -> f32 {
    cap.map_or(score, |cap| cap * (score / cap).tanh())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dot_product_of_any_length() {
        for length in [1, 15, 16, 17, 40] {
            let left: Vec<f32> = (0..length).map(|index| index as f32).collect();
            let right: Vec<f32> = (0..length).map(|index| (index % 3) as f32).collect();
            let expected: f32 = left.iter().zip(&right).map(|(a, b)| a * b).sum();
            assert_eq!(dot(&left, &right), expected, "{length}");
        }
    }

    #[test]
    fn every_byte_is_the_number_of_the_crate_and_the_largest_saturates() {
        for bits in 0..=u8::MAX {
            let element = F8E4M3::from_bits(bits);
            let (ours, theirs) = (element.widen(), element.to_f32());
            assert!(ours == theirs || ours.is_nan() && theirs.is_nan(), "{bits}");
        }
        assert_eq!(F8E4M3::narrow(1e6).widen(), 448.);
    }
}
