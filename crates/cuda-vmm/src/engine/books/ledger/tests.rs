use super::super::range_id::RangeId;
use super::*;

mod limits;
mod random;

fn owner(account: AccountId, range: u64) -> Owner {
    let range = RangeId(range);
    Owner { account, range }
}

/// What each open account owes.
fn owed(ledger: &mut Ledger) -> BTreeMap<AccountId, usize> {
    let owed = ledger.owed();
    assert!(owed.values().all(|bytes| *bytes > 0));
    let open = ledger
        .accounts
        .iter()
        .filter(|(_, account)| !account.closed);
    let all = open.map(|(id, _)| (*id, owed.get(id).copied().unwrap_or_default()));
    all.collect()
}

/// The first range of an account.
fn of(account: AccountId) -> Owner {
    owner(account, 0)
}

#[test]
fn a_refusal_says_what_there_was() {
    let mut ledger = Ledger::new(100);
    let quota = |guarantee_bytes| Quota {
        guarantee_bytes,
        ..Quota::default()
    };
    let first = ledger.open(quota(30)).expect("fits");
    let second = ledger.open(quota(0)).expect("fits");
    assert_eq!(
        ledger.charge(second, 71, None),
        Err(Refusal {
            free_bytes: 70,
            below_ceiling_bytes: usize::MAX,
            beside_guarantees_bytes: 70,
            limit_bytes: 100
        })
    );
    assert_eq!(ledger.charge(second, 70, None), Ok(()));
    assert_eq!(ledger.charge(first, 30, None), Ok(()));
    assert!(ledger.charge(first, 1, None).is_err());
    assert_eq!(
        ledger.open(quota(1)),
        Err(VmmError::QuotaUnsatisfiable {
            what: QuotaConflict::Guarantee,
            asked_bytes: 1,
            available_bytes: 0
        })
    );
}

#[test]
fn a_ceiling_below_the_guarantee_is_refused() {
    let quota = Quota {
        guarantee_bytes: 2,
        ceiling_bytes: Some(1),
        ..Quota::default()
    };
    assert_eq!(
        Ledger::new(100).open(quota),
        Err(VmmError::QuotaUnsatisfiable {
            what: QuotaConflict::GuaranteeAboveCeiling,
            asked_bytes: 2,
            available_bytes: 1
        })
    );
}

#[test]
fn a_closed_account_keeps_its_charge_until_it_is_refunded() {
    let mut ledger = Ledger::new(100);
    let id = ledger.open(Quota::default()).expect("fits");
    assert_eq!(ledger.charge(id, 60, None), Ok(()));
    ledger.close(id);
    assert_eq!(ledger.committed_bytes(), 60);
    assert!(
        ledger.charge(id, 1, None).is_err(),
        "closed accounts grow no more"
    );
    ledger.refund(id, 60);
    assert_eq!(ledger.committed_bytes(), 0);
    assert!(ledger.accounts.is_empty());
}

#[test]
fn an_account_with_a_ceiling_of_zero_stays_open_when_nothing_is_refunded() {
    let mut ledger = Ledger::new(100);
    let quota = Quota {
        ceiling_bytes: Some(0),
        ..Quota::default()
    };
    let id = ledger.open(quota).expect("fits");
    ledger.refund(id, 0);
    assert_eq!(ledger.charge(id, 0, None), Ok(()));
    assert_eq!(
        ledger
            .charge(id, 1, None)
            .map_err(|refusal| refusal.limit_bytes),
        Err(0)
    );
}

fn quota(guarantee_bytes: usize, ceiling_bytes: usize, priority: i32) -> Quota {
    Quota {
        guarantee_bytes,
        ceiling_bytes: Some(ceiling_bytes),
        priority,
    }
}

