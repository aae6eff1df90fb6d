//! How a run of pages is cut into chunks.
//!
//! The cost of backing memory is per mapping, not per byte, and a chunk can only be unmapped whole.
//! So: the largest power-of-two multiple of the page that is at most an eighth of the request, or
//! of the extent that grows with it, between one page and [`CHUNK_BYTES_MAX`], aligned to its own
//! size in the range; edges are cut into smaller aligned chunks. An aligned GiB then takes eight
//! mappings.
//!
//! If an extent grows, its last chunk may reach beyond the request, so that the next requests find
//! their pages there. What is there without being live is slack, at most an eighth of the extent.

use core::ops::Range;

/// The largest chunk in bytes unless another is asked for: eight mappings for a GiB. A larger one
/// would save few calls, and a chunk is given back only when all of it is free.
pub(crate) const CHUNK_BYTES: usize = 128 << 20;

/// The largest chunk that may be asked for, in bytes, for memory that comes and goes as a whole. A
/// call for a larger one takes long, and the driver's other callers wait. `single_handle` pools are
/// not bound by it.
pub(crate) const CHUNK_BYTES_MAX: usize = 1 << 30;

/// The largest chunk, in pages, for an extent of `extent_pages`; a power of two, at least 1.
///
/// `bytes_max` bounds it further if less is wanted.
pub(crate) fn chunk_pages(extent_pages: usize, page_bytes: usize, bytes_max: usize) -> usize {
    let most = (extent_pages / 8).min(bytes_max.min(CHUNK_BYTES_MAX) / page_bytes);
    match most {
        0 => 1,
        most => 1 << most.ilog2(),
    }
}

/// The largest chunk that may begin at page `at`: `largest`, or less if the page is not aligned to
/// it.
fn aligned(at: usize, largest: usize) -> usize {
    if at == 0 {
        largest
    } else {
        largest.min(1 << at.trailing_zeros())
    }
}

/// The end that a run of pages at the end of a growing extent may have, for chunks of at most
/// `largest` pages: at `end` at most, which is not below the run's own.
pub(crate) fn grown_end(run: &Range<usize>, largest: usize, end: usize) -> usize {
    let mut at = run.start;
    while at < run.end {
        let mut pages = aligned(at, largest);
        while at + pages > end {
            pages /= 2;
        }
        at += pages;
    }
    at
}

/// Cuts a run of pages into chunks: powers of two of at most `largest` pages (itself a power of
/// two), each aligned to its own size, covering the run exactly and in order.
pub(crate) fn cut(run: Range<usize>, largest: usize) -> impl Iterator<Item = Range<usize>> {
    let mut at = run.start;
    core::iter::from_fn(move || {
        let left = run.end.checked_sub(at).filter(|left| *left > 0)?;
        let pages = aligned(at, largest).min(1 << left.ilog2());
        let chunk = at..at + pages;
        at = chunk.end;
        Some(chunk)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: usize = 2 << 20;

    #[test]
    fn an_aligned_gibibyte_takes_eight_chunks() {
        let largest = chunk_pages(512, PAGE, CHUNK_BYTES);
        assert_eq!(largest * PAGE, 128 << 20);
        assert_eq!(cut(0..512, largest).count(), 8);
        assert_eq!(chunk_pages(1 << 20, PAGE, usize::MAX), 512, "1 GiB");
    }

    #[test]
    fn a_small_ask_takes_pages() {
        assert_eq!(chunk_pages(1, PAGE, usize::MAX), 1);
        assert_eq!(chunk_pages(15, PAGE, usize::MAX), 1);
        assert_eq!(chunk_pages(16, PAGE, usize::MAX), 2);
        assert_eq!(chunk_pages(1 << 20, PAGE, PAGE), 1);
    }

    #[test]
    fn a_page_above_the_largest_chunk_is_a_chunk_of_its_own() {
        assert_eq!(chunk_pages(64, 2 << 30, usize::MAX), 1);
    }

    #[test]
    fn an_extent_that_grows_page_by_page_takes_ever_larger_chunks() {
        let (mut backed, mut chunks) = (0, Vec::new());
        for live in 1..=4096 {
            if live > backed {
                let largest = chunk_pages(live, PAGE, CHUNK_BYTES);
                let run = backed..live;
                backed = grown_end(&run, largest, usize::MAX);
                chunks.extend(cut(run.start..backed, largest).map(|chunk| chunk.len()));
            }
            assert!(backed - live <= live / 8, "{live} live of {backed}");
        }
        assert_eq!(chunks.iter().max(), Some(&64), "128 MiB");
        assert!(chunks.len() < 160, "{} chunks for 8 GiB", chunks.len());
    }

    proptest! {
        #[test]
        fn a_grown_run_holds_the_run_and_ends_in_bounds_where_its_chunks_do(
            start in 0..10_000usize, pages in 1..500usize, room in 0..500usize, shift in 0..8u32,
        ) {
            let (run, largest) = (start..start + pages, 1 << shift);
            let end = grown_end(&run, largest, run.end + room);
            prop_assert!((run.end..=run.end + room).contains(&end));
            prop_assert!(end - run.end < largest);
            // The last chunk is one that the run itself reaches into.
            let last = cut(start..end, largest).last().map(|chunk| chunk.start);
            prop_assert!(last.is_some_and(|first| first < run.end));
        }

        #[test]
        fn chunks_cover_the_run_aligned_and_no_larger_than_an_eighth(
            start in 0..10_000usize, pages in 1..10_000usize, shift in 0..8u32,
        ) {
            let bytes_max = PAGE << shift;
            let largest = chunk_pages(pages, PAGE, bytes_max);
            prop_assert!(largest == 1 || largest <= pages / 8);
            prop_assert!(largest * PAGE <= bytes_max.min(CHUNK_BYTES_MAX));
            let mut at = start;
            for chunk in cut(start..start + pages, largest) {
                prop_assert_eq!(chunk.start, at);
                prop_assert!(chunk.len().is_power_of_two() && chunk.len() <= largest);
                prop_assert!(chunk.start.is_multiple_of(chunk.len()));
                at = chunk.end;
            }
            prop_assert_eq!(at, start + pages);
            // No more chunks than the whole ones and two staircases of edges.
            let edges = 2 * largest.ilog2() as usize;
            prop_assert!(cut(start..start + pages, largest).count() <= pages / largest + edges + 1);
        }
    }
}
