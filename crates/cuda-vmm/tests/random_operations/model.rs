//! What the pools are held against, and the pools.

use crate::common::{ModelOptions, Models};
use crate::{GUARANTEE_PAGES, LIMIT_PAGES, MODELS, PAGE, SHARED, UNIT, UNITS};
use cuda_vmm::{PoolOptions, VirtualMemoryPool, VmmError};

/// The plain account: which quarters of which pages of which models are live.
pub struct Model(pub Vec<Option<[bool; UNITS]>>);

impl Model {
    pub fn live_pages(units: &[bool; UNITS]) -> usize {
        units.chunks(4).filter(|page| page.contains(&true)).count()
    }

    pub fn all_live_pages(&self) -> usize {
        self.0.iter().flatten().map(Self::live_pages).sum()
    }

    /// Pages that would be live besides if these units were.
    pub fn need(units: &[bool; UNITS], at: usize, count: usize) -> usize {
        let mut after = *units;
        after[at..at + count].fill(true);
        Self::live_pages(&after) - Self::live_pages(units)
    }

    /// Pages that a model may grow by, beside the unused guarantee of the first.
    pub fn room(&self, model: usize) -> usize {
        let guaranteed = match &self.0[0] {
            Some(units) if model != 0 => GUARANTEE_PAGES.saturating_sub(Self::live_pages(units)),
            _ => 0,
        };
        LIMIT_PAGES.saturating_sub(self.all_live_pages() + guaranteed)
    }

    /// The lowest run of units that are not live.
    pub fn place(units: &[bool; UNITS], count: usize) -> Option<usize> {
        (0..UNITS).find(|at| at + count <= UNITS && !units[*at..at + count].contains(&true))
    }
}

/// The models of a shared pool, and after them one pool of its own on the same engine, which alone
/// can be compacted.
pub struct Pools {
    pub shared: Models,
    pub own: Option<VirtualMemoryPool>,
    pub names: Vec<String>,
    ahead_bytes_max: usize,
}

impl Pools {
    pub fn new(shared: Models, ahead_bytes_max: usize) -> Self {
        Self {
            shared,
            own: None,
            names: (0..MODELS).map(|model| format!("model {model}")).collect(),
            ahead_bytes_max,
        }
    }

    pub fn slack_pages(&self) -> usize {
        self.shared.stats().parts.slack_bytes / PAGE
    }

    pub fn not_found(&self, which: usize) -> VmmError {
        VmmError::ModelNotFound {
            model: self.names[which].clone(),
        }
    }

    /// Does something with a model's range.
    pub fn with<T>(
        &self,
        which: usize,
        act: impl FnOnce(&VirtualMemoryPool) -> Result<T, VmmError>,
    ) -> Result<T, VmmError> {
        if which < SHARED {
            self.shared
                .model(&self.names[which])
                .and_then(|range| act(&range))
        } else {
            let own = self.own.as_ref().ok_or_else(|| self.not_found(which));
            own.and_then(act)
        }
    }

    pub fn base_address(&self, which: usize) -> Option<u64> {
        self.with(which, |range| Ok(range.base_address())).ok()
    }

    pub fn allocate_anywhere(&self, which: usize, bytes: usize) -> Result<u64, VmmError> {
        if which < SHARED {
            self.shared.allocate_for_model(&self.names[which], bytes)
        } else {
            self.with(which, |range| range.allocate_anywhere(bytes, 256))
        }
    }

    pub fn deallocate(&self, which: usize, offset: usize, bytes: usize) -> Result<(), VmmError> {
        if which < SHARED {
            self.shared
                .deallocate_for_model(&self.names[which], offset, bytes)
        } else {
            self.with(which, |range| range.deallocate(offset, bytes))
        }
    }

    pub fn register(&mut self, which: usize) -> Result<(), VmmError> {
        if which < SHARED {
            let quota = ModelOptions {
                guarantee_bytes: if which == 0 {
                    GUARANTEE_PAGES * PAGE
                } else {
                    0
                },
                ahead_bytes_max: self.ahead_bytes_max,
                ..ModelOptions::new(UNITS * UNIT)
            };
            return self.shared.register_model_with(&self.names[which], quota);
        }
        if self.own.is_some() {
            return Err(VmmError::ModelAlreadyRegistered {
                model: self.names[which].clone(),
            });
        }
        let engine = self.shared.engine();
        let options = PoolOptions::new().ahead_bytes_max(self.ahead_bytes_max);
        self.own = Some(VirtualMemoryPool::with_options(
            engine,
            UNITS * UNIT,
            PAGE,
            options,
        )?);
        Ok(())
    }

    pub fn unregister(&mut self, which: usize) -> Result<(), VmmError> {
        if which < SHARED {
            self.shared.unregister_model(&self.names[which])
        } else {
            let own = self.own.take().ok_or_else(|| self.not_found(which));
            own.and_then(VirtualMemoryPool::close)
        }
    }
}
