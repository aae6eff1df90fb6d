//! Block tables that give up all memory, keep their addresses and contents, and have both again.

use super::BlockBacking;
use super::block_states::Rest;
use super::memory::BlockMemory;
use crate::engine::{Keep, RangeHandle, Slept, sleep_all};
use crate::{Result, VmmError, WakeOptions};

impl BlockBacking {
    /// Gives up the memory of all blocks, in all tensors or in none, as
    /// [`VirtualMemoryPool::sleep`](crate::VirtualMemoryPool::sleep) does. The same blocks are
    /// backed when it [wakes](Self::wake), at the same addresses, with their contents if these are
    /// kept. So a conversation's keys and values need not be computed again.
    ///
    /// Until then calls that back, give up, pin, lease or [hold](Self::hold) blocks return
    /// [`VmmError::Asleep`], and no work may use the addresses. What was reserved
    /// ([`try_reserve`](Self::try_reserve)) and is dropped meanwhile stays backed.
    ///
    /// # Errors
    /// As [`VirtualMemoryPool::sleep`](crate::VirtualMemoryPool::sleep); `KeptAwake` also while a
    /// launch [holds](Self::hold) the blocks, or some are [pinned](Self::pin). Then all blocks are
    /// awake.
    ///
    /// ```
    /// # #[cfg(feature = "simulator")] {
    /// use cuda_vmm::pool::blocks::{BlockBacking, ElementSize, LayerSpec, TensorSpec};
    /// use cuda_vmm::{Driver, Engine, EngineOptions, HostStore, Keep, WakeOptions};
    ///
    /// let device = Driver::detect()?.device(0)?;
    /// let engine = Engine::new(&device, EngineOptions::new())?;
    /// let spec = LayerSpec::new([TensorSpec::new("k", &[16, 8, 128], ElementSize::new(2)?)?])?;
    /// let backing = BlockBacking::new(&engine, spec, 4096, device.granularity_bytes())?;
    /// backing.back([7, 8, 9])?;
    /// let store = HostStore::new(&device, 64 << 20)?;
    /// backing.sleep(Keep::Host(&store))?;
    /// assert_eq!(engine.stats().committed_bytes, 0);
    /// backing.wake(&WakeOptions::new())?;
    /// assert!(backing.is_backed(8));
    /// # }
    /// # Ok::<(), cuda_vmm::VmmError>(())
    /// ```
    pub fn sleep(&self, keep: Keep<'_>) -> Result<Slept> {
        let inner = self.inner();
        let all = inner.runs(0..self.blocks())?;
        let mut states = inner.settled(&all)?;
        let kept_by = match (states.is_held(), states.pinned()) {
            (true, _) => Some("a launch"),
            (false, 0) => None,
            (false, _) => Some("a pin"),
        };
        if let Some(by) = kept_by {
            return Err(VmmError::KeptAwake {
                offset: 0,
                bytes: states.page_bytes(),
                by,
            });
        }
        states.rest = Rest::Changing;
        drop(states);
        let ranges: Vec<_> = inner.ranges().map(|range| (range, keep)).collect();
        let slept = sleep_all(&ranges);
        let is_asleep = slept.is_ok();
        inner.change(|states| states.rest = Rest::after(is_asleep))?;
        slept
    }

    /// Has the memory of all blocks again, as [`VirtualMemoryPool::wake_with`] does for all tensors
    /// together. Bytes that are to come [first](WakeOptions::first) are those of each tensor.
    ///
    /// # Errors
    /// As [`VirtualMemoryPool::wake`](crate::VirtualMemoryPool::wake). Then all blocks are asleep as
    /// they were.
    ///
    /// [`VirtualMemoryPool::wake_with`]: crate::VirtualMemoryPool::wake_with
    pub fn wake(&self, options: &WakeOptions) -> Result<()> {
        let inner = self.inner();
        let (rest, live_bytes) = inner.change(|states| {
            let rest = states.rest;
            if rest == Rest::Asleep {
                states.rest = Rest::Changing;
            }
            (rest, states.page_bytes())
        })?;
        match rest {
            Rest::Asleep => {}
            Rest::Changing => return Err(inner.asleep(rest)),
            Rest::Awake => return Err(VmmError::Awake { live_bytes }),
        }
        let ranges: Vec<_> = inner.ranges().collect();
        let woken = options.wake(&ranges, true);
        let is_asleep = woken.is_err();
        inner.change(|states| states.rest = Rest::after(is_asleep))?;
        woken.map(drop)
    }

    /// Whether the blocks are asleep, or a thread is putting them to sleep or waking them; false in
    /// a forked process.
    pub fn is_asleep(&self) -> bool {
        let rest = self.inner().look(|states| states.rest);
        rest.is_ok_and(|rest| rest != Rest::Awake)
    }
}

impl BlockMemory {
    fn ranges(&self) -> impl Iterator<Item = &RangeHandle> {
        self.tensors.iter().map(|tensor| tensor.range())
    }

    /// The error of blocks that are not awake.
    pub(super) fn asleep(&self, rest: Rest) -> VmmError {
        let tensors = self.tensors.iter();
        VmmError::Asleep {
            asleep_bytes: tensors.map(|tensor| tensor.stats().asleep_bytes).sum(),
            is_changing: rest == Rest::Changing,
        }
    }
}
