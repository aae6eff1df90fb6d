//! Memory for more rows of several tensors, for all of them or for none.

use super::extent::Extent;
use super::{ElasticTensor, Rows};
use crate::error::Result;
use cuda_vmm::Account;
use cuda_vmm::pool::{Backed, PoolPart, Turn};
use std::ops::Range;
use std::task::{Context, Poll, Waker};

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

    /// Keeps new addresses, if there were none.
    fn keep_addresses(&mut self, growth: Growth) {
        if self.extent().is_none() {
            let bytes = None;
            self.finish(Growth { bytes, ..growth });
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

/// How a reservation waits for memory.
pub(crate) enum Waits<'a> {
    /// Not at all.
    Never,
    /// For retiring memory, if that is enough.
    ForRetiring,
    /// Between polls, at its place in the line.
    InTurn(&'a mut Turn, &'a Waker),
}

impl Waits<'_> {
    fn allocate<'a>(
        self,
        account: &Account,
        parts: &[PoolPart<'a>],
    ) -> Poll<cuda_vmm::Result<Backed<'a>>> {
        match self {
            Self::Never => Poll::Ready(account.try_allocate_many(parts)),
            Self::ForRetiring => Poll::Ready(account.allocate_many(parts)),
            Self::InTurn(turn, waker) => {
                turn.poll_allocate_many(parts, &Context::from_waker(waker))
            }
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
        Self::reserve_by(tensors, rows, Waits::ForRetiring).map(drop)
    }

    /// As [`reserve_together`](Self::reserve_together). Returns whether the memory is reserved; if
    /// not, the turn is to be tried again.
    pub(crate) fn reserve_by(
        tensors: &mut [&mut Self],
        rows: usize,
        waits: Waits<'_>,
    ) -> Result<bool> {
        let Some(first) = tensors.first() else {
            return Ok(true);
        };
        let account = first.pool.account().clone();
        // Also of tensors that need no memory now.
        let mut accounts = tensors.iter().map(|tensor| tensor.pool.account());
        if let Some(other) = accounts.find(|other| **other != account) {
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
        let is_reserved = match waits.allocate(&account, &parts) {
            Poll::Pending => false,
            Poll::Ready(backed) => {
                let backed = backed?;
                // If a copy fails, the memory is freed with the guard, and the rows are where they
                // were.
                let mut both = tensors.iter().zip(&growths);
                both.try_for_each(|(tensor, growth)| tensor.rows.copy_to(growth))?;
                backed.keep();
                true
            }
        };
        for (tensor, growth) in tensors.iter_mut().zip(growths) {
            match is_reserved {
                true => tensor.rows.finish(growth),
                // The next try finds the addresses.
                false => tensor.rows.keep_addresses(growth),
            }
        }
        Ok(is_reserved)
    }

    /// Bytes of device memory that are allocated for the rows: whole pages, with what is reserved.
    pub fn allocated_bytes(&self) -> usize {
        self.rows.extent().map_or(0, |extent| extent.live().len())
    }
}
