//! Which blocks lie in which pages.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::layer_spec::product;
use super::{BlockId, TensorSpec};
use crate::Result;
use core::ops::Range;

/// Tensors whose blocks have the same size, and so lie in pages of the same numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Class {
    pub(super) block_bytes: usize,
    /// How many tensors are of it.
    pub(super) tensors: usize,
    blocks: usize,
    page_bytes: usize,
}

impl Class {
    /// The pages that a run of blocks touches.
    pub(super) fn pages_of(&self, blocks: &Range<BlockId>) -> Range<usize> {
        let (start, end) = (
            blocks.start * self.block_bytes,
            blocks.end * self.block_bytes,
        );
        start / self.page_bytes..end.div_ceil(self.page_bytes)
    }

    /// The blocks that touch a page.
    pub(super) fn blocks_of(&self, page: usize) -> Range<BlockId> {
        // In this order: the product may be larger than an address only behind the last block.
        let start = page * self.page_bytes / self.block_bytes;
        let end = (page * self.page_bytes)
            .saturating_add(self.page_bytes)
            .div_ceil(self.block_bytes);
        start..end.min(self.blocks)
    }

    /// The blocks that begin in a page.
    pub(super) fn blocks_from(&self, page: usize) -> Range<BlockId> {
        let from = |page: usize| {
            let start = page.saturating_mul(self.page_bytes);
            start.div_ceil(self.block_bytes).min(self.blocks)
        };
        from(page)..from(page + 1)
    }

    /// How many pages it has addresses for.
    pub(super) fn pages(&self) -> usize {
        self.pages_of(&(0..self.blocks)).end
    }

    /// What a page of it frees, in all of its tensors, in bytes.
    pub(super) fn page_bytes(&self) -> usize {
        self.page_bytes * self.tensors
    }
}

/// All blocks of a specification, in pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) blocks: usize,
    pub(super) classes: Vec<Class>,
}

impl Layout {
    /// The layout, and each tensor's class.
    pub(super) fn new(
        tensors: &[TensorSpec],
        blocks: usize,
        page_bytes: usize,
    ) -> Result<(Self, Vec<usize>)> {
        let mut classes: Vec<Class> = Vec::new();
        let mut class_of = Vec::new();
        for tensor in tensors {
            let block_bytes = tensor.block_bytes();
            product("tensor", blocks, block_bytes)?;
            let known = classes
                .iter()
                .position(|class| class.block_bytes == block_bytes);
            class_of.push(known.unwrap_or(classes.len()));
            match known {
                Some(class) => classes[class].tensors += 1,
                None => classes.push(Class {
                    block_bytes,
                    tensors: 1,
                    blocks,
                    page_bytes,
                }),
            }
        }
        Ok((Self { blocks, classes }, class_of))
    }

    /// One block in bytes, in all tensors.
    pub(super) fn block_bytes(&self) -> usize {
        let bytes = |class: &Class| class.block_bytes.saturating_mul(class.tensors);
        self.classes
            .iter()
            .map(bytes)
            .fold(0, usize::saturating_add)
    }

    /// The class that has the most bytes.
    pub(super) fn largest(&self) -> usize {
        let bytes = |(_, class): &(usize, &Class)| class.block_bytes.saturating_mul(class.tensors);
        let classes = self.classes.iter().enumerate();
        classes.max_by_key(bytes).map_or(0, |(class, _)| class)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::blocks::ElementSize;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_block_is_of_a_page_as_the_page_is_of_the_block(
            block_bytes in 1..5000usize, blocks in 1..50usize, shift in 0..12u32,
        ) {
            let byte = ElementSize::new(1).expect("not zero");
            let spec = TensorSpec::new("t", &[block_bytes], byte).expect("small");
            let (layout, _) = Layout::new(&[spec], blocks, 1 << shift).expect("small");
            let class = layout.classes[0];
            prop_assert_eq!(class.pages(), (blocks * block_bytes).div_ceil(1 << shift));
            let begun = (0..class.pages()).flat_map(|page| class.blocks_from(page));
            prop_assert!(begun.eq(0..blocks));
            for block in 0..blocks {
                let first = class.pages_of(&(block..block + 1)).start;
                prop_assert!(class.blocks_from(first).contains(&block));
                let bytes = block * block_bytes..(block + 1) * block_bytes;
                for page in 0..class.pages() {
                    let of_page = page << shift..(page + 1) << shift;
                    let touches = bytes.start < of_page.end && of_page.start < bytes.end;
                    prop_assert_eq!(class.pages_of(&(block..block + 1)).contains(&page), touches);
                    prop_assert_eq!(class.blocks_of(page).contains(&block), touches);
                }
            }
        }
    }
}
