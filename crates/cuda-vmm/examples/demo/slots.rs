//! Slots of a model's range of addresses: one for each running request, the lowest free one first,
//! so that memory that is still mapped from an earlier request is met again.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Which slots are free.
#[derive(Clone, Debug, Default)]
pub struct Slots {
    free: BinaryHeap<Reverse<usize>>,
    /// Slots ever taken.
    count: usize,
}

impl Slots {
    /// Takes the lowest free slot.
    pub fn take(&mut self) -> usize {
        if let Some(Reverse(slot)) = self.free.pop() {
            return slot;
        }
        self.count += 1;
        self.count - 1
    }

    /// Gives back a slot that was taken.
    pub fn put_back(&mut self, slot: usize) {
        self.free.push(Reverse(slot));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_free_slot_is_taken() {
        let mut slots = Slots::default();
        assert_eq!([slots.take(), slots.take(), slots.take()], [0, 1, 2]);
        slots.put_back(2);
        slots.put_back(0);
        assert_eq!([slots.take(), slots.take(), slots.take()], [0, 2, 3]);
    }
}
