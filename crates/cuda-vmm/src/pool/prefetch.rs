//! Saying what will be allocated next, so that its memory is made ahead.

use super::VirtualMemoryPool;
use crate::Result;
use crate::engine::Hint;
use crate::size::Extent;
use crate::sync::Arc;

impl VirtualMemoryPool {
    /// Names the bytes that will be allocated next, in this order, so that the worker makes memory
    /// for them ahead. Each part is given by its offset and its bytes.
    ///
    /// A pool with [`PoolOptions::ahead_bytes_max`](crate::PoolOptions::ahead_bytes_max) has memory
    /// made beyond the end of its latest allocation. Use this if the next allocations are
    /// elsewhere, such as in holes that were freed. The worker then makes those of the pages named
    /// that have no memory, the first ones first. Pages count up to `ahead_bytes_max`, with memory
    /// or not: so name those without. The names hold until the next call; an empty list names none.
    /// Without `ahead_bytes_max` the call does nothing.
    ///
    /// It calls no driver. The memory is charged and given up as all that is made ahead.
    ///
    /// # Errors
    /// [`VmmError::ZeroSize`](crate::VmmError::ZeroSize),
    /// [`VmmError::Overflow`](crate::VmmError::Overflow),
    /// [`VmmError::OutOfRange`](crate::VmmError::OutOfRange) for the first part that fails;
    /// [`VmmError::Forked`](crate::VmmError::Forked). After an error the names are as before.
    ///
    /// ```
    /// # #[cfg(feature = "simulator")] {
    /// use cuda_vmm::{Driver, Engine, EngineOptions, PoolOptions, VirtualMemoryPool, WorkerMode};
    ///
    /// const PAGE: usize = 2 << 20;
    /// let device = Driver::detect()?.device(0)?;
    /// let engine = Engine::new(&device, EngineOptions::new().worker(WorkerMode::Manual))?;
    /// let options = PoolOptions::new().ahead_bytes_max(2 * PAGE);
    /// let pool = VirtualMemoryPool::with_options(&engine, 64 * PAGE, PAGE, options)?;
    /// pool.prefetch(&[(7 * PAGE, PAGE), (3 * PAGE, PAGE)])?;
    /// assert_eq!(engine.step().prefetched_bytes, 2 * PAGE);
    /// pool.allocate(7 * PAGE, PAGE)?; // calls no driver
    /// assert_eq!(pool.stats().parts.ahead_bytes, PAGE);
    /// # }
    /// # Ok::<(), cuda_vmm::VmmError>(())
    /// ```
    pub fn prefetch(&self, parts: &[(usize, usize)]) -> Result<()> {
        let pages = parts.iter().map(|(offset, bytes)| {
            let extent = Extent::new(*offset, *bytes, self.capacity_bytes())?;
            Ok(extent.pages(self.page_bytes()))
        });
        let hint = Hint::new(pages.collect::<Result<Vec<_>>>()?);
        if self.range.expect(Arc::new(hint))? {
            self.range.wake_worker();
        }
        Ok(())
    }
}
