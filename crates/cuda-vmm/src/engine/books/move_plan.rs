//! Which chunks of a range are worth moving, and which of them fit in the budget.

use super::pages::relocation::PartlyLive;

/// Chunks to be moved, one after the other.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct MovePlan {
    pub(crate) moves: Vec<PartlyLive>,
}

impl MovePlan {
    /// Chooses those for which there is room when their turn comes: while one moves, its live pages
    /// are held twice, and afterwards its slack is free. What needs least goes first, and so makes
    /// room for the others.
    pub(crate) fn new(chunks: impl Iterator<Item = PartlyLive>, free_bytes: usize) -> Self {
        let mut moves: Vec<_> = chunks.collect();
        moves.sort_by_key(|chunk| chunk.live_page_bytes);
        let mut free_bytes = free_bytes;
        let fitting = moves.iter().take_while(|chunk| {
            let fits = chunk.live_page_bytes <= free_bytes;
            free_bytes = free_bytes.saturating_add(chunk.slack_bytes);
            fits
        });
        moves.truncate(fitting.count());
        Self { moves }
    }

    /// Bytes that would be copied.
    pub(crate) fn moved_bytes(&self) -> usize {
        self.moves.iter().map(|chunk| chunk.live_page_bytes).sum()
    }

    /// Bytes that would be given back.
    pub(crate) fn returned_bytes(&self) -> usize {
        self.moves.iter().map(|chunk| chunk.slack_bytes).sum()
    }

    /// Mappings that there would be besides.
    pub(crate) fn more_chunks(&self) -> usize {
        let more = self.moves.iter().map(|chunk| chunk.pieces.len() - 1);
        more.sum()
    }

    /// The most that is held twice at a time, in bytes; 0 if nothing is to be moved.
    pub(crate) fn scratch_bytes(&self) -> usize {
        self.moves.last().map_or(0, |chunk| chunk.live_page_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chunk(first: usize, live_page_bytes: usize, slack_bytes: usize) -> PartlyLive {
        PartlyLive {
            first,
            live_page_bytes,
            slack_bytes,
            pieces: core::iter::once(first..first + live_page_bytes).collect(),
        }
    }

    #[test]
    fn what_a_small_chunk_gives_back_makes_room_for_a_large_one() {
        let chunks = [chunk(0, 5, 3), chunk(8, 1, 4)];
        let plan = MovePlan::new(chunks.clone().into_iter(), 1);
        assert_eq!(
            plan.moves
                .iter()
                .map(|chunk| chunk.first)
                .collect::<Vec<_>>(),
            [8, 0]
        );
        assert_eq!((plan.moved_bytes(), plan.returned_bytes()), (6, 7));
        assert_eq!((plan.scratch_bytes(), plan.more_chunks()), (5, 0));
        let mut plan = plan;
        for chunk in &mut plan.moves {
            chunk.pieces.push(90..91);
        }
        plan.moves[0].pieces.push(92..93);
        assert_eq!(plan.more_chunks(), 3, "the pieces, less one each");
        assert_eq!(MovePlan::new(chunks.into_iter(), 0), MovePlan::default());
    }

    proptest! {
        #[test]
        fn each_move_fits_when_its_turn_comes_and_none_that_fits_is_left(
            sizes in prop::collection::vec((1..40usize, 1..40usize), 0..30), free_bytes in 0..60usize,
        ) {
            let chunks = sizes.iter().enumerate().map(|(at, (live, slack))| chunk(at * 100, *live, *slack));
            let plan = MovePlan::new(chunks.clone(), free_bytes);
            let mut free_bytes = free_bytes;
            for chunk in &plan.moves {
                prop_assert!(chunk.live_page_bytes <= free_bytes);
                free_bytes += chunk.slack_bytes;
            }
            for chunk in chunks {
                prop_assert!(plan.moves.contains(&chunk) || chunk.live_page_bytes > free_bytes);
            }
        }
    }
}
