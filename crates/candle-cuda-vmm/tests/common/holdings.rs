//! What a device holds: read when a test begins, and compared when it ends.

use super::MIB;
use candle_cuda_vmm::cuda_vmm::sim::Books;
use candle_cuda_vmm::cuda_vmm::{Device, DriverKind};
use std::time::{Duration, Instant};

/// What a device held at a moment.
#[derive(Clone, Debug)]
pub struct Holdings {
    device: Device,
    /// Of a simulated device, which counts everything.
    books: Option<Books>,
    free_bytes: usize,
}

impl Holdings {
    /// What the device holds now.
    pub fn of(device: &Device) -> Self {
        // What Candle freed in the order of a stream goes back to the device when that is waited for.
        device.synchronize().unwrap();
        let simulator = device.driver().simulator();
        Self {
            device: device.clone(),
            books: simulator.map(|simulator| simulator.books(device.ordinal())),
            free_bytes: device.free_bytes().unwrap(),
        }
    }

    /// What the same device holds now.
    pub fn again(&self) -> Self {
        Self::of(&self.device)
    }

    /// What is left on the device that was not there at that moment, in words; `None` if nothing is.
    ///
    /// A simulated device must hold exactly what it held. A GPU may have more free, and less by what its
    /// driver takes for tables of its own. Worker threads may still be giving back when the last object is
    /// dropped, so there is this much patience.
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

/// Bytes that a driver may take for tables of its own, which come and go.
pub fn table_bytes(kind: DriverKind) -> usize {
    match kind {
        DriverKind::Simulated => 0,
        DriverKind::Real => 32 * MIB,
    }
}
