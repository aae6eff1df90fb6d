//! Checks what cudarc does when a slice over memory of a pool is dropped. Leases rely on it.

use crate::bytes::{expect_pattern, pattern};
use crate::common::page;
use crate::token::{Page, Token};
use candle_core::cuda::cudarc::driver::sys::CUresult;
use candle_core::{Device, Tensor};

/// What to do if a test here fails.
const POLICY: &str = "cudarc does not drop a slice over memory of a pool as leases rely on, and as 0.19.10 did. \
    Under the version policy (docs/design/candle.md, \"Which Candle and cudarc?\") this version of cudarc is not allowed \
    before the leases were looked at anew.";

/// The driver's error for a free of an address that a pool has mapped.
const REFUSED: Option<CUresult> = Some(CUresult::CUDA_ERROR_INVALID_VALUE);

/// Fails unless Candle works as if nothing had happened.
#[track_caller]
fn expect_candle_undisturbed(page: &Page) {
    assert_eq!(page.parked_at_candle(), None, "{POLICY}");
    let device = Device::Cuda(page.candle.clone());
    let values = Tensor::new(&[3u8, 1, 4], &device).and_then(|tensor| tensor.to_vec1::<u8>());
    assert_eq!(values.unwrap(), [3, 1, 4]);
}

#[test]
fn the_free_of_the_last_view_is_refused_once_and_only_our_context_object_knows() {
    let memory = Page::new();
    memory.write(&pattern(1, page()));
    let mut token = Token::new(&memory.candle);
    assert!(token.frees_on_the_stream(), "{POLICY}");
    assert!(token.is_free(), "{POLICY}");
    let tensor = memory.tensor::<u8>(&token, page());
    assert!(!token.is_free(), "{POLICY}");
    let view = tensor.narrow(0, 7, 100).unwrap();
    let clone = view.clone();
    for left in [tensor, view] {
        drop(left);
        assert!(!token.is_free(), "{POLICY}");
        assert_eq!(token.take_parked(), None, "{POLICY}");
    }
    assert_eq!(clone.to_vec1::<u8>().unwrap(), pattern(1, page())[7..107]);
    drop(clone);
    assert!(token.is_free(), "{POLICY}");
    assert_eq!(token.take_parked(), REFUSED, "{POLICY}");
    assert_eq!(token.take_parked(), None, "{POLICY}");
    expect_candle_undisturbed(&memory);
    expect_pattern(&memory.stream, memory.address, 1, page());
}

#[test]
fn memory_that_one_tensor_has_left_serves_the_next() {
    let memory = Page::new();
    memory.write(&pattern(2, page()));
    for length in [page(), 1, 4096] {
        let mut token = Token::new(&memory.candle);
        let tensor = memory.tensor::<u8>(&token, length);
        assert!(tensor.to_vec1::<u8>().unwrap() == pattern(2, page())[..length]);
        drop(tensor);
        assert!(token.is_free(), "{POLICY}");
        assert_eq!(token.take_parked(), REFUSED, "{POLICY}");
        expect_candle_undisturbed(&memory);
    }
}

#[test]
fn one_tokens_refusal_is_not_raised_by_anothers_read() {
    let memory = Page::new();
    memory.write(&pattern(3, page()));
    let [first, second] = [Token::new(&memory.candle), Token::new(&memory.candle)];
    let tensors = [&first, &second].map(|token| memory.tensor::<u8>(token, 64));
    let [dropped, read] = tensors;
    drop(dropped);
    assert_eq!(read.to_vec1::<u8>().unwrap(), pattern(3, page())[..64]);
    drop(read);
    for token in [first, second] {
        assert_eq!(token.take_parked(), REFUSED, "{POLICY}");
    }
    expect_candle_undisturbed(&memory);
}

#[test]
fn a_tensor_may_be_dropped_by_a_thread_that_never_called_the_driver() {
    let memory = Page::new();
    memory.write(&pattern(4, page()));
    let mut token = Token::new(&memory.candle);
    let tensor = memory.tensor::<u8>(&token, page());
    std::thread::spawn(move || drop(tensor)).join().unwrap();
    assert!(token.is_free(), "{POLICY}");
    // The error depends on that thread's context.
    assert!(token.take_parked().is_some(), "{POLICY}");
    expect_candle_undisturbed(&memory);
    expect_pattern(&memory.stream, memory.address, 4, page());
}

#[test]
fn a_copy_holds_the_token_though_its_memory_is_its_own() {
    let memory = Page::new();
    memory.write(&pattern(5, page()));
    let mut token = Token::new(&memory.candle);
    let tensor = memory.tensor::<u8>(&token, 4096);
    let copy = tensor.copy().unwrap();
    drop(tensor);
    assert!(!token.is_free(), "{POLICY}");
    assert_eq!(token.take_parked(), REFUSED, "{POLICY}");
    memory.write(&pattern(6, page()));
    assert_eq!(copy.to_vec1::<u8>().unwrap(), pattern(5, page())[..4096]);
    drop(copy);
    assert!(token.is_free(), "{POLICY}");
    assert_eq!(token.take_parked(), None, "{POLICY}");
    expect_candle_undisturbed(&memory);
    expect_pattern(&memory.stream, memory.address, 6, page());
}
