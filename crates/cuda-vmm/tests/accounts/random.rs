//! Random operations on accounts with ranges and blocks, against a plain model of pages.
//!
//! What is within a guarantee is always had, whatever others do, and the rest exactly if it leaves
//! room for all guarantees; and `available_bytes` says so before.

use super::{account, blocks, engine, expect_sums, range};
use crate::common::{PAGE, manual};
use cuda_vmm::pool::blocks::BlockBacking;
use cuda_vmm::{Account, Engine, Quota, VirtualMemoryPool, VmmError};
use proptest::prelude::*;
use std::collections::BTreeSet;

const ACCOUNTS: usize = 3;
/// Pages of each of the two ranges of an account.
const PAGES: usize = 6;
/// Blocks of each account, of half a page in two tensors.
const BLOCKS: usize = 8;

#[derive(Debug, Clone)]
enum Operation {
    /// These pages of both ranges, all or none.
    Allocate {
        account: usize,
        pages: [BTreeSet<usize>; 2],
        keep: bool,
    },
    Deallocate {
        account: usize,
        range: usize,
        page: usize,
    },
    Back {
        account: usize,
        blocks: BTreeSet<usize>,
        keep: bool,
    },
    Unback {
        account: usize,
        blocks: BTreeSet<usize>,
    },
    SetQuota {
        account: usize,
        guarantee: usize,
        ceiling: Option<usize>,
    },
    SetLimit {
        pages: usize,
    },
    GiveBack {
        account: usize,
    },
    Withdraw {
        account: usize,
    },
    TakeStep,
}

fn operations() -> impl Strategy<Value = Operation> {
    let account = 0..ACCOUNTS;
    let pages = || prop::collection::btree_set(0..PAGES, 0..4);
    let blocks = || prop::collection::btree_set(0..BLOCKS, 0..5);
    prop_oneof![
        6 => (account.clone(), [pages(), pages()], prop::bool::weighted(0.8)).prop_map(
            |(account, pages, keep)| Operation::Allocate { account, pages, keep }
        ),
        4 => (account.clone(), 0..2usize, 0..PAGES).prop_map(
            |(account, range, page)| Operation::Deallocate { account, range, page }
        ),
        5 => (account.clone(), blocks(), prop::bool::weighted(0.8)).prop_map(
            |(account, blocks, keep)| Operation::Back { account, blocks, keep }
        ),
        3 => (account.clone(), blocks()).prop_map(
            |(account, blocks)| Operation::Unback { account, blocks }
        ),
        3 => (account.clone(), 0..6usize, prop::option::of(0..9usize)).prop_map(
            |(account, guarantee, ceiling)| Operation::SetQuota { account, guarantee, ceiling }
        ),
        2 => (1..10usize).prop_map(|pages| Operation::SetLimit { pages }),
        1 => account.clone().prop_map(|account| Operation::GiveBack { account }),
        1 => account.prop_map(|account| Operation::Withdraw { account }),
        2 => Just(Operation::TakeStep),
    ]
}

/// What is known of an account.
#[derive(Debug, Clone, Default)]
struct Plain {
    pages: [BTreeSet<usize>; 2],
    blocks: BTreeSet<usize>,
    guarantee: usize,
    ceiling: Option<usize>,
}

impl Plain {
    /// Pages of both tensors with a block in them.
    fn block_pages(blocks: &BTreeSet<usize>) -> usize {
        let pages: BTreeSet<_> = blocks.iter().map(|block| block / 2).collect();
        2 * pages.len()
    }

    fn held(&self) -> usize {
        self.pages.iter().map(BTreeSet::len).sum::<usize>() + Self::block_pages(&self.blocks)
    }
}

struct Played {
    engine: Engine,
    accounts: Vec<(Account, [VirtualMemoryPool; 2], BlockBacking)>,
    plain: Vec<Plain>,
    limit: usize,
}

impl Played {
    /// Pages that an account can have more, if all that is not in use is given up.
    fn available(&self, account: usize) -> usize {
        let others = self.plain.iter().enumerate();
        let others = others.filter(|(index, _)| *index != account);
        let spoken_for: usize = others
            .map(|(_, plain)| plain.held().max(plain.guarantee))
            .sum();
        let own = &self.plain[account];
        let in_limit = self.limit.saturating_sub(spoken_for + own.held());
        let ceiling = own.ceiling.unwrap_or(usize::MAX);
        in_limit.min(ceiling.saturating_sub(own.held()))
    }

    /// Nothing retires afterwards.
    fn settle(&self) {
        while self.engine.stats().parts.retiring_bytes > 0 {
            self.engine.step();
        }
    }

