//! Allocations in several pools of one account, all or none.

use super::VirtualMemoryPool;
use crate::engine::{Account, Ask, Later, Patience, Place, allocate_all, take_all_there};
use crate::size::Extent;
use crate::{Result, VmmError};
use core::task::{Context, Poll};
use core::time::Duration;

/// Bytes of a pool: the pool, their offset in it and their number.
pub type PoolPart<'a> = (&'a VirtualMemoryPool, usize, usize);

/// Bytes of pools that were made live together. Dropping it frees them again; see
/// [`keep`](Self::keep).
///
/// Free none of them while it lives: dropping it would free what was allocated there since.
#[derive(Debug)]
#[must_use = "dropping it frees the bytes again"]
pub struct Backed<'a> {
    parts: Vec<PoolPart<'a>>,
}

impl<'a> Backed<'a> {
    /// Parts that are live, and sorted by pool.
    pub(super) fn new(parts: Vec<PoolPart<'a>>) -> Self {
        Self { parts }
    }

    /// The bytes.
    pub(super) fn parts(&self) -> &[PoolPart<'a>] {
        &self.parts
    }

    /// Keeps the bytes live.
    pub fn keep(mut self) {
        self.parts.clear();
    }
}

impl Drop for Backed<'_> {
    fn drop(&mut self) {
        for of_pool in by_pool(&self.parts) {
            let parts = of_pool.iter().map(|(_, offset, bytes)| (*offset, *bytes));
            let (pool, parts) = (of_pool[0].0, parts.collect::<Vec<_>>());
            if pool.deallocate_many(&parts).is_ok() {
                continue;
            }
            // A caller has freed some of them itself; or this is a forked process, whose memory is
            // the parent's.
            for part in parts {
                let _ = pool.deallocate_many(&[part]);
            }
        }
    }
}

/// Parts in the order of their pools, pool by pool.
fn by_pool<'a, 'b>(parts: &'b [PoolPart<'a>]) -> impl Iterator<Item = &'b [PoolPart<'a>]> {
    parts.chunk_by(|(one, ..), (other, ..)| core::ptr::eq(*one, *other))
}

/// Makes all parts live if all their pages are there; returns whether it did. The short way for
/// what block tables do: it takes the ranges' locks alone.
///
/// Most often the pages have other live bytes. Then one range is locked after the other, since to
/// free what was taken leaves a page as it was.
fn take_there(parts: &[PoolPart<'_>]) -> bool {
    take_beside_live(parts) || ask(parts, take_all_there)
}

/// Makes all parts live if their pages have other live bytes, or none; returns whether it did.
fn take_beside_live(parts: &[PoolPart<'_>]) -> bool {
    let refused = parts
        .iter()
        .position(|(pool, offset, bytes)| !pool.range.take_beside_live(*offset, *bytes));
    let Some(taken) = refused else {
        return true;
    };
    drop(Backed {
        parts: parts[..taken].to_vec(),
    });
    false
}

/// Asks for parts, which are sorted.
fn ask<T>(parts: &[PoolPart<'_>], act: impl FnOnce(&[Ask<'_>]) -> T) -> T {
    let places: Vec<_> = (parts.iter())
        .map(|(_, offset, bytes)| (Place::At(*offset), *bytes))
        .collect();
    let mut asks = Vec::new();
    let mut at = 0;
    for of_pool in by_pool(parts) {
        let end = at + of_pool.len();
        asks.push(Ask {
            handle: &of_pool[0].0.range,
            places: &places[at..end],
            wakes: false,
        });
        at = end;
    }
    act(&asks)
}

/// A place in the line of those that wait for memory; see [`Account::turn`]. Dropping it leaves the
/// line.
#[derive(Debug)]
pub struct Turn {
    account: Account,
    later: Later,
}

impl Turn {
    /// Makes bytes of several pools live like [`Account::try_allocate_many`], as one poll of a
    /// future. If it would have to wait, it keeps its place, and the task is woken when something
    /// has changed. The parts may differ from poll to poll.
    ///
    /// # Errors
    /// As [`VirtualMemoryPool::allocate_async`] and [`Account::try_allocate_many`].
    pub fn poll_allocate_many<'a>(
        &mut self,
        parts: &[PoolPart<'a>],
        context: &Context<'_>,
    ) -> Poll<Result<Backed<'a>>> {
        let parts = self.account.sorted(parts)?;
        let polled = ask(&parts, |asks| self.later.poll(asks, context));
        polled.map_ok(|_| Backed { parts })
    }
}

