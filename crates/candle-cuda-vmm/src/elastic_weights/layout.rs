//! Where each tensor of the weights is, and which bytes of which file are to be read for some bytes
//! of the range.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::convert::Conversion;
use super::file::Stored;
use super::options::Join;
use crate::error::WeightsError;
use candle_core::DType;
use std::collections::BTreeMap;
use std::ops::Range;

/// What kernels and Candle's own allocations begin at: a multiple of this many bytes.
const ALIGNMENT_BYTES: usize = 256;

/// A tensor, and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Placed {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    /// In the memory.
    pub(super) dtype: DType,
    pub(super) offset: usize,
    pub(super) elements: usize,
    /// Which of the files it is in, and where its bytes begin there.
    pub(super) file: usize,
    pub(super) begin: u64,
    pub(super) conversion: Conversion,
}

impl Placed {
    /// The bytes of a number in the file.
    pub(super) fn source_element_bytes(&self) -> usize {
        self.conversion
            .source_bytes()
            .unwrap_or(self.dtype.size_in_bytes())
    }

    /// Its place in the range.
    pub(super) fn bytes(&self) -> Range<usize> {
        self.offset..self.offset + self.elements * self.dtype.size_in_bytes()
    }
}

/// Several tensors that follow each other without a gap: one tensor as well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Joined {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) dtype: DType,
    pub(super) offset: usize,
    /// The places of its parts among all tensors.
    parts: Range<usize>,
}

/// What stands together: a tensor, or the parts of a join under its name.
struct Group {
    name: String,
    is_joined: bool,
    tensors: Vec<Item>,
}

/// A tensor with its file, type in memory and conversion.
type Item = (Stored, usize, DType, Conversion);

/// All tensors, in the order of their places.
#[derive(Debug, Default)]
pub(super) struct Layout {
    tensors: Vec<Placed>,
    joined: Vec<Joined>,
    by_name: BTreeMap<String, usize>,
    bytes: usize,
}

impl Layout {
    /// Places tensors by their names: a number within them counts as such, so layers follow each
    /// other. The parts of a join stand at the place of its name, without gaps.
    pub(super) fn new(stored: Vec<Item>, joins: &[Join]) -> Result<Self, WeightsError> {
        let mut layout = Self::default();
        let mut groups = groups(stored, joins)?;
        groups.sort_by(|one, other| natural(&one.name).cmp(&natural(&other.name)));
        for group in groups {
            let begin = layout.bytes.next_multiple_of(ALIGNMENT_BYTES);
            let first = layout.tensors.len();
            layout.bytes = begin;
            for item in group.tensors {
                layout.place(item);
            }
            let parts = first..layout.tensors.len();
            if group.is_joined {
                let tensors = &layout.tensors[parts.clone()];
                let mut shape = tensors[0].shape.clone();
                shape[0] = tensors.iter().map(|part| part.shape[0]).sum();
                layout.joined.push(Joined {
                    name: group.name,
                    shape,
                    dtype: tensors[0].dtype,
                    offset: begin,
                    parts,
                });
            }
        }
        Ok(layout)
    }

    /// Places a tensor behind what is there.
    fn place(&mut self, (stored, file, dtype, conversion): Item) {
        let placed = Placed {
            dtype,
            offset: self.bytes,
            elements: stored.shape.iter().product(),
            name: stored.name,
            shape: stored.shape,
            file,
            begin: stored.begin,
            conversion,
        };
        self.bytes = placed.bytes().end;
        let place = self.tensors.len();
        self.by_name.insert(placed.name.clone(), place);
        self.tensors.push(placed);
    }

