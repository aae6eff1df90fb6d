//! What a row consists of.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use crate::error::Result;
#[cfg(any(feature = "cuda", test))]
use candle_core::Tensor;
use candle_core::{DType, Error, Shape};
#[cfg(any(feature = "cuda", test))]
use std::iter;
use std::ops::Range;

/// Rows of several tensors get padding if they have such a length. Shorter ones would lose more to
/// it, and longer ones have few tokens in a page.
const PADDED_BYTES: Range<usize> = 64 << 10..1 << 20;
/// They get it if their length is a multiple of this: then the same tensor's parts of rows lie in
/// few of the memory's channels.
const STEP_BYTES: usize = 8 << 10;
const PADDING_BYTES: usize = 2 << 10;

/// The parts of a row, which lie side by side: one, or one for each tensor that shares the range.
#[derive(Debug, Clone)]
pub(super) struct RowLayout {
    pub(super) dtype: DType,
    pub(super) row_bytes: usize,
    columns: Vec<Column>,
}

/// The part of a row that is a row of one tensor.
#[derive(Debug, Clone)]
struct Column {
    dims: Vec<usize>,
    /// Elements of the row before it.
    #[cfg_attr(not(any(feature = "cuda", test)), expect(dead_code))]
    start: usize,
}

impl RowLayout {
    /// Makes the layout of rows of these shapes, side by side.
    ///
    /// # Errors
    /// As [`ElasticTensor::new`](super::ElasticTensor::new).
    pub(super) fn new(shapes: impl IntoIterator<Item = Shape>, dtype: DType) -> Result<Self> {
        if matches!(
            dtype,
            DType::F6E2M3 | DType::F6E3M2 | DType::F4 | DType::F8E8M0
        ) {
            return Err(Error::UnsupportedDTypeForOp(dtype, "elastic-tensor").into());
        }
        let (mut columns, mut elements) = (Vec::new(), 0usize);
        for shape in shapes {
            let (dims, start) = (shape.into_dims(), elements);
            let bytes =
                (dims.iter()).try_fold(dtype.size_in_bytes(), |bytes, dim| bytes.checked_mul(*dim));
            let end = bytes
                .and_then(|bytes| start.checked_add(bytes / dtype.size_in_bytes()))
                .filter(|end| end.checked_mul(dtype.size_in_bytes()).is_some());
            elements = end.ok_or(cuda_vmm::VmmError::Overflow {
                offset: 0,
                bytes: usize::MAX,
            })?;
            if elements == start {
                return Err(cuda_vmm::VmmError::ZeroSize { what: "row" }.into());
            }
            columns.push(Column { dims, start });
        }
        let mut row_bytes = elements * dtype.size_in_bytes();
        let is_aligned = row_bytes.is_multiple_of(STEP_BYTES);
        if columns.len() > 1 && is_aligned && PADDED_BYTES.contains(&row_bytes) {
            row_bytes += PADDING_BYTES;
        }
        Ok(Self {
            dtype,
            row_bytes,
            columns,
        })
    }

    /// Returns the bytes of as many rows as have so many bytes without padding, at least.
    pub(super) fn with_padding(&self, bytes: usize) -> usize {
        let parts = self.columns.iter();
        let dims = parts.map(|column| column.dims.iter().product::<usize>());
        let padding = self.row_bytes - dims.sum::<usize>() * self.dtype.size_in_bytes();
        match padding {
            0 => bytes,
            padding => bytes.saturating_add((bytes / (self.row_bytes - padding) + 1) * padding),
        }
    }

    /// Returns the number of columns.
    pub(super) fn columns(&self) -> usize {
        self.columns.len()
    }

    /// Returns the shape of a column's part of a row.
    pub(super) fn dims(&self, column: usize) -> &[usize] {
        &self.columns[column].dims
    }
}

/// Where columns are in the memory of rows.
#[cfg(any(feature = "cuda", test))]
impl RowLayout {
    /// Returns the bytes of a row before a column's part.
    pub(super) fn start_bytes(&self, column: usize) -> usize {
        self.columns[column].start * self.dtype.size_in_bytes()
    }

    /// Returns the bytes of a column's part of a row.
    pub(super) fn part_bytes(&self, column: usize) -> usize {
        self.dims(column).iter().product::<usize>() * self.dtype.size_in_bytes()
    }

    /// Returns the shape of a tensor over whole rows, for [`column`](Self::column).
    pub(super) fn shape(&self, rows: usize) -> Vec<usize> {
        match &self.columns[..] {
            [only] => iter::once(rows).chain(only.dims.iter().copied()).collect(),
            _ => vec![rows, self.row_bytes / self.dtype.size_in_bytes()],
        }
    }

