//! Objects whose destruction the driver refused.

use crate::{Device, Fence, Mapping, PhysicalMemory, Reservation, Result, Stream, VmmError};

/// An object that could not be destroyed and still owns what it owned.
#[derive(Debug)]
pub(crate) enum Stuck {
    Mapping(Mapping),
    Memory(PhysicalMemory),
    Reservation(Reservation),
    Fence(#[allow(dead_code, reason = "owned to be destroyed")] Fence),
    Stream(#[allow(dead_code, reason = "owned to be destroyed")] Stream),
}

impl Stuck {
    /// Physical bytes that it holds: none but for memory and mappings.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Mapping(mapping) => mapping.bytes(),
            Self::Memory(memory) => memory.bytes(),
            Self::Reservation(_) | Self::Fence(_) | Self::Stream(_) => 0,
        }
    }
}

/// What dropping does with the driver's answer: what it refused goes to the device's quarantine. After a fork, and on a
/// context beyond use, there is nothing to keep.
pub(crate) fn after_drop(device: &Device, outcome: Result<()>, stuck: impl FnOnce() -> Stuck) {
    match outcome {
        Ok(()) | Err(VmmError::Forked) => {}
        Err(error) if error.is_poisoned() => {}
        Err(error) => device.keep(stuck(), Some(&error)),
    }
}

/// What a device could not give back when its owner was dropped.
///
/// Objects in here are owned whole: dropping one tries once more, and what fails again puts itself into the
/// device's current quarantine.
#[derive(Debug, Default)]
pub(crate) struct Quarantine {
    /// What the driver refused.
    refused: Vec<Stuck>,
    /// Mappings that the device may still use: nobody could wait for it when their owner was dropped.
    unfinished: Vec<Mapping>,
    /// Whether it was told that something is in here.
    is_told: bool,
}

impl Quarantine {
    /// Adds an object; says whether that is news, so that it is told once however much follows.
    pub(crate) fn push(&mut self, stuck: Stuck) -> bool {
        self.refused.push(stuck);
        !core::mem::replace(&mut self.is_told, true)
    }

    /// Whether all that was told of has gone; says so once.
    pub(crate) fn is_over(&mut self) -> bool {
        self.refused.is_empty() && core::mem::take(&mut self.is_told)
    }

    /// Adds mappings that must not be unmapped before a context synchronise.
    pub(crate) fn push_unfinished(&mut self, mappings: Vec<Mapping>) {
        self.unfinished.extend(mappings);
    }

    pub(crate) fn take_refused(&mut self) -> Vec<Stuck> {
        core::mem::take(&mut self.refused)
    }

    pub(crate) fn take_unfinished(&mut self) -> Vec<Mapping> {
        core::mem::take(&mut self.unfinished)
    }

    /// Bytes of memory that the driver refused.
    pub(crate) fn refused_bytes(&self) -> usize {
        self.refused.iter().map(Stuck::bytes).sum()
    }

    /// Bytes of memory.
    pub(crate) fn bytes(&self) -> usize {
        self.refused_bytes() + self.unfinished.iter().map(Mapping::bytes).sum::<usize>()
    }

    /// Bytes of addresses in reservations.
    pub(crate) fn address_bytes(&self) -> usize {
        let reservations = self.refused.iter().filter_map(|stuck| match stuck {
            Stuck::Reservation(reservation) => Some(reservation.bytes()),
            _ => None,
        });
        reservations.sum()
    }
}