    /// The bytes of all tensors, with what is between them.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn tensors(&self) -> &[Placed] {
        &self.tensors
    }

    pub(super) fn find(&self, name: &str) -> Option<&Placed> {
        self.by_name.get(name).map(|place| &self.tensors[*place])
    }

    pub(super) fn joined(&self) -> &[Joined] {
        &self.joined
    }

    /// The parts of a join.
    pub(super) fn parts(&self, joined: &Joined) -> &[Placed] {
        &self.tensors[joined.parts.clone()]
    }

    /// Shape, type and offset of a tensor, or of a join.
    pub(super) fn view(&self, name: &str) -> Option<(&[usize], DType, usize)> {
        let joined = || self.joined.iter().find(|it| it.name == name);
        match self.find(name) {
            Some(placed) => Some((&placed.shape, placed.dtype, placed.offset)),
            None => joined().map(|it| (&*it.shape, it.dtype, it.offset)),
        }
    }

    /// The tensors that have some of these bytes.
    pub(super) fn within(&self, bytes: Range<usize>) -> impl Iterator<Item = &Placed> {
        let first = self
            .tensors
            .partition_point(|it| it.bytes().end <= bytes.start);
        let rest = self.tensors[first..].iter();
        rest.take_while(move |it| it.offset < bytes.end)
    }

    /// The bytes from the first to the last tensor or join whose name begins so; `None` if none
    /// does.
    pub(super) fn bytes_of(&self, prefix: &str) -> Option<Range<usize>> {
        let joined = self.joined.iter().filter(|it| it.name.starts_with(prefix));
        let parts = joined.flat_map(|it| self.parts(it));
        let named = self.tensors.iter().filter(|it| it.name.starts_with(prefix));
        let all = parts.chain(named).map(Placed::bytes);
        all.reduce(|one, other| one.start.min(other.start)..one.end.max(other.end))
    }
}

/// Puts the parts of each join together. All other tensors stand alone.
fn groups(stored: Vec<Item>, joins: &[Join]) -> Result<Vec<Group>, WeightsError> {
    let mut places = BTreeMap::new();
    for (place, (stored, ..)) in stored.iter().enumerate() {
        places.insert(stored.name.clone(), place);
    }
    let mut stored: Vec<_> = stored.into_iter().map(Some).collect();
    let mut groups: Vec<Group> = Vec::new();
    for join in joins {
        let name = join.name.clone();
        let is_taken = groups.iter().any(|group| group.name == name);
        if is_taken || places.contains_key(&name) {
            return Err(WeightsError::NameTaken { name });
        }
        let mut tensors: Vec<Item> = Vec::new();
        for part in &join.parts {
            // A part of two joins is missing in the second one.
            let found = places.get(part).and_then(|place| stored[*place].take());
            let found = found.ok_or_else(|| WeightsError::PartMissing {
                name: name.clone(),
                part: part.clone(),
            })?;
            let first = tensors.first().unwrap_or(&found);
            let inner =
                |(stored, _, dtype, _): &Item| (*dtype, stored.shape.get(1..).map(<[_]>::to_vec));
            if found.0.shape.is_empty() || inner(first) != inner(&found) {
                return Err(WeightsError::PartDiffers {
                    name,
                    part: part.clone(),
                    dtype: found.2,
                    shape: found.0.shape.clone(),
                    first_dtype: first.2,
                    first_shape: first.0.shape.clone(),
                });
            }
            tensors.push(found);
        }
        if tensors.is_empty() {
            return Err(WeightsError::NoParts { name });
        }
        groups.push(Group {
            name,
            is_joined: true,
            tensors,
        });
    }
    groups.extend(stored.into_iter().flatten().map(|item| Group {
        name: item.0.name.clone(),
        is_joined: false,
        tensors: vec![item],
    }));
    Ok(groups)
}

