//! Threads that reserve, give back, trim and change the limit at once.

use crate::{Fixture, UNIT, pattern};
use cuda_vmm::VmmError;
use cuda_vmm::sys::DriverFunction;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Numbers for one thread, the same in every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) as usize % end
    }
}

#[test]
fn threads_that_race_keep_their_bytes_and_the_limit() {
    const THREADS: usize = 6;
    const LIMIT: usize = 10;
    let fixture = Fixture::new(LIMIT);
    let (refused, served) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let workers = [(); THREADS].map(|()| ()).into_iter().enumerate();
        let workers: Vec<_> = workers
            .map(|(number, ())| {
                let (fixture, refused, served) = (&fixture, &refused, &served);
                scope.spawn(move || {
                    let mut numbers = Numbers(number as u64 + 1);
                    let mut held = Vec::new();
                    for round in 0..150 {
                        match fixture.store.reserve((1 + numbers.below(4)) * UNIT - 9) {
                            Ok(mut bytes) => {
                                served.fetch_add(1, Ordering::Relaxed);
                                // Both ends of each unit are this thread's alone.
                                let mark = pattern(64, number * 1000 + round);
                                let last = bytes.bytes() - 64;
                                let places: Vec<_> =
                                    (0..last).step_by(UNIT / 2).chain([last]).collect();
                                for at in &places {
                                    bytes.write(*at, &mark).expect("within");
                                }
                                held.push((bytes, places, mark));
                            }
                            Err(VmmError::HostStoreFull {
                                needed_bytes,
                                in_use_bytes,
                                limit_bytes,
                            }) => {
                                refused.fetch_add(1, Ordering::Relaxed);
                                assert_eq!(limit_bytes, LIMIT * UNIT);
                                assert!(needed_bytes + in_use_bytes > limit_bytes);
                                held.clear();
                            }
                            Err(error) => panic!("{error}"),
                        }
                        if held.len() > numbers.below(3) {
                            let (bytes, places, mark) = held.swap_remove(numbers.below(held.len()));
                            for at in places {
                                let mut found = [0; 64];
                                bytes.read(at, &mut found).expect("within");
                                assert!(found[..] == mark[..], "another's bytes");
                            }
                        }
                        if numbers.below(20) == 0 {
                            fixture.store.trim().expect("no fault");
                        }
                    }
                })
            })
            .collect();
        let watch = scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                let stats = fixture.store.stats();
                assert!(stats.registered_bytes <= LIMIT * UNIT, "{stats}");
                assert!(stats.in_use_bytes <= LIMIT * UNIT, "{stats}");
                std::thread::yield_now();
            }
        });
        let outcomes: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        is_over.store(true, Ordering::Relaxed);
        watch.join().expect("the limit is kept");
        outcomes
            .into_iter()
            .for_each(|outcome| outcome.expect("no panic"));
    });
    assert!(refused.into_inner() > 0 && served.into_inner() > 0);
    assert_eq!(fixture.store.stats().in_use_bytes, 0);
    fixture.store.trim().expect("no fault");
    fixture.expect(0, 0, 0);
}

/// The limit is exactly what all need, and a piece is more than each needs. So all are served only
/// if those that come late wait for what another makes.
#[test]
fn nobody_is_refused_for_memory_that_another_is_making() {
    for _ in 0..50 {
        let fixture = Fixture::new(4);
        let start = Barrier::new(4);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    start.wait();
                    let bytes = fixture.store.reserve(UNIT).expect("room for all");
                    start.wait();
                    drop(bytes);
                });
            }
        });
        fixture.expect(0, 4, 2);
        let registered = fixture.calls(DriverFunction::cuMemHostRegister);
        assert_eq!(registered, 2, "no more than the limit at any moment");
    }
}

#[test]
fn limits_that_change_under_way_are_kept_in_the_end() {
    let fixture = Fixture::new(8);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..100 {
                    match fixture.store.reserve(2 * UNIT) {
                        Ok(bytes) => drop(bytes),
                        Err(error) => {
                            let is_full = matches!(error, VmmError::HostStoreFull { .. });
                            assert!(is_full, "{error}");
                        }
                    }
                }
            });
        }
        scope.spawn(|| {
            for round in 0..100 {
                let units = [8, 2, 0, 5][round % 4];
                fixture.store.set_limit_bytes(units * UNIT).expect("here");
            }
            fixture.store.set_limit_bytes(2 * UNIT).expect("here");
        });
    });
    let stats = fixture.store.stats();
    assert_eq!(stats.in_use_bytes, 0);
    assert!(stats.registered_bytes <= 2 * UNIT, "{stats}");
}
