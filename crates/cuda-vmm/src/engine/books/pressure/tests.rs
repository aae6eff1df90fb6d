use super::*;
use proptest::prelude::*;

/// The first range of an account.
fn of<A>(account: A) -> (A, RangeId) {
    (account, RangeId(0))
}

#[test]
fn a_range_has_one_want_that_no_caller_waits_for() {
    let mut wants = Wants::default();
    let waits = wants.push(of(7), 1, true);
    wants.push(of(7), 2, false);
    wants.push(of(8), 3, false);
    wants.push(of(7), 4, false);
    let bytes = |wants: &Wants<i32>| wants.iter().map(|(_, want)| want.bytes).collect::<Vec<_>>();
    assert_eq!(bytes(&wants), [1, 3, 4]);
    wants.set_bytes(waits, 9);
    wants.forget(of(7));
    assert_eq!(bytes(&wants), [9, 3]);
    assert!(wants.remove(waits) && !wants.remove(waits));
    wants.push(of(7), 5, false);
    wants.push(of(7), 2, true);
    assert_eq!(bytes(&wants), [3, 2], "it asks again");
    wants.close(7);
    assert_eq!(bytes(&wants), [3]);
    wants.close(8);
    assert!(wants.is_empty());
}

#[test]
fn what_two_ranges_of_an_account_were_refused_is_forgotten_for_each_or_for_both() {
    let mut wants = Wants::default();
    let (first, second) = ((7, RangeId(0)), (7, RangeId(1)));
    let waits = wants.push(first, 1, true);
    wants.push(first, 2, false);
    wants.push(second, 4, false);
    wants.push((8, RangeId(0)), 8, false);
    wants.forget(second);
    assert!(wants.is_refused(first) && !wants.is_refused(second));
    wants.push(second, 16, false);
    assert_eq!(wants.withdraw(7), 2 + 16);
    assert_eq!(wants.withdraw(7), 0);
    let bytes: Vec<_> = wants.iter().map(|(_, want)| want.bytes).collect();
    assert_eq!(bytes, [1, 8]);
    assert_eq!(wants.bytes(waits), Some(1));
}

#[test]
fn what_closed_ranges_were_refused_their_account_wants_once() {
    let mut wants = Wants::default();
    let bytes = |wants: &Wants<i32>| wants.iter().map(|(_, want)| want.bytes).collect::<Vec<_>>();
    let range = |number| (7, RangeId(number));
    for (number, bytes) in [(0, 1), (1, 2), (2, 4)] {
        wants.push(range(number), bytes, false);
    }
    wants.push((8, RangeId(3)), 8, false);
    wants.close_range(range(0));
    wants.close_range(range(9));
    assert_eq!(bytes(&wants), [1, 2, 4, 8]);
    wants.close_range(range(1));
    assert_eq!(bytes(&wants), [2, 4, 8], "one of an account at most");
    assert!(wants.is_refused(range(4)) && wants.is_refused(range(2)));
    wants.forget(range(4));
    assert_eq!(bytes(&wants), [4, 8], "another range got memory");
    wants.close_range(range(2));
    wants.push(range(5), 16, false);
    assert_eq!(bytes(&wants), [8, 16], "it asks again, for another range");
    wants.close_range(range(5));
    assert_eq!(wants.withdraw(7), 16);
    wants.close(8);
    assert!(wants.is_empty());
}
proptest! {
    #[test]
    fn the_first_account_of_the_highest_priority_stands_first(
        list in prop::collection::vec((-3..4i32, any::<bool>()), 1..20),
    ) {
        let turns: Vec<_> = list
            .iter()
            .enumerate()
            .map(|(number, (priority, waits))| turn(*priority, waits.then_some(Ticket(number as u64))))
            .collect();
        for (first, (a, a_waits)) in list.iter().enumerate() {
            for (second, (b, b_waits)) in list.iter().enumerate() {
                let before = a > b || (a == b && *a_waits && (!b_waits || first < second));
                prop_assert_eq!(turns[first] < turns[second], before);
            }
        }
    }
}
