//! Numbers of one type made into another on their way from a file.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use candle_core::DType;
use half::{bf16, f16};

/// How the numbers of a tensor change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Conversion {
    /// They are as they are in the file.
    None,
    /// From the first type to the second.
    Floats(Float, Float),
}

/// A type of floating-point numbers that is converted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Float {
    F64,
    F32,
    F16,
    BF16,
}

impl Float {
    fn of(dtype: DType) -> Option<Self> {
        match dtype {
            DType::F64 => Some(Self::F64),
            DType::F32 => Some(Self::F32),
            DType::F16 => Some(Self::F16),
            DType::BF16 => Some(Self::BF16),
            _ => None,
        }
    }
}

impl Conversion {
    /// The conversion between two types, if there is one.
    pub(super) fn between(from: DType, to: DType) -> Option<Self> {
        match from == to {
            true => Some(Self::None),
            false => Some(Self::Floats(Float::of(from)?, Float::of(to)?)),
        }
    }

    /// The bytes of a number before the conversion, if there is one.
    pub(super) fn source_bytes(self) -> Option<usize> {
        match self {
            Self::None => None,
            Self::Floats(Float::F64, _) => Some(8),
            Self::Floats(Float::F32, _) => Some(4),
            Self::Floats(Float::F16 | Float::BF16, _) => Some(2),
        }
    }

    /// Converts the numbers of `from`, which are as many as fit in `to`. Rounds to the nearest, as
    /// Candle does.
    pub(super) fn convert(self, from: &[u8], to: &mut [u8]) {
        match self {
            Self::None => to.copy_from_slice(from),
            Self::Floats(source, target) => floats(source, target, from, to),
        }
    }
}

fn floats(source: Float, target: Float, from: &[u8], to: &mut [u8]) {
    macro_rules! each {
        ($from:ty, $to:ty, $convert:expr) => {{
            let numbers = from
                .as_chunks()
                .0
                .iter()
                .map(|bytes| <$from>::from_le_bytes(*bytes));
            let convert: fn($from) -> $to = $convert;
            for (target, number) in to.as_chunks_mut().0.iter_mut().zip(numbers) {
                *target = convert(number).to_le_bytes();
            }
        }};
    }
    match (source, target) {
        (Float::F64, Float::F64) | (Float::F32, Float::F32) => to.copy_from_slice(from),
        (Float::F16, Float::F16) | (Float::BF16, Float::BF16) => to.copy_from_slice(from),
        (Float::F64, Float::F32) => each!(f64, f32, |number| number as f32),
        (Float::F64, Float::F16) => each!(f64, f16, f16::from_f64),
        (Float::F64, Float::BF16) => each!(f64, bf16, bf16::from_f64),
        (Float::F32, Float::F64) => each!(f32, f64, f64::from),
        (Float::F32, Float::F16) => each!(f32, f16, f16::from_f32),
        (Float::F32, Float::BF16) => each!(f32, bf16, bf16::from_f32),
        (Float::F16, Float::F64) => each!(f16, f64, f64::from),
        (Float::F16, Float::F32) => each!(f16, f32, f32::from),
        (Float::F16, Float::BF16) => each!(f16, bf16, |number| bf16::from_f32(number.to_f32())),
        (Float::BF16, Float::F64) => each!(bf16, f64, f64::from),
        (Float::BF16, Float::F32) => each!(bf16, f32, f32::from),
        (Float::BF16, Float::F16) => each!(bf16, f16, |number| f16::from_f32(number.to_f32())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};

    const FLOATS: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::BF16];

    /// The bytes of a tensor of floats.
    fn bytes_of(tensor: &Tensor) -> Vec<u8> {
        macro_rules! bytes {
            ($type:ty) => {{
                let numbers = tensor.to_vec1::<$type>().expect("of this type");
                numbers
                    .iter()
                    .flat_map(|number| number.to_le_bytes())
                    .collect()
            }};
        }
        match tensor.dtype() {
            DType::F64 => bytes!(f64),
            DType::F32 => bytes!(f32),
            DType::F16 => bytes!(f16),
            _ => bytes!(bf16),
        }
    }

    #[test]
    fn numbers_are_those_that_candle_makes() {
        let numbers: Vec<f64> = (-40..40)
            .map(|at| f64::from(at) * 1.000_123_4 / 7.)
            .collect();
        let all = Tensor::new(numbers, &Device::Cpu).expect("a tensor");
        for from in FLOATS {
            let source = all.to_dtype(from).expect("floats");
            for to in FLOATS {
                let expected = bytes_of(&source.to_dtype(to).expect("floats"));
                let mut found = vec![0; expected.len()];
                let conversion = Conversion::between(from, to).expect("floats");
                conversion.convert(&bytes_of(&source), &mut found);
                assert_eq!(found, expected, "{from:?} to {to:?}");
            }
        }
        assert_eq!(
            Conversion::between(DType::U8, DType::U8),
            Some(Conversion::None)
        );
        assert_eq!(Conversion::between(DType::U8, DType::F32), None);
        assert_eq!(Conversion::between(DType::F32, DType::F8E4M3), None);
    }
}
