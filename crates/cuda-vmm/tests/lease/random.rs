//! Random operations on a pool with leases, against a model of what each unit of its addresses is.

use super::common::{PAGE, Simulated, manual};
use cuda_vmm::sim::{Books, Fault, SimConfig};
use cuda_vmm::sys::CUDA_ERROR_OPERATING_SYSTEM;
use cuda_vmm::{Engine, VirtualMemoryPool, VmmError};
use proptest::prelude::*;
use std::ops::Range;
use std::sync::Arc;

const UNIT: usize = PAGE / 4;
const UNITS: usize = 4 * 10;

#[derive(Debug, Clone)]
enum Operation {
    Allocate(Range<usize>),
    Free(Range<usize>),
    Lease(Range<usize>),
    /// The oldest but so many.
    EndLease(usize),
    Step,
    Trim,
    Compact,
    Fault(u64),
}

fn operation() -> impl Strategy<Value = Operation> {
    let units = || (0..UNITS, 1..16usize).prop_map(|(at, count)| at..(at + count).min(UNITS));
    prop_oneof![
        6 => units().prop_map(Operation::Allocate),
        6 => units().prop_map(Operation::Free),
        5 => units().prop_map(Operation::Lease),
        4 => (0..8usize).prop_map(Operation::EndLease),
        3 => Just(Operation::Step),
        1 => Just(Operation::Trim),
        1 => Just(Operation::Compact),
        1 => (1..8u64).prop_map(Operation::Fault),
    ]
}

/// What each unit is: whether its owner has it, and whether it was freed under a lease that still
/// lives.
#[derive(Debug)]
struct Model {
    owned: [bool; UNITS],
    held: [bool; UNITS],
    leases: Vec<(Range<usize>, Arc<()>)>,
}

impl Model {
    fn is_leased(&self, unit: usize) -> bool {
        self.leases.iter().any(|(units, _)| units.contains(&unit))
    }

    fn free(&mut self, units: Range<usize>) {
        for unit in units {
            self.owned[unit] = false;
            self.held[unit] = self.is_leased(unit);
        }
    }

    fn end_lease(&mut self, index: usize) {
        if index < self.leases.len() {
            self.leases.remove(index);
            for unit in 0..UNITS {
                self.held[unit] &= self.is_leased(unit);
            }
        }
    }

    fn pages(&self, is: impl Fn(&[bool], &[bool]) -> bool) -> usize {
        let pages = self.owned.chunks(4).zip(self.held.chunks(4));
        pages.filter(|(owned, held)| is(owned, held)).count()
    }
}

