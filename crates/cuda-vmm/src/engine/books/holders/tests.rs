use super::super::pressure::Wants;
use super::super::range_id::RangeId;
use super::*;
use plain::Holder;
use proptest::prelude::*;

mod plain;

const LIMIT: usize = 100;

fn holder(
    account: usize,
    priority: i32,
    guarantee_bytes: usize,
    used_bytes: usize,
) -> Holder<usize> {
    Holder {
        account,
        priority,
        guarantee_bytes,
        ceiling_bytes: usize::MAX,
        used_bytes,
    }
}

/// What each holder owes, in their order, as those say that are worked out from the ones that owe;
/// and checks that a walk over all says the same.
fn divide(
    limit_bytes: usize,
    holders: &[Holder<usize>],
    wants: impl IntoIterator<Item = (Ticket, Want<usize>)>,
) -> Vec<usize> {
    let wants: Vec<_> = wants.into_iter().collect();
    let expected = plain::divide(limit_bytes, holders, wants.iter().copied());
    let mut indexed = Holders::default();
    // Each holds something else first, and some go.
    for holder in holders {
        let before = super::Holder {
            priority: 1,
            guarantee_bytes: 3,
            ceiling_bytes: 4,
            used_bytes: 9,
        };
        indexed.set(holder.account, Some(before));
        if holder.account % 2 == 0 {
            indexed.set(holder.account, None);
        }
    }
    for holder in holders {
        let now = super::Holder {
            priority: holder.priority,
            guarantee_bytes: holder.guarantee_bytes,
            ceiling_bytes: holder.ceiling_bytes,
            used_bytes: holder.used_bytes,
        };
        indexed.set(holder.account, Some(now));
    }
    let owed = indexed.divide(limit_bytes, wants);
    assert!(owed.values().all(|bytes| *bytes > 0));
    let owed = holders
        .iter()
        .map(|holder| owed.get(&holder.account).copied().unwrap_or_default());
    let owed: Vec<_> = owed.collect();
    assert_eq!(owed, expected);
    owed
}

/// The first range of an account.
fn of<A>(account: A) -> (A, RangeId) {
    (account, RangeId(0))
}

fn wants(list: &[(usize, usize)]) -> Vec<(Ticket, Want<usize>)> {
    let mut wants = Wants::default();
    for (account, bytes) in list {
        wants.push(of(*account), *bytes, true);
    }
    wants.iter().collect()
}

#[test]
fn nothing_is_owed_where_there_is_room() {
    let holders = [holder(0, 0, 0, 60), holder(1, 0, 0, 0)];
    assert_eq!(divide(LIMIT, &holders, wants(&[(1, 40)])), [0, 0]);
    assert_eq!(divide(LIMIT, &holders, wants(&[(1, 41)])), [1, 0]);
}

#[test]
fn the_lowest_priority_owes_first_and_never_below_its_guarantee() {
    let holders = [
        holder(0, 1, 0, 40),
        holder(1, -1, 25, 30),
        holder(2, 2, 0, 30),
        holder(3, 1, 0, 0),
    ];
    assert_eq!(divide(LIMIT, &holders, wants(&[(3, 5)])), [0, 5, 0, 0]);
    assert_eq!(divide(LIMIT, &holders, wants(&[(3, 20)])), [15, 5, 0, 0]);
    // The account above owes nothing, so no account owes part of this.
    assert_eq!(divide(LIMIT, &holders, wants(&[(3, 60)])), [40, 5, 0, 0]);
}

#[test]
fn among_equals_the_furthest_above_its_guarantee_owes_first() {
    let holders = [
        holder(0, 0, 30, 40),
        holder(1, 0, 10, 60),
        holder(2, 0, 0, 0),
    ];
    assert_eq!(divide(LIMIT, &holders, wants(&[(2, 50)])), [0, 50, 0]);
    assert_eq!(divide(LIMIT, &holders, wants(&[(2, 55)])), [5, 50, 0]);
}