    /// Checks an outcome against what was available; returns whether it was served.
    fn judge<T>(&self, account: usize, need: usize, outcome: Result<T, VmmError>) -> Option<T> {
        let available = self.available(account);
        match outcome {
            Ok(served) => {
                assert!(need <= available, "{need} of {available} pages were served");
                Some(served)
            }
            Err(VmmError::OutOfPhysicalMemory {
                asked_bytes,
                limit_bytes,
                ..
            }) => {
                assert!(need > available, "{need} of {available} pages were refused");
                let own = &self.plain[account];
                let most = self.limit.min(own.ceiling.unwrap_or(usize::MAX));
                assert_eq!(limit_bytes / PAGE, most);
                assert!(asked_bytes > 0 && asked_bytes.is_multiple_of(PAGE));
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn play(&mut self, operation: Operation) {
        self.settle();
        match operation {
            Operation::Allocate {
                account,
                pages,
                keep,
            } => {
                let (handle, ranges, _) = &self.accounts[account];
                let own = &self.plain[account];
                let free = |range: usize| pages[range].difference(&own.pages[range]).copied();
                let wanted: [BTreeSet<_>; 2] = [free(0).collect(), free(1).collect()];
                // In halves, so that parts share pages.
                let parts: Vec<_> = (0..2)
                    .flat_map(|range| wanted[range].iter().map(move |page| (range, *page)))
                    .flat_map(|(range, page)| {
                        [(range, page * PAGE), (range, page * PAGE + PAGE / 2)]
                    })
                    .map(|(range, offset)| (&ranges[range], offset, PAGE / 2))
                    .collect();
                let need = wanted.iter().map(BTreeSet::len).sum();
                let outcome = handle.try_allocate_many(&parts);
                if let Some(backed) = self.judge(account, need, outcome)
                    && keep
                {
                    backed.keep();
                    for (range, wanted) in wanted.into_iter().enumerate() {
                        self.plain[account].pages[range].extend(wanted);
                    }
                }
            }
            Operation::Deallocate {
                account,
                range,
                page,
            } => {
                if self.plain[account].pages[range].remove(&page) {
                    let pool = &self.accounts[account].1[range];
                    pool.deallocate(page * PAGE, PAGE).expect("live");
                }
            }
            Operation::Back {
                account,
                blocks,
                keep,
            } => {
                let own = &self.plain[account];
                let after: BTreeSet<_> = own.blocks.union(&blocks).copied().collect();
                let need = Plain::block_pages(&after) - Plain::block_pages(&own.blocks);
                let outcome = self.accounts[account].2.try_reserve(blocks);
                if let Some(backed) = self.judge(account, need, outcome)
                    && keep
                {
                    backed.keep();
                    self.plain[account].blocks = after;
                }
            }
            Operation::Unback { account, blocks } => {
                let own = &mut self.plain[account].blocks;
                let gone: Vec<_> = own.intersection(&blocks).copied().collect();
                own.retain(|block| !gone.contains(block));
                self.accounts[account].2.unback(gone).expect("backed");
            }
            Operation::SetQuota {
                account,
                guarantee,
                ceiling,
            } => {
                let mut quota = Quota::new().guarantee_bytes(guarantee * PAGE);
                quota.ceiling_bytes = ceiling.map(|pages| pages * PAGE);
                let others = self.plain.iter().enumerate();
                let others = others.filter(|(index, _)| *index != account);
                let spoken_for: usize = others
                    .map(|(_, plain)| plain.held().max(plain.guarantee))
                    .sum();
                let held = self.plain[account].held();
                let fits = spoken_for + guarantee <= self.limit
                    || (guarantee <= held && spoken_for + held <= self.limit);
                let outcome = self.accounts[account].0.set_quota(quota);
                if ceiling.is_some_and(|ceiling| guarantee > ceiling) {
                    assert!(outcome.is_err());
                } else if outcome.is_ok() {
                    self.plain[account].guarantee = guarantee;
                    self.plain[account].ceiling = ceiling;
                } else {
                    assert!(!fits, "a guarantee of {guarantee} pages was refused");
                }
            }
            Operation::SetLimit { pages } => {
                let guaranteed: usize = self.plain.iter().map(|plain| plain.guarantee).sum();
                let outcome = self.engine.set_limit_bytes(pages * PAGE);
                assert_eq!(outcome.is_ok(), guaranteed <= pages);
                if outcome.is_ok() {
                    self.limit = pages;
                }
            }
            Operation::GiveBack { account } => {
                self.accounts[account].0.give_back().expect("it can");
            }
            Operation::Withdraw { account } => {
                self.accounts[account].0.withdraw();
            }
            Operation::TakeStep => {
                self.engine.step();
            }
        }
    }

    fn check(&self) {
        self.settle();
        let snapshot = expect_sums(&self.engine);
        for (index, (plain, seen)) in self.plain.iter().zip(&snapshot.accounts).enumerate() {
            assert_eq!(seen.stats.parts.live_page_bytes, plain.held() * PAGE);
            let available = self.accounts[index].0.available_bytes();
            assert_eq!(available, self.available(index) * PAGE, "account {index}");
            let owed = self.accounts[index].0.owed_bytes();
            let above = plain
                .held()
                .saturating_sub(plain.ceiling.unwrap_or(usize::MAX));
            assert!(owed >= above * PAGE, "account {index} owes {owed}");
            let most = plain
                .held()
                .saturating_sub(plain.guarantee.min(plain.held()));
            assert!(
                owed <= most.max(above) * PAGE,
                "account {index} owes {owed}"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn guarantees_hold_for_whatever_accounts_hold(
        operations in prop::collection::vec(operations(), 1..60),
        park_pages in 0..6usize,
        cache_pages in 0..3usize,
    ) {
        let options = manual()
            .park_bytes_max(park_pages * PAGE)
            .cache_bytes_max(cache_pages * PAGE);
        let (simulated, engine) = engine(options);
        let accounts = ["a", "b", "c"].map(|name| {
            let account = account(&engine, name, Quota::new());
            let (ranges, table) = ([range(&account), range(&account)], blocks(&account, BLOCKS));
            (account, ranges, table)
        });
        let mut played = Played {
            engine,
            accounts: accounts.into(),
            plain: vec![Plain::default(); ACCOUNTS],
            limit: super::LIMIT_PAGES,
        };
        for operation in operations {
            played.play(operation);
            played.check();
        }
        let Played { engine, accounts, .. } = played;
        drop(accounts);
        engine.trim().expect("it can");
        prop_assert_eq!(engine.stats().committed_bytes, 0);
        prop_assert_eq!(simulated.books().physical_bytes, 0);
    }
}
