//! The open accounts of an engine: their names, what they owe, and what their ranges have done.

use super::books::account::AccountId;
use super::books::counters::PoolCounters;
use super::owed::Owed;
use crate::sync::Arc;
use std::collections::{BTreeMap, BTreeSet};

/// What an engine knows of an account besides what the ledger does.
#[derive(Debug, Clone)]
pub(crate) struct AccountEntry {
    /// Unique among the open accounts of an engine.
    pub(crate) name: Arc<str>,
    pub(crate) owed: Arc<Owed>,
    /// What those of its ranges have done that are gone.
    pub(crate) counters: PoolCounters,
}

/// The open accounts of an engine.
#[derive(Debug, Default)]
pub(crate) struct Accounts {
    by_id: BTreeMap<AccountId, AccountEntry>,
    names: BTreeSet<Arc<str>>,
}

impl Accounts {
    /// Whether an open account has this name.
    pub(crate) fn has_name(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    /// Whether an account is open.
    pub(crate) fn is_open(&self, id: AccountId) -> bool {
        self.by_id.contains_key(&id)
    }

    /// An account, if it is open.
    pub(crate) fn get(&self, id: AccountId) -> Option<&AccountEntry> {
        self.by_id.get(&id)
    }

    /// Whether an account has a waker for memory that it was refused.
    pub(crate) fn is_woken_for_memory(&self, id: AccountId) -> bool {
        let entry = self.by_id.get(&id);
        entry.is_some_and(|entry| entry.owed.memory.is_set())
    }

    /// Adds an account. One without a name is called by its number.
    pub(crate) fn insert(&mut self, id: AccountId, name: Option<&str>) -> AccountEntry {
        let name: Arc<str> = match name {
            Some(name) => name.into(),
            None => {
                let mut name = format!("#{}", id.number());
                // A caller may have chosen that name.
                while self.has_name(&name) {
                    name.insert(0, '#');
                }
                name.into()
            }
        };
        let entry = AccountEntry {
            name,
            owed: Arc::default(),
            counters: PoolCounters::default(),
        };
        self.names.insert(entry.name.clone());
        self.by_id.insert(id, entry.clone());
        entry
    }

    /// Takes an account out that is closed. What it is left with is to be dropped without a lock.
    pub(crate) fn remove(&mut self, id: AccountId) -> Option<AccountEntry> {
        let entry = self.by_id.remove(&id)?;
        self.names.remove(&entry.name);
        Some(entry)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (AccountId, &AccountEntry)> {
        self.by_id.iter().map(|(id, entry)| (*id, entry))
    }

    /// Adds what a range has done that is gone.
    pub(crate) fn add_counters(&mut self, id: AccountId, counters: &PoolCounters) {
        if let Some(entry) = self.by_id.get_mut(&id) {
            entry.counters.add(counters);
        }
    }
}