/// A name in parts that are numbers or not.
fn natural(name: &str) -> Vec<(Option<u64>, &str)> {
    let is_digit = |byte: &u8| byte.is_ascii_digit();
    let parts = name
        .as_bytes()
        .chunk_by(|one, other| is_digit(one) == is_digit(other));
    let mut begin = 0;
    let parts = parts.map(|part| {
        let text = &name[begin..begin + part.len()];
        begin += part.len();
        (text.parse().ok(), text)
    });
    parts.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(name: &str, elements: usize) -> Item {
        shaped(name, vec![elements])
    }

    fn shaped(name: &str, shape: Vec<usize>) -> Item {
        let stored = Stored {
            name: name.to_owned(),
            dtype: DType::F32,
            shape,
            begin: 8,
        };
        (stored, 0, DType::F32, Conversion::None)
    }

    #[test]
    fn layers_follow_each_other_in_the_order_of_their_numbers() {
        let names = [
            "model.layers.10.w",
            "model.embed",
            "model.layers.9.w",
            "model.layers.9.b",
            "z",
        ];
        let layout = Layout::new(names.map(|name| stored(name, 65)).into(), &[]);
        let layout = layout.expect("no joins");
        let placed: Vec<_> = layout
            .tensors()
            .iter()
            .map(|it| (&*it.name, it.offset))
            .collect();
        let expected = [
            ("model.embed", 0),
            ("model.layers.9.b", 512),
            ("model.layers.9.w", 1024),
            ("model.layers.10.w", 1536),
            ("z", 2048),
        ];
        assert_eq!(placed, expected);
        assert_eq!(layout.bytes(), 2048 + 260);
        assert_eq!(layout.bytes_of("model.layers.9."), Some(512..1024 + 260));
        assert_eq!(layout.bytes_of("z"), Some(2048..2308));
        assert_eq!(layout.bytes_of("y"), None);
        let within = |bytes| layout.within(bytes).map(|it| it.offset).collect::<Vec<_>>();
        assert_eq!(within(0..1), [0]);
        assert_eq!(within(260..512), [0; 0], "between two");
        assert_eq!(within(771..1025), [512, 1024]);
        assert_eq!(within(0..9999), [0, 512, 1024, 1536, 2048]);
        assert_eq!(layout.find("z").map(|it| it.offset), Some(2048));
        assert_eq!(layout.find("model"), None);
    }

    #[test]
    fn parts_of_a_join_follow_each_other_at_the_place_of_its_name() {
        let all = || {
            vec![
                shaped("1.z", vec![3, 5]),
                shaped("1.b", vec![2, 5]),
                shaped("1.none", vec![0, 5]),
                shaped("0.a", vec![1]),
                shaped("1.a", vec![7]),
            ]
        };
        let layout = Layout::new(all(), &[Join::new("1.m", ["1.z", "1.none", "1.b"])]);
        let layout = layout.expect("the parts fit");
        let placed = layout.tensors().iter().map(|it| (&*it.name, it.offset));
        let expected = [
            ("0.a", 0),
            ("1.a", 256),
            ("1.z", 512),
            ("1.none", 572),
            ("1.b", 572),
        ];
        assert_eq!(placed.collect::<Vec<_>>(), expected);
        assert_eq!(layout.view("1.m"), Some((&[5, 5][..], DType::F32, 512)));
        assert_eq!(layout.view("1.b"), Some((&[2, 5][..], DType::F32, 572)));
        assert_eq!(layout.bytes_of("1.m"), Some(512..612));
        assert_eq!(layout.bytes_of("1."), Some(256..612));
        let refused = |joins: &[Join]| Layout::new(all(), joins).expect_err("it is refused");
        for (joins, is_it) in [
            (
                vec![Join::new("m", ["1.z", "1.y"])],
                (|error| matches!(error, WeightsError::PartMissing { part, .. } if part == "1.y"))
                    as fn(&WeightsError) -> bool,
            ),
            (
                vec![Join::new("m", ["1.z"]), Join::new("n", ["1.z"])],
                |error| matches!(error, WeightsError::PartMissing { name, .. } if name == "n"),
            ),
            (
                vec![Join::new("m", ["1.z", "1.a"])],
                |error| matches!(error, WeightsError::PartDiffers { part, .. } if part == "1.a"),
            ),
            (
                vec![Join::new("1.a", ["1.z"])],
                |error| matches!(error, WeightsError::NameTaken { name } if name == "1.a"),
            ),
            (
                vec![Join::new("m", ["1.z"]), Join::new("m", ["1.b"])],
                |error| matches!(error, WeightsError::NameTaken { name } if name == "m"),
            ),
            (
                vec![Join::new("m", [""; 0])],
                |error| matches!(error, WeightsError::NoParts { name } if name == "m"),
            ),
        ] {
            let error = refused(&joins);
            assert!(is_it(&error), "{error}");
        }
    }
}
