//! Shared chunks against the plainest account of the same facts.

use super::*;
use crate::Quota;
use crate::engine::books::ledger::Ledger;
use proptest::prelude::*;

const RANGES: usize = 4;
const FIRSTS: usize = 3;

/// What is known of one mapping.
#[derive(Debug, Clone, Copy)]
struct Plain {
    chunk: usize,
    is_used: bool,
    is_stuck: bool,
}

#[derive(Debug, Clone)]
enum Step {
    /// The chunk at a place is mapped at another, as a new one if it is not shared yet.
    Share {
        from: usize,
        to: usize,
    },
    Retire(usize),
    Refuse(usize),
    End(usize),
}

fn place(at: usize) -> Place {
    (RangeId((at / FIRSTS) as u64), at % FIRSTS)
}

/// The bytes of the chunk with this number, so that no two sums are the same by chance.
fn bytes(chunk: usize) -> usize {
    1 << (chunk % 24)
}

fn step() -> impl Strategy<Value = Step> {
    let at = 0..RANGES * FIRSTS;
    prop_oneof![
        4 => (at.clone(), at.clone()).prop_map(|(from, to)| Step::Share { from, to }),
        2 => at.clone().prop_map(Step::Retire),
        1 => at.clone().prop_map(Step::Refuse),
        2 => at.prop_map(Step::End),
    ]
}

proptest! {
    #[test]
    fn each_is_counted_once_as_what_it_is(steps in prop::collection::vec(step(), 1..80)) {
        let mut ledger = Ledger::new(1);
        let accounts = [(); 2].map(|()| ledger.open(Quota::new()).expect("no guarantee"));
        // The ranges of a chunk are all of one account.
        let account = |chunk: usize| accounts[chunk % 2];
        let mut books: SharedChunks<usize> = SharedChunks::default();
        let mut plain: BTreeMap<usize, Plain> = BTreeMap::new();
        let mut chunks = 0;
        for step in steps {
            match step {
                Step::Share { from, to } => {
                    if from == to || plain.contains_key(&to) {
                        continue;
                    }
                    let known = plain.get(&from).map(|mapping| mapping.chunk);
                    prop_assert_eq!(books.at(place(from)).is_some(), known.is_some());
                    let used = |chunk| Plain { chunk, is_used: true, is_stuck: false };
                    let chunk = known.unwrap_or_else(|| {
                        let chunk = chunks;
                        books.share(account(chunk), bytes(chunk), place(from), chunk);
                        plain.insert(from, used(chunk));
                        chunks += 1;
                        chunk
                    });
                    let id = books.at(place(from)).expect("it is shared");
                    books.add(id, place(to));
                    plain.insert(to, used(chunk));
                }
                Step::Retire(at) => {
                    books.retire(place(at));
                    if let Some(mapping) = plain.get_mut(&at) {
                        mapping.is_used = false;
                    }
                }
                Step::Refuse(at) => {
                    books.refuse(place(at));
                    if let Some(mapping) = plain.get_mut(&at) {
                        (mapping.is_used, mapping.is_stuck) = (false, true);
                    }
                }
                Step::End(at) => {
                    let ended = plain.remove(&at);
                    let left = books.end(place(at));
                    let Some(ended) = ended else {
                        prop_assert_eq!(left, None);
                        continue;
                    };
                    let others: Vec<_> = plain
                        .iter()
                        .filter(|(_, mapping)| mapping.chunk == ended.chunk)
                        .map(|(at, _)| *at)
                        .collect();
                    match (left, &others[..]) {
                        (Some(Left::Memory(of, memory)), []) => {
                            prop_assert_eq!((of, memory), (account(ended.chunk), ended.chunk));
                        }
                        (Some(Left::Others(id)), [only]) => {
                            prop_assert_eq!(books.only_place(id), Some(place(*only)));
                            prop_assert_eq!(books.forget(id), Some(ended.chunk));
                            plain.remove(only);
                        }
                        (Some(Left::Others(id)), [_, _, ..]) => {
                            prop_assert_eq!(books.only_place(id), None);
                        }
                        (left, others) => prop_assert!(false, "{left:?} beside {others:?}"),
                    }
                }
            }
            let mut expected: BTreeMap<AccountId, MemoryParts> = BTreeMap::new();
            for chunk in 0..chunks {
                let of_chunk = || plain.values().filter(|mapping| mapping.chunk == chunk);
                let parts = expected.entry(account(chunk)).or_default();
                let part = match (of_chunk().next(), of_chunk().any(|it| it.is_used)) {
                    (None, _) => continue,
                    (_, true) => &mut parts.shared_bytes,
                    _ if of_chunk().any(|it| it.is_stuck) => &mut parts.quarantined_bytes,
                    _ => &mut parts.retiring_bytes,
                };
                *part += bytes(chunk);
            }
            for account in accounts {
                let parts = expected.get(&account).copied().unwrap_or_default();
                prop_assert_eq!(books.of_account(account), parts);
            }
            prop_assert_eq!(books.parts(), expected.values().copied().sum::<MemoryParts>());
        }
    }
}

#[test]
fn the_accounts_whose_sums_have_changed_are_told_once() {
    let mut ledger = Ledger::new(1);
    let accounts = [(); 2].map(|()| ledger.open(Quota::new()).expect("no guarantee"));
    let mut books: SharedChunks<usize> = SharedChunks::default();
    let ids = accounts.map(|account| {
        let at = account.number() as usize * FIRSTS;
        books.share(account, 4, place(at), at)
    });
    assert_eq!(books.take_changed(), accounts.into_iter().collect());
    books.add(ids[0], place(1));
    assert!(books.take_changed().is_empty(), "it is counted as before");
    books.retire(place(FIRSTS));
    assert_eq!(books.take_changed(), BTreeSet::from([accounts[1]]));
}
