//! Rows on either kind of device.

use super::addresses::Addresses;
#[cfg(feature = "cuda")]
use super::device::DeviceRows;
use super::extent::{Extent, Growth};
use super::host::HostRows;
use super::layout::RowLayout;
use crate::error::Result;
use crate::tensor_pool::{Memory, TensorPool};

/// The rows of one range: those of one tensor, or columns of several.
#[derive(Debug)]
pub(super) enum Rows {
    Host(HostRows),
    #[cfg(feature = "cuda")]
    Device(DeviceRows),
}

/// Evaluates an expression for either kind of rows.
macro_rules! with_rows {
    ($rows:expr, $name:ident => $result:expr) => {
        match $rows {
            Rows::Host($name) => $result,
            #[cfg(feature = "cuda")]
            Rows::Device($name) => $result,
        }
    };
}
pub(super) use with_rows;

impl Rows {
    pub(super) fn new(pool: &TensorPool, addresses: Addresses, layout: RowLayout) -> Self {
        match &pool.inner().memory {
            Memory::Host(memory) => Self::Host(HostRows::new(memory, addresses, layout)),
            #[cfg(feature = "cuda")]
            Memory::Device(memory) => Self::Device(DeviceRows::new(memory, addresses, layout)),
        }
    }

    pub(super) fn extent(&self) -> Option<&Extent> {
        with_rows!(self, rows => rows.extent())
    }

    pub(super) fn plan(&mut self, more: usize) -> Result<Growth> {
        with_rows!(self, rows => rows.plan(more))
    }

    /// Copies the rows to new addresses, if the growth has some.
    pub(super) fn copy_to(&self, growth: &Growth) -> Result<()> {
        match (self, &growth.moved) {
            #[cfg(feature = "cuda")]
            (Self::Device(rows), Some(moved)) => rows.copy_to(moved),
            // On the CPU an extent has no contents.
            _ => Ok(()),
        }
    }

    /// Keeps new addresses, if there were none.
    pub(super) fn keep_addresses(&mut self, growth: Growth) {
        if self.extent().is_none() {
            let bytes = None;
            self.finish(Growth { bytes, ..growth });
        }
    }

    /// Keeps the first `len` rows of a column.
    pub(super) fn truncate(&mut self, column: usize, len: usize) {
        if let (0, Some(extent)) = (len, self.extent()) {
            // Other columns may keep its memory.
            extent.generation.end();
        }
        with_rows!(self, rows => rows.truncate(column, len));
    }

    pub(super) fn finish(&mut self, growth: Growth) {
        with_rows!(self, rows => rows.finish(growth));
    }
}
