//! A tensor that grows where it stands.

#[cfg(feature = "cuda")]
mod device;
mod host;

#[cfg(feature = "cuda")]
use crate::append::Queued;
use crate::error::{Result, VmmError};
use crate::tensor_pool::{Memory, TensorPool};
use candle_core::{DType, Device, Error, Shape, Tensor};
#[cfg(feature = "cuda")]
use device::DeviceRows;
use host::HostRows;
use std::ops::Range;

/// A tensor `[rows, row…]` whose first dimension grows and shrinks, with memory for the rows that are there.
///
/// [`view`](Self::view) hands out ordinary tensors of exactly the rows that there are. Such a view is a snapshot: what
/// is appended, truncated or dropped afterwards does not change it, and its memory stays until it and all that was
/// made of it are dropped. Writing to it in place (`slice_set`) writes to the rows.
///
/// On a CUDA device rows never move while they can stay: appending copies the new rows only, and asks the driver for
/// memory page by page or less. They move to a range of fresh addresses where a view still shows what would be written
/// over, and where a window that was moved forward by [`release_front`](Self::release_front) has reached the end of
/// its addresses. Work is queued on Candle's own stream, the one of the pool's device object. Rows of another device object
/// of the same GPU are copied on that one's stream, and each of the two streams waits for the other.
///
/// A view may be read by another device object, of this GPU or another: its memory stays until that has run, whatever is
/// dropped meanwhile. But what it reads is what is there when it runs: the other stream does not wait for what was appended. Have it
/// wait, which blocks no thread, or synchronise the pool's device. On device objects of one GPU that is
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
/// On a CUDA device views of all rows are parts of one storage, which reaches over the whole pages around them: making and
/// dropping one asks the driver for nothing, and it holds the pages that its rows are in.
///
/// [`to_owned`](Self::to_owned) copies into memory of Candle's own. Candle's `Tensor::copy` of a view on a CUDA device does
/// so too, but copies the whole pages, and shares more with the view than it should: the rows' memory is held as long as the
/// copy, and once it would have gone the first read of the copy reports an `INVALID_VALUE` that is not its own.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_cuda_vmm::TensorPool;
///
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
    rows: Rows,
}

#[derive(Debug)]
enum Rows {
    Host(HostRows),
    #[cfg(feature = "cuda")]
    Device(DeviceRows),
}

/// Calls the same on either kind of rows.
macro_rules! on {
    ($rows:expr, $name:ident => $act:expr) => {
        match $rows {
            Rows::Host($name) => $act,
            #[cfg(feature = "cuda")]
            Rows::Device($name) => $act,
        }
    };
}

impl ElasticTensor {
    /// A tensor without rows; each of its rows has this shape, and no shape is one number. Takes no memory.
    ///
    /// # Errors
    /// - [`CandleError`](VmmError::CandleError) with `UnsupportedDTypeForOp` for a type of which Candle has no tensors
    ///   that it computes with.
    /// - [`Vmm`](VmmError::Vmm) with `ZeroSize` for a row without elements, and with `Overflow` for one whose bytes cannot
    ///   be counted.
    pub fn new(pool: &TensorPool, row_shape: impl Into<Shape>, dtype: DType) -> Result<Self> {
        let row = row_shape.into().into_dims();
        if matches!(
            dtype,
            DType::F6E2M3 | DType::F6E3M2 | DType::F4 | DType::F8E8M0
        ) {
            return Err(Error::UnsupportedDTypeForOp(dtype, "elastic-tensor").into());
        }
        let row_bytes = (row.iter())
            .try_fold(dtype.size_in_bytes(), |bytes, dim| bytes.checked_mul(*dim))
            .ok_or(cuda_vmm::VmmError::Overflow {
                offset: 0,
                bytes: usize::MAX,
            })?;
        if row_bytes == 0 {
            return Err(cuda_vmm::VmmError::ZeroSize { what: "row" }.into());
        }
        let rows = match &pool.inner().memory {
            Memory::Host(budget) => Rows::Host(HostRows::new(budget, row.clone(), dtype)),
            #[cfg(feature = "cuda")]
            Memory::Device(memory) => {
                Rows::Device(DeviceRows::new(memory, row.clone(), dtype, row_bytes))
            }
        };
        Ok(Self {
            pool: pool.clone(),
            row,
            dtype,
            rows,
        })
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        on!(&self.rows, rows => rows.len())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The shape of one row.
    pub fn row_dims(&self) -> &[usize] {
        &self.row
    }

    /// One row in bytes.
    pub fn row_bytes(&self) -> usize {
        self.row.iter().product::<usize>() * self.dtype.size_in_bytes()
    }

    /// So many rows at most: those for which the pool reserves addresses.
    pub fn rows_max(&self) -> usize {
        self.pool.inner().options.reservation_bytes / self.row_bytes()
    }

    /// The type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The device.
    pub fn device(&self) -> &Device {
        self.pool.device()
    }

    /// The pool.
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

    /// Appends rows `[count, row…]`, of any strides, which are copied.
    ///
    /// # Errors
    /// After an error the tensor is as before.
    /// - [`CandleError`](VmmError::CandleError) with `DTypeMismatchBinaryOp`, `DeviceMismatchBinaryOp`,
    ///   `UnexpectedNumberOfDims` or `ShapeMismatchBinaryOp` for rows that are not like these.
    /// - [`InvalidOffset`](VmmError::InvalidOffset), in bytes, if they do not fit in the addresses that the pool reserves.
    /// - [`Vmm`](VmmError::Vmm) with `OutOfPhysicalMemory` if the budget has no room, or the host no memory, and if a driver
    ///   call fails.
    pub fn append(&mut self, rows: &Tensor) -> Result<()> {
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
        let count = rows.dims()[0];
        self.check_room(count)?;
        if count == 0 {
            return Ok(());
        }
        on!(&mut self.rows, all => all.append(rows))
    }

    /// Whether [`append_both`](Self::append_both) takes such tokens, of a sequence in dimension `dim`.
    #[cfg(feature = "cuda")]
    fn takes(&self, tokens: &Tensor, dim: usize) -> bool {
        let dims = tokens.dims();
        !self.is_empty()
            && tokens.rank() == self.row.len() + 1
            && (dims[..dim] == self.row[..dim] && dims[dim + 1..] == self.row[dim..])
            && dims[dim] > 0
            && tokens.dtype() == self.dtype
            && tokens.device().location() == self.device().location()
            && self.check_room(dims[dim]).is_ok()
    }

    /// Appends the tokens of keys and of values, whose sequence is dimension `dim`, by one launch, and answers all of them
    /// as contiguous tensors if that is wanted. [`Queued::Not`] if that cannot be done with these; then the rows are as
    /// before, and [`append`](Self::append) says why or does it another way.
    ///
    /// # Errors
    /// As [`append`](Self::append); then the rows are as before. Call [`undo`](Self::undo) to give back the room for more.
    #[cfg(feature = "cuda")]
    pub(crate) fn append_both(
        [keys, values]: [(&mut Self, &Tensor); 2],
        dim: usize,
        wants_answers: bool,
    ) -> Result<Queued> {
        let are_alike = keys.1.dims() == values.1.dims()
            && keys.0.dtype == values.0.dtype
            && keys.0.len() == values.0.len();
        if !(are_alike && keys.0.takes(keys.1, dim) && values.0.takes(values.1, dim)) {
            return Ok(Queued::Not);
        }
        match (&mut keys.0.rows, &mut values.0.rows) {
            (Rows::Device(first), Rows::Device(second)) => {
                let pair = [(first, keys.1), (second, values.1)];
                DeviceRows::append_both(pair, dim, wants_answers)
            }
            _ => Ok(Queued::Not),
        }
    }

    /// Appends so many rows of zeros.
    ///
    /// # Errors
    /// As [`append`](Self::append).
    pub fn grow(&mut self, rows: usize) -> Result<()> {
        self.check_room(rows)?;
        if rows == 0 {
            return Ok(());
        }
        on!(&mut self.rows, all => all.grow(rows))
    }

    /// Keeps the first `len` rows. Memory of the others goes back by whole pages, but for one page, so that a length that
    /// goes to and fro makes no calls; with no rows left all of it does.
    ///
    /// # Errors
    /// [`CandleError`](VmmError::CandleError) with `NarrowInvalidArgs` if there are fewer; then nothing changes.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        self.check_rows(&(0..len), "truncate beyond the rows")?;
        on!(&mut self.rows, rows => rows.truncate(len));
        Ok(())
    }

