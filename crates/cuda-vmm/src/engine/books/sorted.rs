//! A map of integers in sorted blocks: what is next to a key is next to it in memory.
//!
//! The standard library's B-tree looks a key up from the top each time, and again for each
//! neighbour. Here one look-up finds a place, from which neighbours are read and beside which is
//! inserted; and none is needed if the place used last, or the one after it, is the right one. So
//! sequential access needs no look-up.

use core::ops::Range;

/// Entries in a block at most. Two blocks beside each other hold more than one could, so that at
/// least half of what they take is used.
const BLOCK: usize = 32;

/// Where an entry is, until one is added or removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Position {
    block: usize,
    at: usize,
}

/// Never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Block<V> {
    keys: Vec<usize>,
    values: Vec<V>,
}

#[derive(Debug, Clone)]
pub(crate) struct SortedMap<V> {
    /// The first key of each block.
    firsts: Vec<usize>,
    blocks: Vec<Block<V>>,
    len: usize,
    /// What was used last, or what is now in its place.
    last: Position,
}

impl<V> Default for SortedMap<V> {
    fn default() -> Self {
        Self {
            firsts: Vec::new(),
            blocks: Vec::new(),
            len: 0,
            last: Position::default(),
        }
    }
}

impl<V> SortedMap<V> {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The entry with the greatest key that is not above this one.
    #[inline]
    pub(crate) fn at_or_before(&self, key: usize) -> Option<Position> {
        if let Some(place) = self.near(key) {
            return Some(place);
        }
        let blocks = self.firsts.partition_point(|first| *first <= key);
        let block = blocks.checked_sub(1)?;
        let entries = self.blocks[block].keys.partition_point(|of| *of <= key);
        Some(Position {
            block,
            at: entries - 1,
        })
    }

    /// The same, if it is the entry used last or the next one in its block.
    #[inline]
    fn near(&self, key: usize) -> Option<Position> {
        let Position { block, at } = self.last;
        let keys = &self.blocks.get(block)?.keys;
        if *keys.get(at)? > key {
            return None;
        }
        for at in at..at + 2 {
            match keys.get(at + 1) {
                Some(next) if *next > key => return Some(Position { block, at }),
                Some(_) => {}
                None => {
                    let next = self.firsts.get(block + 1);
                    return next
                        .is_none_or(|next| *next > key)
                        .then_some(Position { block, at });
                }
            }
        }
        None
    }

    /// The entry after this one, or the first.
    #[inline]
    pub(crate) fn next(&self, place: Option<Position>) -> Option<Position> {
        let next = match place {
            None => Position::default(),
            Some(Position { block, at }) if at + 1 < self.blocks[block].keys.len() => {
                Position { block, at: at + 1 }
            }
            Some(Position { block, .. }) => Position {
                block: block + 1,
                at: 0,
            },
        };
        (next.block < self.blocks.len()).then_some(next)
    }

    #[inline]
    pub(crate) fn entry(&self, Position { block, at }: Position) -> (usize, &V) {
        let block = &self.blocks[block];
        (block.keys[at], &block.values[at])
    }

    /// Notes that an entry is used: it is found at once when it is wanted again, or the one after
    /// it.
    #[inline]
    pub(crate) fn note(&mut self, place: Position) {
        self.last = place;
    }

    /// Uses an entry.
    #[inline]
    pub(crate) fn value_mut(&mut self, place: Position) -> &mut V {
        self.note(place);
        &mut self.blocks[place.block].values[place.at]
    }

    fn place_of(&self, key: usize) -> Option<Position> {
        self.at_or_before(key)
            .filter(|place| self.entry(*place).0 == key)
    }

    pub(crate) fn get(&self, key: usize) -> Option<&V> {
        self.place_of(key).map(|place| self.entry(place).1)
    }

    pub(crate) fn get_mut(&mut self, key: usize) -> Option<&mut V> {
        self.place_of(key).map(|place| self.value_mut(place))
    }

    /// Adds an entry that is not there; returns the value of one that is.
    pub(crate) fn insert(&mut self, key: usize, value: V) -> Option<V> {
        let before = self.at_or_before(key);
        if let Some(place) = before.filter(|place| self.entry(*place).0 == key) {
            return Some(core::mem::replace(self.value_mut(place), value));
        }
        self.insert_after(before, key, value);
        None
    }

    /// Adds an entry whose key lies between that of the entry before it, or none, and the next one.
    pub(crate) fn insert_after(&mut self, before: Option<Position>, key: usize, value: V) {
        self.len += 1;
        let Some(before) = before else {
            if self.blocks.is_empty() {
                self.add_block(0, vec![key], vec![value]);
            } else {
                self.insert_at(Position::default(), key, value);
            }
            return;
        };
        self.insert_at(
            Position {
                at: before.at + 1,
                ..before
            },
            key,
            value,
        );
    }

