//! Random operations on both pools against a plain model: a million steps in a release build.
//!
//! The model keeps one flag for each quarter of a page. An allocation is refused for want of memory
//! only if the live pages and the new ones exceed the limit: all else can be given up.

mod common;

#[path = "random_operations/model.rs"]
mod model;

use common::Models;
use cuda_vmm::sim::{Books, Fault, SimConfig, Simulator};
use cuda_vmm::sys::CUDA_ERROR_OPERATING_SYSTEM;
use cuda_vmm::{
    CaptureGuard, Driver, EngineOptions, SharedPoolOptions, Stream, VmmError, WorkerMode,
};
use model::{Model, Pools};
use proptest::prelude::*;

const PAGE: usize = 2 << 20;
const UNIT: usize = PAGE / 4;
const UNITS: usize = 4 * 24;
const MODELS: usize = 4;
/// The first of them share a pool.
const SHARED: usize = 3;
const LIMIT_PAGES: usize = 32;
/// What the first model is guaranteed.
const GUARANTEE_PAGES: usize = 6;

#[derive(Debug, Clone)]
enum Operation {
    Allocate {
        model: usize,
        at: usize,
        units: usize,
        wait: bool,
    },
    AllocateAnywhere {
        model: usize,
        units: usize,
    },
    Deallocate {
        model: usize,
        at: usize,
        units: usize,
    },
    DeallocateAll {
        model: usize,
    },
    Register {
        model: usize,
    },
    Unregister {
        model: usize,
    },
    TakeStep,
    Trim,
    Compact,
    /// Queues a write to a page and lets no work run, until something would wait for it.
    HoldWork {
        model: usize,
        at: usize,
    },
    /// Declares a capture, or ends it.
    Capture,
    /// The nth call from now fails.
    Fault(u64),
}

fn operation() -> impl Strategy<Value = Operation> {
    let model = 0..MODELS;
    let ask = || prop_oneof![6 => 1..24usize, 1 => 64..=UNITS];
    prop_oneof![
        30 => (model.clone(), 0..UNITS, ask(), any::<bool>())
            .prop_map(|(model, at, units, wait)| Operation::Allocate { model, at, units, wait }),
        10 => (model.clone(), ask()).prop_map(|(model, units)| Operation::AllocateAnywhere { model, units }),
        25 => (model.clone(), 0..UNITS, 1..24usize).prop_map(|(model, at, units)| Operation::Deallocate { model, at, units }),
        6 => model.clone().prop_map(|model| Operation::DeallocateAll { model }),
        4 => model.clone().prop_map(|model| Operation::Register { model }),
        3 => (model.clone(), 0..UNITS).prop_map(|(model, at)| Operation::HoldWork { model, at }),
        1 => Just(Operation::Capture),
        1 => model.prop_map(|model| Operation::Unregister { model }),
        8 => Just(Operation::TakeStep),
        2 => Just(Operation::Trim),
        4 => Just(Operation::Compact),
        3 => (1..12u64).prop_map(Operation::Fault),
    ]
}

/// Operations that belong together: mostly one, and sometimes what it takes to have much to
/// compact.
fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let faults = prop::collection::vec(1..40u64, 0..3);
    let freed = prop::collection::vec(0..UNITS / 4, 1..16);
    prop_oneof![
        40 => operation().prop_map(|operation| vec![operation]),
        1 => (freed, faults).prop_map(|(freed, faults)| {
            let all = (0..MODELS).map(|model| Operation::DeallocateAll { model });
            let free = |page| Operation::Deallocate { model: SHARED, at: 4 * page, units: 4 };
            let taken = [
                Operation::Register { model: SHARED },
                Operation::Allocate { model: SHARED, at: 0, units: UNITS, wait: true },
            ];
            let faults = faults.into_iter().map(Operation::Fault);
            let rest = freed.into_iter().map(free).chain(faults);
            all.chain(taken).chain(rest).chain([Operation::Compact]).collect()
        }),
    ]
}

