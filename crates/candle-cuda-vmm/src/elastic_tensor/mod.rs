//! A tensor that grows in place.

mod addresses;
mod columns;
#[cfg(feature = "cuda")]
mod device;
mod extent;
mod fork;
mod generation;
mod growth;
mod host;
mod layout;
mod overwrite;
mod rows;
mod shared;
#[cfg(feature = "cuda")]
mod space;
mod watch;

#[cfg(feature = "cuda")]
use crate::append::AppendOutcome;
use crate::error::{Result, VmmError};
use crate::tensor_pool::TensorPool;
use addresses::Addresses;
use candle_core::{DType, Device, Error, Shape, Tensor};
#[cfg(feature = "cuda")]
use device::{DeviceRows, Pair};
pub(crate) use extent::Live;
pub(crate) use growth::Waits;
use layout::RowLayout;
use rows::{Rows, with_rows};
use shared::Column;
pub(crate) use shared::SharedRows;
use std::ops::Range;
pub use watch::RowsWatch;

/// A tensor `[rows, row…]` whose first dimension grows and shrinks, with memory for the rows in
/// use.
///
/// # Views
/// [`view`](Self::view) returns an ordinary tensor of exactly the current rows. A view is a
/// snapshot: later calls that append, truncate or drop do not change it. Its memory is held until
/// the view, and every tensor made from it, is dropped. In-place writes to a view (`slice_set`)
/// write to the rows.
///
/// On a CUDA device views of all rows share one storage, which covers the whole pages around the
/// rows. So no driver call is needed to make or drop a view. A view holds the pages that its rows
/// are in. On a CPU device it holds no page of the pool; see [`TensorPool`].
///
/// # When rows move
/// On a CUDA device appending copies the new rows only, and allocates memory at most once per page.
/// The rows move to a new range of addresses in two cases only: a view shows memory that would be
/// overwritten, or the rows have reached the end of their addresses. That is so for a window that
/// [`release_front`](Self::release_front) moves forward, and for a KV cache of more tokens than it
/// was made for.
///
/// # Streams
/// Work is queued on Candle's stream of the pool's device object. Rows of another device object of
/// the same GPU are copied on the stream of that object, and each of the two streams waits for the
/// other.
///
/// Another device object, of this GPU or another, may read a view. The memory stays until that work
/// has run, even if everything is dropped meanwhile. But the other stream does not wait for earlier
/// appends, so it reads what is there when it runs. Make it wait, which blocks no thread, or
/// synchronize the pool's device. For device objects of one GPU:
///
/// ```
/// # #[cfg(feature = "cuda")]
/// # fn order(pool: &candle_core::Device, other: &candle_core::Device) -> candle_core::Result<()> {
/// use candle_core::cuda::WrapErr;
///
/// let [pool, other] = [pool.as_cuda_device()?, other.as_cuda_device()?];
/// other.cuda_stream().join(&pool.cuda_stream()).w()?;
/// # Ok(())
/// # }
/// ```
///
/// # Copies
/// [`to_owned`](Self::to_owned) copies into Candle's own memory. Candle's `Tensor::copy` of a view
/// on a CUDA device copies the whole pages and keeps the rows' memory held as long as the copy
/// lives. Once that memory would have been freed, the first read of the copy reports an unrelated
/// `INVALID_VALUE`.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_cuda_vmm::TensorPool;
///
/// # #[cfg(not(feature = "simulator"))]
/// # fn main() {}
/// # #[cfg(feature = "simulator")]
/// # fn main() -> candle_cuda_vmm::Result<()> {
/// let pool = TensorPool::new(&Device::Cpu)?;
/// let mut rows = pool.tensor((2, 3), DType::F32)?;
/// rows.append(&Tensor::ones((4, 2, 3), DType::F32, &Device::Cpu)?)?;
/// let before = rows.view()?;
/// rows.truncate(1)?;
/// rows.grow(1)?;
/// assert_eq!(rows.view()?.dims(), [2, 2, 3]);
/// assert_eq!(before.dims(), [4, 2, 3]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct ElasticTensor {
    pool: TensorPool,
    row: Vec<usize>,
    dtype: DType,
    /// The number of rows that addresses are reserved for; `None` for as many as may be.
    expected_rows: Option<usize>,
    place: Place,
}

/// Where the rows are.
#[derive(Debug)]
enum Place {
    /// In a range of their own.
    Own(Box<Rows>),
    /// In a range with those of other tensors.
    Column(Column),
}

/// Returns whether keys and values are alike in what one launch for both needs.
#[cfg(feature = "cuda")]
fn is_pair([keys, values]: [(&ElasticTensor, &Tensor); 2]) -> bool {
    keys.1.dims() == values.1.dims()
        && keys.0.dtype == values.0.dtype
        && keys.0.len() == values.0.len()
}