#[test]
fn what_is_above_a_ceiling_is_owed_and_serves_the_account_that_wants() {
    let mut holders = [holder(0, 5, 10, 70), holder(1, 0, 0, 30)];
    holders[0].ceiling_bytes = 50;
    assert_eq!(divide(LIMIT, &holders, wants(&[])), [20, 0]);
    assert_eq!(divide(LIMIT, &holders, wants(&[(1, 20)])), [20, 0]);
    assert_eq!(divide(LIMIT, &holders, wants(&[(1, 21)])), [20, 0]);
}

#[test]
fn no_account_owes_a_guarantee_that_is_called_in() {
    let holders = [holder(0, 0, 0, 60), holder(1, 9, 40, 0)];
    assert_eq!(divide(LIMIT, &holders, wants(&[(1, 40)])), [0, 0]);
    assert_eq!(divide(LIMIT, &holders, wants(&[(1, 45)])), [5, 0]);
}

#[test]
fn two_accounts_that_want_do_not_owe_each_other() {
    let holders = [holder(0, 0, 0, 50), holder(1, 0, 0, 50)];
    assert_eq!(divide(LIMIT, &holders, wants(&[(0, 20), (1, 20)])), [0, 20]);
    assert_eq!(divide(LIMIT, &holders, wants(&[(1, 20), (0, 20)])), [20, 0]);
}

#[test]
fn of_two_equals_that_do_not_wait_neither_owes() {
    let holders = [holder(0, 0, 0, 50), holder(1, 0, 0, 50)];
    let mut wants = Wants::default();
    for account in [0, 1] {
        wants.push(of(account), 20, false);
    }
    assert_eq!(divide(LIMIT, &holders, wants.iter()), [0, 0]);
}

#[test]
fn an_account_at_its_ceiling_asks_no_other() {
    let mut holders = [holder(0, 0, 0, 90), holder(1, 0, 0, 10)];
    holders[1].ceiling_bytes = 15;
    assert_eq!(divide(LIMIT, &holders, wants(&[(1, 6)])), [0, 0]);
    assert_eq!(divide(LIMIT, &holders, wants(&[(1, 5)])), [5, 0]);
}

#[test]
fn what_is_above_a_lowered_limit_is_owed_by_the_lowest_priority_first() {
    let holders = [
        holder(0, 1, 0, 40),
        holder(1, -1, 25, 30),
        holder(2, 2, 0, 20),
        holder(3, 1, 0, 10),
    ];
    let owed = |limit| divide(limit, &holders, wants(&[]));
    assert_eq!(owed(LIMIT), [0; 4]);
    assert_eq!(owed(96), [0, 4, 0, 0]);
    // Down to the guarantee of the lowest, and then the one furthest above its own.
    assert_eq!(owed(95), [0, 5, 0, 0]);
    assert_eq!(owed(75), [20, 5, 0, 0]);
    assert_eq!(owed(50), [40, 5, 0, 5]);
    assert_eq!(owed(30), [40, 5, 15, 10]);
    // No account owes what is guaranteed, whatever the limit.
    for limit in [25, 10, 0] {
        assert_eq!(owed(limit), [40, 5, 20, 10]);
    }
}

#[test]
fn a_guarantee_that_is_not_used_is_kept_below_a_lowered_limit() {
    let holders = [holder(0, 0, 10, 40), holder(1, -1, 30, 5)];
    assert_eq!(divide(70, &holders, wants(&[])), [0, 0]);
    assert_eq!(divide(60, &holders, wants(&[])), [10, 0]);
    assert_eq!(divide(40, &holders, wants(&[])), [30, 0]);
    assert_eq!(divide(35, &holders, wants(&[])), [30, 0]);
}

#[test]
fn what_is_above_a_ceiling_counts_towards_a_lowered_limit() {
    let mut holders = [holder(0, 5, 0, 60), holder(1, 0, 0, 40)];
    holders[0].ceiling_bytes = 50;
    assert_eq!(divide(90, &holders, wants(&[])), [10, 0]);
    assert_eq!(divide(80, &holders, wants(&[])), [10, 10]);
    assert_eq!(divide(40, &holders, wants(&[])), [20, 40]);
}

