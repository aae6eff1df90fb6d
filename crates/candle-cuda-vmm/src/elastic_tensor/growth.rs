//! Memory for more rows of several tensors, for all of them or for none.

use super::rows::Rows;
use super::{ElasticTensor, Place};
use crate::error::Result;
use cuda_vmm::Account;
use cuda_vmm::pool::{Backed, PoolPart, Turn};
use std::ops::{Deref, DerefMut};
use std::sync::MutexGuard;
use std::task::{Context, Poll, Waker};

/// The rows of a range that grow, of which no other thread adds any meanwhile.
enum Growing<'a> {
    Own(&'a mut Rows),
    Shared(MutexGuard<'a, Rows>),
}

impl Deref for Growing<'_> {
    type Target = Rows;

    fn deref(&self) -> &Rows {
        match self {
            Self::Own(rows) => rows,
            Self::Shared(rows) => rows,
        }
    }
}

impl DerefMut for Growing<'_> {
    fn deref_mut(&mut self) -> &mut Rows {
        match self {
            Self::Own(rows) => rows,
            Self::Shared(rows) => rows,
        }
    }
}

/// Returns the rows of these tensors, each range once.
fn ranges<'a>(tensors: &'a mut [&mut ElasticTensor]) -> Result<Vec<Growing<'a>>> {
    let mut ranges = Vec::with_capacity(tensors.len());
    let mut shared = Vec::new();
    for tensor in tensors.iter_mut() {
        match &mut tensor.place {
            Place::Own(rows) => ranges.push(Growing::Own(rows)),
            Place::Column(column) => {
                let rows = column.shared();
                if rows.is_new(&mut shared) {
                    ranges.push(Growing::Shared(rows.lock()?));
                }
            }
        }
    }
    Ok(ranges)
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
        tensors
            .iter()
            .try_for_each(|tensor| tensor.check_room(rows))?;
        let mut ranges = ranges(tensors)?;
        let growths: Result<Vec<_>> = ranges.iter_mut().map(|range| range.plan(rows)).collect();
        let growths = growths?;
        let parts: Vec<_> = (ranges.iter().zip(&growths))
            .filter_map(|(range, growth)| growth.part(range.extent()))
            .collect();
        let is_reserved = match waits.allocate(&account, &parts) {
            Poll::Pending => false,
            Poll::Ready(backed) => {
                let backed = backed?;
                // If a copy fails, the memory is freed with the guard, and the rows are where they
                // were.
                let mut both = ranges.iter().zip(&growths);
                both.try_for_each(|(range, growth)| range.copy_to(growth))?;
                backed.keep();
                true
            }
        };
        for (range, growth) in ranges.iter_mut().zip(growths) {
            match is_reserved {
                true => range.finish(growth),
                // The next try finds the addresses.
                false => range.keep_addresses(growth),
            }
        }
        Ok(is_reserved)
    }

    /// Bytes of device memory that are allocated for the rows: whole pages, with what is reserved.
    ///
    /// Layers of a [sequence in one range](crate::Sequence::rows_in_one_range) share their memory:
    /// then these are the bytes for all of them.
    pub fn allocated_bytes(&self) -> usize {
        Self::allocated_together([self])
    }

    /// As [`allocated_bytes`](Self::allocated_bytes) for several tensors. Memory that they share
    /// counts once.
    pub(crate) fn allocated_together<'a>(tensors: impl IntoIterator<Item = &'a Self>) -> usize {
        let mut bytes = 0;
        let mut shared = Vec::new();
        for tensor in tensors {
            if let Place::Column(column) = &tensor.place
                && !column.shared().is_new(&mut shared)
            {
                continue;
            }
            let live = tensor.rows(|rows, _| rows.extent().map_or(0, |extent| extent.live().len()));
            bytes += live.unwrap_or(0);
        }
        bytes
    }
}
