//! An elastic pool as KVCached's: pages of 2 MiB with a handle each, mapped when needed.
//!
//! Each model keeps up to ten pages mapped that it does not use; when fewer than five are left, a
//! thread in the background maps more. What is freed beyond that is unmapped and released at once,
//! on the thread that frees it. A model gives up what it keeps only if another needs the memory.

use crate::card::Card;
use anyhow::{Context, Result};
use cuda_vmm::{Access, Device, Mapping, PhysicalMemory, Reservation};
use cuda_vmm_benches::serving::{BLOCK_BYTES, Memory};
use cuda_vmm_sim::CostModel;
use itertools::Itertools;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// With fewer mapped pages at hand the background maps more.
const RESERVE_MIN: usize = 5;
/// This many are kept.
const RESERVE_MAX: usize = 10;

struct Model {
    reservation: Arc<Reservation>,
    /// Mapped pages, in use or not.
    mapped: BTreeMap<u32, Mapping>,
    /// Mapped pages that are not in use, the last one first.
    reserve: Vec<u32>,
    unmapped: BTreeSet<u32>,
}

impl Model {
    /// Maps the lowest page that is not.
    fn map(&mut self, device: &Device) -> Result<u32> {
        let page = self.unmapped.pop_first();
        let page = page.context("fewer pages than the limit")?;
        let memory = Arc::new(PhysicalMemory::new(device, BLOCK_BYTES)?);
        let access = [(device.clone(), Access::ReadWrite)];
        let offset = page as usize * BLOCK_BYTES;
        let mapping = Mapping::new(&self.reservation, offset, &memory, &access)?;
        self.mapped.insert(page, mapping);
        Ok(page)
    }

    fn unmap(&mut self, page: u32) -> Result<()> {
        if let Some(mapping) = self.mapped.remove(&page) {
            mapping.close().map_err(|failure| failure.error)?;
        }
        self.unmapped.insert(page);
        Ok(())
    }
}

pub struct PageAtATime {
    models: Vec<Model>,
    limit: usize,
    card: Card,
}

impl PageAtATime {
    pub fn new(limit: usize, models: usize, costs: Option<CostModel>) -> Result<Self> {
        let mut card = Card::new(costs)?;
        let models = (0..models).map(|_| {
            Ok(Model {
                reservation: Arc::new(Reservation::new(&card.device, limit * BLOCK_BYTES)?),
                mapped: BTreeMap::new(),
                reserve: Vec::new(),
                unmapped: (0..limit as u32).collect(),
            })
        });
        let models = models.collect::<Result<_>>()?;
        card.begin();
        Ok(Self {
            models,
            limit,
            card,
        })
    }

    fn held(&self) -> usize {
        self.models.iter().map(|model| model.mapped.len()).sum()
    }

    /// Unmaps what other models keep in reserve, as far as a model cannot have its pages without.
    fn take_back(&mut self, now_ns: &mut u64, model: usize, count: usize) -> Result<()> {
        let to_map = count.saturating_sub(self.models[model].reserve.len());
        let mut missing = (self.held() + to_map).saturating_sub(self.limit);
        for (number, other) in self.models.iter_mut().enumerate() {
            let pages = other.reserve.len().min(missing);
            if number == model || pages == 0 {
                continue;
            }
            missing -= pages;
            let mut pages = other.reserve.drain(..pages).collect_vec().into_iter();
            let unmap = || pages.try_for_each(|page| other.unmap(page));
            self.card.call(now_ns, unmap)?;
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

    fn take(&mut self, now_ns: &mut u64, model: usize, count: usize) -> Result<Option<Vec<u32>>> {
        if count > self.free_blocks(model) {
            return Ok(None);
        }
        self.take_back(now_ns, model, count)?;
        let (own, device) = (&mut self.models[model], self.card.device.clone());
        let mut take = || own.reserve.pop().map_or_else(|| own.map(&device), Ok);
        let take_all = || (0..count).map(|_| take()).collect::<Result<_>>();
        self.card.call(now_ns, take_all).map(Some)
    }

    fn give(&mut self, now_ns: &mut u64, model: usize, blocks: Vec<u32>) -> Result<()> {
        let own = &mut self.models[model];
        let kept = (RESERVE_MAX.saturating_sub(own.reserve.len())).min(blocks.len());
        own.reserve.extend(&blocks[..kept]);
        let mut surplus = blocks[kept..].iter();
        let unmap = || surplus.try_for_each(|page| own.unmap(*page));
        self.card.call(now_ns, unmap)
    }

    fn work(&mut self, now_ns: u64) -> Result<()> {
        for model in 0..self.models.len() {
            let room = self.limit - self.held();
            let own = &mut self.models[model];
            if own.reserve.len() >= RESERVE_MIN || room == 0 {
                continue;
            }
            let wanted = (RESERVE_MAX - own.reserve.len()).min(room);
            let device = self.card.device.clone();
            let more = |_| own.map(&device).map(|page| own.reserve.insert(0, page));
            let map = || (0..wanted).try_for_each(more);
            self.card.behind(now_ns, map)?;
        }
        Ok(())
    }

    fn held_bytes(&self, model: usize) -> u64 {
        (self.models[model].mapped.len() * BLOCK_BYTES) as u64
    }
}
