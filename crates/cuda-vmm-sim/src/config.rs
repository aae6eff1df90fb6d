//! What a simulator is to look like.

use crate::CostModel;

/// How many devices, how much memory, and how it behaves; a builder.
///
/// By default one device of 80 GiB with a granularity of 2 MiB, backed by host memory that takes
/// space only where it is written, CUDA 13.0, and no cost model.
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

    /// The default: one device of 80 GiB.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many devices there are, at most [`MAX_DEVICES`](Self::MAX_DEVICES). With none, `cuInit`
    /// answers `CUDA_ERROR_NO_DEVICE`.
    pub fn devices(mut self, count: usize) -> Self {
        self.devices = count;
        self
    }

    /// The memory of each device, in bytes.
    pub fn memory_bytes(mut self, bytes: usize) -> Self {
        self.memory_bytes = bytes;
        self
    }

    /// The allocation granularity, in bytes: a power of two and a multiple of the host's page size.
    pub fn granularity_bytes(mut self, bytes: usize) -> Self {
        self.granularity_bytes = bytes;
        self
    }

    /// Keeps books only: addresses are mere numbers, no host memory is reserved or written, and
    /// copies and memsets check their ranges but move nothing.
    pub fn unbacked(mut self) -> Self {
        self.backed = false;
        self
    }

    /// Charges calls and work to virtual clocks.
    pub fn cost_model(mut self, model: CostModel) -> Self {
        self.cost_model = Some(model);
        self
    }

    /// What `cuDriverGetVersion` answers, as `major * 1000 + minor * 10`. Below 12050 the table has no
    /// `cuCtxRecordEvent`.
    pub fn driver_version(mut self, version: i32) -> Self {
        self.driver_version = version;
        self
    }
}
