//! One thread: an account of its own, which ends and begins again, and what is done with it.

use crate::life::{BLOCKS, Life, RANGE_PAGES, ROW, View, layers, pair, views};
use crate::tally::{Outcome, Tally};
use crate::tokens::Tokens;
use crate::watch::CODES;
use candle_core::Device;
use candle_cuda_vmm::cuda_vmm::{self, SharedMemoryPool};
use candle_cuda_vmm::kv_cache::KvCache;
use candle_cuda_vmm::{Quota, Result, VmmError};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::sync::Arc;
use std::time::Duration;

/// The most rows, tokens and views of each kind.
const ROWS: usize = 512;
const TOKENS: usize = 2048;
const VIEWS: usize = 6;

/// An operation: its name, how often it is chosen, and what it does.
type Operation = (&'static str, u32, fn(&mut Player, &mut Life) -> Result<()>);

/// All of them.
pub const OPERATIONS: &[Operation] = &[
    ("tensor append", 8, Player::append_rows),
    ("tensor grow", 2, Player::grow),
    ("tensor reserve", 2, Player::reserve_rows),
    ("tensor truncate", 4, Player::truncate_rows),
    ("tensor front", 3, Player::release_rows),
    ("tensor clear", 1, Player::clear_rows),
    ("tensor fork", 2, Player::fork_tensor),
    ("cache append", 8, Player::append_cache),
    ("cache truncate", 4, Player::truncate_cache),
    ("cache front", 3, Player::release_cache),
    ("cache reset", 1, Player::reset_cache),
    ("cache clone", 1, Player::clone_cache),
    ("cache fork", 2, Player::fork_cache),
    ("sequence step", 10, Player::step_sequence),
    ("sequence truncate", 3, Player::truncate_sequence),
    ("sequence reset", 2, Player::reset_sequence),
    ("sequence fork", 2, Player::fork_sequence),
    ("end of an origin", 3, Player::end_origin),
    ("blocks allocate", 6, Player::allocate_blocks),
    ("blocks free", 4, Player::free_blocks),
    ("blocks reclaim", 2, Player::reclaim_blocks),
    ("range allocate", 6, Player::allocate),
    ("range deallocate", 6, Player::deallocate),
    ("range lease", 3, Player::lease),
    ("range end lease", 3, Player::end_lease),
    ("range pin", 1, Player::pin),
    ("range compact", 1, Player::compact),
    ("view check", 4, Player::check_view),
    ("account quota", 1, Player::set_quota),
    ("account give back", 2, Player::give_back),
    ("engine step", 2, Player::step),
    ("engine trim", 1, Player::trim),
    ("check all", 1, Player::check_all),
];

pub struct Player {
    name: String,
    device: Device,
    shared: SharedMemoryPool,
    has_faults: bool,
    random: SmallRng,
    tally: Tally,
}

impl Player {
    pub fn new(
        number: u64,
        seed: u64,
        device: Device,
        shared: &SharedMemoryPool,
        has_faults: bool,
    ) -> Self {
        Self {
            name: format!("account {number}"),
            device,
            shared: shared.clone(),
            has_faults,
            random: SmallRng::seed_from_u64(seed),
            tally: Tally::default(),
        }
    }

    /// Plays until all is over.
    ///
    /// # Errors
    /// The first that must not be, and contents that are wrong.
    pub fn play(mut self, is_over: impl Fn() -> bool) -> Result<Tally> {
        let weights: u32 = OPERATIONS.iter().map(|(_, weight, _)| weight).sum();
        while !is_over() {
            let Some(mut life) = self.begin()? else {
                continue;
            };
            // Some hundreds of operations with one account, then another.
            let operations = self.random.random_range(50..1_000);
            for _ in 0..operations {
                if is_over() {
                    break;
                }
                let mut at = self.random.random_range(0..weights);
                let chosen = OPERATIONS.iter().find(|(_, weight, _)| {
                    let is_it = at < *weight;
                    at = at.saturating_sub(*weight);
                    is_it
                });
                let Some((name, _, operate)) = chosen else {
                    continue;
                };
                let result = operate(&mut self, &mut life);
                self.judge(name, result)?;
                self.give_what_is_owed(&mut life);
            }
            life.check()?;
            self.end(life)?;
        }
        Ok(self.tally)
    }

    /// Notes the outcome of an operation.
    ///
    /// # Errors
    /// The operation's, if it must not be.
    fn judge<T>(&mut self, name: &'static str, result: Result<T>) -> Result<Option<T>> {
        let error = match result {
            Ok(done) => {
                self.tally.note(name, Outcome::Done);
                return Ok(Some(done));
            }
            Err(error) => error,
        };
        let code = error.driver_code();
        let is_quarantined = matches!(error, VmmError::Vmm(cuda_vmm::VmmError::Quarantined { .. }));
        if self.has_faults && (is_quarantined || code.is_some_and(|code| CODES.contains(&code))) {
            self.tally.note(name, Outcome::Failed);
        } else if error.is_out_of_memory() || error.is_retryable() {
            self.tally.note(name, Outcome::Refused);
        } else {
            return Err(VmmError::other(format!("{}: {name}: {error}", self.name)));
        }
        Ok(None)
    }

    fn begin(&mut self) -> Result<Option<Life>> {
        let registered = self.shared.register_model(&self.name, Quota::new());
        let Some(account) = self.judge("register", registered.map_err(VmmError::from))? else {
            return Ok(None);
        };
        let life = Life::new(&self.device, account, self.random.random());
        let life = self.judge("begin", life)?;
        if life.is_none() {
            self.unregister()?;
        }
        Ok(life)
    }

    fn end(&mut self, life: Life) -> Result<()> {
        drop(life);
        self.unregister()
    }

    fn unregister(&mut self) -> Result<()> {
        let ended = self.shared.unregister_model(&self.name);
        self.judge("unregister", ended.map_err(VmmError::from))?;
        Ok(())
    }

    /// Gives back what other threads wait for.
    fn give_what_is_owed(&mut self, life: &mut Life) {
        if life.account.owed_bytes() > 0 && self.random.random_range(0..4) == 0 {
            life.sequence.reset();
            life.tokens = Tokens::default();
            self.tally.note("preempt", Outcome::Done);
        }
    }

    fn some(&mut self, most: usize) -> usize {
        self.random.random_range(0..=most)
    }

    fn keep(&mut self, life: &mut Life, view: View) {
        if life.views.len() < VIEWS && self.random.random() {
            life.views.push(view);
        }
    }

    fn append_rows(&mut self, life: &mut Life) -> Result<()> {
        let count = self.some(100).min(ROWS - life.rows.len());
        let more = Tokens::random(count, &mut self.random);
        let rows = more.tensor(0, &[count, ROW[0], ROW[1]], 1.0, &self.device)?;
        life.tensor.append(&rows)?;
        life.rows.append(&more);
        let view = View {
            tensor: life.tensor.view()?,
            tokens: life.rows.clone(),
            dim: 0,
            factor: 1.0,
        };
        self.keep(life, view);
        Ok(())
    }

    fn grow(&mut self, life: &mut Life) -> Result<()> {
        let count = self.some(100).min(ROWS - life.rows.len());
        life.tensor.grow(count)?;
        life.rows.append(&Tokens::zeros(count));
        Ok(())
    }

    fn reserve_rows(&mut self, life: &mut Life) -> Result<()> {
        let count = self.some(200).min(ROWS - life.rows.len());
        life.tensor.reserve(count)
    }

    fn truncate_rows(&mut self, life: &mut Life) -> Result<()> {
        let len = self.some(life.rows.len());
        life.tensor.truncate(len)?;
        life.rows.truncate(len);
        Ok(())
    }

    fn release_rows(&mut self, life: &mut Life) -> Result<()> {
        let count = self.some(life.rows.len());
        life.tensor.release_front(count)?;
        life.rows.release_front(count);
        Ok(())
    }

    fn clear_rows(&mut self, life: &mut Life) -> Result<()> {
        life.tensor.clear();
        life.rows = Tokens::default();
        Ok(())
    }

    /// Goes on with a fork, and keeps what it was made of.
    fn fork_tensor(&mut self, life: &mut Life) -> Result<()> {
        let fork = life.tensor.fork()?;
        let origin = std::mem::replace(&mut life.tensor, fork);
        life.origins.tensor = Some((origin, life.rows.clone()));
        Ok(())
    }

    fn fork_cache(&mut self, life: &mut Life) -> Result<()> {
        let fork = life.cache.fork()?;
        let origin = std::mem::replace(&mut life.cache, fork);
        life.origins.cache = Some((origin, life.cached.clone()));
        Ok(())
    }

    fn fork_sequence(&mut self, life: &mut Life) -> Result<()> {
        let fork = life.sequence.fork()?;
        let origin = std::mem::replace(&mut life.layers, layers(&fork)?);
        life.sequence = fork;
        life.origins.sequence = Some((origin, life.tokens.clone()));
        Ok(())
    }

    /// Drops what a fork was made of, or tokens of it.
    fn end_origin(&mut self, life: &mut Life) -> Result<()> {
        let origins = &mut life.origins;
        match (self.random.random_range(0..4), &mut origins.tensor) {
            (0, tensor) => *tensor = None,
            (1, _) => origins.cache = None,
            (2, _) => origins.sequence = None,
            (_, Some((tensor, rows))) => {
                let len = self.random.random_range(0..=rows.len());
                tensor.truncate(len)?;
                rows.truncate(len);
            }
            (_, None) => {}
        }
        Ok(())
    }

    fn append_cache(&mut self, life: &mut Life) -> Result<()> {
        let count = self.some(200).min(TOKENS - life.cached.len());
        let more = Tokens::random(count, &mut self.random);
        let (k, v) = pair(&more, &self.device)?;
        let all = life.cache.append(&k, &v)?;
        life.cached.append(&more);
        for view in views(all, &life.cached) {
            self.keep(life, view);
        }
        Ok(())
    }

    fn truncate_cache(&mut self, life: &mut Life) -> Result<()> {
        let len = self.some(life.cached.len());
        life.cache.truncate(len)?;
        life.cached.truncate(len);
        Ok(())
    }

    fn release_cache(&mut self, life: &mut Life) -> Result<()> {
        let count = self.some(life.cached.len());
        life.cache.release_front(count)?;
        life.cached.release_front(count);
        Ok(())
    }

    fn reset_cache(&mut self, life: &mut Life) -> Result<()> {
        life.cache.reset();
        life.cached = Tokens::default();
        Ok(())
    }

    /// Goes on with a copy, and drops the cache.
    fn clone_cache(&mut self, life: &mut Life) -> Result<()> {
        life.cache = life.cache.try_clone()?;
        Ok(())
    }

    /// As a model does: memory for all layers, and then no layer is refused.
    fn step_sequence(&mut self, life: &mut Life) -> Result<()> {
        let count = self.some(200).min(TOKENS - life.tokens.len());
        match self.some(2) {
            0 => life.sequence.reserve(count)?,
            1 => life.sequence.try_reserve(count)?,
            _ => (life.sequence).reserve_timeout(count, Duration::from_millis(2))?,
        }
        let more = Tokens::random(count, &mut self.random);
        let (k, v) = pair(&more, &self.device)?;
        let mut all = life.tokens.clone();
        all.append(&more);
        for layer in &mut life.layers {
            let appended = layer.append(&k, &v);
            if let Err(error) = appended {
                // The layers before it have the tokens, and this one has not.
                life.sequence.truncate(life.tokens.len())?;
                return Err(error);
            }
        }
        life.tokens = all;
        Ok(())
    }

    fn truncate_sequence(&mut self, life: &mut Life) -> Result<()> {
        let len = self.some(life.tokens.len());
        life.sequence.truncate(len)?;
        life.tokens.truncate(len);
        Ok(())
    }

    fn reset_sequence(&mut self, life: &mut Life) -> Result<()> {
        life.sequence.reset();
        life.tokens = Tokens::default();
        Ok(())
    }

    fn allocate_blocks(&mut self, life: &mut Life) -> Result<()> {
        let count = self.some(16).min(BLOCKS - life.table.len());
        let blocks = match self.random.random() {
            true => life.blocks.allocate(count)?,
            false => life.blocks.try_allocate(count)?,
        };
        let from = life.table.len();
        life.table
            .extend(blocks.into_iter().map(|block| (block, None)));
        for at in from..life.table.len() {
            let value = self.random.random_range(1..1 << 24) as f32;
            life.table[at].1 = life.write_block(life.table[at].0, value)?;
        }
        Ok(())
    }

    fn free_blocks(&mut self, life: &mut Life) -> Result<()> {
        let count = self.some(life.table.len());
        // Any of them, so that pages have holes.
        for _ in 0..count {
            let at = self.random.random_range(0..life.table.len());
            let (block, _) = life.table.swap_remove(at);
            life.blocks.free([block])?;
        }
        Ok(())
    }

    /// Evicts free blocks, and moves others.
    fn reclaim_blocks(&mut self, life: &mut Life) -> Result<()> {
        let bytes = self.some(4) << 21;
        let plan = match self.random.random() {
            true => life.blocks.reclaim_candidates(bytes, |_| None),
            false => life
                .blocks
                .reclaim_candidates_with_moves(bytes, 1.0, |_| None),
        };
        life.blocks.commit(&plan)?;
        for (block, _) in &mut life.table {
            if let Some((_, to)) = plan.moves().iter().find(|(from, _)| from == block) {
                *block = *to;
            }
        }
        Ok(())
    }

    fn allocate(&mut self, life: &mut Life) -> Result<()> {
        let most = RANGE_PAGES * life.range.page_bytes() / 4;
        let bytes = self.random.random_range(1..=most);
        let base = life.range.base_address();
        match life.range.allocate_anywhere(bytes, 256) {
            Ok(address) => life.spans.push(((address - base) as usize, bytes)),
            // The range is small, which is no fault.
            Err(cuda_vmm::VmmError::OutOfVirtualMemory { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    fn deallocate(&mut self, life: &mut Life) -> Result<()> {
        if life.spans.is_empty() {
            return Ok(());
        }
        let at = self.random.random_range(0..life.spans.len());
        let (offset, bytes) = life.spans.swap_remove(at);
        Ok(life.range.deallocate(offset, bytes)?)
    }

    fn lease(&mut self, life: &mut Life) -> Result<()> {
        if life.spans.is_empty() || life.leases.len() > VIEWS {
            return Ok(());
        }
        let at = self.random.random_range(0..life.spans.len());
        let (offset, bytes) = life.spans[at];
        let token = Arc::new(());
        life.range.lease(offset, bytes, token.clone())?;
        life.leases.push(token);
        Ok(())
    }

    fn end_lease(&mut self, life: &mut Life) -> Result<()> {
        life.leases.pop();
        Ok(())
    }

    fn pin(&mut self, life: &mut Life) -> Result<()> {
        life.pin = match (life.pin.take(), life.spans.first()) {
            (None, Some((offset, bytes))) => Some(life.range.pin_for_graph(*offset, *bytes)?),
            _ => None,
        };
        Ok(())
    }

    fn compact(&mut self, life: &mut Life) -> Result<()> {
        life.range.compact()?;
        Ok(())
    }

    /// Checks a view that was kept, and drops it.
    fn check_view(&mut self, life: &mut Life) -> Result<()> {
        if life.views.is_empty() {
            return Ok(());
        }
        let at = self.random.random_range(0..life.views.len());
        life.views.swap_remove(at).check("a view")
    }

    fn set_quota(&mut self, life: &mut Life) -> Result<()> {
        let page = life.range.page_bytes();
        let guarantee = self.some(8) * page;
        let ceiling = guarantee + (16 + self.some(64)) * page;
        let quota = Quota::new()
            .guarantee_bytes(guarantee)
            .ceiling_bytes(ceiling);
        let quota = quota.priority(self.random.random_range(0..3));
        match life.account.set_quota(quota) {
            // Others have been guaranteed the rest.
            Err(cuda_vmm::VmmError::QuotaUnsatisfiable { .. }) => Ok(()),
            set => Ok(set?),
        }
    }

    fn give_back(&mut self, life: &mut Life) -> Result<()> {
        life.account.give_back()?;
        Ok(())
    }

    fn step(&mut self, life: &mut Life) -> Result<()> {
        life.account.engine().step();
        Ok(())
    }

    fn trim(&mut self, life: &mut Life) -> Result<()> {
        life.account.engine().trim()?;
        Ok(())
    }

    fn check_all(&mut self, life: &mut Life) -> Result<()> {
        life.check()
    }
}
