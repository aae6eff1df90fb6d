//! Tensors in a forked process: calls fail, and take no lock that may never be released there.

use crate::common::open;
use candle_core::{DType, Tensor};
use candle_cuda_vmm::cuda_vmm::VmmError as Core;
use candle_cuda_vmm::{Result, TensorPool, VmmError};

/// Runs `act` in a child process. Fails unless it returns `true` within ten seconds.
#[track_caller]
fn in_child(act: impl FnOnce() -> bool) {
    // SAFETY: the child runs only `act`, which takes no lock that another thread may have held, and
    // exits.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        // SAFETY: this affects the child only; it exits without running the parent's handlers.
        unsafe {
            libc::alarm(10);
            libc::_exit(if act() { 0 } else { 1 });
        }
    }
    let mut status = 0;
    // SAFETY: `status` is valid for a write.
    let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!((waited, status), (child, 0));
}

fn is_forked<T>(result: Result<T>) -> bool {
    matches!(result, Err(VmmError::Vmm(Core::Forked)))
}

#[test]
fn tensors_are_refused_in_a_child() {
    let test = open();
    let pool = TensorPool::new(&test.device).unwrap();
    let empty = pool.tensor(16, DType::F32).unwrap();
    let mut full = pool.tensor(16, DType::F32).unwrap();
    let rows = Tensor::zeros((4, 16), DType::F32, &test.device).unwrap();
    full.append(&rows).unwrap();
    let view = full.view_rows(0..2).unwrap();
    in_child(|| {
        is_forked(empty.view())
            && is_forked(full.view())
            && is_forked(full.view_rows(1..2))
            && is_forked(full.append(&rows))
            && is_forked(full.grow(1))
    });
    assert_eq!(full.view().unwrap().dims(), [4, 16]);
    drop(view);
}
