//! The limit of an engine, which can change while it runs.

use super::inner::{Engine, Inner};
use crate::sync::atomic::Ordering;
use crate::{Result, VmmError};

impl Engine {
    /// The limit in bytes, as it was given last.
    pub fn limit_bytes(&self) -> usize {
        self.inner().limit_bytes.load(Ordering::Relaxed)
    }

    /// Changes the limit while the engine runs, up or down.
    ///
    /// The limit may be below what is held. Then nothing more is made, what is parked, cached or
    /// made ahead goes with the next step, and accounts owe the rest
    /// ([`Account::owed_bytes`](super::Account::owed_bytes)), none of them below its guarantee.
    /// What is live or leased stays until its owner frees it.
    ///
    /// # Errors
    /// [`VmmError::ZeroSize`] for a limit of 0; [`VmmError::QuotaUnsatisfiable`] if the accounts
    /// are guaranteed more; [`VmmError::Forked`]. Then nothing has changed.
    pub fn set_limit_bytes(&self, bytes: usize) -> Result<()> {
        let engine = self.open()?;
        if bytes == 0 {
            return Err(VmmError::ZeroSize { what: "limit" });
        }
        let mut state = engine.state.lock();
        state.ledger.set_limit(engine.budget_bytes(bytes))?;
        state.starved.note_other_room();
        engine.limit_bytes.store(bytes, Ordering::Relaxed);
        drop(state);
        // What is to be spared above it goes with the next step.
        engine.worker.wake(engine, false);
        Ok(())
    }
}

impl Inner {
    /// What a limit leaves for the pools: with a headroom, no more than the device has beside it.
    pub(crate) fn budget_bytes(&self, limit_bytes: usize) -> usize {
        match self.options.headroom_bytes {
            0 => limit_bytes,
            headroom_bytes => {
                limit_bytes.min(self.device.total_bytes().saturating_sub(headroom_bytes))
            }
        }
    }
}
