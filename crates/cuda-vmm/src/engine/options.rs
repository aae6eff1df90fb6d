//! How an engine and a range on it are made.

use super::books::policy::CHUNK_BYTES;
use crate::{QuotaConflict, Result, VmmError};

/// What takes an engine's steps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WorkerMode {
    /// A thread of the engine's own, started when there is first something to do and silent when
    /// there is not.
    #[default]
    Thread,
    /// Only [`Engine::step`](crate::Engine::step), and calls that need what a step would bring. For
    /// tests and simulations, which are deterministic with it.
    Manual,
}

/// How an engine is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineOptions {
    /// The budget in bytes; the device's total if none is given. A limit above the device's memory
    /// is kept as given: then the driver says when there is no more.
    pub limit_bytes: Option<usize>,
    /// Memory of the device, in bytes, that the budget leaves alone, for other allocators in the
    /// process.
    pub headroom_bytes: usize,
    /// How much freed memory stays mapped, in bytes, to be taken back without a driver call. If
    /// more is freed, it is given back down to [`park_bytes_min`](Self::park_bytes_min). 0 keeps
    /// nothing.
    pub park_bytes_max: usize,
    /// Down to how many bytes freed memory is given back once it is more than
    /// [`park_bytes_max`](Self::park_bytes_max), so that a range that breathes does not call the
    /// driver at each breath. Three quarters of that if none is given; never more than that.
    pub park_bytes_min: Option<usize>,
    /// How much memory that is no longer mapped is kept, in bytes, to be mapped again anywhere
    /// without being made. It is overwritten with zeros on the device before, so that no range
    /// finds another's bytes in it, and given up before an allocation is refused. 0 keeps nothing.
    pub cache_bytes_max: usize,
    /// The largest chunk in bytes; 128 MiB is the default, and 1 GiB the most. A page is the
    /// smallest chunk whatever this says, so with 0 each page has a chunk of its own and can be
    /// given back alone. Larger chunks take fewer driver calls, and a chunk is only given back
    /// whole: what it holds without being live is slack, which
    /// [`compact`](crate::VirtualMemoryPool::compact) gives back.
    pub chunk_bytes_max: usize,
    /// What takes the steps.
    pub worker: WorkerMode,
}

impl EngineOptions {
    /// The defaults: the device's total, no headroom, nothing parked or cached, chunks of up to 128
    /// MiB, a worker thread.
    pub const fn new() -> Self {
        Self {
            limit_bytes: None,
            headroom_bytes: 0,
            park_bytes_max: 0,
            park_bytes_min: None,
            cache_bytes_max: 0,
            chunk_bytes_max: CHUNK_BYTES,
            worker: WorkerMode::Thread,
        }
    }

    /// With a budget in bytes.
    pub const fn limit_bytes(mut self, bytes: usize) -> Self {
        self.limit_bytes = Some(bytes);
        self
    }

    /// With memory left for others, in bytes.
    pub const fn headroom_bytes(mut self, bytes: usize) -> Self {
        self.headroom_bytes = bytes;
        self
    }

    /// With freed memory kept mapped, up to this many bytes.
    pub const fn park_bytes_max(mut self, bytes: usize) -> Self {
        self.park_bytes_max = bytes;
        self
    }

    /// With freed memory given back down to this many bytes, once it is too much.
    pub const fn park_bytes_min(mut self, bytes: usize) -> Self {
        self.park_bytes_min = Some(bytes);
        self
    }

    /// With unmapped memory kept, up to this many bytes.
    pub const fn cache_bytes_max(mut self, bytes: usize) -> Self {
        self.cache_bytes_max = bytes;
        self
    }

    /// With chunks of up to this many bytes.
    pub const fn chunk_bytes_max(mut self, bytes: usize) -> Self {
        self.chunk_bytes_max = bytes;
        self
    }

    /// With this worker.
    pub const fn worker(mut self, worker: WorkerMode) -> Self {
        self.worker = worker;
        self
    }

    /// Down to how many bytes parked memory is given back once it is too much.
    pub(crate) fn park_low_bytes(&self) -> usize {
        let max_bytes = self.park_bytes_max;
        self.park_bytes_min.unwrap_or(max_bytes - max_bytes / 4)
    }

