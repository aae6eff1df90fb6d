//! Rows that are written over in place, as those of a ring are.

use super::ElasticTensor;
use super::rows::{Rows, with_rows};
use crate::error::Result;
use candle_core::Tensor;
use std::ops::Range;

#[cfg(feature = "cuda")]
use super::{Place, device::DeviceRows, is_pair};
#[cfg(feature = "cuda")]
use crate::append::AppendOutcome;

impl ElasticTensor {
    /// Moves all rows to a new place if a view shows some of these.
    ///
    /// # Errors
    /// As [`append`](Self::append). After an error the rows are unchanged.
    pub(crate) fn make_writable(&mut self, rows: Range<usize>) -> Result<()> {
        self.check_rows(&rows, "there are no such rows")?;
        self.rows_mut(|all, column| with_rows!(all, all => all.make_writable(column, rows)))?
    }

    /// Writes over rows from row `at` on, which are [writable](Self::make_writable). A view that
    /// was made since then shows the new rows.
    ///
    /// # Errors
    /// As [`append`](Self::append). After an error some of the rows may be written.
    pub(crate) fn overwrite(&mut self, at: usize, rows: &Tensor) -> Result<()> {
        self.check_like(rows)?;
        self.check_rows(&(at..at + rows.dims()[0]), "there are no such rows")?;
        self.rows_mut(|all, column| with_rows!(all, all => all.overwrite(column, at, rows)))?
    }

    /// Copies `count` rows from row `at` on to Candle's own memory.
    pub(crate) fn copy_of(&self, at: usize, count: usize) -> Result<Tensor> {
        Ok(self.view()?.narrow(0, at, count)?.force_contiguous()?)
    }

    /// As [`overwrite`](Self::overwrite) for keys and values, by one launch, with the sequence in
    /// dimension `dim`. Returns `false` if that is not possible for these tensors. Then, and after
    /// an error, no row is written.
    #[cfg(feature = "cuda")]
    pub(crate) fn overwrite_both(
        [keys, values]: [(&mut Self, &Tensor); 2],
        at: usize,
        dim: usize,
    ) -> Result<bool> {
        let is_pair = is_pair([(keys.0, keys.1), (values.0, values.1)]);
        let (Place::Own(first), Place::Own(second)) = (&keys.0.place, &values.0.place) else {
            return Ok(false);
        };
        match (&**first, &**second) {
            (Rows::Device(first), Rows::Device(second)) if is_pair => {
                let pair = [(first, keys.1), (second, values.1)];
                let queued = DeviceRows::overwrite_both(pair, at, dim)?;
                Ok(!matches!(queued, AppendOutcome::Unsupported))
            }
            _ => Ok(false),
        }
    }
}