impl TensorPool {
    /// Makes a tensor without rows; see [`ElasticTensor::new`].
    ///
    /// # Errors
    /// As [`ElasticTensor::new`].
    pub fn tensor(&self, row_shape: impl Into<Shape>, dtype: DType) -> Result<ElasticTensor> {
        ElasticTensor::new(self, row_shape, dtype)
    }
}

impl ElasticTensor {
    /// Makes a tensor without rows. `row_shape` is the shape of each row; an empty shape makes each
    /// row one number. Allocates no memory.
    ///
    /// # Errors
    /// - [`CandleError`](VmmError::CandleError) with `UnsupportedDTypeForOp` if Candle cannot
    ///   compute with this dtype.
    /// - [`Vmm`](VmmError::Vmm) with `ZeroSize` if a row has no elements, and with `Overflow` if
    ///   its size in bytes overflows.
    pub fn new(pool: &TensorPool, row_shape: impl Into<Shape>, dtype: DType) -> Result<Self> {
        Self::expecting(pool, row_shape, dtype, None)
    }

    /// As [`new`](Self::new), with addresses for the number of rows that is expected. More rows
    /// move to a larger range, up to what the pool reserves for a tensor.
    pub(crate) fn expecting(
        pool: &TensorPool,
        row_shape: impl Into<Shape>,
        dtype: DType,
        expected_rows: Option<usize>,
    ) -> Result<Self> {
        let row = row_shape.into();
        let layout = RowLayout::new([row.clone()], dtype)?;
        let (inner, row_bytes) = (pool.inner(), layout.row_bytes);
        let page_bytes = inner.memory.common().page_bytes();
        let bytes_max = inner.options.reservation_bytes;
        let addresses = match expected_rows {
            None => Addresses::new(bytes_max, page_bytes),
            Some(rows) => {
                let mut addresses = Addresses::unknown(bytes_max, page_bytes);
                addresses.expect(rows, row_bytes);
                addresses
            }
        };
        Ok(Self {
            pool: pool.clone(),
            row: row.into_dims(),
            dtype,
            expected_rows,
            place: Place::Own(Box::new(Rows::new(pool, addresses, layout))),
        })
    }

    /// Does something with the rows, of which this tensor has a column. Fails in a forked process
    /// if other tensors share the range.
    fn rows<T>(&self, act: impl FnOnce(&Rows, usize) -> T) -> Result<T> {
        match &self.place {
            Place::Own(rows) => Ok(act(rows, 0)),
            Place::Column(column) => Ok(act(&*column.lock()?, column.index)),
        }
    }

    /// As [`rows`](Self::rows), for what changes them.
    fn rows_mut<T>(&mut self, act: impl FnOnce(&mut Rows, usize) -> T) -> Result<T> {
        match &mut self.place {
            Place::Own(rows) => Ok(act(rows, 0)),
            Place::Column(column) => Ok(act(&mut *column.lock()?, column.index)),
        }
    }

    /// Returns the number of rows.
    pub fn len(&self) -> usize {
        let len = self.rows(|rows, column| with_rows!(rows, rows => rows.len(column)));
        len.unwrap_or(0)
    }

    /// Returns whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the shape of one row.
    pub fn row_dims(&self) -> &[usize] {
        &self.row
    }

    /// Returns the size of one row in bytes.
    pub fn row_bytes(&self) -> usize {
        self.row.iter().product::<usize>() * self.dtype.size_in_bytes()
    }

    /// Returns the most rows that fit in the addresses that the pool may reserve for a tensor.
    pub fn rows_max(&self) -> usize {
        self.pool.inner().options.reservation_bytes / self.row_bytes()
    }

    /// Returns the dtype of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Returns the device.
    pub fn device(&self) -> &Device {
        self.pool.device()
    }

    /// Returns the pool.
    pub fn pool(&self) -> &TensorPool {
        &self.pool
    }

    fn shape(&self, rows: usize) -> Shape {
        let dims: Vec<_> = std::iter::once(rows)
            .chain(self.row.iter().copied())
            .collect();
        Shape::from(dims)
    }

    fn check_room(&self, more: usize) -> Result<()> {
        let (len, row_bytes) = (self.len(), self.row_bytes());
        if more > self.rows_max().saturating_sub(len) {
            return Err(VmmError::InvalidOffset {
                offset: len * row_bytes,
                size: more.saturating_mul(row_bytes),
                capacity: self.pool.inner().options.reservation_bytes,
            });
        }
        Ok(())
    }

