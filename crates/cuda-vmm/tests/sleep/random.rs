//! Random operations on pools that sleep and wake, against a plain model of pages and a budget.

use crate::common::manual;
use crate::fixture::{Fixture, PAGE};
use core::ops::Range;
use cuda_vmm::{Keep, VmmError, WakeOptions};
use proptest::prelude::*;

const POOLS: usize = 3;
/// Pages of each pool that the operations are about.
const USED: usize = 24;
const LIMIT_PAGES: usize = 40;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    Nothing,
    Host,
    Constant,
}

#[derive(Debug, Clone)]
enum Operation {
    Take {
        pool: usize,
        pages: Range<usize>,
    },
    Free {
        pool: usize,
        pages: Range<usize>,
    },
    /// Writes to one live page of a pool, so that its copy is true no more.
    Write {
        pool: usize,
        at: usize,
    },
    Sleep {
        pool: usize,
        kept: Kept,
    },
    Wake {
        pool: usize,
        first: Range<usize>,
    },
    Stream {
        pool: usize,
        first: Range<usize>,
    },
    Forget {
        pool: usize,
    },
    Compact {
        pool: usize,
    },
    Trim,
    TakeStep,
}

fn operation() -> impl Strategy<Value = Operation> {
    let pool = 0..POOLS;
    let run = || (0..USED, 1..=12usize).prop_map(|(at, pages)| at..(at + pages).min(USED));
    let kept = prop_oneof![
        Just(Kept::Nothing),
        Just(Kept::Host),
        Just(Kept::Host),
        Just(Kept::Constant),
        Just(Kept::Constant),
    ];
    prop_oneof![
        5 => (pool.clone(), run()).prop_map(|(pool, pages)| Operation::Take { pool, pages }),
        4 => (pool.clone(), run()).prop_map(|(pool, pages)| Operation::Free { pool, pages }),
        2 => (pool.clone(), 0..USED).prop_map(|(pool, at)| Operation::Write { pool, at }),
        5 => (pool.clone(), kept).prop_map(|(pool, kept)| Operation::Sleep { pool, kept }),
        5 => (pool.clone(), run()).prop_map(|(pool, first)| Operation::Wake { pool, first }),
        2 => (pool.clone(), run()).prop_map(|(pool, first)| Operation::Stream { pool, first }),
        1 => pool.clone().prop_map(|pool| Operation::Forget { pool }),
        1 => pool.prop_map(|pool| Operation::Compact { pool }),
        1 => Just(Operation::Trim),
        2 => Just(Operation::TakeStep),
    ]
}

/// What the model knows of a pool besides its contents.
#[derive(Debug, Clone, Copy, Default)]
struct Known {
    /// How it sleeps, if it does.
    asleep: Option<Kept>,
    /// Whether the host has a copy that is the same as the pool.
    has_copy: bool,
    /// Whether a page was written since the wake, so that the owner may not promise anything.
    is_written: bool,
}

struct World {
    fixture: Fixture,
    known: [Known; POOLS],
}

impl World {
    fn live(&self, pool: usize, pages: Range<usize>) -> Vec<usize> {
        let contents = &self.fixture.contents[pool];
        pages.filter(|page| contents.contains_key(page)).collect()
    }

    /// Pages with memory, of all pools.
    fn held_pages(&self) -> usize {
        let awake = (0..POOLS).filter(|pool| self.known[*pool].asleep.is_none());
        awake.map(|pool| self.fixture.contents[pool].len()).sum()
    }

    fn take(&mut self, pool: usize, pages: Range<usize>) {
        let taken = self.fixture.try_take(pool, pages.clone());
        if self.known[pool].asleep.is_some() {
            let error = taken.expect_err("it is asleep");
            assert!(matches!(error, VmmError::Asleep { .. }), "{error}");
        } else if !self.live(pool, pages.clone()).is_empty() && taken.is_err() {
            let error = taken.expect_err("live");
            assert!(matches!(error, VmmError::AlreadyMapped { .. }), "{error}");
        } else {
            match taken {
                Ok(()) => self.known[pool].has_copy = false,
                Err(error) => {
                    assert!(error.is_out_of_memory(), "{error}");
                    assert!(self.held_pages() + pages.len() > LIMIT_PAGES, "{error}");
                }
            }
        }
    }

    fn free(&mut self, pool: usize, pages: Range<usize>) {
        for page in self.live(pool, pages) {
            if self.known[pool].asleep.is_some() {
                let error = self.fixture.pools[pool].deallocate(page * PAGE, PAGE);
                assert!(matches!(error, Err(VmmError::Asleep { .. })));
                continue;
            }
            self.fixture.free(pool, page..page + 1);
            self.known[pool].has_copy = false;
        }
    }

