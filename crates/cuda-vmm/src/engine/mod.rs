//! One budget on one device: which range holds which physical memory.
//!
//! Three rules hold everywhere: no lock is held over a driver call; what a failed call leaves is
//! what was there before; nothing is unmapped that the device may still use.
//!
//! The modules stand on floors, and each uses those below it only:
//!
//! ```text
//! sleep                               giving up all memory of ranges, and having it again
//! allocate, compact, share,           what takes several of the steps below
//! make_private
//! waiting, step                       how long a call waits; the work that is due now and then
//! free, lease, pin, hint, streams,    the methods of a range's handle
//! follow, closing
//! handle                              a range, with the account that it is charged to
//! account, listener                   a share of the budget; a task that waits for a change
//! relief, prefetch, guarantee,        what is done with the budget
//! shortage, retry, stranded, moving,
//! drain, sharing, backing, refused,
//! retire
//! inner, worker                       the budget: the state, its options, its thread
//! changes                             the lock of the state, and the protocol of waiting for a change
//! state, owing                        the state
//! ranges, slot, range                 a range behind its lock
//! queue, users, relocation(s)         what the driver has to be asked about
//! accounts, owed, scope, listeners    whose memory it is, and what is woken
//! books, options, stats, at_work      pure bookkeeping, and plain values
//! ```
#![deny(clippy::unwrap_used)]

mod account;
mod accounts;
mod allocate;
mod at_work;
mod backing;
mod books;
mod changes;
mod closing;
mod compact;
mod drain;
mod follow;
mod free;
mod guarantee;
mod handle;
mod hint;
mod inner;
mod lease;
mod limit;
mod listener;
mod listeners;
mod make_private;
mod moving;
mod options;
mod owed;
mod owing;
mod pin;
mod prefetch;
mod queue;
mod range;
mod ranges;
mod refused;
mod relief;
mod relocation;
mod relocations;
mod retire;
mod retry;
mod scope;
mod share;
mod sharing;
mod shortage;
mod sleep;
mod slot;
mod snapshot;
mod state;
mod stats;
mod step;
mod stranded;
mod streams;
mod target;
mod users;
mod waiting;
mod worker;

pub(crate) use account::Reclaimer;
pub use account::{Account, Demand};
pub(crate) use allocate::{Ask, Later, allocate_all, take_all_there};
pub use books::account::Quota;
pub use books::counters::{EngineCounters, PoolCounters};
pub(crate) use books::hint::Hint;
pub use compact::CompactReport;
pub(crate) use free::deallocate_together;
pub(crate) use handle::RangeHandle;
pub use inner::Engine;
pub use options::{EngineOptions, PoolOptions, WorkerMode};
pub use pin::GraphPin;
pub(crate) use range::Place;
pub use range::leases::LeaseToken;
pub(crate) use share::{Share, share_all};
pub(crate) use sleep::{Arrival, Waking, sleep_all, wake_all};
pub use sleep::{Keep, Slept};
pub(crate) use snapshot::{AccountLook, Look, RangeStats};
pub(crate) use stats::write_rest;
pub use stats::{AccountStats, EngineStats, Givable, StepReport};
pub(crate) use waiting::Patience;

use crate::Result;
use retry::Which;
use scope::Scope;
use worker::Steps;

impl Engine {
    /// What it holds now; one moment's snapshot. All zero except the limit in a forked process.
    pub fn stats(&self) -> EngineStats {
        // In a forked process the lock may be held for good.
        let mut stats = match self.open() {
            Ok(inner) => inner.state.lock().stats_seen(|_, _| ()),
            Err(_) => EngineStats::default(),
        };
        stats.limit_bytes = self.limit_bytes();
        stats
    }

    /// What has happened so far; one moment's numbers. All zero in a forked process except what the
    /// device counts.
    pub fn counters(&self) -> EngineCounters {
        let mut counters = match self.open() {
            Ok(inner) => inner.state.lock().look().counters,
            Err(_) => EngineCounters::default(),
        };
        counters.device_calls = self.device().memory_calls();
        counters
    }

    /// Does the work that is due: looks which freed memory the device has finished with,
    /// synchronises the context if no stream was named (unless a capture is declared), gives back
    /// what is above `park_bytes_max`, makes memory ahead for the ranges that ask for it, and
    /// retries what the driver refused.
    ///
    /// With [`WorkerMode::Thread`] the engine's thread calls it. Waits for the device only if a
    /// context synchronise is due.
    ///
    /// In a forked process it does nothing.
    pub fn step(&self) -> StepReport {
        match self.open() {
            Ok(inner) => inner.step(false),
            Err(_) => StepReport::default(),
        }
    }

    /// Gives back everything that is not live and that the device has finished with; returns the
    /// bytes.
    ///
    /// Waits for nothing: what is still retiring goes later.
    ///
    /// # Errors
    /// The driver's, if it refused; what it refused is in quarantine.
    /// [`VmmError::Forked`](crate::VmmError::Forked).
    pub fn trim(&self) -> Result<usize> {
        self.trim_to(0)
    }

    /// As [`trim`](Self::trim), but only until no more than `bytes` bytes are committed.
    ///
    /// # Errors
    /// As [`trim`](Self::trim).
    pub fn trim_to(&self, bytes: usize) -> Result<usize> {
        let inner = self.open()?;
        inner.poll();
        let retried_bytes = inner.retry(&Which::All);
        let (given_bytes, outcome) =
            inner.give_up(Scope::All, |parts| parts.total_bytes() <= bytes);
        outcome.map(|()| retried_bytes + given_bytes)
    }
}
