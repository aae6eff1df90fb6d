//! Each driver call of an allocation of several ranges fails in turn, and pairs of them.

use super::{account, blocks, engine, expect_sums, range};
use crate::common::{PAGE, manual};
use cuda_vmm::sim::Fault;
use cuda_vmm::sys::{CUDA_ERROR_OPERATING_SYSTEM, CUDA_ERROR_OUT_OF_MEMORY, CUresult};
use cuda_vmm::{Quota, Result};

/// What is asked for.
#[derive(Debug, Clone, Copy)]
enum Asked {
    /// Parts of two pools, in pages of their own and in shared ones.
    Parts,
    /// Blocks of two tensors.
    Blocks,
}

/// Asks with the calls of these numbers failing; returns how many calls were made.
fn run(asked: Asked, failing: &[u64], code: CUresult) -> u64 {
    let what = format!("{asked:?}, calls {failing:?} failing with {code}");
    let (simulated, engine) = engine(manual().park_bytes_max(8 * PAGE));
    let model = account(&engine, "model", Quota::new());
    let (keys, values, table) = (range(&model), range(&model), blocks(&model, 16));
    keys.allocate(0, PAGE / 2).expect("room");
    // A page that is parked, to be taken back.
    values.allocate(0, PAGE).expect("room");
    values.deallocate(0, PAGE).expect("live");
    table.back([1]).expect("room");
    engine.step();
    let seen = || {
        let live = [&keys, &values].map(|pool| (pool.stats().live_bytes, pool.stats().live_pages));
        (live, table.stats().backed_blocks)
    };
    let before = (seen(), engine.stats().parts);
    simulated.simulator.start_trace();
    for nth in failing {
        simulated.simulator.inject(Fault::nth_call(*nth, code));
    }
    let outcome: Result<()> = match asked {
        Asked::Parts => {
            let parts = [
                (&keys, PAGE / 2, PAGE),
                (&keys, 2 * PAGE, 8),
                (&keys, 2 * PAGE + 8, 8),
                (&values, 0, 2 * PAGE),
            ];
            let backed = model.try_allocate_many(&parts);
            backed.map(cuda_vmm::Backed::keep)
        }
        Asked::Blocks => {
            let backed = table.try_reserve([0, 2, 5]);
            backed.map(cuda_vmm::pool::blocks::BackedBlocks::keep)
        }
    };
    let calls = simulated.simulator.take_trace().len() as u64;
    simulated.simulator.clear_faults();
    expect_sums(&engine);
    match outcome {
        Ok(()) => assert!(seen() != before.0, "{what}"),
        Err(error) => {
            assert_eq!(error.driver_code(), Some(code), "{what}: {error}");
            assert_eq!(seen(), before.0, "{what}");
        }
    }
    for _ in 0..3 {
        engine.step();
    }
    if seen() == before.0 {
        assert_eq!(engine.stats().parts, before.1, "{what}");
    }
    drop((keys, values, table, model));
    for _ in 0..3 {
        engine.step();
    }
    simulated.device.retry_quarantine();
    assert_eq!(engine.stats().committed_bytes, 0, "{what}");
    assert_eq!(simulated.books().physical_bytes, 0, "{what}");
    calls
}

#[test]
fn all_is_as_before_whichever_calls_fail() {
    for asked in [Asked::Parts, Asked::Blocks] {
        let calls = run(asked, &[], 0);
        assert!(calls >= 9, "{asked:?}: {calls}");
        for code in [CUDA_ERROR_OPERATING_SYSTEM, CUDA_ERROR_OUT_OF_MEMORY] {
            for first in 1..=calls {
                run(asked, &[first], code);
                for second in first + 1..=calls + 8 {
                    run(asked, &[first, second], code);
                }
            }
        }
    }
}
