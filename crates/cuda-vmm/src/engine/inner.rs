//! One budget on one device: what all owners of an engine share.

use super::options::EngineOptions;
use super::state::StateLock;
use super::worker::Worker;
use crate::process::Process;
use crate::sync::atomic::AtomicUsize;
use crate::sync::{Arc, PoisonError, Weak};
use crate::{Device, QuotaConflict, Result, VmmError};

/// One budget on one device, shared by the ranges that are made on it; a cheap clone.
///
/// It lives until its last range is gone and its memory given back.
#[derive(Clone, Debug)]
pub struct Engine {
    inner: Arc<Inner>,
    process: Process,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) device: Device,
    pub(crate) options: EngineOptions,
    /// The limit as it was given last, or the device's total.
    pub(crate) limit_bytes: AtomicUsize,
    pub(crate) state: StateLock,
    pub(crate) worker: Worker<Inner>,
}

impl Engine {
    /// An engine on this device.
    ///
    /// # Errors
    /// [`VmmError::ZeroSize`] for a limit of 0; [`VmmError::QuotaUnsatisfiable`] if the headroom
    /// leaves nothing, or if `park_bytes_min` is above `park_bytes_max`.
    pub fn new(device: &Device, options: EngineOptions) -> Result<Self> {
        options.check()?;
        let limit_bytes = options.limit_bytes.unwrap_or(device.total_bytes());
        if limit_bytes == 0 {
            return Err(VmmError::ZeroSize { what: "limit" });
        }
        let mut budget_bytes = limit_bytes;
        if options.headroom_bytes > 0 {
            let available_bytes = device.total_bytes();
            if options.headroom_bytes >= available_bytes {
                return Err(VmmError::QuotaUnsatisfiable {
                    what: QuotaConflict::Headroom,
                    asked_bytes: options.headroom_bytes,
                    available_bytes,
                });
            }
            budget_bytes = budget_bytes.min(available_bytes - options.headroom_bytes);
        }
        let inner = Arc::new(Inner {
            device: device.clone(),
            options,
            limit_bytes: AtomicUsize::new(limit_bytes),
            state: StateLock::new(budget_bytes),
            worker: Worker::new(options.worker),
        });
        let holder: Weak<Inner> = Arc::downgrade(&inner);
        device.register(holder)?;
        let process = device.driver().process();
        Ok(Self { inner, process })
    }

    /// For modules whose functions check the process themselves.
    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }

    /// Fails in a forked process, where the engine's locks may be held for good.
    pub(crate) fn open(&self) -> Result<&Arc<Inner>> {
        self.process.check().map(|()| &self.inner)
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.inner.device
    }
}

impl Inner {
    /// Fails in a forked process, where other threads' locks may be held for good and nothing that
    /// is waited for comes.
    pub(crate) fn check_process(&self) -> Result<()> {
        self.device.driver().check_process()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.check_process().is_err() {
            self.worker.abandon();
            return;
        }
        // Pools close their ranges, so memory is left here only if the driver refused it, or if a
        // capture was declared and no worker could wait for its end. The device may still use it,
        // so it is not unmapped now; the device's quarantine keeps it until that is known.
        let state = self.state.state.get_mut();
        let state = state.unwrap_or_else(PoisonError::into_inner);
        state.relocations.abandon(&self.device);
        for mut range in state.ranges.values() {
            let (in_use, finished) = range.pages.take_all();
            self.device.keep_unfinished(in_use);
            for mapping in finished {
                self.device.keep(mapping, None);
            }
        }
    }
}
