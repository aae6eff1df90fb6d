//! The sizes of batches that are captured.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use crate::error::GraphError;
use std::collections::BTreeSet;

/// The options of a [`DecodeGraph`](super::DecodeGraph): the sizes of its buckets.
///
/// A step of any batch runs in the smallest bucket that has room for it. The other rows of the
/// bucket have no sequence: give them a length of 0
/// ([`KvBatch::lengths`](crate::attention::KvBatch::lengths)).
///
/// ```
/// use candle_cuda_vmm::graph::DecodeGraphOptions;
///
/// let options = DecodeGraphOptions::up_to(24);
/// assert_eq!(options.buckets().collect::<Vec<_>>(), [1, 2, 4, 8, 16, 24]);
/// assert_eq!(options.bucket(9).unwrap(), 16);
/// assert!(options.bucket(25).is_err());
/// assert_eq!(options.and(12).bucket(9).unwrap(), 12);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DecodeGraphOptions {
    buckets: BTreeSet<usize>,
}

impl DecodeGraphOptions {
    /// Buckets of all powers of two below `batch_max`, and of `batch_max`. No bucket if that is 0.
    pub fn up_to(batch_max: usize) -> Self {
        let powers = (0..usize::BITS).map(|bit| 1 << bit);
        let buckets = powers.take_while(|size| *size < batch_max);
        let largest = (batch_max > 0).then_some(batch_max);
        Self {
            buckets: buckets.chain(largest).collect(),
        }
    }

    /// Buckets of these sizes. Zeros are left out.
    pub fn of(sizes: impl IntoIterator<Item = usize>) -> Self {
        Self {
            buckets: sizes.into_iter().filter(|size| *size > 0).collect(),
        }
    }

    /// Adds a bucket of this size, unless it is 0.
    pub fn and(mut self, size: usize) -> Self {
        self.buckets.extend((size > 0).then_some(size));
        self
    }

    /// Returns the sizes of the buckets, the smallest first.
    pub fn buckets(&self) -> impl DoubleEndedIterator<Item = usize> + '_ {
        self.buckets.iter().copied()
    }

    /// Returns the size of the bucket in which a batch runs.
    ///
    /// # Errors
    /// [`GraphError::NoBucket`] for a batch of 0, and for one beyond the largest bucket.
    pub fn bucket(&self, batch: usize) -> Result<usize, GraphError> {
        let found = self.buckets.range(batch.max(1)..).next().copied();
        found.filter(|_| batch > 0).ok_or(GraphError::NoBucket {
            batch,
            batch_max: self.buckets.last().copied().unwrap_or(0),
        })
    }
}
