//! Tensors whose rows are columns of one range.

use super::addresses::Addresses;
use super::layout::RowLayout;
use super::rows::{Rows, with_rows};
use super::{ElasticTensor, Place};
use crate::error::Result;
use crate::tensor_pool::TensorPool;
use candle_core::{DType, Shape};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Rows of several tensors, side by side in one range: row `t` has row `t` of each tensor.
///
/// So many short tensors take few pages. Their memory follows the longest of them. Each tensor is a
/// column, and its views are strided.
#[derive(Debug, Clone)]
pub(crate) struct SharedRows {
    pool: TensorPool,
    dtype: DType,
    rows: Arc<Mutex<Rows>>,
}

/// One of the tensors that share a range.
#[derive(Debug)]
pub(super) struct Column {
    shared: SharedRows,
    pub(super) index: usize,
}

impl SharedRows {
    /// Makes a range for tensors without rows, of these row shapes. Allocates no memory.
    ///
    /// Each tensor may have as many rows as if it had a range of its own.
    ///
    /// # Errors
    /// As [`ElasticTensor::new`].
    pub(crate) fn new(
        pool: &TensorPool,
        shapes: impl IntoIterator<Item = Shape>,
        dtype: DType,
    ) -> Result<Self> {
        let layout = RowLayout::new(shapes, dtype)?;
        let reservation_bytes = pool.inner().options.reservation_bytes;
        let bytes_max = reservation_bytes.saturating_mul(layout.columns());
        let bytes_max = layout.with_padding(bytes_max);
        let page_bytes = pool.inner().memory.common().page_bytes();
        let rows = Rows::new(pool, Addresses::unknown(bytes_max, page_bytes), layout);
        Ok(Self {
            pool: pool.clone(),
            dtype,
            rows: Arc::new(Mutex::new(rows)),
        })
    }

    /// Makes the tensor of a column, with addresses for the number of rows that is expected. A
    /// column has one tensor at a time.
    pub(crate) fn tensor(&self, index: usize, expected_rows: usize) -> Result<ElasticTensor> {
        let row = with_rows!(&mut *self.lock()?, rows => {
            rows.expect(expected_rows);
            rows.dims(index).to_vec()
        });
        Ok(ElasticTensor {
            pool: self.pool.clone(),
            row,
            dtype: self.dtype,
            expected_rows: Some(expected_rows),
            place: Place::Column(Column {
                shared: self.clone(),
                index,
            }),
        })
    }

    pub(super) fn pool(&self) -> &TensorPool {
        &self.pool
    }

    /// The same tensors in another range.
    pub(super) fn with_rows(&self, rows: Rows) -> Self {
        Self {
            rows: Arc::new(Mutex::new(rows)),
            ..self.clone()
        }
    }

    /// Adds the range to those that were seen, unless it is among them. Returns whether it was not.
    pub(super) fn is_new<'a>(&'a self, seen: &mut Vec<&'a Self>) -> bool {
        let is_new = !seen.iter().any(|other| self.is_same(other));
        seen.extend(is_new.then_some(self));
        is_new
    }

    /// Returns whether both are one range.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.rows, &other.rows)
    }

    /// Drops the rows of all columns but these.
    pub(super) fn keep_columns(&self, kept: &[usize]) -> Result<()> {
        let mut rows = self.lock()?;
        let columns = with_rows!(&*rows, rows => rows.columns());
        let gone = columns.filter(|column| !kept.contains(column));
        gone.for_each(|column| rows.truncate(column, 0));
        Ok(())
    }

    /// Locks the rows. Fails in a forked process, where the lock may never be released.
    pub(super) fn lock(&self) -> Result<MutexGuard<'_, Rows>> {
        self.pool.engine().device().driver().check_process()?;
        Ok(self.rows.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Column {
    pub(super) fn new(shared: SharedRows, index: usize) -> Self {
        Self { shared, index }
    }

    pub(super) fn shared(&self) -> &SharedRows {
        &self.shared
    }

    pub(super) fn lock(&self) -> Result<MutexGuard<'_, Rows>> {
        self.shared.lock()
    }
}

/// Frees what the other tensors do not need.
impl Drop for Column {
    fn drop(&mut self) {
        if let Ok(mut rows) = self.lock() {
            with_rows!(&mut *rows, rows => rows.truncate(self.index, 0));
        }
    }
}
