//! The resources that a device holds: read when a test begins, and compared when it ends.

use super::MIB;
use candle_cuda_vmm::cuda_vmm::sim::Books;
use candle_cuda_vmm::cuda_vmm::{Device, DriverKind};
use std::time::{Duration, Instant};

/// The resources that a device held at one moment.
#[derive(Clone, Debug)]
pub struct Holdings {
    device: Device,
    /// The books of a simulated device, which count everything.
    books: Option<Books>,
    free_bytes: usize,
}

impl Holdings {
    /// Reads what the device holds now.
    pub fn of(device: &Device) -> Self {
        // The device gets memory that Candle freed on a stream only when the stream is waited for.
        device.synchronize().unwrap();
        let simulator = device.driver().simulator();
        Self {
            device: device.clone(),
            books: simulator.map(|simulator| simulator.books(device.ordinal())),
            free_bytes: device.free_bytes().unwrap(),
        }
    }

    /// Reads again what the same device holds.
    pub fn again(&self) -> Self {
        Self::of(&self.device)
    }

    /// Describes what the device holds beyond that moment; `None` if nothing. A simulated device
    /// must hold exactly what it held. A GPU may have more free memory, or less by the size of its
    /// driver's tables. Worker threads may still free memory after the last object is dropped, so
    /// it retries for `patience`.
    pub fn leak_after(&self, patience: Duration) -> Option<String> {
        let deadline = Instant::now() + patience;
        loop {
            let leak = self.leak()?;
            if Instant::now() >= deadline {
                return Some(leak);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn leak(&self) -> Option<String> {
        let device = &self.device;
        let ordinal = device.ordinal();
        let quarantined = (
            device.quarantined_bytes(),
            device.quarantined_address_bytes(),
        );
        if quarantined != (0, 0) {
            return Some(format!(
                "device {ordinal} has {} bytes of memory and {} of addresses in quarantine",
                quarantined.0, quarantined.1
            ));
        }
        let now = Self::of(device);
        if now.books != self.books {
            return Some(format!(
                "device {ordinal} held {:?} and now holds {:?}",
                self.books, now.books
            ));
        }
        let least = self
            .free_bytes
            .saturating_sub(table_bytes(device.driver().kind()));
        (now.free_bytes < least).then(|| {
            format!(
                "device {ordinal} had {} bytes free and now has {}",
                self.free_bytes, now.free_bytes
            )
        })
    }
}

/// The memory in bytes that a driver may use for its own tables, which vary.
pub fn table_bytes(kind: DriverKind) -> usize {
    match kind {
        DriverKind::Simulated => 0,
        DriverKind::Real => 32 * MIB,
    }
}