#[test]
fn wants_are_owed_beside_what_is_above_a_lowered_limit() {
    let holders = [
        holder(0, 0, 0, 60),
        holder(1, -1, 10, 40),
        holder(2, 1, 0, 0),
    ];
    assert_eq!(divide(90, &holders, wants(&[(2, 5)])), [0, 15, 0]);
    assert_eq!(divide(80, &holders, wants(&[(2, 20)])), [10, 30, 0]);
    // One of the lowest priority does not ask those above it, but owes its own.
    assert_eq!(divide(90, &holders, wants(&[(1, 5)])), [0, 10, 0]);
}

fn holders() -> impl Strategy<Value = Vec<Holder<usize>>> {
    let one = (-2..3i32, 0..30usize, 0..60usize, 0..60usize);
    prop::collection::vec(one, 1..6).prop_map(|list| {
        let mut left = LIMIT;
        list.into_iter()
            .enumerate()
            .map(
                |(account, (priority, guarantee_bytes, above, used_bytes))| {
                    // As the ledger has it: what is used and guaranteed fits in the limit.
                    let guarantee_bytes = guarantee_bytes.min(left);
                    let used_bytes = used_bytes.min(left);
                    left -= used_bytes.max(guarantee_bytes);
                    let ceiling_bytes = guarantee_bytes + above;
                    Holder {
                        ceiling_bytes,
                        ..holder(account, priority, guarantee_bytes, used_bytes)
                    }
                },
            )
            .collect()
    })
}

/// What is missing for a want, in a world where `owed` has been given back: worked out anew,
/// without `divide`.
fn missing(holders: &[Holder<usize>], owed: &[usize], wants: &[(usize, usize)]) -> usize {
    let used = |index: usize| holders[index].used_bytes - owed[index];
    let taken: usize = (0..holders.len())
        .map(|index| used(index).max(holders[index].guarantee_bytes))
        .sum();
    let mut more = 0;
    for (account, bytes) in wants {
        let holder = &holders[*account];
        if holder.used_bytes + bytes <= holder.ceiling_bytes {
            more += bytes.saturating_sub(holder.guarantee_bytes.saturating_sub(used(*account)));
        }
    }
    (taken + more).saturating_sub(LIMIT)
}