    /// Checks what can be told without a device, as [`Engine::new`](crate::Engine::new) does first.
    ///
    /// # Errors
    /// [`VmmError::ZeroSize`] for a limit of 0; [`VmmError::QuotaUnsatisfiable`] if
    /// `park_bytes_min` is above `park_bytes_max`.
    pub fn check(&self) -> Result<()> {
        if self.limit_bytes == Some(0) {
            return Err(VmmError::ZeroSize { what: "limit" });
        }
        let what = QuotaConflict::ParkBytesMin;
        check_watermarks(what, self.park_bytes_min, self.park_bytes_max)
    }
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self::new()
    }
}

/// How one elastic range is made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolOptions {
    /// Whether each run of pages that an allocation finds without memory gets one physical handle,
    /// whatever its size, and nothing beyond it. For callers that register the memory with a
    /// network card.
    ///
    /// So an allocation has a single handle if none of its pages has memory when it is made. Pages
    /// that a neighbour keeps, and pages that were freed and are still parked or retiring, keep the
    /// handles that they have; a run of missing pages on each side of them gets one each. If the
    /// device has no memory for a run as a whole, the allocation fails. A handle goes back only
    /// whole, when none of its pages is live. Nothing is made ahead, whatever
    /// [`ahead_bytes_max`](Self::ahead_bytes_max) says.
    /// [`compact`](crate::VirtualMemoryPool::compact) gives each run of live pages of a partly live
    /// handle one of its own. The handles are the pool's: they cannot be exported.
    pub single_handle: bool,
    /// The largest chunk in bytes, instead of the engine's ([`EngineOptions::chunk_bytes_max`]); 1
    /// GiB at most. With 0 each page has a chunk of its own, and goes back alone. With 1 GiB memory
    /// that comes and goes as a whole, such as weights, takes the fewest calls.
    pub chunk_bytes_max: Option<usize>,
    /// How much memory the worker makes, maps and opens beyond the end of the latest allocation, in
    /// bytes, before it is asked for, so that a range that grows step by step calls no driver on
    /// the way. What is made ahead is on the range's account, never takes another's guarantee, and
    /// is given up first when memory is short. 0, the default, makes none.
    pub ahead_bytes_max: usize,
    /// The worker begins again when fewer than this many bytes are left ahead, in whole pages and
    /// at least one. Near [`ahead_bytes_max`](Self::ahead_bytes_max) it works in small pieces and
    /// often; near 0 it may come too late. Half of that if none is given; never more than that.
    pub ahead_bytes_min: Option<usize>,
}

impl PoolOptions {
    /// The defaults: chunks as the engine's options say, nothing made ahead.
    pub const fn new() -> Self {
        Self {
            single_handle: false,
            chunk_bytes_max: None,
            ahead_bytes_max: 0,
            ahead_bytes_min: None,
        }
    }

    /// With chunks of at most this many bytes.
    pub const fn chunk_bytes_max(mut self, bytes: usize) -> Self {
        self.chunk_bytes_max = Some(bytes);
        self
    }

    /// With memory made ahead, up to this many bytes.
    pub const fn ahead_bytes_max(mut self, bytes: usize) -> Self {
        self.ahead_bytes_max = bytes;
        self
    }

    /// With the worker beginning again when fewer than this many bytes are left ahead.
    pub const fn ahead_bytes_min(mut self, bytes: usize) -> Self {
        self.ahead_bytes_min = Some(bytes);
        self
    }

    /// Checks that the watermarks hold together.
    pub(crate) fn check(&self) -> Result<()> {
        let what = QuotaConflict::AheadBytesMin;
        check_watermarks(what, self.ahead_bytes_min, self.ahead_bytes_max)
    }

    /// With one handle for each allocation.
    pub const fn single_handle(mut self, single: bool) -> Self {
        self.single_handle = single;
        self
    }
}

fn check_watermarks(what: QuotaConflict, low: Option<usize>, high_bytes: usize) -> Result<()> {
    match low {
        Some(low_bytes) if low_bytes > high_bytes => Err(VmmError::QuotaUnsatisfiable {
            what,
            asked_bytes: low_bytes,
            available_bytes: high_bytes,
        }),
        _ => Ok(()),
    }
}
