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
    /// Tensors that are one tensor as well.
    pub(super) joins: Vec<Join>,
    /// Is told how many bytes have been read, and how many there are; by several threads, and not
    /// always in order.
    pub(super) progress: Option<Arc<Progress>>,
}

/// Tensors that follow each other in memory, and are one tensor of this name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Join {
    pub(super) name: String,
    pub(super) parts: Vec<String>,
}

impl Join {
    pub(super) fn new<P: Into<String>>(
        name: impl Into<String>,
        parts: impl IntoIterator<Item = P>,
    ) -> Self {
        Self {
            name: name.into(),
            parts: parts.into_iter().map(Into::into).collect(),
        }
    }
}

type Progress = dyn Fn(usize, usize) + Send + Sync;

impl WeightsOptions {
    /// The defaults: the types of the files, no joins, and no word of progress.
    pub fn new() -> Self {
        Self::default()
    }

    /// With floating-point numbers of this type.
    pub fn dtype(mut self, dtype: DType) -> Self {
        self.dtype = Some(dtype);
        self
    }

    /// With these tensors one below the other in memory, so that builders also have the tensor
    /// `name` of all their rows, and no byte is copied: shapes `[a, in…]` and `[b, in…]` give
    /// `[a + b, in…]`. So a model that multiplies by several matrices at once finds them joined.
    ///
    /// The parts keep their own names. A part begins where the one before it ends, which is at no
    /// multiple of 256 bytes if a row is not. Parts that differ in their type or inner dimensions,
    /// or are missing, fail the loading: see [`WeightsError`](crate::WeightsError).
    pub fn join<P: Into<String>>(
        mut self,
        name: impl Into<String>,
        parts: impl IntoIterator<Item = P>,
    ) -> Self {
        self.joins.push(Join::new(name, parts));
        self
    }

    /// With a function that is told how many bytes have been read, and how many there are. Several
    /// threads call it, about once for each 2 MiB.
    pub fn progress(mut self, progress: impl Fn(usize, usize) + Send + Sync + 'static) -> Self {
        self.progress = Some(Arc::new(progress));
        self
    }

    /// Tells how many bytes are there.
    pub(super) fn tell(&self, bytes: usize, all_bytes: usize) {
        if let Some(progress) = &self.progress {
            progress(bytes, all_bytes);
        }
    }
}

impl fmt::Debug for WeightsOptions {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = formatter.debug_struct("WeightsOptions");
        debug
            .field("dtype", &self.dtype)
            .field("joins", &self.joins)
            .finish_non_exhaustive()
    }
}
