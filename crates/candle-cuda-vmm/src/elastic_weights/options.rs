//! How weights are loaded.

use candle_core::DType;
use std::fmt;
use std::sync::Arc;

/// How weights are loaded.
///
/// ```
/// use candle_core::DType;
/// use candle_cuda_vmm::WeightsOptions;
///
/// let options = WeightsOptions::new()
///     .dtype(DType::BF16)
///     .progress(|bytes, all_bytes| eprintln!("{} %", 100 * bytes / all_bytes));
/// assert_eq!(options.dtype, Some(DType::BF16));
/// ```
#[derive(Clone, Default)]
#[non_exhaustive]
pub struct WeightsOptions {
    /// The type of all floating-point numbers in memory. If none is given, they have those of the
    /// files. Numbers of other kinds always have.
    pub dtype: Option<DType>,
    /// Is told how many bytes have been read, and how many there are; by several threads, and not
    /// always in order.
    pub(super) progress: Option<Arc<Progress>>,
}

type Progress = dyn Fn(usize, usize) + Send + Sync;

impl WeightsOptions {
    /// The defaults: the types of the files, and no word of progress.
    pub fn new() -> Self {
        Self::default()
    }

    /// With floating-point numbers of this type.
    pub fn dtype(mut self, dtype: DType) -> Self {
        self.dtype = Some(dtype);
        self
    }

    /// With a function that is told how many bytes have been read, and how many there are. Several
    /// threads call it, about once for each 2 MiB.
    pub fn progress(mut self, progress: impl Fn(usize, usize) + Send + Sync + 'static) -> Self {
        self.progress = Some(Arc::new(progress));
        self
    }
}

impl fmt::Debug for WeightsOptions {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = formatter.debug_struct("WeightsOptions");
        debug.field("dtype", &self.dtype).finish_non_exhaustive()
    }
}
