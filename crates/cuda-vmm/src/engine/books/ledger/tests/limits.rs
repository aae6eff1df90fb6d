//! What is said of the cache, of limits that are exceeded, and of what comes free.

use super::{quota, *};

/// A ledger with a limit of 100 and accounts that hold this much.
fn holding<const N: usize>(held: [usize; N]) -> (Ledger, [AccountId; N]) {
    let mut ledger = Ledger::new(100);
    let ids = held.map(|bytes| {
        let id = ledger.open(Quota::new()).expect("fits");
        assert_eq!(ledger.charge(id, bytes, None), Ok(()));
        id
    });
    (ledger, ids)
}

#[test]
fn what_is_in_the_cache_is_committed_and_makes_room_when_it_is_taken() {
    let (mut ledger, [id]) = holding([60]);
    ledger.put_in_cache(id, 40);
    let told = |ledger: &Ledger| (ledger.committed_bytes(), ledger.cached_bytes());
    assert_eq!(told(&ledger), (60, 40));
    assert_eq!(ledger.account_bytes(id), 20);
    assert_eq!(ledger.room(id, None).free_bytes, 40);
    let refused = ledger.charge(id, 41, None);
    assert_eq!(refused.map_err(|refusal| refusal.free_bytes), Err(40));
    ledger.take_from_cache(40);
    assert_eq!(ledger.room(id, None).free_bytes, 80);
    ledger.restock(40);
    assert_eq!(told(&ledger), (60, 40), "as before");
    ledger.take_from_cache(30);
    assert_eq!(told(&ledger), (30, 10));
    ledger.restock(5);
    assert_eq!(told(&ledger), (35, 15));
}

#[test]
fn all_of_a_limit_can_be_guaranteed_and_no_more() {
    let mut ledger = Ledger::new(100);
    let refused = |what, asked_bytes, available_bytes| VmmError::QuotaUnsatisfiable {
        what,
        asked_bytes,
        available_bytes,
    };
    assert_eq!(
        ledger.open(quota(101, 200, 0)),
        Err(refused(QuotaConflict::GuaranteeAboveLimit, 101, 100))
    );
    assert!(ledger.open(quota(100, 100, 0)).is_ok());
    assert_eq!(ledger.set_limit(100), Ok(()));
    assert_eq!(
        ledger.set_limit(99),
        Err(refused(QuotaConflict::LimitBelowGuarantees, 100, 99))
    );
}

#[test]
fn beside_the_guarantees_of_others_an_account_may_hold_the_rest() {
    let mut ledger = Ledger::new(100);
    let [first, _] = [30, 20].map(|bytes| ledger.open(quota(bytes, 200, 0)).expect("fits"));
    let expected = Refusal {
        free_bytes: 80,
        below_ceiling_bytes: 200,
        beside_guarantees_bytes: 80,
        limit_bytes: 100,
    };
    assert_eq!(ledger.charge(first, 81, None), Err(expected));
    assert_eq!(ledger.room(first, None), expected);
}

#[test]
fn above_a_limit_an_account_may_take_what_brings_its_use_no_higher() {
    let (mut ledger, [first, second]) = holding([50, 40]);
    assert!(!ledger.is_over(first));
    assert_eq!(ledger.room_when_over(first), None);
    let comes_back = ComesBack {
        coming_bytes: 45,
        spare_bytes: 0,
    };
    ledger.foresee(first, comes_back);
    assert_eq!(ledger.set_limit(60), Ok(()));
    assert!(ledger.is_over(first) && ledger.is_over(second));
    // 5 and 40 are in use.
    let expected = Refusal {
        free_bytes: 15,
        below_ceiling_bytes: usize::MAX - 50,
        beside_guarantees_bytes: 60,
        limit_bytes: 60,
    };
    assert_eq!(ledger.room_when_over(first), Some(expected));
    // Above its ceiling too.
    assert_eq!(ledger.set_quota(first, quota(0, 12, 0)), Ok(()));
    let expected = Refusal {
        free_bytes: 7,
        below_ceiling_bytes: 7,
        beside_guarantees_bytes: 12,
        limit_bytes: 12,
    };
    assert_eq!(ledger.room_when_over(first), Some(expected));
    // Above its ceiling alone.
    assert_eq!(ledger.set_limit(100), Ok(()));
    assert!(ledger.is_over(first) && !ledger.is_over(second));
    assert!(ledger.is_above_ceiling(first) && !ledger.is_above_ceiling(second));
    assert_eq!(ledger.room_when_over(first), Some(expected));
    assert_eq!(ledger.room_when_over(second), None);
}

