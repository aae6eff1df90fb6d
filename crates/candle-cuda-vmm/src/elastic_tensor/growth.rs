//! Memory for more rows of several tensors, for all of them or for none.

use super::extent::Extent;
use super::{ElasticTensor, Rows};
use crate::error::Result;
use cuda_vmm::Account;
use cuda_vmm::pool::{Backed, PoolPart};
use std::ops::Range;
use std::time::Duration;

/// What a tensor needs for more rows. Nothing is allocated yet.
#[derive(Debug)]
pub(super) struct Growth {
    /// The bytes to allocate, if any.
    pub(super) bytes: Option<Range<usize>>,
    /// New addresses, if the rows have to move.
    pub(super) moved: Option<Extent>,
}

impl Growth {
    /// The bytes to allocate, if any.
    fn part<'a>(&'a self, tensor: &'a ElasticTensor) -> Option<PoolPart<'a>> {
        let extent = self.moved.as_ref().or(tensor.rows.extent())?;
        let bytes = self.bytes.clone()?;
        Some((extent.range(), bytes.start, bytes.len()))
    }
}

impl Rows {
    fn extent(&self) -> Option<&Extent> {
        match self {
            Self::Host(rows) => rows.extent(),
            #[cfg(feature = "cuda")]
            Self::Device(rows) => rows.extent(),
        }
    }

    fn plan(&mut self, more: usize) -> Result<Growth> {
        match self {
            Self::Host(rows) => rows.plan(more),
            #[cfg(feature = "cuda")]
            Self::Device(rows) => rows.plan(more),
        }
    }

    /// Copies the rows to new addresses, if the growth has some.
    fn copy_to(&self, growth: &Growth) -> Result<()> {
        match (self, &growth.moved) {
            #[cfg(feature = "cuda")]
            (Self::Device(rows), Some(moved)) => rows.copy_to(moved),
            // On the CPU an extent has no contents.
            _ => Ok(()),
        }
    }

    fn finish(&mut self, growth: Growth) {
        match self {
            Self::Host(rows) => rows.finish(growth),
            #[cfg(feature = "cuda")]
            Self::Device(rows) => rows.finish(growth),
        }
    }
}

/// How long a reservation waits for memory.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Wait {
    /// Not at all.
    Never,
    /// For retiring memory, if that is enough.
    ForRetiring,
    /// For any memory, for so long at most.
    AtMost(Duration),
}

impl Wait {
    fn allocate<'a>(
        self,
        account: &Account,
        parts: &[PoolPart<'a>],
    ) -> cuda_vmm::Result<Backed<'a>> {
        match self {
            Self::Never => account.try_allocate_many(parts),
            Self::ForRetiring => account.allocate_many(parts),
            Self::AtMost(timeout) => account.allocate_many_timeout(parts, timeout),
        }
    }
}

impl ElasticTensor {
    /// Allocates memory for `rows` more rows, without adding them. The next rows up to that many
    /// need no memory, and so cannot be refused for want of it.
    ///
    /// Memory that is reserved and not used is freed by [`truncate`](Self::truncate) and
    /// [`clear`](Self::clear).
    ///
    /// # Errors
    /// As [`append`](Self::append). After an error rows and memory are as before.
    pub fn reserve(&mut self, rows: usize) -> Result<()> {
        Self::reserve_together(&mut [self], rows)
    }

    /// As [`reserve`](Self::reserve), for several tensors of one account: for all of them, or after
    /// an error for none.
    ///
    /// # Errors
    /// - As [`append`](Self::append).
    /// - [`Vmm`](crate::VmmError::Vmm) with `ForeignAccount` if a tensor's pool charges another
    ///   account than that of the first tensor.
    pub fn reserve_together(tensors: &mut [&mut Self], rows: usize) -> Result<()> {
        Self::reserve_all(tensors, rows, Wait::ForRetiring)
    }

    pub(crate) fn reserve_all(tensors: &mut [&mut Self], rows: usize, wait: Wait) -> Result<()> {
        let Some(first) = tensors.first() else {
            return Ok(());
        };
        let account = first.pool.account().clone();
        // Also of tensors that need no memory now.
        let mut accounts = tensors.iter().map(|tensor| tensor.pool.account());
        if let Some(other) = accounts.find(|other| !other.is(&account)) {
            return Err(cuda_vmm::VmmError::ForeignAccount {
                expected: account.name().into(),
                found: other.name().into(),
            }
            .into());
        }
        let mut growths = Vec::with_capacity(tensors.len());
        for tensor in tensors.iter_mut() {
            tensor.check_room(rows)?;
            growths.push(tensor.rows.plan(rows)?);
        }
        let parts: Vec<_> = (tensors.iter().zip(&growths))
            .filter_map(|(tensor, growth)| growth.part(tensor))
            .collect();
        let backed = wait.allocate(&account, &parts)?;
        // If a copy fails, the memory is freed with the guard, and the rows are where they were.
        (tensors.iter().zip(&growths))
            .try_for_each(|(tensor, growth)| tensor.rows.copy_to(growth))?;
        backed.keep();
        for (tensor, growth) in tensors.iter_mut().zip(growths) {
            tensor.rows.finish(growth);
        }
        Ok(())
    }

    /// Bytes of device memory that are allocated for the rows: whole pages, with what is reserved.
    pub fn allocated_bytes(&self) -> usize {
        self.rows.extent().map_or(0, |extent| extent.live().len())
    }
}