    /// Returns a column of a tensor over whole rows: a view, which is strided if there are other
    /// columns.
    pub(super) fn column(&self, rows: &Tensor, column: usize) -> candle_core::Result<Tensor> {
        if let [_] = self.columns[..] {
            return Ok(rows.clone());
        }
        let Column { dims, start } = &self.columns[column];
        let part = rows.narrow(1, *start, dims.iter().product())?;
        let Some((_, inner)) = dims.split_first() else {
            return part.squeeze(1);
        };
        // A view cannot be reshaped, but its last dimension can be split: the inner ones come out
        // behind it, the innermost first.
        let mut split = part;
        for dim in inner.iter().rev() {
            split = split.unfold(1, *dim, *dim)?;
        }
        let order: Vec<_> = [0, 1]
            .into_iter()
            .chain((2..dims.len() + 1).rev())
            .collect();
        let split = split.permute(order)?;
        match &split.dims()[1..] == dims {
            true => Ok(split),
            // Candle divides in F32, which is exact up to 16 million elements.
            false => Err(Error::UnexpectedShape {
                msg: "a row is too large to be split".to_owned(),
                expected: Shape::from(dims.as_slice()),
                got: split.shape().clone(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::VmmError;
    use candle_core::Device;

    fn numbers(shape: Vec<usize>) -> candle_core::Result<Tensor> {
        let count: usize = shape.iter().product();
        Tensor::arange(0u32, count as u32, &Device::Cpu)?.reshape(shape)
    }

    #[test]
    fn columns_are_views_of_the_parts_of_rows() -> Result<()> {
        let shapes: [&[usize]; 5] = [&[2, 3, 4], &[2, 3, 5], &[], &[7], &[1, 1, 2, 1]];
        let layout = RowLayout::new(shapes.map(Shape::from), DType::U32)?;
        let elements = 24 + 30 + 1 + 7 + 2;
        assert_eq!((layout.row_bytes, layout.columns()), (4 * elements, 5));
        let rows = numbers(layout.shape(3))?;
        let mut start = 0;
        for (column, dims) in shapes.iter().enumerate() {
            let part: usize = dims.iter().product();
            let bytes = (layout.start_bytes(column), layout.part_bytes(column));
            assert_eq!(bytes, (4 * start, 4 * part));
            let found = layout.column(&rows, column)?;
            assert_eq!((&found.dims()[1..], found.stride()[0]), (*dims, elements));
            let expected = rows.narrow(1, start, part)?;
            let flat = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<u32>();
            assert_eq!(flat(&found)?, flat(&expected)?);
            // The heads of a token lie side by side.
            if let Some(last) = found.stride().last().filter(|_| !dims.is_empty()) {
                assert_eq!(*last, 1);
            }
            start += part;
        }
        Ok(())
    }

    #[test]
    fn rows_of_many_layers_are_padded() -> Result<()> {
        let row_bytes = |columns: usize, dim: usize| {
            let shapes = vec![Shape::from((8, dim)); columns];
            RowLayout::new(shapes, DType::F16).map(|layout| layout.row_bytes)
        };
        // 32 layers, 33, the fewest, and too many of 8 heads of 128.
        assert_eq!(row_bytes(64, 128)?, 130 << 10);
        assert_eq!(row_bytes(66, 128)?, 132 << 10);
        assert_eq!(row_bytes(32, 128)?, 66 << 10);
        assert_eq!(row_bytes(28, 128)?, 56 << 10);
        assert_eq!(row_bytes(512, 128)?, 1 << 20);
        assert_eq!(row_bytes(1, 32 << 10)?, 512 << 10);
        // The parts stay where they were.
        let layout = RowLayout::new(vec![Shape::from((8, 128)); 64], DType::F16)?;
        assert_eq!(layout.start_bytes(63), 63 * (2 << 10));
        assert_eq!(layout.shape(3), [3, 65 << 10]);
        // A GiB has 8,192 rows without padding.
        assert!(layout.with_padding(1 << 30) >= 8192 * (130 << 10));
        let short = RowLayout::new(vec![Shape::from((8, 128)); 2], DType::F16)?;
        assert_eq!(short.with_padding(1 << 30), 1 << 30);
        Ok(())
    }

    #[test]
    fn the_only_column_is_contiguous() -> Result<()> {
        let layout = RowLayout::new([Shape::from((2, 3))], DType::U32)?;
        let rows = numbers(layout.shape(4))?;
        let column = layout.column(&rows, 0)?;
        assert!(column.is_contiguous() && column.dims() == [4, 2, 3]);
        Ok(())
    }

    #[test]
    fn rows_that_cannot_be_are_refused() {
        let of = |shapes: &[(usize, usize)], dtype| {
            let layout = RowLayout::new(shapes.iter().map(|dims| Shape::from(*dims)), dtype);
            layout.map(drop).expect_err("there are no such rows")
        };
        let zero = of(&[(2, 3), (0, 3)], DType::F32);
        assert!(matches!(
            zero,
            VmmError::Vmm(cuda_vmm::VmmError::ZeroSize { what: "row" })
        ));
        for shapes in [&[(usize::MAX, 2)][..], &[(usize::MAX / 4, 1), (2, 1)]] {
            let error = of(shapes, DType::F32);
            assert!(matches!(error, VmmError::InvalidOffset { .. }), "{error}");
        }
        let error = of(&[(1, 1)], DType::F4);
        assert!(matches!(
            error,
            VmmError::CandleError(Error::UnsupportedDTypeForOp(DType::F4, "elastic-tensor"))
        ));
    }
}
