//! Random operations of models with quotas that change, against a plain model: what is within a
//! guarantee is always had, whatever others do, and the rest exactly when it leaves room for all
//! guarantees.

use crate::common::{ModelOptions, Models, PAGE, manual};
use cuda_vmm::sim::SimConfig;
use cuda_vmm::{Driver, Quota, SharedPoolOptions, VmmError};
use proptest::prelude::*;
use std::time::Duration;

const MODELS: usize = 4;
const LIMIT_PAGES: usize = 12;
const PAGES: usize = 16;

#[derive(Debug, Clone)]
enum Operation {
    Allocate {
        model: usize,
        page: usize,
        pages: usize,
        timed: bool,
    },
    Deallocate {
        model: usize,
        page: usize,
    },
    SetQuota {
        model: usize,
        guarantee: usize,
        ceiling: Option<usize>,
        priority: i32,
    },
    Register {
        model: usize,
    },
    Unregister {
        model: usize,
    },
    GiveBack {
        model: usize,
    },
    Relieve {
        pages: usize,
    },
    TakeStep,
}

fn operations() -> impl Strategy<Value = Operation> {
    let model = 0..MODELS;
    prop_oneof![
        6 => (model.clone(), 0..PAGES, 1..6usize, any::<bool>())
            .prop_map(|(model, page, pages, timed)| Operation::Allocate { model, page, pages, timed }),
        5 => (model.clone(), 0..PAGES).prop_map(|(model, page)| Operation::Deallocate { model, page }),
        3 => (model.clone(), 0..8usize, prop::option::of(0..14usize), -2..3i32).prop_map(
            |(model, guarantee, ceiling, priority)| Operation::SetQuota { model, guarantee, ceiling, priority }
        ),
        1 => model.clone().prop_map(|model| Operation::Register { model }),
        1 => model.clone().prop_map(|model| Operation::Unregister { model }),
        1 => model.prop_map(|model| Operation::GiveBack { model }),
        1 => (0..5usize).prop_map(|pages| Operation::Relieve { pages }),
        2 => Just(Operation::TakeStep),
    ]
}

/// What is known of a model: its live pages and its quota, in pages.
#[derive(Debug, Clone, Default)]
struct Plain {
    live: [bool; PAGES],
    guarantee: usize,
    ceiling: Option<usize>,
    quota: Quota,
}

impl Plain {
    fn held(&self) -> usize {
        self.live.iter().filter(|live| **live).count()
    }

    fn ceiling(&self) -> usize {
        self.ceiling.unwrap_or(usize::MAX)
    }
}

type Plains = [Option<Plain>; MODELS];

/// Pages spoken for by all but one.
fn spoken_for(models: &Plains, but: usize) -> usize {
    let others = models.iter().enumerate().filter(|(index, _)| *index != but);
    let others = others.filter_map(|(_, model)| model.as_ref());
    others.map(|model| model.held().max(model.guarantee)).sum()
}

/// Lets memory that is on its way to the cache be overwritten, which the device does in its own
/// time.
fn overwrite(pool: &Models) {
    while pool.stats().parts.retiring_bytes > 0 {
        pool.engine().step();
    }
}

