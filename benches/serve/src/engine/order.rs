//! Which row of a decode step each sequence has.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use crate::scheduler::Id;
use std::collections::HashSet;

/// The sequences of the last step by their rows. A sequence keeps its row as long as that is one of
/// the step's, so the device has its table already.
#[derive(Debug, Default)]
pub struct Order {
    /// As they were given.
    given: Vec<Id>,
    rows: Vec<Id>,
}

impl Order {
    /// The sequence of each row.
    pub fn rows(&self) -> &[Id] {
        &self.rows
    }

    /// Gives each of these sequences one of as many rows.
    pub fn place(&mut self, sequences: &[Id]) {
        if self.given == sequences {
            return;
        }
        self.given.clear();
        self.given.extend_from_slice(sequences);
        let mut new: HashSet<_> = sequences.iter().copied().collect();
        self.rows.truncate(sequences.len());
        let free = self.rows.iter().enumerate();
        let free = free.filter(|(_, id)| !new.remove(id)).map(|(row, _)| row);
        let free: Vec<_> = free.collect();
        let mut new = sequences.iter().filter(|id| new.contains(id));
        for (row, id) in free.into_iter().zip(new.by_ref()) {
            self.rows[row] = *id;
        }
        self.rows.extend(new);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn sequences_keep_their_rows(
            steps in prop::collection::vec(prop::collection::hash_set(0..12u64, 0..8), 1..20),
        ) {
            let mut order = Order::default();
            for step in steps {
                let step: Vec<_> = step.into_iter().map(Id).collect();
                let before = order.rows().to_vec();
                order.place(&step);
                let mut placed = order.rows().to_vec();
                for (row, id) in before.iter().enumerate().take(step.len()) {
                    prop_assert!(!step.contains(id) || placed[row] == *id);
                }
                placed.sort();
                let mut step = step;
                step.sort();
                prop_assert_eq!(placed, step);
            }
        }
    }
}