proptest! {
    #[test]
    fn what_is_owed_is_enough_or_all_there_is_and_not_more(
        holders in holders(),
        asks in prop::collection::vec((0..6usize, 1..80usize), 0..5),
    ) {
        // One want for each account, so that the order of two by one account does not matter here.
        let mut list: Vec<(usize, usize)> = Vec::new();
        for (account, bytes) in asks {
            if account < holders.len() && list.iter().all(|(other, _)| *other != account) {
                list.push((account, bytes));
            }
        }
        let owed = divide(LIMIT, &holders, wants(&list));
        let excess = |holder: &Holder<usize>| holder.used_bytes.saturating_sub(holder.ceiling_bytes);
        list.sort_by_key(|(account, _)| Reverse(holders[*account].priority));
        let asks: Vec<usize> = list.iter().map(|(account, _)| *account).collect();

        for (index, holder) in holders.iter().enumerate() {
            let floor = holder.guarantee_bytes.min(holder.used_bytes);
            prop_assert!(holder.used_bytes - owed[index] >= floor, "below its guarantee");
            prop_assert!(owed[index] >= excess(holder), "above its ceiling");
            if owed[index] == excess(holder) {
                continue;
            }
            // An account of a higher priority wants more than there is, or one of its own priority
            // that holds no more than it.
            let may_ask = |account: usize| {
                let asker = &holders[account];
                let is_equal = asker.priority == holder.priority
                    && asker.above_guarantee() <= holder.above_guarantee();
                account != index && (asker.priority > holder.priority || is_equal)
            };
            prop_assert!(list.iter().any(|(account, _)| may_ask(*account)));
            // Each account below it gives all that it can, unless it stands further ahead in the
            // line.
            for (lower, other) in holders.iter().enumerate() {
                let stands = asks.iter().position(|account| *account == lower);
                if other.priority < holder.priority && stands.is_none() {
                    prop_assert_eq!(other.used_bytes - owed[lower], other.guarantee_bytes.min(other.used_bytes));
                }
            }
            // One byte less, and the wants are not met.
            let mut less = owed.clone();
            less[index] -= 1;
            prop_assert!(missing(&holders, &less, &list) > 0, "more than is needed");
        }
        // No account could owe what is still missing.
        if missing(&holders, &owed, &list) > 0 {
            let lowest = list.iter().map(|(account, _)| holders[*account].priority).min();
            for (index, holder) in holders.iter().enumerate() {
                if !asks.contains(&index) && Some(holder.priority) < lowest {
                    prop_assert_eq!(holder.used_bytes - owed[index], holder.guarantee_bytes.min(holder.used_bytes));
                }
            }
        }
    }

    #[test]
    fn what_is_above_a_lowered_limit_is_owed_in_order_and_not_more(
        holders in holders(), limit in 0..LIMIT,
    ) {
        let owed = divide(limit, &holders, wants(&[]));
        let kept = |index: usize| holders[index].used_bytes - owed[index];
        let excess = |index: usize| {
            holders[index].used_bytes.saturating_sub(holders[index].ceiling_bytes)
        };
        let spoken_for = |bytes: &dyn Fn(usize) -> usize| -> usize {
            (0..holders.len()).map(|index| bytes(index).max(holders[index].guarantee_bytes)).sum()
        };
        let guaranteed: usize = holders.iter().map(|holder| holder.guarantee_bytes).sum();
        let left = spoken_for(&kept);
        prop_assert!(left <= limit.max(guaranteed), "enough, or all there is");
        for (index, holder) in holders.iter().enumerate() {
            prop_assert!(kept(index) >= holder.guarantee_bytes.min(holder.used_bytes));
            prop_assert!(owed[index] >= excess(index));
            if owed[index] == excess(index) {
                continue;
            }
            prop_assert!(left >= limit, "more than is needed");
            for (other, lower) in holders.iter().enumerate() {
                if lower.priority < holder.priority {
                    let floor = lower.guarantee_bytes.min(lower.used_bytes);
                    prop_assert_eq!(kept(other), floor, "the lowest priority first");
                }
            }
        }
    }

    #[test]
    fn of_two_equals_never_both_owe_and_never_the_one_that_holds_less(
        used in (0..60usize, 0..60usize), guarantees in (0..20usize, 0..20usize),
        asks in (0..60usize, 0..60usize), waits in any::<bool>(), first in 0..2usize,
    ) {
        let guarantees = [guarantees.0.min(LIMIT - 60), guarantees.1.min(LIMIT - 60)];
        let used = [used.0, used.1.min(LIMIT - used.0.max(guarantees[0]))];
        let holders = [0, 1].map(|index| holder(index, 0, guarantees[index], used[index]));
        let asks = [asks.0, asks.1];
        let mut wants = Wants::default();
        for account in [first, 1 - first] {
            if asks[account] > 0 {
                wants.push(of(account), asks[account], waits);
            }
        }
        let owed = divide(LIMIT, &holders, wants.iter());
        prop_assert!(owed[0] == 0 || owed[1] == 0);
        for index in 0..2 {
            let (mine, other) = (&holders[index], &holders[1 - index]);
            if mine.above_guarantee() < other.above_guarantee() {
                prop_assert_eq!(owed[index], 0);
            }
        }
    }

    /// Accounts that want several things, wait or not, and hold more than the limit or not.
    #[test]
    fn what_is_owed_is_what_a_walk_says(
        list in prop::collection::vec(
            (-2..3i32, 0..4usize, 0..9usize, prop::option::of(0..12usize)),
            1..12,
        ),
        asks in prop::collection::vec((0..12usize, 0..4u64, 1..12usize, any::<bool>()), 0..10),
        limit in 0..70usize,
    ) {
        let holders: Vec<_> = list
            .into_iter()
            .enumerate()
            .map(|(account, (priority, guarantee, used, ceiling))| Holder {
                ceiling_bytes: ceiling.unwrap_or(usize::MAX),
                ..holder(account, priority, guarantee, used)
            })
            .collect();
        let mut wants = Wants::default();
        for (account, range, bytes, waits) in asks {
            wants.push((account, RangeId(range)), bytes, waits);
        }
        divide(limit, &holders, wants.iter());
    }
}