#[test]
fn a_quota_that_cannot_hold_is_refused_and_changes_nothing() {
    let mut ledger = Ledger::new(100);
    let first = ledger.open(quota(30, 50, 1)).expect("fits");
    let second = ledger.open(quota(20, 90, 0)).expect("fits");
    assert_eq!(ledger.charge(second, 60, None), Ok(()));
    let refused = |what, asked_bytes, available_bytes| {
        Err(VmmError::QuotaUnsatisfiable {
            what,
            asked_bytes,
            available_bytes,
        })
    };
    // 60 are held by the other, and so 40 are left.
    let outcome = ledger.set_quota(first, quota(41, 50, 7));
    assert_eq!(outcome, refused(QuotaConflict::Guarantee, 41, 40));
    let outcome = ledger.set_quota(first, quota(40, 39, 7));
    assert_eq!(
        outcome,
        refused(QuotaConflict::GuaranteeAboveCeiling, 40, 39)
    );
    assert_eq!(ledger.quota(first), Some(quota(30, 50, 1)));
    // What is held counts towards a guarantee.
    assert_eq!(
        ledger.set_quota(second, quota(71, 90, 0)),
        refused(QuotaConflict::Guarantee, 71, 70)
    );
    assert_eq!(ledger.set_quota(second, quota(70, 90, 0)), Ok(()));
    assert_eq!(
        ledger.set_quota(first, quota(31, 50, 1)),
        refused(QuotaConflict::Guarantee, 31, 30)
    );
    assert_eq!(ledger.set_quota(second, quota(0, 90, 0)), Ok(()));
    assert_eq!(ledger.set_quota(first, quota(40, 50, 1)), Ok(()));
    assert_eq!(ledger.charge(first, 40, None), Ok(()));
    ledger.close(first);
    assert_eq!(
        ledger.set_quota(AccountId(9), quota(0, 1, 0)),
        Err(VmmError::Closed)
    );
}

#[test]
fn what_is_held_above_a_lowered_limit_cannot_be_guaranteed() {
    let mut ledger = Ledger::new(100);
    let [first, second] = [(); 2].map(|()| ledger.open(quota(0, 100, 0)).expect("fits"));
    for id in [first, second] {
        assert_eq!(ledger.charge(id, 30, None), Ok(()));
    }
    assert_eq!(ledger.set_limit(40), Ok(()));
    assert_eq!(ledger.set_quota(first, quota(30, 100, 0)), Ok(()));
    let outcome = ledger.set_quota(second, quota(11, 100, 0));
    let expected = VmmError::QuotaUnsatisfiable {
        what: QuotaConflict::Guarantee,
        asked_bytes: 11,
        available_bytes: 10,
    };
    assert_eq!(outcome, Err(expected));
    assert_eq!(ledger.set_quota(second, quota(10, 100, 0)), Ok(()));
    let owed = owed(&mut ledger);
    assert_eq!((owed[&first], owed[&second]), (0, 20));
}

#[test]
fn an_account_above_its_lowered_ceiling_owes_the_rest_and_gets_no_more() {
    let mut ledger = Ledger::new(100);
    let id = ledger.open(Quota::default()).expect("fits");
    assert_eq!(ledger.charge(id, 60, None), Ok(()));
    assert!(ledger.is_calm());
    assert_eq!(ledger.set_quota(id, quota(10, 45, 0)), Ok(()));
    assert!(!ledger.is_calm() && ledger.is_above_ceiling(id));
    assert_eq!(owed(&mut ledger)[&id], 15);
    let coming_bytes = 6;
    let comes_back = ComesBack {
        coming_bytes,
        ..ComesBack::default()
    };
    ledger.foresee(id, comes_back);
    assert_eq!(owed(&mut ledger)[&id], 9, "less what comes back anyhow");
    ledger.begin_releasing(id, 2);
    assert_eq!(owed(&mut ledger)[&id], 7);
    ledger.end_releasing(id, 2);
    assert!(ledger.charge(id, 1, None).is_err());
    ledger.refund(id, 15);
    assert!(ledger.is_calm());
    assert_eq!(owed(&mut ledger)[&id], 0);
    assert_eq!(ledger.set_quota(id, quota(0, 0, 0)), Ok(()));
    assert!(!ledger.is_calm());
    ledger.close(id);
    assert!(ledger.is_calm(), "no account can be asked");
    assert!(owed(&mut ledger).is_empty());
}