#[test]
fn an_account_above_its_ceiling_has_something_to_spare_or_not() {
    let (mut ledger, [first, second]) = holding([40, 50]);
    let spare = |spare_bytes| ComesBack {
        coming_bytes: spare_bytes,
        spare_bytes,
    };
    for id in [first, second] {
        ledger.foresee(id, spare(3));
    }
    assert_eq!(ledger.spare_above_ceiling(), None, "none is above");
    assert_eq!(ledger.set_quota(second, quota(0, 45, 0)), Ok(()));
    assert_eq!(ledger.spare_above_ceiling(), Some(second));
    ledger.foresee(second, spare(0));
    assert_eq!(ledger.spare_above_ceiling(), None);
}

#[test]
fn what_comes_back_in_any_way_is_not_owed() {
    let (mut ledger, [id]) = holding([60]);
    assert_eq!(ledger.set_quota(id, quota(0, 40, 0)), Ok(()));
    assert_eq!(owed(&mut ledger)[&id], 20);
    ledger.foresee_shared(id, 6);
    assert_eq!(owed(&mut ledger)[&id], 14);
    ledger.begin_releasing(id, 5);
    assert_eq!(owed(&mut ledger)[&id], 9);
    ledger.end_releasing(id, 3);
    assert_eq!(owed(&mut ledger)[&id], 12);
    ledger.end_releasing(id, 2);
    assert_eq!(owed(&mut ledger)[&id], 14);
}

#[test]
fn a_refused_account_is_served_when_there_is_room_that_is_not_stuck() {
    let (mut ledger, [holder, asker]) = holding([100, 0]);
    ledger.refuse(of(asker), 20, true);
    assert!(ledger.served(0).is_empty());
    ledger.refund(holder, 20);
    assert_eq!(ledger.available_bytes(asker, None, 0), 20);
    assert_eq!(ledger.served(0), BTreeSet::from([asker]));
    assert_eq!(ledger.available_bytes(asker, None, 3), 17);
    assert!(ledger.served(1).is_empty());
}

#[test]
fn what_a_closed_range_was_refused_its_account_wants_for_any_other() {
    let (mut ledger, [id]) = holding([100]);
    ledger.refuse(owner(id, 0), 20, true);
    assert!(ledger.is_refused(owner(id, 0)) && !ledger.is_refused(owner(id, 1)));
    ledger.close_range(owner(id, 0));
    assert!(ledger.is_refused(owner(id, 1)));
}

#[test]
fn a_place_in_the_line_says_how_much_is_waited_for() {
    let (mut ledger, [id]) = holding([100]);
    let ticket = ledger.line_up(of(id), 20);
    assert_eq!(ledger.awaited_bytes(Some(ticket)), Some(20));
    ledger.wait_for(ticket, 15);
    assert_eq!(ledger.awaited_bytes(Some(ticket)), Some(15));
    assert_eq!(ledger.awaited_bytes(None), None);
    assert!(ledger.leave_line(ticket));
    assert_eq!(ledger.awaited_bytes(Some(ticket)), None);
}

#[test]
fn accounts_that_come_and_go_leave_a_short_list_of_changes() {
    let (mut ledger, ids) = holding([10; 3]);
    ledger.owed();
    let mut longest = 0;
    for _ in 0..1000 {
        let id = ledger.open(Quota::new()).expect("fits");
        longest = longest.max(ledger.changed.len());
        ledger.close(id);
    }
    // 64, twice those that stay, and one more.
    assert_eq!(longest, 64 + 2 * ids.len() + 1);
    assert!(ledger.owed().is_empty() && ledger.changed.is_empty());
}