    /// Forgets what was appended since there were `len` rows, and holds no more memory than they take.
    pub(crate) fn undo(&mut self, len: usize) {
        match &mut self.rows {
            Rows::Host(rows) => rows.truncate(len),
            #[cfg(feature = "cuda")]
            Rows::Device(rows) => rows.undo(len),
        }
    }

    /// Forgets the last rows but `rows` of them: [`truncate`](Self::truncate) by the rows that go.
    ///
    /// # Errors
    /// As there.
    pub fn shrink(&mut self, rows: usize) -> Result<()> {
        self.check_rows(&(0..rows), "shrink by more than the rows")?;
        self.truncate(self.len() - rows)
    }

    /// Forgets the first `count` rows, as a sliding window does. Their memory goes back by whole pages.
    ///
    /// # Errors
    /// As [`truncate`](Self::truncate).
    pub fn release_front(&mut self, count: usize) -> Result<()> {
        self.check_rows(&(0..count), "release more than the rows")?;
        on!(&mut self.rows, rows => rows.release_front(count));
        Ok(())
    }

    /// Forgets all rows and gives their memory back.
    pub fn clear(&mut self) {
        on!(&mut self.rows, rows => rows.clear());
    }

    /// All rows, `[rows, row…]`, contiguous.
    ///
    /// # Errors
    /// [`CandleError`](VmmError::CandleError), [`Vmm`](VmmError::Vmm).
    pub fn view(&self) -> Result<Tensor> {
        self.view_rows(0..self.len())
    }

    /// Some rows, `[rows, row…]`, contiguous.
    ///
    /// # Errors
    /// As [`view`](Self::view), and [`CandleError`](VmmError::CandleError) with `NarrowInvalidArgs` for rows that are not
    /// there.
    pub fn view_rows(&self, rows: Range<usize>) -> Result<Tensor> {
        self.check_rows(&rows, "view of rows that are not there")?;
        on!(&self.rows, all => all.view(rows))
    }

    /// A copy of all rows in memory of Candle's own, `[rows, row…]`.
    ///
    /// # Errors
    /// As [`view`](Self::view).
    pub fn to_owned(&self) -> Result<Tensor> {
        match &self.rows {
            Rows::Host(rows) => rows.to_owned(),
            // Not `copy`, whose result would share the lease.
            #[cfg(feature = "cuda")]
            Rows::Device(_) => Ok(self.view()?.force_contiguous()?),
        }
    }

    /// A tensor of the same pool with copies of the rows.
    ///
    /// # Errors
    /// As [`append`](Self::append) and [`view`](Self::view).
    pub fn try_clone(&self) -> Result<Self> {
        let mut clone = Self::new(&self.pool, self.row.as_slice(), self.dtype)?;
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
