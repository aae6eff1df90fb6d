//! What does not fit is refused by name, and changes nothing.

mod calls;
mod construction;

use crate::common::UnderTest;
use candle_core::{DType, Error, Result, Tensor};
use candle_cuda_vmm::VmmError;

pub fn zeros(test: &UnderTest, shape: &[usize], dtype: DType) -> Tensor {
    Tensor::zeros(shape, dtype, &test.device).unwrap()
}

pub fn index(test: &UnderTest, numbers: &[u32]) -> Tensor {
    Tensor::new(numbers, &test.device).unwrap()
}

/// Fails unless the result is exactly this error, with these numbers.
#[track_caller]
pub fn refused<T>(result: Result<T>, expected: &VmmError) {
    match result.map(|_| ()) {
        Err(error) => {
            let found = VmmError::find(&error).unwrap_or_else(|| panic!("{error}"));
            assert_eq!(format!("{found:?}"), format!("{expected:?}"));
        }
        Ok(()) => panic!("expected {expected:?}, got success"),
    }
}

/// Fails unless the result is an error of Candle whose text begins with this. The text has all
/// values.
#[track_caller]
pub fn refused_by_candle<T>(result: Result<T>, expected: &str) {
    let error = match result.map(|_| ()) {
        Err(Error::WithBacktrace { inner, .. }) => *inner,
        Err(error) => error,
        Ok(()) => panic!("expected {expected}, got success"),
    };
    let found = error.to_string();
    assert!(found.starts_with(expected), "{found} instead of {expected}");
}

/// The same, for a function that returns this crate's result.
#[track_caller]
pub fn candle<T>(result: candle_cuda_vmm::Result<T>, expected: &str) {
    match result.map(|_| ()) {
        Err(VmmError::CandleError(error)) => refused_by_candle::<()>(Err(error), expected),
        other => panic!("expected {expected}, got {other:?}"),
    }
}

#[track_caller]
pub fn ours<T>(result: candle_cuda_vmm::Result<T>, expected: &VmmError) {
    refused(result.map_err(Error::from), expected);
}
