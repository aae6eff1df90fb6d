//! The door for a pool to its range: a handle that owns the range's engine.
//!
//! The methods of [`RangeHandle`] are in the file of what they do: `allocate`, `free`, `lease`,
//! `pin`, `hint`, `streams`, `follow`, `compact`, `closing`. Each checks the process first, since
//! in a forked one the locks may be held for good.

use super::account::Account;
use super::books::owner::Owner;
use super::books::range_id::RangeId;
use super::inner::{Engine, Inner};
use super::options::PoolOptions;
use super::range::Range;
use super::slot::Slot;
use super::snapshot::RangeStats;
use crate::size::{Extent, check_page_bytes};
use crate::sync::Arc;
use crate::{Reservation, Result, VmmError};

/// A range of an engine, by which its pool uses it; a cheap clone.
#[derive(Debug, Clone)]
pub(crate) struct RangeHandle {
    account: Account,
    page_bytes: usize,
    pub(crate) slot: Slot,
}

impl RangeHandle {
    /// Reserves addresses for a new range that is charged to an account. Returns it with its first
    /// address.
    pub(crate) fn open(
        account: &Account,
        capacity_bytes: usize,
        page_bytes: usize,
        options: PoolOptions,
    ) -> Result<(Self, u64)> {
        let inner = account.engine().open()?;
        let device = &inner.device;
        check_page_bytes(page_bytes, device.granularity_bytes())?;
        if capacity_bytes == 0 {
            return Err(VmmError::ZeroSize { what: "capacity" });
        }
        options.check()?;
        let reserved_bytes = capacity_bytes.checked_next_multiple_of(page_bytes);
        let reserved_bytes = reserved_bytes.ok_or(VmmError::Overflow {
            offset: 0,
            bytes: capacity_bytes,
        })?;
        let reservation = Reservation::with_alignment(device, reserved_bytes, page_bytes)?;
        let address = reservation.address();
        let size = (capacity_bytes, page_bytes);
        let charged = (account.id(), account.owed()?.clone());
        let range = Range::new(device, reservation, size, charged, options);
        let process = device.driver().process();
        let mut state = inner.state.lock();
        if !state.accounts.is_open(account.id()) {
            // The range goes without the lock: that calls the driver.
            drop(state);
            return Err(VmmError::Closed);
        }
        let slot = state.ranges.insert(range, process);
        drop(state);
        if options.ahead_bytes_max > 0 {
            inner.worker.wake(inner, false);
        }
        let account = account.clone();
        let handle = Self {
            account,
            page_bytes,
            slot,
        };
        Ok((handle, address))
    }

    pub(crate) fn id(&self) -> RangeId {
        self.slot.id()
    }

    /// The range with the account that it is charged to.
    pub(crate) fn owner(&self) -> Owner {
        Owner {
            account: self.account.id(),
            range: self.id(),
        }
    }

    /// The account that the range is charged to.
    pub(crate) fn account(&self) -> &Account {
        &self.account
    }

    /// The engine that the range is on.
    pub(crate) fn engine(&self) -> &Engine {
        self.account.engine()
    }

    /// The same, for modules that have checked the process.
    pub(crate) fn inner(&self) -> &Arc<Inner> {
        self.engine().inner()
    }

    /// Its page in bytes.
    pub(crate) fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// Whether all of the bytes are live; false if the range was closed.
    pub(crate) fn is_live(&self, offset: usize, bytes: usize) -> bool {
        self.slot.lock_open().is_ok_and(|range| {
            let extent = Extent::new(offset, bytes, range.capacity_bytes);
            range.rest.is_awake() && extent.is_ok_and(|extent| range.is_live(&extent.range()))
        })
    }

    /// Pages in which the owner has bytes; 0 if the range was closed.
    pub(crate) fn live_pages(&self) -> usize {
        let range = self.slot.lock_open();
        range.map_or(0, |range| range.owned_pages())
    }

    /// The range's numbers at one moment.
    ///
    /// # Errors
    /// [`VmmError::Forked`], [`VmmError::Closed`].
    pub(crate) fn stats(&self) -> Result<RangeStats> {
        let state = self.engine().open()?.state.lock();
        let range = state.ranges.get(self.id()).ok_or(VmmError::Closed)?;
        Ok(state.range_stats(self.id(), &range))
    }
}
