//! Whether rows are still where they were.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::ElasticTensor;
use super::extent::Extent;
use super::generation::Generation;
use crate::error::{Result, VmmError};
use std::sync::Arc;

/// Tells whether the rows of tensors are still at the addresses at which they were when it was
/// made, and in memory of their own. Cloning is cheap.
///
/// A captured step names addresses. It must not run any more when the rows have moved, because they
/// reached the end of their addresses or because a view showed what was written over; when all rows
/// were dropped, with the tensor or without; and when a fork shares their memory.
/// [`DecodeGraph::replay`](crate::graph::DecodeGraph::replay) asks it.
#[derive(Clone, Debug, Default)]
pub struct RowsWatch(Vec<Watched>);

#[derive(Clone, Debug)]
struct Watched {
    generation: Arc<Generation>,
    /// The generation when the watch was made.
    seen: u64,
}

impl RowsWatch {
    /// Watches the rows of all these tensors.
    pub(crate) fn of<'a>(tensors: impl IntoIterator<Item = &'a ElasticTensor>) -> Result<Self> {
        let watches = tensors.into_iter().map(ElasticTensor::watch);
        let watches: Result<Vec<_>> = watches.collect();
        Ok(Self(
            watches?.into_iter().flat_map(|watch| watch.0).collect(),
        ))
    }

    /// Returns whether all rows are where they were.
    pub fn is_current(&self) -> bool {
        let is_current = |watched: &Watched| watched.generation.get() == watched.seen;
        self.0.iter().all(is_current)
    }
}

impl Extent {
    fn watch(&self) -> RowsWatch {
        let generation = self.generation.generation().clone();
        let seen = generation.get();
        RowsWatch(vec![Watched { generation, seen }])
    }
}

impl ElasticTensor {
    /// Watches the rows at their present addresses.
    ///
    /// # Errors
    /// [`NotMapped`](VmmError::NotMapped) if there are no rows yet.
    pub fn watch(&self) -> Result<RowsWatch> {
        let watch = self.rows(|rows, _| rows.extent().map(Extent::watch))?;
        watch.ok_or(VmmError::NotMapped { offset: 0, size: 0 })
    }
}