#[test]
fn what_comes_free_is_for_the_highest_priority_and_then_for_the_first() {
    let mut ledger = Ledger::new(100);
    let holder = ledger.open(Quota::default()).expect("fits");
    let low = ledger.open(quota(0, 100, -1)).expect("fits");
    let [first, second] = [(); 2].map(|()| ledger.open(quota(0, 100, 3)).expect("fits"));
    assert_eq!(ledger.charge(holder, 100, None), Ok(()));
    let low_ticket = ledger.line_up(of(low), 10);
    let first_ticket = ledger.line_up(of(first), 20);
    let second_ticket = ledger.line_up(of(second), 10);
    ledger.refund(holder, 20);
    let free = |ledger: &Ledger, id, ticket| ledger.room(id, ticket).free_bytes;
    assert_eq!(
        free(&ledger, holder, None),
        0,
        "an account that comes now stands last"
    );
    assert_eq!(free(&ledger, low, Some(low_ticket)), 0);
    assert_eq!(free(&ledger, second, Some(second_ticket)), 0);
    assert_eq!(free(&ledger, second, None), 0);
    assert_eq!(free(&ledger, first, Some(first_ticket)), 20);
    ledger.wait_for(first_ticket, 15);
    assert_eq!(free(&ledger, second, Some(second_ticket)), 5);
    // A priority that changes meanwhile counts at once.
    assert_eq!(ledger.set_quota(low, quota(0, 100, 4)), Ok(()));
    assert_eq!(free(&ledger, low, Some(low_ticket)), 20);
    assert_eq!(ledger.charge(low, 10, Some(low_ticket)), Ok(()));
    assert!(ledger.leave_line(low_ticket));
    assert!(!ledger.leave_line(low_ticket), "it has left");
    assert!(ledger.charge(first, 15, Some(first_ticket)).is_err());
    assert!(ledger.leave_line(first_ticket));
    assert_eq!(ledger.charge(second, 10, Some(second_ticket)), Ok(()));
    assert!(ledger.leave_line(second_ticket));
    assert!(ledger.is_calm());
}

#[test]
fn a_guarantee_does_not_wait_behind_others() {
    let mut ledger = Ledger::new(100);
    let sure = ledger.open(quota(40, 100, -9)).expect("fits");
    let holder = ledger.open(quota(0, 100, 0)).expect("fits");
    let urgent = ledger.open(quota(0, 100, 9)).expect("fits");
    assert_eq!(ledger.charge(holder, 50, None), Ok(()));
    ledger.line_up(of(urgent), 30);
    assert_eq!(ledger.room(sure, None).free_bytes, 40);
    assert_eq!(
        ledger.charge(sure, 41, None).map_err(|r| r.free_bytes),
        Err(40)
    );
    assert_eq!(ledger.charge(sure, 40, None), Ok(()));
}

#[test]
fn a_refused_want_is_over_when_there_was_room_for_it_a_number_of_times() {
    let mut ledger = Ledger::new(100);
    let holder = ledger.open(Quota::default()).expect("fits");
    let asker = ledger.open(Quota::default()).expect("fits");
    assert_eq!(ledger.charge(holder, 90, None), Ok(()));
    ledger.refuse(of(asker), 30, true);
    assert_eq!(owed(&mut ledger)[&holder], 20);
    ledger.refuse(of(asker), 40, true);
    assert_eq!(
        owed(&mut ledger)[&holder],
        30,
        "in place of the earlier one"
    );
    assert_eq!(ledger.charge(holder, 10, None), Ok(()), "no account waits");
    assert_eq!(owed(&mut ledger)[&holder], 40);
    ledger.refund(holder, 40);
    assert_eq!(owed(&mut ledger)[&holder], 0);
    assert_eq!(ledger.charge(holder, 40, None), Ok(()));
    assert_eq!(
        owed(&mut ledger)[&holder],
        40,
        "it was taken before the other asked again"
    );
    ledger.refund(holder, 40);
    for _ in 1..pressure::CHANCES {
        assert!(!ledger.is_calm());
        assert_eq!(owed(&mut ledger)[&holder], 0);
    }
    assert!(ledger.is_calm(), "the other has moved on");
    assert_eq!(ledger.charge(holder, 40, None), Ok(()));
    ledger.refuse(of(asker), 1, true);
    ledger.refund(holder, 1);
    assert_eq!(ledger.charge(asker, 1, None), Ok(()));
    ledger.forget(owner(asker, 1));
    assert!(!ledger.is_calm(), "another range got memory");
    ledger.forget(of(asker));
    assert!(ledger.is_calm(), "it got memory");
}

#[test]
fn what_others_cannot_help_with_is_remembered_and_not_owed() {
    let mut ledger = Ledger::new(100);
    let holder = ledger.open(Quota::new().guarantee_bytes(40)).expect("fits");
    let asker = ledger.open(Quota::new()).expect("fits");
    assert_eq!(ledger.charge(holder, 60, None), Ok(()));
    ledger.refuse(of(asker), 61, false);
    assert_eq!(owed(&mut ledger)[&holder], 0);
    assert_eq!(ledger.refused().collect::<Vec<_>>(), [(asker, 61)]);
    ledger.refuse(of(asker), 60, true);
    assert_eq!(owed(&mut ledger)[&holder], 20);
}
