//! All numbers that an operator reads, at one moment.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use crate::MemoryParts;
use crate::engine::{
    AccountLook, AccountStats, Engine, EngineCounters, EngineStats, Look, PoolCounters, Quota,
};

/// One account of an engine, such as a model of a
/// [`SharedMemoryPool`](crate::SharedMemoryPool), as a [`Snapshot`] has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
#[non_exhaustive]
pub struct AccountSnapshot {
    /// The name of the account; `#` and a number if it was made with a pool.
    pub name: String,
    /// How much it may hold.
    pub quota: Quota,
    /// The bytes that it is asked to give back.
    pub owed_bytes: usize,
    /// The memory that it holds, by parts, and its addresses.
    pub stats: AccountStats,
    /// Counts of events on all its ranges.
    pub counters: PoolCounters,
}

/// An engine and the accounts on it at one moment.
///
/// The parts of [`engine`](Self::engine) are those of all [`accounts`](Self::accounts) and of
/// [`others`](Self::others), one by one, and their sum is what is committed; what each account
/// holds is the sum of its own parts.
///
/// With the feature `serde` it can be written and read; a field that is missing then is read as
/// zero.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
#[non_exhaustive]
pub struct Snapshot {
    /// The memory that the engine holds.
    pub engine: EngineStats,
    /// Counts of events on the engine.
    pub counters: EngineCounters,
    /// The open accounts, by name.
    pub accounts: Vec<AccountSnapshot>,
    /// Memory of no open account: the cache, and what closed accounts have left.
    pub others: MemoryParts,
}

impl From<AccountLook> for AccountSnapshot {
    fn from(look: AccountLook) -> Self {
        Self {
            name: look.name.as_ref().to_owned(),
            quota: look.quota,
            owed_bytes: look.owed_bytes,
            stats: look.stats,
            counters: look.counters,
        }
    }
}

impl Engine {
    /// The numbers of the budget and of each account at one moment. No call of another thread comes
    /// between. So the memory of the accounts and of no account adds up to what the engine holds.
    ///
    /// Makes no driver calls. All zero except the limit in a forked process. Takes the engine's
    /// lock for as long as it takes to count the runs of live bytes.
    pub fn snapshot(&self) -> Snapshot {
        let Look {
            stats,
            counters,
            accounts,
        } = self.look();
        let mut accounts: Vec<_> = accounts.into_iter().map(AccountSnapshot::from).collect();
        accounts.sort_by(|one, other| one.name.cmp(&other.name));
        let held: MemoryParts = accounts.iter().map(|account| account.stats.parts).sum();
        Snapshot {
            engine: stats,
            counters,
            accounts,
            others: stats.parts - held,
        }
    }
}
