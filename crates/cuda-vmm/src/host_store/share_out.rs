//! Work in parts that several threads do together.
#![forbid(unsafe_code)]

/// The stack of a helping thread, which needs little.
#[cfg(not(model_check))]
const STACK_BYTES: usize = 128 << 10;

/// Calls `work` once for each number below `parts`, from up to `threads` threads, and returns when
/// all is done.
///
/// The calling thread works too, so a system that starts no more threads only makes it slower.
#[cfg(not(model_check))]
pub(crate) fn share_out(parts: usize, threads: usize, work: impl Fn(usize) + Sync) {
    share_out_with(parts, threads, STACK_BYTES, work);
}

#[cfg(not(model_check))]
fn share_out_with(parts: usize, threads: usize, stack_bytes: usize, work: impl Fn(usize) + Sync) {
    use crate::sync::atomic::{AtomicUsize, Ordering};
    use crate::sync::thread;

    let next = AtomicUsize::new(0);
    let work_on = || {
        loop {
            let part = next.fetch_add(1, Ordering::Relaxed);
            if part >= parts {
                return;
            }
            work(part);
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads.min(parts) {
            let builder = thread::Builder::new().stack_size(stack_bytes);
            if let Err(error) = builder.spawn_scoped(scope, work_on) {
                crate::events::debug!(%error, "no more threads to touch host memory");
                break;
            }
        }
        work_on();
    });
}

/// The model checker has no part in this work, as its threads share nothing.
#[cfg(model_check)]
pub(crate) fn share_out(parts: usize, _threads: usize, work: impl Fn(usize) + Sync) {
    (0..parts).for_each(work);
}

#[cfg(all(test, not(model_check)))]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::sync::{Barrier, Mutex};

    #[test]
    fn each_part_is_done_once_whatever_the_number_of_threads() {
        for (parts, threads) in [(0, 4), (1, 0), (1, 4), (7, 1), (100, 3), (3, 100)] {
            let done = Mutex::new(Vec::new());
            share_out(parts, threads, |part| {
                done.lock().expect("no panic").push(part)
            });
            let mut done = done.into_inner().expect("no panic");
            done.sort_unstable();
            assert_eq!(done, (0..parts).collect::<Vec<_>>());
        }
    }

    #[test]
    fn threads_work_at_the_same_time() {
        let (all_here, workers) = (Barrier::new(3), Mutex::new(HashSet::new()));
        share_out(3, 3, |_| {
            workers
                .lock()
                .expect("no panic")
                .insert(std::thread::current().id());
            // Each waits for the two others.
            all_here.wait();
        });
        assert_eq!(workers.into_inner().expect("no panic").len(), 3);
    }

    #[test]
    fn a_system_that_starts_no_thread_leaves_the_work_to_the_caller() {
        let caller = std::thread::current().id();
        let done = Mutex::new(0);
        // No system has room for such a stack.
        share_out_with(10, 4, 1 << 60, |_| {
            assert_eq!(std::thread::current().id(), caller);
            *done.lock().expect("no panic") += 1;
        });
        assert_eq!(done.into_inner().expect("no panic"), 10);
    }
}
