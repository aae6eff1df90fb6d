//! Random operations on pools that share memory, against a plain model of pages and chunks.

use crate::common::manual;
use crate::fixture::{CHUNK, Fixture, PAGE};
use core::ops::Range;
use cuda_vmm::{PoolOptions, VmmError};
use proptest::prelude::*;

const POOLS: usize = 4;
/// Pages of each pool that the operations are about.
const USED: usize = 4 * CHUNK;
const LIMIT_PAGES: usize = 10 * CHUNK;

#[derive(Debug, Clone)]
enum Operation {
    Take {
        pool: usize,
        at: usize,
        pages: usize,
    },
    /// All pages of a pool that has none, in large chunks.
    Fill {
        pool: usize,
    },
    Free {
        pool: usize,
        at: usize,
        pages: usize,
    },
    Share {
        from: usize,
        to: usize,
        at: usize,
        pages: usize,
    },
    MakePrivate {
        pool: usize,
        at: usize,
        pages: usize,
    },
    Close {
        pool: usize,
    },
    Compact {
        pool: usize,
    },
    Trim,
    TakeStep,
    Settle,
}

fn operation() -> impl Strategy<Value = Operation> {
    let pool = 0..POOLS;
    let run = || (0..USED, 1..=2 * CHUNK);
    prop_oneof![
        5 => (pool.clone(), run()).prop_map(|(pool, (at, pages))| Operation::Take { pool, at, pages }),
        2 => pool.clone().prop_map(|pool| Operation::Fill { pool }),
        5 => (pool.clone(), run()).prop_map(|(pool, (at, pages))| Operation::Free { pool, at, pages }),
        5 => (pool.clone(), pool.clone(), run())
            .prop_map(|(from, to, (at, pages))| Operation::Share { from, to, at, pages }),
        3 => (pool.clone(), run())
            .prop_map(|(pool, (at, pages))| Operation::MakePrivate { pool, at, pages }),
        1 => pool.clone().prop_map(|pool| Operation::Close { pool }),
        1 => pool.prop_map(|pool| Operation::Compact { pool }),
        1 => Just(Operation::Trim),
        2 => Just(Operation::TakeStep),
        2 => Just(Operation::Settle),
    ]
}

/// The largest runs of pages in `pages` that are in `pool`'s contents.
fn live_runs(fixture: &Fixture, pool: usize, pages: Range<usize>) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for page in pages.filter(|page| fixture.contents[pool].contains_key(page)) {
        match runs.last_mut() {
            Some(run) if run.end == page => run.end += 1,
            _ => runs.push(page..page + 1),
        }
    }
    runs
}

fn play(fixture: &mut Fixture, operation: Operation) -> Result<(), TestCaseError> {
    let run = |at: usize, pages: usize| at..(at + pages).min(USED);
    match operation {
        Operation::Take { pool, at, pages } => {
            let pages = run(at, pages);
            let (offset, bytes) = (pages.start * PAGE, pages.len() * PAGE);
            let is_taken = !live_runs(fixture, pool, pages.clone()).is_empty();
            let refused = fixture.try_take(pool, pages.clone()).err();
            match refused {
                None => prop_assert!(!is_taken),
                Some(VmmError::AlreadyMapped { .. }) => prop_assert!(is_taken),
                Some(VmmError::Shared { .. }) => {
                    let moved = fixture.pools[pool].make_private(offset, bytes);
                    match moved {
                        Ok(bytes) => prop_assert!(bytes > 0, "there is something to move"),
                        Err(error) => prop_assert!(error.is_out_of_memory(), "{}", error),
                    }
                }
                Some(error) => prop_assert!(error.is_out_of_memory(), "{}", error),
            }
        }
        Operation::Fill { pool } => {
            let free_bytes = LIMIT_PAGES * PAGE - fixture.engine.stats().committed_bytes;
            if fixture.pools[pool].stats().chunks == 0 && free_bytes >= USED * PAGE {
                fixture.take(pool, 0..USED);
            }
        }
        Operation::Free { pool, at, pages } => {
            for pages in live_runs(fixture, pool, run(at, pages)) {
                fixture.free(pool, pages);
            }
        }
        Operation::Share {
            from,
            to,
            at,
            pages,
        } => {
            let pages = run(at, pages);
            let has_all = live_runs(fixture, from, pages.clone()) == [pages.clone()];
            let is_taken = !live_runs(fixture, to, pages.clone()).is_empty();
            if has_all && !is_taken {
                let before = fixture.engine.stats().committed_bytes;
                fixture.share(from, to, pages);
                // Nothing is charged; what was in the way was given up.
                prop_assert!(fixture.engine.stats().committed_bytes <= before);
            } else {
                let refused = fixture.try_share(from, to, pages).map(drop);
                let is_right = match refused {
                    Err(VmmError::AlreadyMapped { .. }) => is_taken,
                    Err(VmmError::NotMapped { .. }) => !has_all,
                    _ => false,
                };
                prop_assert!(is_right, "{:?}", refused);
            }
        }
        Operation::MakePrivate { pool, at, pages } => {
            let pages = run(at, pages);
            let before = fixture.pools[pool].stats();
            match fixture.pools[pool].make_private(pages.start * PAGE, pages.len() * PAGE) {
                Ok(moved) => {
                    let after = fixture.pools[pool].stats();
                    prop_assert!(moved <= before.shared_bytes - after.shared_bytes);
                    // Now they may be written.
                    for pages in live_runs(fixture, pool, pages) {
                        fixture.write(pool, pages);
                    }
                }
                Err(error) => prop_assert!(error.is_out_of_memory(), "{}", error),
            }
        }
        Operation::Close { pool } => fixture.close(pool),
        Operation::Compact { pool } => {
            let report = fixture.pools[pool].compact().expect("no call fails");
            let slack_bytes = fixture.pools[pool].stats().parts.slack_bytes;
            prop_assert_eq!(report.skipped_bytes, slack_bytes);
        }
        Operation::Trim => _ = fixture.engine.trim().expect("no call fails"),
        Operation::TakeStep => _ = fixture.engine.step(),
        Operation::Settle => fixture.settle(),
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn each_pool_reads_what_it_has_and_each_byte_is_counted_once(
        operations in prop::collection::vec(operation(), 1..60),
        park_pages in prop::sample::select(vec![0, CHUNK, 100]),
    ) {
        let options = manual()
            .limit_bytes(LIMIT_PAGES * PAGE)
            .park_bytes_max(park_pages * PAGE)
            .cache_bytes_max(CHUNK * PAGE);
        let mut fixture = Fixture::new(options, 0);
        for pool in 0..POOLS {
            let ahead_bytes = pool / 2 * CHUNK * PAGE;
            fixture.open(PoolOptions::new().ahead_bytes_max(ahead_bytes));
        }
        for operation in operations {
            play(&mut fixture, operation)?;
            fixture.check();
        }
        // The last owner frees.
        for pool in 0..POOLS {
            fixture.close(pool);
        }
        fixture.engine.trim().expect("no call fails");
        prop_assert_eq!(fixture.engine.stats().committed_bytes, 0);
        fixture.end();
    }
}
