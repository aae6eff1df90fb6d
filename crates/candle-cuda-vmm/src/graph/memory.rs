//! Memory that a step reaches beside its tensors, kept in place while the step is launched.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use crate::elastic_blocks::ElasticBlocks;
use crate::elastic_tensor::RowsWatch;
use crate::error::{GraphError, Result};
use candle_core::Device;
use cuda_vmm::pool::blocks::{BlockError, BlockHold, BlockId};

/// Memory that a captured step reaches and that may go away while the tensors of the step stay:
/// blocks that tables name, and rows of caches.
///
/// A type with several such parts calls the one within the other. `()` is for a step that uses
/// nothing but its own tensors.
pub trait StepMemory {
    /// Checks that the memory is there, keeps it in place, and calls `launch`, which queues the
    /// step, or runs it on the CPU and before a capture. What goes away after that is freed behind
    /// the step. A step over blocks does not back blocks or give some up.
    ///
    /// # Errors
    /// Why the memory is not there; then `launch` was not called. Otherwise what `launch` returns.
    fn while_held(&mut self, launch: &mut dyn FnMut() -> Result<()>) -> Result<()>;

    /// Returns the device on whose stream the memory is freed, if there is one. The step must run
    /// on the same.
    fn device(&self) -> Option<&Device> {
        None
    }
}

impl StepMemory for () {
    fn while_held(&mut self, launch: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        launch()
    }
}

/// The blocks of a paged cache that the tables of steps name.
///
/// Say which blocks come into tables ([`name`](Self::name)), and which leave them
/// ([`forget`](Self::forget)). A block may be named several times, by sequences that begin alike.
/// Before each launch, those that were named since the last are checked. If blocks were given up
/// meanwhile, all are. So a step looks at few blocks, however many its tables have.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_cuda_vmm::TensorPool;
/// use candle_cuda_vmm::graph::{StepBlocks, StepMemory};
///
/// # #[cfg(not(feature = "simulator"))]
/// # fn main() {}
/// # #[cfg(feature = "simulator")]
/// # fn main() -> candle_cuda_vmm::Result<()> {
/// let pool = TensorPool::new(&Device::Cpu)?;
/// let blocks = pool.blocks(64, [("k", (16, 8, 64), DType::F16)])?;
/// blocks.back([3, 4])?;
/// let mut named = StepBlocks::new(&blocks);
/// named.name([3, 4])?;
/// named.while_held(&mut || Ok(()))?;
/// blocks.unback([4])?;
/// assert!(named.while_held(&mut || Ok(())).is_err());
/// named.forget([4]);
/// named.while_held(&mut || Ok(()))?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct StepBlocks {
    blocks: ElasticBlocks,
    /// How often each block is named.
    named: Vec<u32>,
    /// Blocks that were named since the last check.
    unchecked: Vec<BlockId>,
    /// How often blocks had been given up when all named ones were last seen backed.
    generation: Option<u64>,
}

impl StepBlocks {
    /// Names no block yet.
    pub fn new(blocks: &ElasticBlocks) -> Self {
        Self {
            named: vec![0; blocks.num_blocks()],
            blocks: blocks.clone(),
            unchecked: Vec::new(),
            generation: None,
        }
    }

    /// Says that tables name these blocks from now on, once more each.
    ///
    /// # Errors
    /// [`Vmm`](crate::VmmError::Vmm) with `Block` around [`BlockError::Invalid`] for the first block
    /// that does not exist; then none is named.
    pub fn name(&mut self, blocks: impl IntoIterator<Item = BlockId>) -> Result<()> {
        let before = self.unchecked.len();
        self.unchecked.extend(blocks);
        let (new, all) = (&self.unchecked[before..], self.named.len());
        if let Some(block) = new.iter().copied().find(|block| *block >= all) {
            self.unchecked.truncate(before);
            let error = BlockError::Invalid { block, blocks: all };
            return Err(cuda_vmm::VmmError::Block(error).into());
        }
        for block in new {
            self.named[*block] += 1;
        }
        Ok(())
    }

    /// Says that tables name these blocks no more, or once less each. Blocks that no table names
    /// are passed over.
    pub fn forget(&mut self, blocks: impl IntoIterator<Item = BlockId>) {
        for block in blocks {
            if let Some(count) = self.named.get_mut(block) {
                *count = count.saturating_sub(1);
            }
        }
    }

    /// Checks what may have changed, while no block can be given up.
    fn check(&mut self, hold: &BlockHold) -> Result<()> {
        let is_named = |block: &BlockId| self.named[*block] > 0;
        let missing = match self.generation == Some(hold.generation()) {
            true if self.unchecked.is_empty() => None,
            true => hold.find_missing(self.unchecked.iter().copied().filter(is_named))?,
            false => hold.find_missing((0..self.named.len()).filter(is_named))?,
        };
        if let Some(block) = missing {
            return Err(cuda_vmm::VmmError::Block(BlockError::NotBacked { block }).into());
        }
        self.generation = Some(hold.generation());
        self.unchecked.clear();
        Ok(())
    }
}

impl StepMemory for StepBlocks {
    /// Fails with [`Vmm`](crate::VmmError::Vmm) with `Block` around [`BlockError::NotBacked`] for a
    /// named block that has no memory.
    fn while_held(&mut self, launch: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let hold = self.blocks.backing().hold()?;
        self.check(&hold)?;
        launch()
    }

    fn device(&self) -> Option<&Device> {
        Some(self.blocks.pool().device())
    }
}

impl StepMemory for RowsWatch {
    /// Fails with [`GraphError::RowsMoved`] unless all rows are where they
    /// were. The views in the step keep their memory.
    fn while_held(&mut self, launch: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        match self.is_current() {
            true => launch(),
            false => Err(GraphError::RowsMoved.into()),
        }
    }

    fn device(&self) -> Option<&Device> {
        Some(RowsWatch::device(self))
    }
}
