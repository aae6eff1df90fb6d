//! Pools of one account that have the same memory behind a part of their addresses.
//!
//! # Safety
//! Nothing unsafe is done here. [`VirtualMemoryPool::make_private_by_ref`] is unsafe to call: its
//! caller promises what the `&mut` of [`VirtualMemoryPool::make_private`] stands for.
#![allow(unsafe_code)]

use super::{Backed, PoolPart, VirtualMemoryPool};
use crate::engine::{Account, Share, share_all};
use crate::size::Extent;
use crate::{Result, VmmError};

/// Bytes that one pool is to share with another at the same offsets: the pool that has them, the
/// one that gets them, their offset and their number.
pub type SharedPart<'a> = (&'a VirtualMemoryPool, &'a VirtualMemoryPool, usize, usize);

/// Bytes that pools share now; see [`Account::share_many`]. Dropping it frees them again in the
/// pools that got them; see [`keep`](Self::keep).
///
/// Free none of them there while it lives.
#[derive(Debug)]
#[must_use = "dropping it frees the bytes again"]
pub struct Shared<'a> {
    backed: Backed<'a>,
    rest: Vec<PoolPart<'a>>,
}

impl<'a> Shared<'a> {
    /// The bytes that are shared, in the pools that got them: their chunks are the memory of both
    /// pools.
    pub fn parts(&self) -> &[PoolPart<'a>] {
        self.backed.parts()
    }

    /// The bytes that were asked for and are not shared: they are not in a chunk that lies in the
    /// part as a whole, or something is in the way at their addresses. To have them as well,
    /// allocate them ([`Account::allocate_many`] takes this list) and copy them.
    pub fn rest(&self) -> &[PoolPart<'a>] {
        &self.rest
    }

    /// Keeps the bytes live in the pools that got them.
    pub fn keep(self) {
        self.backed.keep();
    }
}

impl Account {
    /// Makes pools of the account share memory: the chunks behind each part of the first pool are
    /// mapped at the same offsets of the second too, without a copy. All parts are shared, or none.
    ///
    /// Use it for what several sequences begin with. Only whole chunks are shared, of which all
    /// bytes are live and in the part; [`Shared::rest`] names the bytes that are left. A chunk may
    /// be shared any number of times, and again by a pool that got it. Shared memory is counted
    /// once, as [`shared_bytes`](crate::MemoryParts::shared_bytes) of the account and in no part of
    /// a pool. So sharing charges nothing. What is parked or made ahead in the second pool is given
    /// up for it.
    ///
    /// Shared memory is for reading. No call of this crate writes to it. So work that uses the
    /// pools must not write to bytes that were shared, in either pool, before
    /// [`make_private`](VirtualMemoryPool::make_private). Bytes that were freed in a shared chunk
    /// cannot be allocated again before that: [`VmmError::Shared`]. Nor does the call order
    /// streams: work that reads in the second pool comes after the work that wrote in the first if
    /// the caller orders it.
    ///
    /// Bytes are freed in each pool for itself. A chunk without live bytes in one pool retires
    /// there, and is then unmapped. The last pool that is left has it as ordinary memory. So memory
    /// that was shared is used anew only when the users of all pools are past.
    /// [`compact`](VirtualMemoryPool::compact) leaves shared chunks alone, and so does
    /// [`trim`](VirtualMemoryPool::trim).
    ///
    /// Each chunk costs a mapping (`cuMemMap`, `cuMemSetAccess`), which takes as long for a small
    /// chunk as for a large one.
    ///
    /// # Errors
    /// [`VmmError::ForeignAccount`] for a pool of another account; [`VmmError::WrongPageSize`] for
    /// two pools whose pages differ; [`VmmError::SingleHandle`]; [`VmmError::ZeroSize`],
    /// [`VmmError::Overflow`], [`VmmError::OutOfRange`]; [`VmmError::NotMapped`] if some of the
    /// bytes are not live in the first pool; [`VmmError::AlreadyMapped`] if some are live in the
    /// second or overlap those of another part, [`VmmError::Leased`] if some were freed there and
    /// are leased; [`VmmError::Driver`], [`VmmError::Closed`], [`VmmError::Forked`]. After an error
    /// everything is as before.
    ///
    /// ```
    /// # #[cfg(feature = "simulator")] {
    /// use cuda_vmm::{Driver, Engine, EngineOptions, PoolOptions, Quota, VirtualMemoryPool};
    ///
    /// let device = Driver::detect()?.device(0)?;
    /// let engine = Engine::new(&device, EngineOptions::new().limit_bytes(64 << 20))?;
    /// let model = engine.account("model", Quota::new())?;
    /// let range = || VirtualMemoryPool::on_account(&model, 1 << 30, 2 << 20, PoolOptions::new());
    /// let (parent, mut child) = (range()?, range()?);
    /// parent.allocate(0, 33 << 20)?;
    /// let shared = model.share_many(&[(&parent, &child, 0, 33 << 20)])?;
    /// // The last chunk is not full. Its bytes are to be copied.
    /// let [(_, offset, bytes)] = shared.rest()[..] else {
    ///     panic!("one run is left");
    /// };
    /// assert_eq!((offset, bytes), (32 << 20, 1 << 20));
    /// model.allocate_many(shared.rest())?.keep();
    /// shared.keep();
    /// assert_eq!(model.stats().parts.shared_bytes, 32 << 20);
    /// assert_eq!(model.stats().parts.live_page_bytes, 4 << 20);
    /// // The child is to write anew from 30 MiB on.
    /// child.deallocate(30 << 20, 3 << 20)?;
    /// child.make_private(30 << 20, 2 << 20)?;
    /// child.allocate(30 << 20, 2 << 20)?;
    /// # }
    /// # Ok::<(), cuda_vmm::VmmError>(())
    /// ```
    pub fn share_many<'a>(&self, parts: &[SharedPart<'a>]) -> Result<Shared<'a>> {
        let sorted = self.sorted_by_target(parts)?;
        let shares: Vec<_> = sorted
            .iter()
            .map(|(source, target, offset, bytes)| Share {
                source: &source.range,
                target: &target.range,
                bytes: *offset..offset + bytes,
            })
            .collect();
        let shared = share_all(&shares)?;
        let (mut parts, mut rest) = (Vec::new(), Vec::new());
        for ((_, target, offset, bytes), shared) in sorted.iter().zip(shared) {
            let (target, end) = (*target, offset + bytes);
            let mut at = *offset;
            for run in shared {
                if at < run.start {
                    rest.push((target, at, run.start - at));
                }
                at = run.end;
                parts.push((target, run.start, run.len()));
            }
            if at < end {
                rest.push((target, at, end - at));
            }
        }
        let backed = Backed::new(parts);
        Ok(Shared { backed, rest })
    }

    /// The parts by the pool that gets them and their offset, all of this account.
    fn sorted_by_target<'a>(&self, parts: &[SharedPart<'a>]) -> Result<Vec<SharedPart<'a>>> {
        for (source, target, offset, bytes) in parts {
            let pools = [source, target];
            if let Some(foreign) = pools.iter().find(|pool| pool.account() != self) {
                return Err(VmmError::ForeignAccount {
                    expected: self.name().into(),
                    found: foreign.account().name().into(),
                });
            }
            if source.page_bytes() != target.page_bytes() {
                return Err(VmmError::WrongPageSize {
                    expected_bytes: target.page_bytes(),
                    found_bytes: source.page_bytes(),
                });
            }
            Extent::new(*offset, *bytes, target.capacity_bytes())?;
        }
        let targets: Vec<_> = (parts.iter())
            .map(|(_, target, offset, bytes)| (*target, *offset, *bytes))
            .collect();
        // Overlapping parts are refused there.
        self.sorted(&targets)?;
        let mut sorted = parts.to_vec();
        sorted.sort_by_key(|(_, target, offset, _)| (core::ptr::from_ref(*target).addr(), *offset));
        Ok(sorted)
    }
}