/// Lets held work run when a case ends, well or badly: pools wait for it when they are dropped.
struct Release(Simulator);

impl Drop for Release {
    fn drop(&mut self) {
        self.0.release_work();
    }
}

/// With chunks of several pages a partial free leaves slack, which only compaction gives up: the
/// pool says how much.
fn run(
    steps: Vec<Operation>,
    options: EngineOptions,
    streams: bool,
    ahead_bytes_max: usize,
) -> Result<(), TestCaseError> {
    let driver = Driver::simulated(SimConfig::new().unbacked().memory_bytes(1 << 30))
        .expect("a free slot for a simulator");
    let simulator = driver.simulator().expect("simulated").clone();
    let device = driver.device(0).expect("device");
    let stream = Stream::new(&device).expect("stream");
    let engine = options
        .limit_bytes(LIMIT_PAGES * PAGE)
        .worker(WorkerMode::Manual);
    let shared =
        Models::with_options(&device, SharedPoolOptions::new().engine(engine)).expect("pool");
    let mut pools = Pools::new(shared, ahead_bytes_max);
    let mut model = Model(vec![None; MODELS]);
    let mut faulty = false;
    let (mut held, mut capture) = (false, None);
    let _in_the_end = Release(simulator.clone());
    for step in steps {
        let what = format!("{step:?}");
        let waits = match &step {
            Operation::Allocate { wait, .. } => *wait,
            Operation::AllocateAnywhere { .. }
            | Operation::Register { .. }
            | Operation::Unregister { .. }
            | Operation::Compact
            | Operation::Fault(_) => true,
            _ => false,
        };
        if held && waits {
            simulator.release_work();
            held = false;
        }
        // Where no stream is named, what retires waits for the capture's end.
        let may_be_stuck = capture.is_some();
        let compacts = matches!(step, Operation::Compact);
        match step {
            Operation::Allocate {
                model: which,
                at,
                units: count,
                wait,
            } => {
                let (offset, bytes) = (at * UNIT, count * UNIT);
                let outcome = pools.with(which, |range| {
                    if wait {
                        range.allocate(offset, bytes)
                    } else {
                        range.try_allocate(offset, bytes)
                    }
                });
                let (room, slack_pages) = (model.room(which), pools.slack_pages());
                let Some(units) = &mut model.0[which] else {
                    prop_assert_eq!(outcome, Err(pools.not_found(which)));
                    continue;
                };
                if at + count > UNITS {
                    prop_assert_eq!(
                        outcome,
                        Err(VmmError::OutOfRange {
                            offset,
                            bytes,
                            capacity_bytes: UNITS * UNIT
                        })
                    );
                } else if units[at..at + count].contains(&true) {
                    prop_assert_eq!(outcome, Err(VmmError::AlreadyMapped { offset, bytes }));
                } else {
                    let need = Model::need(units, at, count);
                    match outcome {
                        Ok(address) => {
                            prop_assert!(need <= room, "{what}: admitted beyond the limit");
                            prop_assert_eq!(
                                Some(address),
                                pools.base_address(which).map(|base| base + offset as u64)
                            );
                            units[at..at + count].fill(true);
                        }
                        Err(VmmError::Driver(_) | VmmError::Quarantined { .. }) => {
                            prop_assert!(faulty, "{what}")
                        }
                        Err(error) => {
                            prop_assert!(error.is_out_of_memory(), "{what}: {error}");
                            // Without a wait, what retires may be in the way.
                            prop_assert!(
                                need + slack_pages > room || !wait || faulty || may_be_stuck,
                                "{what}: {error}; need {need} room {room} slack {slack_pages}; {}",
                                pools.shared.stats()
                            );
                        }
                    }
                }
            }
            Operation::AllocateAnywhere {
                model: which,
                units: count,
            } => {
                let outcome = pools.allocate_anywhere(which, count * UNIT);
                let (room, slack_pages) = (model.room(which), pools.slack_pages());
                let Some(units) = &mut model.0[which] else {
                    prop_assert_eq!(outcome, Err(pools.not_found(which)));
                    continue;
                };
                match (Model::place(units, count), outcome) {
                    (None, outcome) => prop_assert!(
                        matches!(outcome, Err(VmmError::OutOfVirtualMemory { .. })),
                        "{what}"
                    ),
                    (Some(at), Ok(address)) => {
                        prop_assert!(Model::need(units, at, count) <= room);
                        prop_assert_eq!(
                            Some(address),
                            pools
                                .base_address(which)
                                .map(|base| base + (at * UNIT) as u64)
                        );
                        units[at..at + count].fill(true);
                    }
                    (Some(_), Err(VmmError::Driver(_) | VmmError::Quarantined { .. })) => {
                        prop_assert!(faulty, "{what}")
                    }
                    (Some(at), Err(error)) => {
                        prop_assert!(error.is_out_of_memory(), "{what}: {error}");
                        prop_assert!(
                            Model::need(units, at, count) + slack_pages > room
                                || faulty
                                || may_be_stuck,
                            "{what}: {error}"
                        );
                    }
                }
            }
            Operation::Deallocate {
                model: which,
                at,
                units: count,
            } => {
                let (offset, bytes) = (at * UNIT, count * UNIT);
                let outcome = pools.deallocate(which, offset, bytes);
                let expected = match &mut model.0[which] {
                    None => Err(pools.not_found(which)),
                    Some(_) if at + count > UNITS => Err(VmmError::OutOfRange {
                        offset,
                        bytes,
                        capacity_bytes: UNITS * UNIT,
                    }),
                    Some(units) if units[at..at + count].contains(&false) => {
                        Err(VmmError::NotMapped { offset, bytes })
                    }
                    Some(units) => {
                        units[at..at + count].fill(false);
                        Ok(())
                    }
                };
                prop_assert_eq!(outcome, expected);
            }
            Operation::DeallocateAll { model: which } => {
                if let Some(units) = &mut model.0[which] {
                    for at in (0..UNITS).filter(|at| units[*at]) {
                        prop_assert_eq!(pools.deallocate(which, at * UNIT, UNIT), Ok(()));
                    }
                    units.fill(false);
                }
            }
            Operation::Register { model: which } => {
                let outcome = pools.register(which);
                if model.0[which].is_some() {
                    prop_assert_eq!(
                        outcome,
                        Err(VmmError::ModelAlreadyRegistered {
                            model: pools.names[which].clone()
                        })
                    );
                } else {
                    match outcome {
                        Ok(()) => {
                            model.0[which] = Some([false; UNITS]);
                            if streams {
                                pools
                                    .with(which, |range| range.use_stream(&stream))
                                    .expect("same device");
                            }
                        }
                        // The others hold what would be guaranteed.
                        Err(VmmError::QuotaUnsatisfiable { .. }) => prop_assert_eq!(which, 0),
                        Err(error) => prop_assert!(faulty, "{what}: {error}"),
                    }
                }
            }
            Operation::Unregister { model: which } => {
                let outcome = pools.unregister(which);
                match model.0[which].take() {
                    None => prop_assert_eq!(outcome, Err(pools.not_found(which))),
                    Some(_) => prop_assert!(outcome.is_ok() || faulty, "{what}: {outcome:?}"),
                }
            }
            Operation::TakeStep => {
                pools.shared.engine().step();
            }
            Operation::HoldWork { model: which, at } => {
                let is_live = model.0[which].as_ref().is_some_and(|units| units[at]);
                // Where no stream is named, steps synchronise, which would wait for what is held.
                if let Some(base_address) = pools.base_address(which).filter(|_| streams && is_live)
                {
                    simulator.hold_work();
                    held = true;
                    let address = base_address + (at * UNIT) as u64;
                    // SAFETY: the unit is live, and its page stays mapped until the work has run,
                    // which is what is tested: the simulator would poison the context.
                    let written = unsafe { stream.memset(address, 7, UNIT) };
                    prop_assert!(written.is_ok() || faulty, "{what}: {written:?}");
                }
            }
            Operation::Capture => {
                capture = match capture.take() {
                    Some(_over) => None,
                    None => Some(CaptureGuard::new()),
                }
            }
            Operation::Trim => prop_assert!(pools.shared.trim().is_ok() || faulty),
            Operation::Compact => {
                let outcome = pools.own.as_mut().map(|own| own.compact());
                if let (Some(Ok(report)), Some(own)) = (&outcome, &pools.own) {
                    prop_assert_eq!(report.skipped_bytes, own.stats().parts.slack_bytes);
                }
                prop_assert!(
                    !matches!(outcome, Some(Err(_))) || faulty,
                    "{what}: {outcome:?}"
                );
            }
            Operation::Fault(nth) => {
                simulator.inject(Fault::nth_call(nth, CUDA_ERROR_OPERATING_SYSTEM));
                faulty = true;
                // What it hits is the next step's; then the driver works again.
                continue;
            }
        }
        let stats = pools.shared.stats();
        prop_assert_eq!(
            stats.parts.total_bytes(),
            stats.committed_bytes,
            "{}: {}",
            what,
            stats
        );
        // What two faults have stranded is live, but in quarantine.
        let stranded_bytes = if compacts && faulty {
            stats.parts.quarantined_bytes
        } else {
            0
        };
        let live_bytes = model.all_live_pages() * PAGE;
        prop_assert!(
            stats.parts.live_page_bytes <= live_bytes
                && live_bytes <= stats.parts.live_page_bytes + stranded_bytes,
            "{what}: {stats}"
        );
        prop_assert!(
            stats.committed_bytes <= LIMIT_PAGES * PAGE,
            "{what}: {stats}"
        );
        let books = simulator.books(0).physical_bytes;
        prop_assert_eq!(
            stats.committed_bytes + device.quarantined_bytes(),
            books,
            "{}: {}",
            what,
            stats
        );
        if faulty {
            simulator.clear_faults();
            faulty = false;
            drop(capture.take());
            for _ in 0..3 {
                pools.shared.engine().step();
            }
            device.retry_quarantine();
            let stats = pools.shared.stats();
            prop_assert_eq!(stats.parts.quarantined_bytes, 0, "{}: {}", what, stats);
            prop_assert_eq!(
                stats.parts.live_page_bytes,
                live_bytes,
                "{}: {}",
                what,
                stats
            );
        }
    }
    simulator.clear_faults();
    simulator.release_work();
    drop(capture);
    // Models that went during a capture are still there.
    for _ in 0..3 {
        pools.shared.engine().step();
    }
    prop_assert!(!simulator.is_poisoned(0));
    drop((pools, stream, device, driver));
    prop_assert_eq!(simulator.books(0), Books::default());
    Ok(())
}

/// 1,000 cases of 1,000 steps in a release build; enough of them in a debug build to find what is
/// plain.
fn cases() -> u32 {
    if cfg!(debug_assertions) { 12 } else { 1_000 }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), max_shrink_iters: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn both_pools_agree_with_a_plain_model(
        steps in prop::collection::vec(operations(), 1_000),
        park in prop::bool::ANY,
        streams in prop::bool::ANY,
        cache in prop::bool::ANY,
        ahead in prop::bool::ANY,
        chunked in prop::bool::weighted(0.3),
    ) {
        let options = EngineOptions::new()
            .park_bytes_max(if park { 8 * PAGE } else { 0 })
            .cache_bytes_max(if cache { 8 * PAGE } else { 0 })
            .chunk_bytes_max(if chunked { 4 * PAGE } else { 0 });
        run(steps.concat(), options, streams, if ahead { 3 * PAGE } else { 0 })?;
    }
}
