//! Whether rows are still where they were.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::ElasticTensor;
use super::extent::Extent;
use super::generation::Generation;
use crate::error::{GraphError, Result, VmmError};
use candle_core::Device;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Tells whether the rows of tensors are still at the addresses at which they were when it was
/// made, and in memory of their own. Cloning is cheap.
///
/// A captured step names addresses. It must not run any more when the rows have moved, because they
/// reached the end of their addresses or because a view showed what was written over; when all rows
/// were dropped, with the tensor or without; and when a fork shares their memory.
/// [`DecodeGraph::replay`](crate::graph::DecodeGraph::replay) asks it.
#[derive(Clone, Debug)]
pub struct RowsWatch {
    watched: Vec<Watched>,
    device: Device,
}

#[derive(Clone, Debug)]
struct Watched {
    generation: Arc<Generation>,
    /// The generation when the watch was made.
    seen: u64,
}

impl RowsWatch {
    /// Watches the rows of all these tensors, which are on this device.
    pub(crate) fn of<'a>(
        device: &Device,
        tensors: impl IntoIterator<Item = &'a ElasticTensor>,
    ) -> Result<Self> {
        let watched = tensors.into_iter().map(|tensor| {
            let watched = tensor.rows(|rows, _| rows.extent().map(Extent::watch))?;
            let watched = watched.ok_or(VmmError::NotMapped { offset: 0, size: 0 })?;
            watched.ok_or_else(|| GraphError::RowsMoved.into())
        });
        Ok(Self {
            watched: watched.collect::<Result<_>>()?,
            device: device.clone(),
        })
    }

    /// Returns the device of the rows.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Returns whether all rows are where they were.
    pub fn is_current(&self) -> bool {
        let is_current = |watched: &Watched| watched.generation.get() == watched.seen;
        self.watched.iter().all(is_current)
    }
}

impl Extent {
    /// Watches the rows; `None` if others share their memory.
    fn watch(&self) -> Option<Watched> {
        let (live, shared_end) = (self.live(), self.shared_end.load(Ordering::Relaxed));
        if shared_end > 0 && self.range().is_shared(live.start, live.len()) {
            return None;
        }
        let generation = self.generation.generation().clone();
        let seen = generation.get();
        Some(Watched { generation, seen })
    }
}

impl ElasticTensor {
    /// Watches the rows at their present addresses.
    ///
    /// # Errors
    /// [`NotMapped`](VmmError::NotMapped) if there are no rows yet, and
    /// [`GraphError::RowsMoved`] if others share their memory.
    pub fn watch(&self) -> Result<RowsWatch> {
        RowsWatch::of(self.device(), [self])
    }
}