    fn write(&mut self, pool: usize, at: usize) {
        if self.known[pool].asleep.is_some() {
            return;
        }
        if let Some(page) = self.live(pool, at..USED).first() {
            self.fixture.write(pool, *page..page + 1);
            self.known[pool].is_written = true;
        }
    }

    fn sleep(&mut self, pool: usize, kept: Kept) {
        let known = self.known[pool];
        // The owner keeps its promises.
        let kept = match kept {
            Kept::Constant if known.is_written && known.has_copy => Kept::Host,
            kept => kept,
        };
        let store = &self.fixture.store;
        let keep = match kept {
            Kept::Nothing => Keep::Nothing,
            Kept::Host => Keep::Host(store),
            Kept::Constant => Keep::Constant(store),
        };
        let slept = self.fixture.pools[pool].sleep(keep);
        if known.asleep.is_some() {
            let error = slept.expect_err("it is asleep");
            assert!(matches!(error, VmmError::Asleep { .. }), "{error}");
            return;
        }
        let slept = slept.expect("nothing keeps it awake");
        let live_bytes = self.fixture.contents[pool].len() * PAGE;
        let expected = match kept {
            Kept::Nothing => 0,
            Kept::Constant if known.has_copy => 0,
            Kept::Host | Kept::Constant => live_bytes,
        };
        assert_eq!(slept.copied_bytes, expected);
        assert_eq!(self.fixture.pools[pool].stats().committed_bytes, 0);
        self.known[pool].asleep = Some(kept);
    }

    fn wake(&mut self, pool: usize, first: Range<usize>, streams: bool) {
        let options =
            WakeOptions::new().first(core::iter::once(first.start * PAGE..first.end * PAGE));
        let woken = match streams {
            false => self.fixture.pools[pool].wake_with(&options),
            true => (self.fixture.pools[pool].wake_streaming(&options))
                .map(|arriving| arriving.finish().expect("no call fails")),
        };
        let Some(kept) = self.known[pool].asleep else {
            let error = woken.expect_err("it is awake");
            assert!(matches!(error, VmmError::Awake { .. }), "{error}");
            return;
        };
        let pages = self.fixture.contents[pool].len();
        if let Err(error) = woken {
            assert!(error.is_out_of_memory(), "{error}");
            assert!(self.held_pages() + pages > LIMIT_PAGES, "{error}");
            return;
        }
        self.known[pool] = Known {
            asleep: None,
            // Without a byte there is nothing to copy.
            has_copy: kept == Kept::Constant && pages > 0,
            is_written: false,
        };
        if kept == Kept::Nothing {
            for page in self.live(pool, 0..USED) {
                self.fixture.write(pool, page..page + 1);
            }
        }
    }

    fn apply(&mut self, operation: &Operation) {
        match operation.clone() {
            Operation::Take { pool, pages } => self.take(pool, pages),
            Operation::Free { pool, pages } => self.free(pool, pages),
            Operation::Write { pool, at } => self.write(pool, at),
            Operation::Sleep { pool, kept } => self.sleep(pool, kept),
            Operation::Wake { pool, first } => self.wake(pool, first, false),
            Operation::Stream { pool, first } => self.wake(pool, first, true),
            Operation::Forget { pool } => {
                let forgotten = self.fixture.pools[pool].forget_copy();
                assert_eq!(forgotten.is_ok(), self.known[pool].asleep.is_none());
                if forgotten.is_ok() {
                    self.known[pool].has_copy = false;
                }
            }
            Operation::Compact { pool } => {
                let compacted = self.fixture.pools[pool].compact();
                assert_eq!(compacted.is_ok(), self.known[pool].asleep.is_none());
            }
            Operation::Trim => {
                self.fixture.settle();
                self.fixture.engine.trim().expect("no call fails");
            }
            Operation::TakeStep => drop(self.fixture.engine.step()),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn each_pool_has_its_contents_whenever_it_is_awake(
        operations in prop::collection::vec(operation(), 1..60)
    ) {
        let options = manual().limit_bytes(LIMIT_PAGES * PAGE).chunk_bytes_max(4 * PAGE);
        let fixture = Fixture::new(options, &[1, 1, 2]);
        let mut world = World { fixture, known: Default::default() };
        for operation in &operations {
            // What was written and freed is past, so that all errors are the model's.
            world.fixture.stream.synchronize().expect("done");
            world.apply(operation);
            world.fixture.check();
        }
        world.fixture.end();
    }
}
