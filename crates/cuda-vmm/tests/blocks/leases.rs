//! Blocks whose memory was handed out stay as they are until the token is released.

use crate::common::{manual, turn};
use crate::fixture::{Fixture, PAGE, Shapes};
use cuda_vmm::pool::blocks::BlockError;
use cuda_vmm::{LeaseToken, VmmError};
use std::ops::Range;
use std::sync::{Arc, Weak};

/// Fails unless the blocks hold what they did, backed or not.
#[track_caller]
fn expect_kept(fixture: &Fixture, contents: &[(usize, u64, Vec<u8>)]) {
    for (block, address, expected) in contents {
        let mut bytes = vec![0; expected.len()];
        // SAFETY: the block is leased.
        unsafe { fixture.stream.read(*address, &mut bytes) }.expect("mapped");
        assert!(bytes == *expected, "block {block}");
    }
}

/// What these blocks hold, and where.
fn contents(fixture: &Fixture, blocks: Range<usize>) -> Vec<(usize, u64, Vec<u8>)> {
    let of_blocks = (fixture.contents.iter()).filter(|((_, block), _)| blocks.contains(block));
    let with_address = of_blocks.map(|((tensor, block), bytes)| {
        let tensor = &fixture.backing.tensors()[*tensor];
        let address = tensor.base_address() + (block * tensor.block_bytes()) as u64;
        (*block, address, bytes.clone())
    });
    with_address.collect()
}

/// A token that is released when no code uses the memory any more.
#[derive(Debug)]
struct Ended(Weak<()>);

impl LeaseToken for Ended {
    fn is_released(&mut self) -> bool {
        self.0.strong_count() == 0
    }
}

/// Leases blocks of some tensors, for as long as the result lives.
fn lease(fixture: &Fixture, tensors: Range<usize>, blocks: Range<usize>) -> Arc<()> {
    let user = Arc::new(());
    for tensor in tensors {
        let token = Ended(Arc::downgrade(&user));
        let leased = fixture.backing.lease(tensor, blocks.clone(), token);
        assert_eq!(leased, Ok(()));
    }
    user
}

#[test]
fn blocks_given_up_under_a_lease_stay_until_it_ends() {
    let _turn = turn();
    for shapes in Shapes::ALL {
        let mut fixture = Fixture::new(shapes, 48, manual());
        fixture.back(0..48);
        let kept = contents(&fixture, 0..20);
        let tensors = fixture.backing.tensors().len();
        let user = lease(&fixture, 0..tensors, 0..20);
        fixture.unback(0..48);
        fixture.settle();
        expect_kept(&fixture, &kept);
        let committed_bytes = fixture.backing.stats().committed_bytes;
        let of_leased: Vec<_> = (0..20).collect();
        assert_eq!(
            committed_bytes,
            fixture.page_bytes(&of_leased),
            "{shapes:?}"
        );
        // No call gets what the lease has; any call gets what is beside it.
        assert!(matches!(
            fixture.backing.back([30, 3]),
            Err(VmmError::Leased { .. })
        ));
        assert!(!fixture.backing.is_backed(30));
        fixture.back([30]);
        expect_kept(&fixture, &kept);
        drop(user);
        fixture.settle();
        fixture.check();
        fixture.back(0..20);
        fixture.check();
        fixture.end();
    }
}

#[test]
fn plans_leave_leased_blocks_alone() {
    let _turn = turn();
    let mut fixture = Fixture::new(Shapes::Vectors, 64, manual());
    fixture.back(0..64);
    let kept = contents(&fixture, 3..5);
    let plan = |fixture: &Fixture| {
        let free = |block: usize| (block != 40).then_some(0.0);
        (fixture.backing).reclaim_candidates_with_moves(usize::MAX, 1.0, free)
    };
    let before = plan(&fixture);
    drop(lease(&fixture, 1..2, 3..5));
    let stale = fixture.backing.commit(&before, &fixture.stream);
    assert_eq!(
        stale,
        Err(VmmError::Block(BlockError::StalePlan { block: 3 }))
    );
    let user = lease(&fixture, 1..2, 3..5);
    let leased = plan(&fixture);
    let named = leased.moves().iter().flat_map(|(from, to)| [from, to]);
    assert!(
        leased
            .evicted()
            .iter()
            .chain(named)
            .all(|block| ![3, 4].contains(block)),
        "{leased:?}"
    );
    // Sixteen blocks a page; the page of the two stays in both tensors, and block 40 moves into it.
    assert_eq!(leased.freed_bytes(), 6 * PAGE);
    fixture.commit(&leased);
    fixture.settle();
    expect_kept(&fixture, &kept);
    fixture.check();
    // Given up, the pages of the leased blocks still do not empty.
    fixture.unback([3, 4]);
    let rest = fixture
        .backing
        .reclaim_candidates(usize::MAX, |_| Some(0.0));
    assert_eq!(rest.freed_bytes(), 0);
    drop(user);
    let rest = fixture
        .backing
        .reclaim_candidates(usize::MAX, |_| Some(0.0));
    assert_eq!(rest.freed_bytes(), 2 * PAGE);
    fixture.commit(&rest);
    fixture.settle();
    fixture.check();
    fixture.end();
}

#[test]
fn leased_memory_outlives_the_backing_and_ends_with_the_token() {
    let _turn = turn();
    let mut fixture = Fixture::new(Shapes::Vectors, 16, manual());
    fixture.back(0..16);
    let kept = contents(&fixture, 2..4);
    let user = lease(&fixture, 0..2, 2..4);
    let Fixture {
        backing,
        engine,
        stream,
        simulated,
        ..
    } = fixture;
    drop(backing);
    for (_, address, expected) in &kept {
        let mut bytes = vec![0; expected.len()];
        // SAFETY: the blocks are leased.
        unsafe { stream.read(*address, &mut bytes) }.expect("mapped");
        assert!(bytes == *expected);
    }
    drop(user);
    for _ in 0..3 {
        simulated.device.synchronize().expect("done");
        engine.step();
    }
    assert_eq!(simulated.books().physical_bytes, 0);
    assert_eq!(simulated.books().reservations, 0);
}

#[test]
fn what_cannot_be_leased_is_refused() {
    let _turn = turn();
    let mut fixture = Fixture::new(Shapes::Mla, 8, manual());
    fixture.back([1, 2]);
    let refused = |tensor, blocks: Range<usize>, error: VmmError| {
        let token = Arc::new(());
        let outcome = fixture.backing.lease(tensor, blocks, token.clone());
        assert_eq!(outcome, Err(error));
        assert_eq!(Arc::strong_count(&token), 1, "dropped");
    };
    let (tensor, tensors) = (2, 2);
    let error = BlockError::InvalidTensor { tensor, tensors };
    refused(2, 1..2, error.into());
    assert_eq!(fixture.backing.index_of("rope"), Ok(1));
    let tensor = "rope ".to_owned();
    assert_eq!(
        fixture.backing.index_of("rope "),
        Err(BlockError::UnknownTensor { tensor }.into())
    );
    let (block, blocks) = (8, 8);
    refused(
        0,
        1..usize::MAX,
        BlockError::Invalid { block, blocks }.into(),
    );
    refused(0, 1..4, BlockError::NotBacked { block: 3 }.into());
    let what = "number of blocks";
    refused(0, 1..1, VmmError::ZeroSize { what });
    assert_eq!(fixture.backing.stats().pinned_blocks, 0);
    fixture.check();
    fixture.end();
}
