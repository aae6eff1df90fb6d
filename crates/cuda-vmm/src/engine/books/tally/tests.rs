use super::*;
use proptest::prelude::*;

fn looks() -> impl Strategy<Value = RangeLook> {
    (0..4u64, 0..50usize, 0..50usize, 0..50usize, any::<u16>()).prop_map(
        |(account, retiring, ahead, parked, bits)| RangeLook {
            account: AccountId(account),
            parts: MemoryParts {
                retiring_bytes: retiring,
                ahead_bytes: ahead,
                parked_bytes: parked + 7,
                ..MemoryParts::default()
            },
            spare_parked_bytes: parked,
            left_parked_bytes: if bits & 1 == 0 { parked } else { 0 },
            facts: (Fact::ALL.iter())
                .map(|fact| (*fact, bits >> *fact as u16 & 1 != 0))
                .collect(),
        },
    )
}

#[test]
fn a_fact_holds_if_it_was_said_once_or_more() {
    let facts: Facts = [
        (Fact::Ended, true),
        (Fact::Leaving, true),
        (Fact::Ended, true),
        (Fact::Hungry, false),
    ]
    .into_iter()
    .collect();
    let holds = Fact::ALL.into_iter().filter(|fact| facts.has(*fact));
    assert_eq!(holds.collect::<Vec<_>>(), [Fact::Ended, Fact::Leaving]);
}

#[test]
fn those_that_were_made_after_the_last_one_come_first() {
    let mut tally = Tally::default();
    for id in [1, 4, 6, 9] {
        let look = RangeLook {
            account: AccountId(0),
            parts: MemoryParts::default(),
            spare_parked_bytes: 0,
            left_parked_bytes: 0,
            facts: [(Fact::Parked, id != 6)].into_iter().collect(),
        };
        tally.set(RangeId(id), look);
    }
    let in_turn = |last| -> Vec<_> {
        let with = tally.with_in_turn(Fact::Parked, RangeId(last));
        with.map(|id| id.0).collect()
    };
    assert_eq!(in_turn(4), [9, 1, 4]);
    assert_eq!(in_turn(5), [9, 1, 4]);
    assert_eq!(in_turn(9), [1, 4, 9]);
}

proptest! {
    #[test]
    fn sums_are_those_of_a_walk(
        steps in prop::collection::vec((0..12u64, prop::option::of(looks())), 0..100),
    ) {
        let mut tally = Tally::default();
        let mut plain: BTreeMap<RangeId, RangeLook> = BTreeMap::new();
        let comes_back = |plain: &BTreeMap<RangeId, RangeLook>, account| {
            let of_account = plain.values().filter(|look| look.account == account);
            of_account.fold(ComesBack::default(), |sum, look| ComesBack {
                coming_bytes: sum.coming_bytes
                    + look.parts.retiring_bytes
                    + look.parts.ahead_bytes
                    + look.spare_parked_bytes,
                spare_bytes: sum.spare_bytes + look.parts.ahead_bytes + look.spare_parked_bytes,
            })
        };
        for (id, look) in steps {
            let id = RangeId(id);
            // A range stays on its account.
            let look = look.map(|look| RangeLook { account: AccountId(id.0 % 4), ..look });
            let account = AccountId(id.0 % 4);
            let before = comes_back(&plain, account);
            let told = match look {
                Some(look) => {
                    plain.insert(id, look);
                    tally.set(id, look)
                }
                None => {
                    plain.remove(&id);
                    tally.remove(id)
                }
            };
            let after = comes_back(&plain, account);
            match told {
                Some(told) => prop_assert_eq!(told, (account, after)),
                None => prop_assert_eq!(before, after),
            }
            let parts: MemoryParts = plain.values().map(|look| look.parts).sum();
            prop_assert_eq!(tally.parts(), parts);
            let spare: usize = plain.values().map(|look| look.spare_parked_bytes).sum();
            prop_assert_eq!(tally.spare_parked_bytes(), spare);
            let left: usize = plain.values().map(|look| look.left_parked_bytes).sum();
            prop_assert_eq!(tally.left_parked_bytes(), left);
            for number in 0..4 {
                let account = AccountId(number);
                prop_assert_eq!(tally.comes_back(account), comes_back(&plain, account));
                let own = plain.iter().filter(|(_, look)| look.account == account);
                let own: Vec<_> = own.map(|(id, _)| *id).collect();
                prop_assert_eq!(tally.of_account(account).collect::<Vec<_>>(), own);
            }
            for fact in Fact::ALL {
                let with = plain.iter().filter(|(_, look)| look.facts.has(fact));
                let with: Vec<_> = with.map(|(id, _)| *id).collect();
                prop_assert_eq!(tally.any(fact), !with.is_empty());
                prop_assert_eq!(tally.with(fact).collect::<Vec<_>>(), with);
            }
            prop_assert_eq!(tally.of_range(id), plain.get(&id));
        }
    }
}
