//! Attention over the K and V of a batch of sequences: in rows, in a cache for each sequence, and
//! in blocks. The cases run on the device under test. A GPU is compared with the reference and with
//! the CPU.

mod decode;
mod extremes;
mod layouts;
mod prompt;
mod random;
mod reference;
pub mod refusals;
mod vacant;
mod write;

use crate::common::UnderTest;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::VmmError;
use candle_cuda_vmm::attention::DecodePlan;
use candle_cuda_vmm::cuda_vmm::DriverKind;
use std::io::Write;

/// Returns whether the device under test has attention. If it has not, says so, and checks that the
/// crate does.
pub fn has_attention(test: &UnderTest) -> bool {
    if test.kind == DriverKind::Simulated || cfg!(feature = "attention") {
        return true;
    }
    let refusal = DecodePlan::new(&test.device, 1, 1).unwrap_err();
    assert!(matches!(refusal, VmmError::NoAttentionKernels));
    // Written directly, because the test harness captures standard output.
    let _ = writeln!(
        std::io::stderr(),
        "skipped: this build has no feature `attention`, so the GPU has no kernels"
    );
    false
}

/// Returns the numbers of a tensor.
pub fn numbers(tensor: &Tensor) -> Vec<f32> {
    let tensor = tensor.to_device(&Device::Cpu).unwrap();
    let tensor = tensor.to_dtype(DType::F32).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Fails unless numbers differ by at most `allowed`, relative to the expected number if that is
/// more than 1. NaN is expected as NaN, and infinities as themselves.
#[track_caller]
pub fn assert_close(ours: &[f32], expected: &[f64], allowed: f64, case: &str) {
    assert_eq!(ours.len(), expected.len(), "{case}");
    for (at, (ours, expected)) in ours.iter().zip(expected).enumerate() {
        let ours = f64::from(*ours);
        let is_close = match expected.is_finite() {
            true => (ours - expected).abs() <= allowed * expected.abs().max(1.),
            false => ours == *expected || ours.is_nan() && expected.is_nan(),
        };
        assert!(is_close, "{ours} instead of {expected} at {at}: {case}");
    }
}

/// The allowed error of numbers around 1 in this dtype.
pub fn allowed(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 2e-5,
        DType::F16 => 4e-3,
        _ => 3e-2,
    }
}
