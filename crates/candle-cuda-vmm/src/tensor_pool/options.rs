//! The options of a tensor pool.

use cuda_vmm::EngineOptions;

/// Options of a [`TensorPool`](crate::TensorPool).
///
/// ```
/// use candle_cuda_vmm::{EngineOptions, TensorPoolOptions};
///
/// let options = TensorPoolOptions::new()
///     .engine(EngineOptions::new().limit_bytes(8 << 30))
///     .reservation_bytes(64 << 30)
///     .ahead_bytes_max(32 << 20);
/// assert_eq!(options.engine.limit_bytes, Some(8 << 30));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct TensorPoolOptions {
    /// Options of the engine behind the pool: its limit, the memory that stays mapped after a free,
    /// the largest chunk.
    pub engine: EngineOptions,
    /// Page size in bytes. `None` selects the device's granularity.
    pub page_bytes: Option<usize>,
    /// The most addresses that a tensor reserves, in bytes. They limit the tensor's size and cost
    /// no memory. A tensor reserves all of them at once, and a KV cache those for its `max_seq_len`
    /// tokens, until there are more.
    pub reservation_bytes: usize,
    /// Memory in bytes that the engine's worker maps ahead of each tensor's end, so that the tensor
    /// grows without a driver call; see [`PoolOptions::ahead_bytes_max`].
    ///
    /// [`PoolOptions::ahead_bytes_max`]: cuda_vmm::PoolOptions::ahead_bytes_max
    pub ahead_bytes_max: usize,
    /// Whether an append to a KV cache returns contiguous copies of all tokens instead of views;
    /// see [`contiguous_output`](Self::contiguous_output).
    pub contiguous_output: bool,
}

impl TensorPoolOptions {
    /// The default options: the device's memory is the limit, pages have the device's granularity,
    /// a tensor reserves at most 16 GiB of addresses, and nothing is mapped ahead.
    pub const fn new() -> Self {
        Self {
            engine: EngineOptions::new(),
            page_bytes: None,
            reservation_bytes: 16 << 30,
            ahead_bytes_max: 0,
            contiguous_output: false,
        }
    }

    /// Sets the options of the engine.
    pub const fn engine(mut self, engine: EngineOptions) -> Self {
        self.engine = engine;
        self
    }

    /// Sets the page size, in bytes: a power of two, at least the device's granularity.
    pub const fn page_bytes(mut self, bytes: usize) -> Self {
        self.page_bytes = Some(bytes);
        self
    }

    /// Sets how many bytes of addresses a tensor reserves at most.
    pub const fn reservation_bytes(mut self, bytes: usize) -> Self {
        self.reservation_bytes = bytes;
        self
    }

    /// Sets how many bytes of memory are mapped ahead of each tensor's end.
    pub const fn ahead_bytes_max(mut self, bytes: usize) -> Self {
        self.ahead_bytes_max = bytes;
        self
    }

    /// Sets whether appends to KV caches return contiguous copies of all tokens, instead of views
    /// of token-major memory.
    ///
    /// Use it for models that repeat K and V for each group of heads, as Candle's do (`repeat_kv`).
    /// Candle repeats a contiguous tensor by plain copies, and a transposed view element by
    /// element, which takes longer than a copy first. The copies are Candle's memory for as long as
    /// the model keeps them. [`gqa`](crate::attention::gqa) needs no copies.
    pub const fn contiguous_output(mut self, contiguous: bool) -> Self {
        self.contiguous_output = contiguous;
        self
    }
}

impl Default for TensorPoolOptions {
    fn default() -> Self {
        Self::new()
    }
}