impl Account {
    /// Makes bytes of several pools of the account live, in all of them or in none, without waiting
    /// for the device. Each part is a pool, an offset and a number of bytes.
    ///
    /// Room for all of it is taken before any memory is made. So if two calls ask for memory that
    /// is enough for one, one of them gets it. The bytes are freed again if the guard is dropped;
    /// call [`Backed::keep`] to keep them.
    ///
    /// # Errors
    /// As [`VirtualMemoryPool::try_allocate`], for the first part that fails; the bytes asked for
    /// are those of all parts. [`VmmError::AlreadyMapped`] also for a part that overlaps one before
    /// it; [`VmmError::ForeignAccount`] for a pool of another account. After an error no byte of
    /// any pool is newly live.
    ///
    /// ```
    /// # #[cfg(feature = "simulator")] {
    /// use cuda_vmm::{Driver, Engine, EngineOptions, PoolOptions, Quota, VirtualMemoryPool};
    ///
    /// let device = Driver::detect()?.device(0)?;
    /// let engine = Engine::new(&device, EngineOptions::new().limit_bytes(8 << 20))?;
    /// let model = engine.account("model", Quota::new())?;
    /// let range = || VirtualMemoryPool::on_account(&model, 1 << 30, 2 << 20, PoolOptions::new());
    /// let (keys, values) = (range()?, range()?);
    /// model.try_allocate_many(&[(&keys, 0, 4 << 20), (&values, 0, 4 << 20)])?.keep();
    /// let more = model.try_allocate_many(&[(&keys, 4 << 20, 1), (&values, 4 << 20, 1)]);
    /// assert_eq!(more.unwrap_err().shortfall_bytes(), 4 << 20);
    /// # }
    /// # Ok::<(), cuda_vmm::VmmError>(())
    /// ```
    pub fn try_allocate_many<'a>(&self, parts: &[PoolPart<'a>]) -> Result<Backed<'a>> {
        self.allocate_parts(parts, &Patience::None)
    }

    /// Makes bytes of several pools live like [`try_allocate_many`](Self::try_allocate_many), but
    /// waits for retiring memory if that is enough, as [`VirtualMemoryPool::allocate`] does.
    ///
    /// # Errors
    /// As [`try_allocate_many`](Self::try_allocate_many).
    pub fn allocate_many<'a>(&self, parts: &[PoolPart<'a>]) -> Result<Backed<'a>> {
        self.allocate_parts(parts, &Patience::Retiring)
    }

    /// Makes bytes of several pools live like [`try_allocate_many`](Self::try_allocate_many), but
    /// waits up to `timeout` for memory, as [`VirtualMemoryPool::allocate_timeout`] does.
    ///
    /// # Errors
    /// As [`VirtualMemoryPool::allocate_timeout`] and
    /// [`try_allocate_many`](Self::try_allocate_many).
    pub fn allocate_many_timeout<'a>(
        &self,
        parts: &[PoolPart<'a>],
        timeout: Duration,
    ) -> Result<Backed<'a>> {
        self.allocate_parts(parts, &Patience::for_at_most(timeout))
    }

    pub(crate) fn allocate_parts<'a>(
        &self,
        parts: &[PoolPart<'a>],
        patience: &Patience,
    ) -> Result<Backed<'a>> {
        let parts = self.sorted(parts)?;
        if !take_there(&parts) {
            ask(&parts, |asks| allocate_all(asks, patience))?;
        }
        Ok(Backed { parts })
    }

    /// A place in the line of those that wait for memory, for a caller that tries again and again
    /// and keeps nothing locked in between. It stands there from the first try on that would wait.
    pub fn turn(&self) -> Turn {
        Turn {
            account: self.clone(),
            later: Later::new(self.engine()),
        }
    }

    /// The parts by pool and offset, all of them of this account and none of them twice.
    pub(super) fn sorted<'a>(&self, parts: &[PoolPart<'a>]) -> Result<Vec<PoolPart<'a>>> {
        for (pool, offset, bytes) in parts {
            if pool.account() != self {
                return Err(VmmError::ForeignAccount {
                    expected: self.name().into(),
                    found: pool.account().name().into(),
                });
            }
            Extent::new(*offset, *bytes, pool.capacity_bytes())?;
        }
        let mut sorted = parts.to_vec();
        sorted
            .sort_unstable_by_key(|(pool, offset, _)| (core::ptr::from_ref(*pool).addr(), *offset));
        for pair in sorted.windows(2) {
            let [(pool, before, long), (other, offset, bytes)] = pair else {
                continue;
            };
            if core::ptr::eq(*pool, *other) && *offset < before + long {
                let (offset, bytes) = (*offset, *bytes);
                return Err(VmmError::AlreadyMapped { offset, bytes });
            }
        }
        Ok(sorted)
    }
}