    fn insert_at(&mut self, Position { mut block, mut at }: Position, key: usize, value: V) {
        let entries = self.blocks[block].keys.len();
        if entries == BLOCK {
            // What grows at its end leaves full blocks behind.
            let stay = if at == BLOCK && block + 1 == self.blocks.len() {
                BLOCK
            } else {
                BLOCK / 2
            };
            if stay == BLOCK {
                return self.add_block(block + 1, vec![key], vec![value]);
            }
            let full = &mut self.blocks[block];
            let (keys, values) = (full.keys.split_off(stay), full.values.split_off(stay));
            full.keys.shrink_to(BLOCK / 2);
            full.values.shrink_to(BLOCK / 2);
            self.add_block(block + 1, keys, values);
            if at > stay {
                (block, at) = (block + 1, at - stay);
            }
        }
        let place = Position { block, at };
        self.blocks[block].keys.insert(at, key);
        self.blocks[block].values.insert(at, value);
        if at == 0 {
            self.firsts[block] = key;
        }
        self.last = place;
    }

    fn add_block(&mut self, block: usize, keys: Vec<usize>, values: Vec<V>) {
        self.firsts.insert(block, keys[0]);
        self.blocks.insert(block, Block { keys, values });
        self.last = Position { block, at: 0 };
    }

    /// Gives an entry another key, which leaves it between its neighbours.
    pub(crate) fn rename(&mut self, place: Position, key: usize) {
        self.blocks[place.block].keys[place.at] = key;
        if place.at == 0 {
            self.firsts[place.block] = key;
        }
        self.last = place;
    }

    pub(crate) fn remove(&mut self, key: usize) -> Option<V> {
        self.place_of(key).map(|place| self.remove_at(place))
    }

    pub(crate) fn remove_at(&mut self, Position { block, at }: Position) -> V {
        self.len -= 1;
        let from = &mut self.blocks[block];
        from.keys.remove(at);
        let value = from.values.remove(at);
        match from.keys.first() {
            None => {
                self.blocks.remove(block);
                self.firsts.remove(block);
            }
            Some(first) => {
                self.firsts[block] = *first;
                self.merge(block);
                if block > 0 {
                    self.merge(block - 1);
                }
            }
        }
        value
    }

    /// Makes one block of this and the next, if they fit into one.
    fn merge(&mut self, block: usize) {
        let entries = |block: &Block<V>| block.keys.len();
        let fits = match self.blocks.get(block..block + 2) {
            Some([this, next]) => entries(this) + entries(next) <= BLOCK,
            _ => false,
        };
        if fits {
            let mut next = self.blocks.remove(block + 1);
            self.firsts.remove(block + 1);
            let this = &mut self.blocks[block];
            this.keys.append(&mut next.keys);
            this.values.append(&mut next.values);
        }
    }

    /// The entries with these keys, in order.
    pub(crate) fn range(&self, keys: Range<usize>) -> impl Iterator<Item = (usize, &V)> {
        let before = keys.start.checked_sub(1);
        let before = before.and_then(|key| self.at_or_before(key));
        self.visit(self.next(before), keys.end)
    }

    /// The entries from this place on whose keys are below `end`, in order.
    pub(crate) fn visit(
        &self,
        from: Option<Position>,
        end: usize,
    ) -> impl Iterator<Item = (usize, &V)> {
        let Position { block, mut at } = from.unwrap_or(Position {
            block: self.blocks.len(),
            at: 0,
        });
        let entries = self.blocks[block..].iter().flat_map(move |block| {
            let at = core::mem::take(&mut at);
            block.keys[at..].iter().copied().zip(&block.values[at..])
        });
        entries.take_while(move |(key, _)| *key < end)
    }

    /// Uses the entries from this place on whose keys are below `end`, in order.
    pub(crate) fn visit_mut(
        &mut self,
        from: Option<Position>,
        end: usize,
        mut visit: impl FnMut(usize, &mut V),
    ) {
        let Some(Position { block, mut at }) = from else {
            return;
        };
        for Block { keys, values } in &mut self.blocks[block..] {
            for (key, value) in keys[at..].iter().zip(&mut values[at..]) {
                if *key >= end {
                    return;
                }
                visit(*key, value);
            }
            at = 0;
        }
    }

    /// All entries in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, &V)> {
        let blocks = self.blocks.iter();
        blocks.flat_map(|block| block.keys.iter().copied().zip(&block.values))
    }

    pub(crate) fn into_values(self) -> impl Iterator<Item = V> {
        self.blocks.into_iter().flat_map(|block| block.values)
    }
}

impl<V: PartialEq> PartialEq for SortedMap<V> {
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len && self.iter().eq(other.iter())
    }
}

impl<V: Eq> Eq for SortedMap<V> {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const KEYS: usize = 400;