fn run(operations: Vec<Operation>, chunk_bytes_max: usize) -> Result<(), TestCaseError> {
    let simulated = Simulated::new(SimConfig::new().unbacked());
    let engine =
        Engine::new(&simulated.device, manual().chunk_bytes_max(chunk_bytes_max)).expect("engine");
    let mut pool = VirtualMemoryPool::on_engine(&engine, UNITS * UNIT, PAGE).expect("pool");
    let mut model = Model {
        owned: [false; UNITS],
        held: [false; UNITS],
        leases: Vec::new(),
    };
    let mut faulty = false;
    for operation in operations {
        let bytes_of = |units: &Range<usize>| (units.start * UNIT, units.len() * UNIT);
        let may_fail = core::mem::take(&mut faulty);
        match operation.clone() {
            Operation::Allocate(units) => {
                let (offset, bytes) = bytes_of(&units);
                let outcome = pool.allocate(offset, bytes);
                let held = units.clone().any(|unit| model.held[unit]);
                let owned = units.clone().any(|unit| model.owned[unit]);
                match outcome {
                    Ok(_) => {
                        prop_assert!(!held && !owned);
                        units.for_each(|unit| model.owned[unit] = true);
                    }
                    Err(VmmError::Leased { .. }) => prop_assert!(held),
                    Err(VmmError::AlreadyMapped { .. }) => prop_assert!(owned && !held),
                    Err(error) => prop_assert!(may_fail, "{error}"),
                }
            }
            Operation::Free(units) => {
                let (offset, bytes) = bytes_of(&units);
                let owned = units.clone().all(|unit| model.owned[unit]);
                let expected = if owned {
                    Ok(())
                } else {
                    Err(VmmError::NotMapped { offset, bytes })
                };
                prop_assert_eq!(pool.deallocate(offset, bytes), expected);
                if owned {
                    model.free(units);
                }
            }
            Operation::Lease(units) => {
                let (offset, bytes) = bytes_of(&units);
                let token = Arc::new(());
                let owned = units.clone().all(|unit| model.owned[unit]);
                let expected = if owned {
                    Ok(())
                } else {
                    Err(VmmError::NotMapped { offset, bytes })
                };
                prop_assert_eq!(pool.lease(offset, bytes, token.clone()), expected);
                if owned {
                    model.leases.push((units, token));
                }
            }
            Operation::EndLease(index) => {
                model.end_lease(index);
                // Found out, and the fence that follows it passed, in a step each.
                engine.step();
                engine.step();
            }
            Operation::Step => _ = engine.step(),
            Operation::Trim => prop_assert!(pool.trim().is_ok() || may_fail),
            Operation::Compact => prop_assert!(pool.compact().is_ok() || may_fail),
            Operation::Fault(nth) => {
                simulated
                    .simulator
                    .inject(Fault::nth_call(nth, CUDA_ERROR_OPERATING_SYSTEM));
                faulty = true;
                continue;
            }
        }
        if may_fail {
            simulated.simulator.clear_faults();
            (0..3).for_each(|_| _ = engine.step());
            simulated.device.retry_quarantine();
        }
        let (stats, engine_stats) = (pool.stats(), engine.stats());
        let what = format!("{operation:?}: {stats}; {engine_stats}");
        prop_assert_eq!(
            engine_stats.parts.total_bytes(),
            engine_stats.committed_bytes,
            "{}",
            what
        );
        let owned_pages = model.pages(|owned, _| owned.contains(&true));
        let leased_pages =
            model.pages(|owned, held| !owned.contains(&true) && held.contains(&true));
        prop_assert_eq!(stats.parts.live_page_bytes, owned_pages * PAGE, "{}", what);
        prop_assert_eq!(stats.parts.leased_bytes, leased_pages * PAGE, "{}", what);
        let owned_units = model.owned.iter().filter(|owned| **owned).count();
        prop_assert_eq!(stats.live_bytes, owned_units * UNIT, "{}", what);
        for unit in 0..UNITS {
            prop_assert_eq!(
                pool.is_mapped(unit * UNIT, UNIT),
                model.owned[unit],
                "unit {} {}",
                unit,
                what
            );
            prop_assert_eq!(
                pool.is_leased(unit * UNIT, UNIT),
                model.is_leased(unit),
                "unit {} {}",
                unit,
                what
            );
        }
    }
    simulated.simulator.clear_faults();
    drop(pool);
    let leased_pages =
        (0..UNITS / 4).filter(|page| (4 * page..4 * page + 4).any(|unit| model.is_leased(unit)));
    prop_assert_eq!(
        engine.stats().parts.leased_bytes,
        leased_pages.count() * PAGE
    );
    drop(model);
    (0..4).for_each(|_| _ = engine.step());
    prop_assert_eq!(engine.stats().committed_bytes, 0);
    drop(engine);
    drop((simulated.device, simulated.driver));
    prop_assert_eq!(simulated.simulator.books(0), Books::default());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn leases_agree_with_a_plain_model(
        operations in prop::collection::vec(operation(), 1..120),
        chunked in any::<bool>(),
    ) {
        run(operations, if chunked { 4 * PAGE } else { 0 })?;
    }
}
