//! Objects whose destruction the driver refused.

use crate::{Mapping, PhysicalMemory, Reservation};

/// An object that could not be destroyed and still owns what it owned.
#[derive(Debug)]
pub(crate) enum Stuck {
    Mapping(Mapping),
    Memory(PhysicalMemory),
    Reservation(Reservation),
}

impl Stuck {
    /// Physical bytes that it holds; a reservation holds none.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Mapping(mapping) => mapping.bytes(),
            Self::Memory(memory) => memory.bytes(),
            Self::Reservation(_) => 0,
        }
    }
}

/// What a device could not give back when its owner was dropped.
///
/// Objects in here are owned whole: dropping the quarantine drops each, which tries once more and puts
/// what fails again into the device's current quarantine.
#[derive(Debug, Default)]
pub(crate) struct Quarantine(Vec<Stuck>);

impl Quarantine {
    pub(crate) fn push(&mut self, stuck: Stuck) {
        self.0.push(stuck);
    }

    pub(crate) fn bytes(&self) -> usize {
        self.0.iter().map(Stuck::bytes).sum()
    }

    /// Bytes of addresses in reservations.
    pub(crate) fn address_bytes(&self) -> usize {
        let reservations = self.0.iter().filter_map(|stuck| match stuck {
            Stuck::Reservation(reservation) => Some(reservation.bytes()),
            _ => None,
        });
        reservations.sum()
    }
}
