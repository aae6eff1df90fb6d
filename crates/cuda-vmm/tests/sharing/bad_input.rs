//! What cannot be shared is refused with the values that are wrong, and changes nothing.

use crate::common::{manual, turn};
use crate::fixture::{CHUNK, Fixture, PAGE, PAGES};
use cuda_vmm::{PoolOptions, Quota, VirtualMemoryPool, VmmError};

#[test]
fn wrong_parts_are_refused() {
    let _turn = turn();
    let mut fixture = Fixture::new(manual(), 3);
    fixture.take(0, 0..2 * CHUNK);
    fixture.take(1, CHUNK..CHUNK + 1);
    let other = fixture.engine.account("other", Quota::new()).expect("new");
    let pool = |account, page, options| {
        VirtualMemoryPool::on_account(account, PAGES * PAGE, page, options).expect("addresses")
    };
    let foreign = pool(&other, PAGE, PoolOptions::new());
    let coarse = pool(&fixture.account, 2 * PAGE, PoolOptions::new());
    let single = PoolOptions::new().single_handle(true);
    let single = pool(&fixture.account, PAGE, single);
    let [from, to, third] = &fixture.pools[..] else {
        panic!("three pools");
    };
    let chunk = CHUNK * PAGE;
    let (offset, bytes) = (CHUNK * PAGE, CHUNK * PAGE);
    let of_others = |expected: &str, found: &str| VmmError::ForeignAccount {
        expected: expected.into(),
        found: found.into(),
    };
    let cases = [
        ((from, &foreign, 0, chunk), of_others("model", "other")),
        ((&foreign, to, 0, chunk), of_others("model", "other")),
        (
            (from, &coarse, 0, chunk),
            VmmError::WrongPageSize {
                expected_bytes: 2 * PAGE,
                found_bytes: PAGE,
            },
        ),
        ((from, &single, 0, chunk), VmmError::SingleHandle),
        ((&single, to, 0, chunk), VmmError::SingleHandle),
        (
            (from, to, offset, bytes),
            VmmError::AlreadyMapped { offset, bytes },
        ),
        (
            (from, from, offset, bytes),
            VmmError::AlreadyMapped { offset, bytes },
        ),
        (
            (from, to, 2 * offset, bytes),
            VmmError::NotMapped {
                offset: 2 * offset,
                bytes,
            },
        ),
        ((from, to, 0, 0), VmmError::ZeroSize { what: "size" }),
        (
            (from, to, usize::MAX, 2),
            VmmError::Overflow {
                offset: usize::MAX,
                bytes: 2,
            },
        ),
        (
            (from, to, PAGES * PAGE, 1),
            VmmError::OutOfRange {
                offset: PAGES * PAGE,
                bytes: 1,
                capacity_bytes: PAGES * PAGE,
            },
        ),
    ];
    let before = fixture.simulated.books();
    for (part, error) in cases {
        // Beside a part that could be shared.
        let parts = [(from, third, 0, chunk), part];
        let alone = fixture.account.share_many(&[part]).map(drop);
        assert_eq!(alone, Err(error.clone()));
        assert_eq!(fixture.account.share_many(&parts).map(drop), Err(error));
        assert_eq!(fixture.simulated.books(), before);
    }
    let twice = [(from, to, 0, chunk), (from, to, PAGE, PAGE)];
    let (offset, bytes) = (PAGE, PAGE);
    assert_eq!(
        fixture.account.share_many(&twice).map(drop),
        Err(VmmError::AlreadyMapped { offset, bytes })
    );
    assert!(fixture.account.share_many(&[]).is_ok());
    fixture.account.close();
    let closed = fixture.account.share_many(&[(from, to, 0, chunk)]);
    assert_eq!(closed.map(drop), Err(VmmError::Closed));
    drop((foreign, coarse, single, other));
    fixture.end();
}

#[test]
fn several_parts_are_shared_together() {
    let _turn = turn();
    let mut fixture = Fixture::new(manual(), 4);
    fixture.take(0, 0..4 * CHUNK);
    fixture.take(1, 0..CHUNK);
    let pools = &fixture.pools;
    let chunk = CHUNK * PAGE;
    let parts = [
        // Out of order, of two sources, with a run of the middle of a chunk.
        (&pools[0], &pools[3], 2 * chunk, 2 * chunk),
        (&pools[1], &pools[2], 0, chunk),
        (&pools[0], &pools[3], 0, chunk + PAGE),
    ];
    let shared = fixture.account.share_many(&parts).expect("they can");
    let mut of_last: Vec<_> = (shared.parts().iter())
        .filter(|(pool, ..)| core::ptr::eq(*pool, &pools[3]))
        .map(|(_, offset, bytes)| (*offset, *bytes))
        .collect();
    of_last.sort_unstable();
    assert_eq!(of_last, [(0, chunk), (2 * chunk, 2 * chunk)]);
    let rest: Vec<_> = shared
        .rest()
        .iter()
        .map(|(_, offset, bytes)| (*offset, *bytes))
        .collect();
    assert_eq!(rest, [(chunk, PAGE)]);
    shared.keep();
    assert_eq!(fixture.account.stats().parts.shared_bytes, 4 * chunk);
    fixture.check_books();
    fixture.end();
}

#[test]
fn private_memory_is_asked_for_within_the_pool() {
    let _turn = turn();
    let mut fixture = Fixture::new(manual(), 1);
    let ask = |fixture: &mut Fixture, offset, bytes| fixture.pools[0].make_private(offset, bytes);
    assert_eq!(
        ask(&mut fixture, 0, 0),
        Err(VmmError::ZeroSize { what: "size" })
    );
    assert!(matches!(
        ask(&mut fixture, PAGES * PAGE, 1),
        Err(VmmError::OutOfRange { .. })
    ));
    assert_eq!(ask(&mut fixture, 0, PAGES * PAGE), Ok(0));
    fixture.end();
}
