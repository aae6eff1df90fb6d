//! Where each tensor of the weights is, and which bytes of which file are to be read for some bytes
//! of the range.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::convert::Conversion;
use super::file::Stored;
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

/// All tensors, in the order of their places.
#[derive(Debug, Default)]
pub(super) struct Layout {
    tensors: Vec<Placed>,
    by_name: BTreeMap<String, usize>,
    bytes: usize,
}

impl Layout {
    /// Places tensors, each with its file, type in memory and conversion, by their names: a number
    /// within them counts as such, so layers follow each other.
    pub(super) fn new(stored: Vec<(Stored, usize, DType, Conversion)>) -> Self {
        let mut stored = stored;
        stored.sort_by(|(one, ..), (other, ..)| natural(&one.name).cmp(&natural(&other.name)));
        let mut layout = Self::default();
        for (stored, file, dtype, conversion) in stored {
            let placed = Placed {
                dtype,
                offset: layout.bytes.next_multiple_of(ALIGNMENT_BYTES),
                elements: stored.shape.iter().product(),
                name: stored.name,
                shape: stored.shape,
                file,
                begin: stored.begin,
                conversion,
            };
            layout.bytes = placed.bytes().end;
            let place = layout.tensors.len();
            layout.by_name.insert(placed.name.clone(), place);
            layout.tensors.push(placed);
        }
        layout
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

    /// The tensors that have some of these bytes.
    pub(super) fn within(&self, bytes: Range<usize>) -> impl Iterator<Item = &Placed> {
        let first = self
            .tensors
            .partition_point(|it| it.bytes().end <= bytes.start);
        let rest = self.tensors[first..].iter();
        rest.take_while(move |it| it.offset < bytes.end)
    }

    /// The bytes from the first to the last tensor whose name begins so; `None` if none does.
    pub(super) fn bytes_of(&self, prefix: &str) -> Option<Range<usize>> {
        let mut named = self.tensors.iter().filter(|it| it.name.starts_with(prefix));
        let first = named.next()?;
        let last = named.next_back().unwrap_or(first);
        Some(first.offset..last.bytes().end)
    }
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

    fn stored(name: &str, elements: usize) -> (Stored, usize, DType, Conversion) {
        let stored = Stored {
            name: name.to_owned(),
            dtype: DType::F32,
            shape: vec![elements],
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
        let layout = Layout::new(names.map(|name| stored(name, 65)).into());
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
}