impl VirtualMemoryPool {
    /// Whether some of the bytes lie in a chunk that another pool maps too, live or not; false if
    /// the pool was closed. A chunk that others let go is shared until their work on it is past.
    pub fn is_shared(&self, offset: usize, bytes: usize) -> bool {
        self.range.is_shared(offset, bytes)
    }

    /// Gives the pool memory of its own in the place of shared chunks behind `bytes` bytes at
    /// `offset`; returns the bytes of their live pages, 0 if none is shared. Addresses and contents
    /// of live bytes stay.
    ///
    /// Call it before work writes to bytes that were shared
    /// ([`Account::share_many`]), and before bytes are allocated again that were freed in a shared
    /// chunk. Chunks are moved as a whole, by the steps of [`compact`](Self::compact): new memory,
    /// a copy on the device, and the new memory mapped in the place of the shared. The pool's
    /// account is charged for the live pages of the chunks, all at once. Parked memory is given up
    /// for it. Pages without live bytes get no memory.
    ///
    /// No work may be launched on the pool's memory meanwhile, so this takes `&mut self`. It first
    /// waits for all that is queued on the named streams, or on any stream if none is named. The
    /// other pools that share the memory go on.
    ///
    /// # Errors
    /// [`VmmError::KeptShared`] if a lease, a pin or a capture keeps a chunk in its place: then use
    /// other addresses; [`VmmError::OutOfPhysicalMemory`]; [`VmmError::ZeroSize`],
    /// [`VmmError::Overflow`], [`VmmError::OutOfRange`]; [`VmmError::Driver`],
    /// [`VmmError::Closed`], [`VmmError::Forked`]. After an error live bytes are where they were,
    /// with their contents. If it is the driver's, some chunks may have memory of their own
    /// already; if the driver refuses to undo what it did, see [`compact`](Self::compact).
    pub fn make_private(&mut self, offset: usize, bytes: usize) -> Result<usize> {
        self.range.make_private(offset, bytes)
    }

    /// Gives the pool memory of its own like [`make_private`](Self::make_private), for a pool that
    /// other threads have too. They may allocate and free meanwhile.
    ///
    /// # Errors
    /// As [`make_private`](Self::make_private).
    ///
    /// # Safety
    /// No work that uses the shared chunks behind these bytes may be launched, by any thread, from
    /// the beginning of the call to its end, as for [`compact_shared`](Self::compact_shared). Other
    /// chunks are left alone, and so are those that are leased.
    pub unsafe fn make_private_by_ref(&self, offset: usize, bytes: usize) -> Result<usize> {
        self.range.make_private(offset, bytes)
    }
}