    /// Appends copies of rows `[count, row…]`, of any strides.
    ///
    /// # Errors
    /// After an error the tensor is unchanged.
    /// - [`CandleError`](VmmError::CandleError) with `DTypeMismatchBinaryOp`,
    ///   `DeviceMismatchBinaryOp`, `UnexpectedNumberOfDims` or `ShapeMismatchBinaryOp` if the rows
    ///   differ from those of this tensor.
    /// - [`InvalidOffset`](VmmError::InvalidOffset), in bytes, if there are more than
    ///   [`rows_max`](Self::rows_max) rows.
    /// - [`Vmm`](VmmError::Vmm) with `OutOfPhysicalMemory` if the budget or the host has no memory.
    /// - [`Vmm`](VmmError::Vmm) if a driver call fails.
    pub fn append(&mut self, rows: &Tensor) -> Result<()> {
        self.check_like(rows)?;
        let count = rows.dims()[0];
        self.check_room(count)?;
        if count == 0 {
            return Ok(());
        }
        self.rows_mut(|all, column| with_rows!(all, all => all.append(column, rows)))?
    }

    /// Fails if rows `[count, row…]` differ from those of this tensor in dtype, device or shape.
    pub(crate) fn check_like(&self, rows: &Tensor) -> Result<()> {
        const OP: &str = "elastic-append";
        if rows.dtype() != self.dtype {
            let (lhs, rhs, op) = (self.dtype, rows.dtype(), OP);
            return Err(Error::DTypeMismatchBinaryOp { lhs, rhs, op }.into());
        }
        let (lhs, rhs, op) = (self.device().location(), rows.device().location(), OP);
        if lhs != rhs {
            return Err(Error::DeviceMismatchBinaryOp { lhs, rhs, op }.into());
        }
        if rows.rank() != self.row.len() + 1 {
            let (expected, got) = (self.row.len() + 1, rows.rank());
            let shape = rows.shape().clone();
            return Err(Error::UnexpectedNumberOfDims {
                expected,
                got,
                shape,
            }
            .into());
        }
        if rows.dims()[1..] != self.row {
            let (lhs, rhs, op) = (self.shape(self.len()), rows.shape().clone(), OP);
            return Err(Error::ShapeMismatchBinaryOp { lhs, rhs, op }.into());
        }
        Ok(())
    }

    /// Returns whether [`append_both`](Self::append_both) supports these tokens, with the sequence
    /// in dimension `dim`.
    #[cfg(feature = "cuda")]
    fn supports_append_both(&self, tokens: &Tensor, dim: usize) -> bool {
        let dims = tokens.dims();
        // The first tokens of a cache reserve addresses, which a failed launch would leave.
        let has_addresses = self.rows(|rows, _| rows.extent().is_some());
        has_addresses.unwrap_or(false)
            && tokens.rank() == self.row.len() + 1
            && (dims[..dim] == self.row[..dim] && dims[dim + 1..] == self.row[dim..])
            && dims[dim] > 0
            && tokens.dtype() == self.dtype
            && tokens.device().location() == self.device().location()
            && self.check_room(dims[dim]).is_ok()
    }

    /// Appends the tokens of keys and values by one launch, with the sequence in dimension `dim`.
    /// Returns all of them as contiguous tensors if `contiguous` is set.
    ///
    /// Returns [`AppendOutcome::Unsupported`] if that is not possible for these tensors. The rows
    /// are then unchanged, and [`append`](Self::append) works or returns the reason.
    ///
    /// # Errors
    /// As [`append`](Self::append), and then the rows are unchanged. Call [`undo`](Self::undo) to
    /// free the memory that was allocated for more rows.
    #[cfg(feature = "cuda")]
    pub(crate) fn append_both(
        [keys, values]: [(&mut Self, &Tensor); 2],
        dim: usize,
        contiguous: bool,
    ) -> Result<AppendOutcome> {
        if !(is_pair([(keys.0, keys.1), (values.0, values.1)])
            && keys.0.supports_append_both(keys.1, dim)
            && values.0.supports_append_both(values.1, dim))
        {
            return Ok(AppendOutcome::Unsupported);
        }
        let tokens = [keys.1, values.1];
        match (&mut keys.0.place, &mut values.0.place) {
            (Place::Own(keys), Place::Own(values)) => match (&mut **keys, &mut **values) {
                (Rows::Device(keys), Rows::Device(values)) => {
                    let pair = Pair::Apart([keys, values]);
                    DeviceRows::append_both(pair, tokens, dim, contiguous)
                }
                _ => Ok(AppendOutcome::Unsupported),
            },
            (Place::Column(keys), Place::Column(values))
                if keys.shared().is_same(values.shared()) =>
            {
                match &mut *keys.lock()? {
                    Rows::Device(rows) => {
                        let pair = Pair::Together(rows, [keys.index, values.index]);
                        DeviceRows::append_both(pair, tokens, dim, contiguous)
                    }
                    Rows::Host(_) => Ok(AppendOutcome::Unsupported),
                }
            }
            _ => Ok(AppendOutcome::Unsupported),
        }
    }

