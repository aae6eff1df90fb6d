//! The configuration of a simulator.

use crate::CostModel;

/// Configuration of a simulator: its devices, their memory, and their behavior. A builder.
///
/// The default is one device of 80 GiB with a granularity of 2 MiB, CUDA 13.0 and no cost model.
/// Device memory is host memory, which takes space only for what is written.
#[derive(Clone, Debug)]
pub struct SimConfig {
    pub(crate) devices: usize,
    pub(crate) memory_bytes: usize,
    pub(crate) granularity_bytes: usize,
    pub(crate) backed: bool,
    pub(crate) cost_model: Option<CostModel>,
    pub(crate) driver_version: i32,
}

impl Default for SimConfig {
    fn default() -> Self {
        Self {
            devices: 1,
            memory_bytes: 80 << 30,
            granularity_bytes: 2 << 20,
            backed: true,
            cost_model: None,
            driver_version: 13000,
        }
    }
}

impl SimConfig {
    /// The most devices that one simulator may have.
    pub const MAX_DEVICES: usize = 32;

    /// Returns the default configuration: one device of 80 GiB.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the number of devices, at most [`MAX_DEVICES`](Self::MAX_DEVICES). With none, `cuInit`
    /// returns `CUDA_ERROR_NO_DEVICE`.
    pub fn devices(mut self, count: usize) -> Self {
        self.devices = count;
        self
    }

    /// Sets the memory of each device, in bytes.
    pub fn memory_bytes(mut self, bytes: usize) -> Self {
        self.memory_bytes = bytes;
        self
    }

    /// Sets the allocation granularity in bytes: a power of two and a multiple of the host's page
    /// size.
    pub fn granularity_bytes(mut self, bytes: usize) -> Self {
        self.granularity_bytes = bytes;
        self
    }

    /// Simulates without host memory: the simulator only tracks addresses. Copies and memsets check
    /// their ranges and move no bytes.
    pub fn unbacked(mut self) -> Self {
        self.backed = false;
        self
    }

    /// Charges calls and work to virtual clocks.
    pub fn cost_model(mut self, model: CostModel) -> Self {
        self.cost_model = Some(model);
        self
    }

    /// Sets the result of `cuDriverGetVersion`, as `major * 1000 + minor * 10`. Below 12050 the
    /// table has no `cuCtxRecordEvent`.
    pub fn driver_version(mut self, version: i32) -> Self {
        self.driver_version = version;
        self
    }
}
