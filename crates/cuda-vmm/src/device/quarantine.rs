//! What the driver did not take back from a device's objects.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::Device;
use crate::driver::Driver;
use crate::quarantine::{Quarantine, Stuck};
use crate::{CaptureGuard, Result, VmmError};

impl Device {
    /// Returns the bytes of memory that the driver refused to take back when an object was dropped.
    /// No allocation gets them; [`retry_quarantine`](Self::retry_quarantine) asks the driver again.
    /// 0 in a forked process.
    pub fn quarantined_bytes(&self) -> usize {
        self.quarantine(|quarantine| quarantine.bytes())
    }

    /// Returns the bytes of addresses that the driver refused to free.
    pub fn quarantined_address_bytes(&self) -> usize {
        self.quarantine(|quarantine| quarantine.address_bytes())
    }

    /// Returns the bytes of pinned host memory that the driver refused to unregister when its
    /// [`HostStore`](crate::HostStore) ended.
    pub fn quarantined_host_bytes(&self) -> usize {
        self.quarantine(|quarantine| quarantine.host_bytes())
    }

    /// Tries again to give back what is in quarantine. Returns the bytes of device memory that went.
    ///
    /// If an engine ended with memory that the device might still use, this waits for the device
    /// ([`synchronize`](Self::synchronize)), unless a capture is declared. In a forked process it
    /// does nothing.
    pub fn retry_quarantine(&self) -> usize {
        if self.driver().check_process().is_err() {
            return 0;
        }
        let before = self.quarantined_bytes();
        let unfinished = self.quarantine(Quarantine::take_unfinished);
        if !unfinished.is_empty() {
            let finished = CaptureGuard::try_none().is_some_and(|_no_capture| {
                match self.finish_work(true) {
                    Ok(()) => true,
                    // Nothing runs on a poisoned context any more.
                    Err(error) => error.is_poisoned(),
                }
            });
            if finished {
                drop(unfinished);
            } else {
                self.quarantine(|quarantine| quarantine.push_unfinished(unfinished));
            }
        }
        self.retry_refused();
        before.saturating_sub(self.quarantined_bytes())
    }

    /// Tries again to give back what the driver refused. Returns the bytes that went. Waits for
    /// nothing.
    pub(crate) fn retry_refused(&self) -> usize {
        // Taken out, so that no lock is held while the driver is called. An object that fails again
        // puts itself back when it is dropped.
        let refused = self.quarantine(Quarantine::take_refused);
        let refused_bytes: usize = refused.iter().map(|stuck| stuck.bytes()).sum();
        drop(refused);
        let left_bytes = self.quarantine(|quarantine| quarantine.refused_bytes());
        if self.quarantine(Quarantine::is_over) {
            crate::events::info!("the driver has taken back all that was quarantined");
        }
        refused_bytes.saturating_sub(left_bytes)
    }

    /// Quarantines an object that the driver refused to destroy as it was dropped. After a fork,
    /// and in a poisoned context, there is nothing to keep.
    pub(crate) fn after_drop<S: Stuck + 'static>(
        &self,
        outcome: Result<()>,
        stuck: impl FnOnce() -> S,
    ) {
        match outcome {
            Ok(()) | Err(VmmError::Forked) => {}
            Err(error) if error.is_poisoned() => {}
            Err(error) => self.keep(stuck(), Some(&error)),
        }
    }

    /// Quarantines an object that was not destroyed, with the error if it is known.
    pub(crate) fn keep(&self, stuck: impl Stuck + 'static, error: Option<&VmmError>) {
        if self.is_lost() {
            // Its drop calls no driver, and quarantines nothing.
            return drop(stuck);
        }
        let bytes = stuck.bytes();
        if self.quarantine(|quarantine| quarantine.push(Box::new(stuck))) {
            match error {
                Some(error) => {
                    crate::events::warn!(%error, bytes, "the driver did not take an object back, which is quarantined");
                }
                None => crate::events::warn!(bytes, "an engine left memory, which is quarantined"),
            }
        }
    }

    /// Quarantines objects that the device may still use. They stay until a context synchronise.
    pub(crate) fn keep_unfinished<S: Stuck + 'static>(&self, unfinished: Vec<S>) {
        let boxed = |stuck| -> Box<dyn Stuck> { Box::new(stuck) };
        let unfinished = unfinished.into_iter().map(boxed);
        self.quarantine(|quarantine| quarantine.push_unfinished(unfinished));
    }

    /// Calls the driver to take something back. If the driver returns that the context is poisoned,
    /// all later calls of this kind return that error without calling the driver.
    pub(crate) fn give_to_driver(&self, call: impl FnOnce(&Driver) -> Result<()>) -> Result<()> {
        if let Some(error) = self.0.lost.get() {
            return Err(error.clone());
        }
        call(self.counted_driver()).inspect_err(|error| {
            if error.is_poisoned() {
                let _ = self.0.lost.set(error.clone());
            }
        })
    }

    /// Returns whether the driver takes nothing back any more, since the context is poisoned.
    pub(crate) fn is_lost(&self) -> bool {
        self.0.lost.get().is_some()
    }

    /// Accesses the quarantine. A forked process has none.
    pub(crate) fn quarantine<T: Default>(&self, use_it: impl FnOnce(&mut Quarantine) -> T) -> T {
        let locked = self.0.quarantine.lock();
        locked.map_or_else(|_| T::default(), |mut quarantine| use_it(&mut quarantine))
    }
}