    /// One step, with a key and a number for what it needs.
    fn steps() -> impl Strategy<Value = Vec<(u8, usize, usize)>> {
        // Most add, so that there are many blocks; some sweep a run away, so that they merge.
        prop::collection::vec((0..10u8, 0..KEYS, 1..80usize), 1..300)
    }

    fn assert_is(map: &SortedMap<usize>, model: &BTreeMap<usize, usize>) {
        let pairs: Vec<_> = model.iter().map(|(key, value)| (*key, *value)).collect();
        let stored: Vec<_> = map.iter().map(|(key, value)| (key, *value)).collect();
        assert_eq!((map.len(), map.is_empty()), (pairs.len(), pairs.is_empty()));
        assert_eq!(stored, pairs);
        let entries: Vec<_> = map.blocks.iter().map(|block| block.keys.len()).collect();
        assert!(
            entries.iter().all(|count| (1..=BLOCK).contains(count)),
            "{entries:?}"
        );
        let firsts: Vec<_> = map.blocks.iter().map(|block| block.keys[0]).collect();
        assert_eq!(map.firsts, firsts);
    }

    proptest! {
        #[test]
        fn it_answers_as_a_b_tree(steps in steps()) {
            let (mut map, mut model) = (SortedMap::default(), BTreeMap::new());
            for (value, (step, key, many)) in steps.into_iter().enumerate() {
                match step {
                    0..=3 => for key in key..(key + many).min(KEYS) {
                        prop_assert_eq!(map.insert(key, value), model.insert(key, value));
                    },
                    4 => prop_assert_eq!(map.insert(key, value), model.insert(key, value)),
                    5 => prop_assert_eq!(map.remove(key), model.remove(&key)),
                    6 => for key in (key..(key + many).min(KEYS)).step_by(1 + value % 3) {
                        prop_assert_eq!(map.remove(key), model.remove(&key));
                    },
                    7 => {
                        prop_assert_eq!(map.get_mut(key).map(|of| core::mem::replace(of, value)),
                            model.get_mut(&key).map(|of| core::mem::replace(of, value)));
                    }
                    8 => {
                        let before = map.at_or_before(key);
                        let at = before.filter(|place| map.entry(*place).0 == key);
                        let from = at.or_else(|| map.next(before));
                        map.visit_mut(from, key + many, |_, of| *of += 1);
                    }
                    _ => {
                        // An entry moves half the way to the next one.
                        if let Some(place) = map.at_or_before(key) {
                            let (from, _) = map.entry(place);
                            let end = map.next(Some(place)).map_or(KEYS, |next| map.entry(next).0);
                            let to = from + (end - from) / 2;
                            map.rename(place, to);
                            let of = model.remove(&from);
                            model.extend(of.map(|of| (to, of)));
                        }
                    }
                }
                if step == 8 {
                    model.range_mut(key..key + many).for_each(|(_, of)| *of += 1);
                }
                assert_is(&map, &model);
                for key in (0..=KEYS).step_by(7).chain([key]) {
                    let before = map.at_or_before(key);
                    prop_assert_eq!(before.map(|place| map.entry(place).0), model.range(..=key).next_back().map(|(key, _)| *key));
                    let after = map.next(before);
                    prop_assert_eq!(after.map(|place| map.entry(place).0), model.range(key + 1..).next().map(|(key, _)| *key));
                    prop_assert_eq!(map.get(key), model.get(&key));
                }
                prop_assert!(map.range(key..key + many).eq(model.range(key..key + many).map(|(key, of)| (*key, of))));
            }
            prop_assert!(map.into_values().eq(model.into_values()));
        }
    }

    #[test]
    fn maps_are_equal_if_their_entries_are() {
        let map = |entries: &[(usize, char)]| {
            let mut map = SortedMap::default();
            for (key, value) in entries {
                map.insert(*key, *value);
            }
            map
        };
        let one = map(&[(1, 'a'), (2, 'b')]);
        assert!(one == map(&[(2, 'b'), (1, 'a')]));
        for other in [
            &[(1, 'a')][..],
            &[(1, 'a'), (2, 'c')],
            &[(1, 'a'), (3, 'b')],
        ] {
            assert!(one != map(other));
        }
    }

    #[test]
    fn blocks_are_full_behind_an_end_that_grows_and_half_full_elsewhere() {
        let mut map = SortedMap::default();
        (0..10 * BLOCK).for_each(|key| {
            map.insert(2 * key, ());
        });
        assert_eq!(map.blocks.len(), 10);
        (0..10 * BLOCK).filter(|key| key % 5 > 0).for_each(|key| {
            map.remove(2 * key);
        });
        let entries: Vec<_> = map.blocks.iter().map(|block| block.keys.len()).collect();
        assert!(
            entries.windows(2).all(|pair| pair[0] + pair[1] > BLOCK),
            "{entries:?}"
        );
    }
}