    /// Appends `rows` rows of zeros.
    ///
    /// # Errors
    /// As [`append`](Self::append).
    pub fn grow(&mut self, rows: usize) -> Result<()> {
        self.check_room(rows)?;
        if rows == 0 {
            return Ok(());
        }
        self.rows_mut(|all, column| with_rows!(all, all => all.grow(column, rows)))?
    }

    /// Keeps the first `len` rows and drops the rest.
    ///
    /// Frees the memory of the other rows by whole pages, except for one page, so that a length
    /// that alternates around a page boundary makes no driver calls. With `len` 0 it frees all
    /// memory.
    ///
    /// # Errors
    /// [`CandleError`](VmmError::CandleError) with `NarrowInvalidArgs` if there are fewer than
    /// `len` rows; then nothing changes.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        self.check_rows(&(0..len), "len is more than the number of rows")?;
        self.rows_mut(|rows, column| rows.truncate(column, len))
    }

    /// The bytes of device memory that are allocated for the rows now.
    pub(crate) fn live(&self) -> Live {
        let live = self.rows(|rows, _| Live::of(rows.extent()));
        live.unwrap_or_default()
    }

    /// Drops the rows from `len` on, and frees the memory that was allocated for them since `live`
    /// was.
    pub(crate) fn undo(&mut self, len: usize, live: &Live) {
        let undo =
            self.rows_mut(|rows, column| with_rows!(rows, rows => rows.undo(column, len, live)));
        undo.unwrap_or_default();
    }

    /// Drops the last `rows` rows; see [`truncate`](Self::truncate).
    ///
    /// # Errors
    /// As [`truncate`](Self::truncate).
    pub fn shrink(&mut self, rows: usize) -> Result<()> {
        self.check_rows(&(0..rows), "cannot drop more rows than there are")?;
        self.truncate(self.len() - rows)
    }

    /// Drops the first `count` rows, as a sliding window does, and frees their memory by whole
    /// pages.
    ///
    /// # Errors
    /// As [`truncate`](Self::truncate).
    pub fn release_front(&mut self, count: usize) -> Result<()> {
        self.check_rows(&(0..count), "cannot drop more rows than there are")?;
        self.rows_mut(|rows, column| with_rows!(rows, rows => rows.release_front(column, count)))
    }

    /// Drops all rows and frees their memory.
    pub fn clear(&mut self) {
        let cleared = self.rows_mut(|rows, column| rows.truncate(column, 0));
        cleared.unwrap_or_default();
    }

    /// Returns a view `[rows, row…]` of all rows. It is contiguous, unless the tensor is of a
    /// [sequence in one range](crate::Sequence::rows_in_one_range) on a CUDA device.
    ///
    /// # Errors
    /// - [`CandleError`](VmmError::CandleError) if Candle fails.
    /// - [`Vmm`](VmmError::Vmm) if a driver call fails.
    pub fn view(&self) -> Result<Tensor> {
        self.view_rows(0..self.len())
    }

    /// Returns a view `[rows, row…]` of some rows, as [`view`](Self::view) does of all.
    ///
    /// # Errors
    /// As [`view`](Self::view), and [`CandleError`](VmmError::CandleError) with `NarrowInvalidArgs`
    /// if there are no such rows.
    pub fn view_rows(&self, rows: Range<usize>) -> Result<Tensor> {
        self.check_rows(&rows, "there are no such rows")?;
        self.rows(|all, column| with_rows!(all, all => all.view(column, rows)))?
    }

    /// Copies all rows to a tensor `[rows, row…]` in Candle's own memory.
    ///
    /// # Errors
    /// As [`view`](Self::view).
    pub fn to_owned(&self) -> Result<Tensor> {
        self.rows(|rows, column| with_rows!(rows, rows => rows.to_owned(column)))?
    }

    /// Makes a tensor of the same pool with copies of the rows.
    ///
    /// # Errors
    /// As [`append`](Self::append) and [`view`](Self::view).
    pub fn try_clone(&self) -> Result<Self> {
        let (row, expected_rows) = (self.row.as_slice(), self.expected_rows);
        let mut clone = Self::expecting(&self.pool, row, self.dtype, expected_rows)?;
        if !self.is_empty() {
            clone.append(&self.view()?)?;
        }
        Ok(clone)
    }

    fn check_rows(&self, rows: &Range<usize>, msg: &'static str) -> Result<()> {
        if rows.start > rows.end || rows.end > self.len() {
            let (start, len) = (rows.start, rows.end.saturating_sub(rows.start));
            let shape = self.shape(self.len());
            return Err(Error::NarrowInvalidArgs {
                shape,
                dim: 0,
                start,
                len,
                msg,
            }
            .into());
        }
        Ok(())
    }
}
