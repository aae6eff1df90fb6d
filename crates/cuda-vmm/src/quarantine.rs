//! Objects whose destruction the driver refused.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use core::fmt::Debug;

/// An object that the driver did not destroy, and that still owns what it owned. Dropping it asks
/// the driver again.
pub(crate) trait Stuck: Debug + Send + Sync {
    /// Physical memory that it holds, in bytes.
    fn bytes(&self) -> usize {
        0
    }

    /// Host memory that it pins, in bytes.
    fn host_bytes(&self) -> usize {
        0
    }

    /// Addresses that it reserves, in bytes.
    fn address_bytes(&self) -> usize {
        0
    }
}

/// What a device could not give back when its owner was dropped.
///
/// The quarantine owns its objects whole: dropping one tries once more, and what fails again puts
/// itself into the device's current quarantine.
#[derive(Debug, Default)]
pub(crate) struct Quarantine {
    /// What the driver refused.
    refused: Vec<Box<dyn Stuck>>,
    /// What the device may still use: its owner could not wait when it was dropped.
    unfinished: Vec<Box<dyn Stuck>>,
    /// Whether a warning was given that something is in here.
    is_told: bool,
}

impl Quarantine {
    /// Adds an object. Returns whether it is the first, so that one warning stands for all that
    /// follows.
    pub(crate) fn push(&mut self, stuck: Box<dyn Stuck>) -> bool {
        self.refused.push(stuck);
        !core::mem::replace(&mut self.is_told, true)
    }

    /// Returns, once, whether all that a warning was given for has gone.
    pub(crate) fn is_over(&mut self) -> bool {
        self.refused.is_empty() && core::mem::take(&mut self.is_told)
    }

    /// Adds objects that must not be destroyed before a context synchronise.
    pub(crate) fn push_unfinished(&mut self, unfinished: impl IntoIterator<Item = Box<dyn Stuck>>) {
        self.unfinished.extend(unfinished);
    }

    pub(crate) fn take_refused(&mut self) -> Vec<Box<dyn Stuck>> {
        core::mem::take(&mut self.refused)
    }

    pub(crate) fn take_unfinished(&mut self) -> Vec<Box<dyn Stuck>> {
        core::mem::take(&mut self.unfinished)
    }

    /// Memory that the driver refused to take back, in bytes.
    pub(crate) fn refused_bytes(&self) -> usize {
        self.refused.iter().map(|stuck| stuck.bytes()).sum()
    }

    /// Memory in bytes.
    pub(crate) fn bytes(&self) -> usize {
        let unfinished = self.unfinished.iter();
        self.refused_bytes() + unfinished.map(|stuck| stuck.bytes()).sum::<usize>()
    }

    /// Host memory in bytes.
    pub(crate) fn host_bytes(&self) -> usize {
        self.refused.iter().map(|stuck| stuck.host_bytes()).sum()
    }

    /// Addresses in bytes.
    pub(crate) fn address_bytes(&self) -> usize {
        self.refused.iter().map(|stuck| stuck.address_bytes()).sum()
    }
}
