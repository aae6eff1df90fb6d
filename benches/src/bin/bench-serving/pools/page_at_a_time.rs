//! An elastic pool as KVCached is one: pages of 2 MiB with a handle each, mapped when they are needed.
//!
//! Each model keeps up to ten pages mapped that it does not use; when fewer than five are left, a thread in the background maps
//! more. What is freed beyond that is unmapped and released at once, on the thread that frees it. Only where another model's
//! memory would not do otherwise, it gives up what it keeps.

use super::{BLOCK_BYTES, Memory};
use crate::card::{Card, Costs};
use anyhow::Result;
use cuda_vmm::{Access, Device, Mapping, PhysicalMemory, Reservation};
use std::collections::BTreeSet;
use std::sync::Arc;

/// With fewer mapped pages at hand the background maps more.
const RESERVE_MIN: usize = 5;
/// So many are kept.
const RESERVE_MAX: usize = 10;

/// The pages of one model.
struct Model {
    reservation: Arc<Reservation>,
    /// Mapped pages, in use or not.
    mapped: Vec<Option<Mapping>>,
    /// Mapped pages that are not in use, the last one first.
    reserve: Vec<u32>,
    /// Pages that are not mapped.
    unmapped: BTreeSet<u32>,
}

impl Model {
    fn held(&self) -> usize {
        self.mapped.len() - self.unmapped.len()
    }

    fn unmap(&mut self, page: u32) -> cuda_vmm::Result<()> {
        if let Some(mapping) = self.mapped[page as usize].take() {
            mapping.close().map_err(|failure| failure.error)?;
        }
        self.unmapped.insert(page);
        Ok(())
    }
}

/// Models that share so many pages.
pub struct PageAtATime {
    models: Vec<Model>,
    limit: usize,
    /// Calls on the stepping thread.
    calls: u64,
    card: Card,
}

fn map(device: &Device, reservation: &Arc<Reservation>, page: u32) -> cuda_vmm::Result<Mapping> {
    let memory = Arc::new(PhysicalMemory::new(device, BLOCK_BYTES)?);
    let access = [(device.clone(), Access::ReadWrite)];
    Mapping::new(reservation, page as usize * BLOCK_BYTES, &memory, &access)
}

impl PageAtATime {
    /// A pool of so many blocks for so many models.
    ///
    /// # Errors
    /// If there is no simulator here.
    pub fn new(limit: usize, models: usize, costs: Costs) -> Result<Self> {
        let mut card = Card::new(costs)?;
        let models = (0..models).map(|_| {
            Ok(Model {
                reservation: Arc::new(Reservation::new(&card.device, limit * BLOCK_BYTES)?),
                mapped: (0..limit).map(|_| None).collect(),
                reserve: Vec::new(),
                unmapped: (0..limit as u32).collect(),
            })
        });
        let models = models.collect::<Result<_>>()?;
        card.begin();
        Ok(Self {
            models,
            limit,
            calls: 0,
            card,
        })
    }

    fn held(&self) -> usize {
        self.models.iter().map(Model::held).sum()
    }

    /// Unmaps what other models keep in reserve, as far as a model cannot have its pages without.
    fn take_back(&mut self, now_ns: &mut u64, model: usize, count: usize) -> Result<()> {
        let to_map = count.saturating_sub(self.models[model].reserve.len());
        let mut missing = (self.held() + to_map).saturating_sub(self.limit);
        for (_, other) in (0..)
            .zip(&mut self.models)
            .filter(|(other, _)| *other != model)
        {
            let pages = other.reserve.len().min(missing);
            missing -= pages;
            let pages: Vec<_> = other.reserve.drain(..pages).collect();
            self.card.call(now_ns, || {
                pages.into_iter().try_for_each(|page| other.unmap(page))
            })?;
        }
        Ok(())
    }
}

impl Memory for PageAtATime {
    fn most_blocks(&self, _: usize) -> usize {
        self.limit
    }

    fn free_blocks(&self, _: usize) -> usize {
        let reserves = self.models.iter().map(|model| model.reserve.len());
        self.limit - self.held() + reserves.sum::<usize>()
    }

    fn take(
        &mut self,
        now_ns: &mut u64,
        model: usize,
        count: usize,
        blocks: &mut Vec<u32>,
    ) -> Result<bool> {
        if count > self.free_blocks(model) {
            return Ok(false);
        }
        let before = self.card.memory_calls();
        self.take_back(now_ns, model, count)?;
        let device = self.card.device.clone();
        let own = &mut self.models[model];
        self.card.call(now_ns, || {
            for _ in 0..count {
                let page = match own.reserve.pop() {
                    Some(page) => page,
                    None => {
                        let page = own
                            .unmapped
                            .pop_first()
                            .expect("as many pages as the limit has");
                        own.mapped[page as usize] = Some(map(&device, &own.reservation, page)?);
                        page
                    }
                };
                blocks.push(page);
            }
            Ok::<_, anyhow::Error>(())
        })?;
        self.calls += self.card.memory_calls() - before;
        Ok(true)
    }

    fn give(&mut self, now_ns: &mut u64, model: usize, blocks: &mut Vec<u32>) -> Result<()> {
        let before = self.card.memory_calls();
        let own = &mut self.models[model];
        self.card.call(now_ns, || {
            for page in blocks.drain(..) {
                if own.reserve.len() < RESERVE_MAX {
                    own.reserve.push(page);
                    continue;
                }
                own.unmap(page)?;
            }
            Ok::<_, anyhow::Error>(())
        })?;
        self.calls += self.card.memory_calls() - before;
        Ok(())
    }

    fn work(&mut self, now_ns: u64) -> Result<()> {
        for model in 0..self.models.len() {
            let room = self.limit - self.held();
            let own = &mut self.models[model];
            if own.reserve.len() >= RESERVE_MIN || room == 0 {
                continue;
            }
            let wanted = (RESERVE_MAX - own.reserve.len()).min(room);
            let pages: Vec<_> = own.unmapped.iter().copied().take(wanted).collect();
            let (device, reservation, asked) = (
                self.card.device.clone(),
                own.reservation.clone(),
                pages.clone(),
            );
            let made = self.card.behind(now_ns, move || {
                let made = asked
                    .into_iter()
                    .map(|page| map(&device, &reservation, page));
                made.collect::<cuda_vmm::Result<Vec<_>>>()
            })??;
            for (page, mapping) in pages.into_iter().zip(made) {
                own.unmapped.remove(&page);
                own.mapped[page as usize] = Some(mapping);
                own.reserve.insert(0, page);
            }
        }
        Ok(())
    }

    fn held_bytes(&self, model: usize) -> u64 {
        (self.models[model].held() * BLOCK_BYTES) as u64
    }

    fn memory_calls(&self) -> u64 {
        self.calls
    }
}
