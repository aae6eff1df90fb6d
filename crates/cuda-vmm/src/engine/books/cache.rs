//! Clean memory that is mapped nowhere, waiting to be used again, by size. Pure: over a payload
//! `M`, which is physical memory in production and a number in tests.
//!
//! A chunk that comes from here takes a map and a set-access, but no create.

use std::collections::BTreeMap;

/// Memory by its size in bytes.
#[derive(Debug)]
pub(crate) struct Cache<M> {
    by_bytes: BTreeMap<usize, Vec<M>>,
    bytes: usize,
}

impl<M> Default for Cache<M> {
    fn default() -> Self {
        Self {
            by_bytes: BTreeMap::new(),
            bytes: 0,
        }
    }
}

impl<M> Cache<M> {
    /// All that is in it, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn put(&mut self, bytes: usize, memory: M) {
        self.bytes += bytes;
        self.by_bytes.entry(bytes).or_default().push(memory);
    }

    /// Takes out memory of just this size.
    pub(crate) fn take(&mut self, bytes: usize) -> Option<M> {
        let same = self.by_bytes.get_mut(&bytes)?;
        let memory = same.pop();
        if same.is_empty() {
            self.by_bytes.remove(&bytes);
        }
        self.bytes -= bytes;
        memory
    }

    /// Takes out the largest, with its size in bytes: what is needed least is given up with the
    /// fewest calls.
    pub(crate) fn take_largest(&mut self) -> Option<(usize, M)> {
        let (&bytes, _) = self.by_bytes.last_key_value()?;
        self.take(bytes).map(|memory| (bytes, memory))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_gives_out_what_was_put_in_and_no_more(steps in prop::collection::vec((0..5u8, 1..6usize), 0..100)) {
            let (mut cache, mut model) = (Cache::default(), Vec::new());
            for (number, (step, bytes)) in steps.into_iter().enumerate() {
                match step {
                    0 | 1 => {
                        cache.put(bytes, number);
                        model.push((bytes, number));
                    }
                    2 | 3 => {
                        let taken = cache.take(bytes).map(|memory| (bytes, memory));
                        let expected = model.iter().rposition(|(of, _)| *of == bytes);
                        prop_assert_eq!(taken, expected.map(|at| model.remove(at)));
                    }
                    _ => {
                        let largest = model.iter().map(|(bytes, _)| *bytes).max();
                        let expected = model.iter().rposition(|(bytes, _)| Some(*bytes) == largest);
                        prop_assert_eq!(cache.take_largest(), expected.map(|at| model.remove(at)));
                    }
                }
                prop_assert_eq!(cache.bytes(), model.iter().map(|(bytes, _)| bytes).sum::<usize>());
            }
        }
    }
}