fn play(pool: &Models, models: &mut Plains, operation: Operation) {
    let name = |model: usize| ["a", "b", "c", "d"][model];
    match operation {
        Operation::Allocate {
            model,
            page,
            pages,
            timed,
        } => {
            let others = spoken_for(models, model);
            let Some(plain) = &mut models[model] else {
                return;
            };
            let pages = pages.min(PAGES - page);
            let handle = pool.model(name(model)).expect("registered");
            let ask = || match timed {
                true => handle.allocate_timeout(page * PAGE, pages * PAGE, Duration::ZERO),
                false => handle.try_allocate(page * PAGE, pages * PAGE),
            };
            let mut outcome = ask();
            if matches!(
                outcome,
                Err(VmmError::OutOfPhysicalMemory {
                    retiring_bytes: 1..,
                    ..
                })
            ) {
                overwrite(pool);
                outcome = ask();
            }
            if plain.live[page..page + pages].contains(&true) {
                assert!(matches!(outcome, Err(VmmError::AlreadyMapped { .. })));
                return;
            }
            let held = plain.held() + pages;
            let fits = held <= plain.ceiling() && others + held.max(plain.guarantee) <= LIMIT_PAGES;
            assert!(held > plain.guarantee || fits, "a guarantee holds");
            match outcome {
                Ok(_) => {
                    assert!(fits, "more than it may have");
                    plain.live[page..page + pages].fill(true);
                }
                Err(error) => {
                    assert!(!fits && error.is_out_of_memory(), "{error}");
                }
            }
        }
        Operation::Deallocate { model, page } => {
            let Some(plain) = &mut models[model] else {
                return;
            };
            let outcome = pool.deallocate_for_model(name(model), page * PAGE, PAGE);
            assert_eq!(outcome.is_ok(), plain.live[page]);
            plain.live[page] = false;
        }
        Operation::SetQuota {
            model,
            guarantee,
            ceiling,
            priority,
        } => {
            let mut quota = Quota::new().guarantee_bytes(guarantee * PAGE);
            quota.ceiling_bytes = ceiling.map(|pages| pages * PAGE);
            quota.priority = priority;
            let others = spoken_for(models, model);
            let mut outcome = pool.set_quota(name(model), quota);
            if outcome.is_err() && pool.stats().parts.retiring_bytes > 0 {
                overwrite(pool);
                outcome = pool.set_quota(name(model), quota);
            }
            let Some(plain) = &mut models[model] else {
                assert!(matches!(outcome, Err(VmmError::ModelNotFound { .. })));
                return;
            };
            let holds = others + plain.held().max(guarantee) <= LIMIT_PAGES;
            match outcome {
                Ok(()) => {
                    (plain.guarantee, plain.ceiling) = (guarantee, ceiling);
                    assert!(holds && guarantee <= plain.ceiling());
                    plain.quota = quota;
                }
                Err(VmmError::QuotaUnsatisfiable {
                    what,
                    asked_bytes,
                    available_bytes,
                }) => {
                    assert!(
                        !holds || guarantee > ceiling.unwrap_or(usize::MAX),
                        "{what}"
                    );
                    assert!(asked_bytes == guarantee * PAGE && available_bytes < asked_bytes);
                }
                Err(error) => panic!("{error}"),
            }
            assert_eq!(pool.quota(name(model)), Some(plain.quota));
        }
        Operation::Register { model } => {
            if models[model].is_none() {
                let options = ModelOptions::new(PAGES * PAGE);
                pool.register_model_with(name(model), options)
                    .expect("addresses");
                models[model] = Some(Plain::default());
            }
        }
        Operation::Unregister { model } => {
            let outcome = pool.unregister_model(name(model));
            assert_eq!(outcome.is_ok(), models[model].is_some());
            models[model] = None;
        }
        Operation::GiveBack { model } => {
            if models[model].is_some() {
                let handle = pool.model(name(model)).expect("registered");
                handle.account().give_back().expect("the driver takes it");
                let stats = handle.stats();
                let left_bytes = stats.live_bytes + stats.parts.retiring_bytes;
                assert_eq!(stats.committed_bytes, left_bytes);
            }
        }
        Operation::Relieve { pages } => {
            let before = pool.stats().committed_bytes;
            let given_bytes = pool.relieve(pages * PAGE);
            let after = pool.stats();
            assert_eq!(before - after.committed_bytes, given_bytes);
            let spare_bytes =
                after.committed_bytes - after.parts.live_page_bytes - after.parts.retiring_bytes;
            assert!(given_bytes >= pages * PAGE || spare_bytes == 0);
        }
        Operation::TakeStep => {
            pool.engine().step();
        }
    }
}

/// What holds at every moment.
fn check(pool: &Models, models: &Plains) {
    let stats = pool.stats();
    assert_eq!(stats.parts.total_bytes(), stats.committed_bytes);
    assert!(stats.committed_bytes <= LIMIT_PAGES * PAGE);
    for (name, model) in ["a", "b", "c", "d"].into_iter().zip(models) {
        let owed = pool.model_owed_bytes(name);
        assert_eq!(owed.is_some(), model.is_some());
        let (Some(owed_bytes), Some(plain)) = (owed, model) else {
            continue;
        };
        let above = |bound: usize| plain.held().saturating_sub(bound) * PAGE;
        assert!(owed_bytes <= above(plain.guarantee), "below a guarantee");
        assert!(owed_bytes >= above(plain.ceiling()), "above a ceiling");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn guarantees_hold_whatever_others_do(
        park in prop::sample::select(vec![0, 3 * PAGE, 12 * PAGE]),
        cache in prop::sample::select(vec![0, 2 * PAGE]),
        operations in prop::collection::vec(operations(), 1..120),
    ) {
        let driver = Driver::simulated(SimConfig::new().unbacked()).expect("a simulator");
        let device = driver.device(0).expect("the first device");
        let engine = manual().limit_bytes(LIMIT_PAGES * PAGE).park_bytes_max(park).cache_bytes_max(cache).chunk_bytes_max(0);
        let options = SharedPoolOptions::new().engine(engine).page_bytes(PAGE);
        let pool = Models::with_options(&device, options).expect("a pool");
        let mut models = Plains::default();
        for model in 0..MODELS {
            play(&pool, &mut models, Operation::Register { model });
        }
        for operation in operations {
            play(&pool, &mut models, operation);
            check(&pool, &models);
        }
        drop(pool);
        prop_assert_eq!(driver.simulator().expect("simulated").books(0).physical_bytes, 0);
    }
}
