//! K and V of one model's sequences, in blocks that have memory while they are in use.

use super::budget::{Budget, Counted};
use super::prefix::PrefixCache;
use super::sleeper::is_store_full;
use crate::config::Config;
use crate::scheduler::{Blocks, Growth, Id};
use candle_core::{DType, Tensor};
use candle_cuda_vmm::attention::KvBatch;
use candle_cuda_vmm::graph::StepBlocks;
use candle_cuda_vmm::{
    Account, BlockId, ElasticBlockAllocator, ElasticBlocks, ElasticBlocksOptions, HostStore, Keep,
    Result, TensorPool, TensorPoolOptions, VmmError, WakeOptions,
};
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// The tokens of a block.
pub const BLOCK_TOKENS: usize = 16;

/// How a model's blocks get their memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// As sequences need it, made ahead; it goes back when others want it.
    Elastic,
    /// All at the start, and for good.
    Static,
    /// Page by page as sequences need it, and back as soon as pages are empty.
    PageAtATime,
    /// What memory that costs nothing would give. Each model has all at the start that the limit of
    /// all models holds, which is more than the limit together, on purpose. What sequences have in
    /// use is counted, and stays within the limit. Prefixes that nothing uses do not count.
    Ideal,
}

impl Policy {
    /// Whether blocks have their memory from the start, and for good.
    pub fn is_backed_at_start(self) -> bool {
        matches!(self, Self::Static | Self::Ideal)
    }
}

/// What is known of a sequence.
#[derive(Debug, Default)]
struct Sequence {
    /// Its prompt, and what was generated.
    tokens: Vec<u32>,
    blocks: Vec<BlockId>,
    /// How many of them, from the first on, are in the prefix cache.
    known: usize,
}

impl Sequence {
    /// Whether its last token is the first of a block that it has not.
    fn is_at_boundary(&self) -> bool {
        !self.blocks.is_empty() && self.tokens.len() == self.blocks.len() * BLOCK_TOKENS + 1
    }
}

/// The blocks of one model, its sequences, and the prefixes that it keeps.
pub struct Kv {
    /// K and V of each layer. Dropped before the blocks.
    layers: Vec<[Tensor; 2]>,
    blocks: ElasticBlocks,
    allocator: ElasticBlockAllocator,
    named: StepBlocks,
    prefix: PrefixCache,
    sequences: HashMap<Id, Sequence>,
    /// Blocks that this plan has taken for sequences that will ask for one each.
    spare: Vec<BlockId>,
    policy: Policy,
    /// What of all models' budget is counted for this one, if there is one.
    counted: Option<Counted>,
    /// The models that memory is shared with.
    others: Vec<Account>,
    /// How long they may take to give back what they owe.
    patience: Duration,
    /// What all models may hold, and how much of it is to be free.
    limit_bytes: usize,
    free_bytes_min: usize,
    /// Since when memory is refused, for which they may owe.
    asking_since: Option<Instant>,
    /// What the next block needs if none is free.
    page_bytes: usize,
    /// Whether the plan of this step lacks memory.
    is_short: bool,
    /// The fewest blocks that this plan was refused, since it last freed some.
    refused: usize,
    /// The first failure that is not for want of memory.
    failure: Option<VmmError>,
}

/// How many tensors K and V of all layers are.
fn tensors(config: &Config) -> usize {
    2 * config.num_hidden_layers
}

/// The largest page. On an H100 mapping 16 MiB takes as long as mapping 2 MiB does.
const PAGE_BYTES_MAX: usize = 16 << 20;

/// The options of a pool for [`Kv`], on a device of this granularity. K and V of all layers are in
/// one range, so a page is one call of the driver instead of one for each tensor. It is as large as
/// those would be together, up to what takes no longer to map.
pub fn pool_options(config: &Config, granularity_bytes: usize) -> TensorPoolOptions {
    let all_bytes = (tensors(config) * granularity_bytes).next_power_of_two();
    let page_bytes = all_bytes.min(PAGE_BYTES_MAX.max(granularity_bytes));
    TensorPoolOptions::new().page_bytes(page_bytes)
}

impl Kv {
    /// Reserves addresses for this many blocks, and with some policies their memory. The elastic
    /// one has the memory of so many made ahead.
    pub fn new(
        pool: &TensorPool,
        config: &Config,
        dtype: DType,
        num_blocks: usize,
        ahead_blocks_max: usize,
        policy: Policy,
    ) -> Result<Self> {
        let tensors = tensors(config);
        let shape = (tensors, BLOCK_TOKENS, config.kv_heads(), config.head_dim());
        let ahead = match policy {
            Policy::Elastic => ahead_blocks_max,
            Policy::Static | Policy::PageAtATime | Policy::Ideal => 0,
        };
        let options = ElasticBlocksOptions::new().ahead_blocks_max(ahead);
        let blocks = pool.blocks_with_options(num_blocks, [("kv", shape, dtype)], options)?;
        if policy.is_backed_at_start() {
            blocks.back(0..num_blocks)?;
        }
        // SAFETY: tables name allocated blocks only, which `named` checks before each captured step.
        // They are backed until they are freed, after which no table names them. No operation reads
        // a whole tensor.
        #[allow(unsafe_code)]
        let all = unsafe { blocks.reserved_tensors()? };
        let part = |part: usize| all[0].narrow(1, part, 1)?.squeeze(1);
        let layers = (0..tensors).step_by(2);
        let layers = layers.map(|layer| Ok([part(layer)?, part(layer + 1)?]));
        let page_bytes = blocks.backing().page_bytes();
        Ok(Self {
            layers: layers.collect::<candle_core::Result<_>>()?,
            allocator: blocks.allocator(),
            named: StepBlocks::new(&blocks),
            blocks,
            prefix: PrefixCache::new(BLOCK_TOKENS),
            sequences: HashMap::new(),
            spare: Vec::new(),
            policy,
            counted: None,
            others: Vec::new(),
            patience: Duration::ZERO,
            limit_bytes: 0,
            free_bytes_min: 0,
            asking_since: None,
            page_bytes,
            is_short: false,
            refused: usize::MAX,
            failure: None,
        })
    }

    /// Counts the blocks that sequences use in a budget, and takes none that it has no room for.
    /// The model has this place among all models: of those that wait for each other, the first
    /// keeps what it has.
    pub fn within(mut self, budget: Budget, model: usize, block_bytes: usize) -> Self {
        self.counted = Some(budget.counted(model, block_bytes));
        self
    }

    /// Has sequences wait so long for what these models owe before they are preempted.
    pub fn beside(mut self, others: Vec<Account>, patience: Duration) -> Self {
        (self.others, self.patience) = (others, patience);
        self
    }

    /// Has so much of what all models may hold be free, as far as prefixes that nothing uses can go
    /// for it: the model's own while it has some, and then those of others.
    pub fn keep_free(mut self, limit_bytes: usize, free_bytes_min: usize) -> Self {
        (self.limit_bytes, self.free_bytes_min) = (limit_bytes, free_bytes_min);
        self
    }

    /// K and V of all layers for a batch with these tables and lengths.
    pub fn batch(&self, tables: &Tensor, lengths: &Tensor) -> Result<Vec<KvBatch>> {
        let layers = self.layers.iter().map(|[k, v]| {
            let kv = KvBatch::blocks(k, v, tables)?.lengths(lengths)?;
            Ok(kv.checked_by(&self.blocks))
        });
        layers.collect()
    }

    /// Clones of the tensors of all layers, for a step that is captured.
    pub fn layers(&self) -> (Vec<[Tensor; 2]>, ElasticBlocks) {
        (self.layers.clone(), self.blocks.clone())
    }

    /// The blocks that tables name, for captured steps.
    pub fn named(&mut self) -> &mut StepBlocks {
        &mut self.named
    }

    /// Notes a sequence with its prompt. It has no blocks yet.
    pub fn begin(&mut self, id: Id, prompt: Vec<u32>) {
        let sequence = Sequence {
            tokens: prompt,
            ..Sequence::default()
        };
        self.sequences.insert(id, sequence);
    }

    /// Appends a generated token.
    pub fn push(&mut self, id: Id, token: u32) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.tokens.push(token);
        }
    }

    /// Forgets a sequence, which was released.
    pub fn forget(&mut self, id: Id) {
        self.release(id);
        self.sequences.remove(&id);
    }

    /// The tokens of a sequence.
    pub fn tokens(&self, id: Id) -> &[u32] {
        self.sequences.get(&id).map_or(&[], |it| &it.tokens)
    }

    /// The blocks of a sequence.
    pub fn table(&self, id: Id) -> &[BlockId] {
        self.sequences.get(&id).map_or(&[], |it| &it.blocks)
    }

    /// Notes that the first `count` tokens of a sequence are in its blocks, and makes whole blocks
    /// known to others.
    pub fn computed(&mut self, id: Id, count: usize) {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        let whole = (count / BLOCK_TOKENS).min(sequence.blocks.len());
        while sequence.known < whole {
            let at = sequence.known;
            let before = at.checked_sub(1).map(|before| sequence.blocks[before]);
            let tokens = &sequence.tokens[at * BLOCK_TOKENS..][..BLOCK_TOKENS];
            if !self.prefix.add(before, tokens, sequence.blocks[at]) {
                // Another sequence has computed the same.
                break;
            }
            sequence.known += 1;
        }
    }

    /// Gives memory back: the pages in which the fewest prefixes are lost, the longest unused first.
    /// Returns how many bytes were freed; they come free when the device has finished with them.
    pub fn give_back(&mut self, bytes: usize) -> Result<usize> {
        if self.policy.is_backed_at_start() {
            return Ok(0);
        }
        let cost = |block| self.prefix.cost(block);
        let plan = self.allocator.reclaim_candidates(bytes, cost);
        if plan.is_empty() {
            return Ok(0);
        }
        self.allocator.commit(&plan)?;
        let behind = self.prefix.remove(plan.evicted());
        self.allocator.free(behind)?;
        Ok(plan.freed_bytes())
    }

    /// Forgets all prefixes that nothing uses, and gives their memory back.
    pub fn clear_prefixes(&mut self) -> Result<()> {
        let evicted = self.prefix.evict(usize::MAX);
        self.allocator.free(evicted)?;
        self.give_back(usize::MAX).map(drop)
    }

    /// Gives up the memory of all blocks, whose sequences have ended. The store has the prefixes, or
    /// they are forgotten if it has no room. Returns whether it has them.
    pub fn sleep(&mut self, store: &HostStore) -> Result<bool> {
        // What is backed and unused would be copied.
        let empty = self.allocator.reclaim_candidates(usize::MAX, |_| None);
        if !empty.is_empty() {
            self.allocator.commit(&empty)?;
        }
        match self.blocks.sleep(Keep::Host(store)) {
            Err(error) if is_store_full(&error) => {
                self.clear_prefixes()?;
                self.blocks.sleep(Keep::Nothing)?;
                Ok(false)
            }
            slept => slept.map(|_| true),
        }
    }

    /// Has the memory of all blocks again, and the prefixes in them.
    pub fn wake(&self) -> Result<()> {
        match self.blocks.is_asleep() {
            true => self.blocks.wake(&WakeOptions::new()),
            false => Ok(()),
        }
    }

    /// Counts this many blocks more as in use. Returns `false` if the budget has no room for them.
    fn take(&mut self, count: usize) -> bool {
        self.counted.as_mut().is_none_or(|it| it.take(count))
    }

    /// Gives the budget what was counted and is no more in use.
    fn settle(&mut self) {
        if let Some(counted) = &mut self.counted {
            counted.settle(self.allocator.allocated() - self.spare.len() - self.prefix.unused());
        }
    }

    /// Takes blocks, if need be those of prefixes that nothing uses.
    fn allocate(&mut self, count: usize) -> Result<Vec<BlockId>> {
        if self.lacks_pages(count) {
            let evicted = self.prefix.evict(count);
            self.allocator.free(evicted)?;
        }
        loop {
            let error = match self.allocator.try_allocate(count) {
                Ok(blocks) => {
                    // Others give back, so what is missing may come too.
                    if let Some(since) = &mut self.asking_since {
                        *since = Instant::now();
                    }
                    return Ok(blocks);
                }
                Err(error) => error,
            };
            self.asking_since.get_or_insert_with(Instant::now);
            let evicted = self.prefix.evict(count);
            if evicted.is_empty() {
                return Err(error);
            }
            self.allocator.free(evicted)?;
        }
    }

    /// Whether so many blocks need pages though little is free. Then a prefix of the model's own
    /// goes first: its blocks are there already.
    fn lacks_pages(&self, count: usize) -> bool {
        self.free_bytes_min > 0
            && self.prefix.unused() > 0
            && self.allocator.free_backed() < count
            && self.free_bytes() < self.free_bytes_min + self.page_bytes
    }

    /// What no model holds.
    fn free_bytes(&self) -> usize {
        let others = self.others.iter().map(Account::committed_bytes);
        let held = self.blocks.account().committed_bytes() + others.sum::<usize>();
        self.limit_bytes.saturating_sub(held)
    }

    /// How much too little is free, which prefixes of others may make room for; 0 while the model
    /// has some of its own.
    pub fn missing_bytes(&self) -> usize {
        match self.free_bytes_min > 0 && self.prefix.unused() == 0 {
            true => self.free_bytes_min.saturating_sub(self.free_bytes()),
            false => 0,
        }
    }

    /// A plan begins. Sequences that began together need a block in the same step, so their blocks
    /// are taken by one call. If there are too few, each asks for its own.
    pub fn begin_plan(&mut self) {
        self.is_short = false;
        self.refused = usize::MAX;
        if let Some(counted) = &mut self.counted {
            counted.begin_plan();
        }
        let growing = self.sequences.values().filter(|it| it.is_at_boundary());
        match growing.count() {
            0 | 1 => {}
            count => self.spare = self.allocate(count).unwrap_or_default(),
        }
    }

    /// A plan is made. If it has all the memory that it needs, other models owe nothing for what was
    /// refused before: it was found among prefixes, or the sequence that needed it has gone.
    pub fn end_plan(&mut self) {
        let spare = std::mem::take(&mut self.spare);
        if !spare.is_empty() {
            // They are handed out, so they can be freed.
            _ = self.allocator.free(spare);
        }
        if let Some(counted) = &mut self.counted {
            counted.end_plan(self.is_short);
        }
        if !self.is_short && self.asking_since.take().is_some() {
            self.blocks.account().withdraw();
        }
    }

    /// Whether memory that was refused is likely to be there soon.
    fn is_coming(&self) -> bool {
        let owes = |other: &Account| other.owed_bytes() > 0;
        self.asking_since.is_some_and(|since| {
            let asking = since.elapsed();
            let retires = || self.blocks.engine().stats().parts.retiring_bytes > 0;
            asking < HEARD || asking < self.patience && (self.others.iter().any(owes) || retires())
        })
    }

    /// There is no memory. What was refused is not asked for again in the same plan, as others would
    /// be told each time.
    fn lack(&mut self) -> Growth {
        self.is_short = true;
        match self.is_coming() {
            true => Growth::Coming,
            false => Growth::Short,
        }
    }

    /// Whether the model, if it can compute nothing, must give its memory to one that waits.
    pub fn must_yield(&self) -> bool {
        self.counted.as_ref().is_some_and(Counted::must_yield)
    }

    /// The first failure of a call of the scheduler that was not for want of memory.
    pub fn failure(&mut self) -> Option<VmmError> {
        self.failure.take()
    }

    /// Blocks with prefixes that nothing uses.
    pub fn unused_prefixes(&self) -> usize {
        self.prefix.unused()
    }

    /// Blocks that are handed out: to sequences and prefixes.
    pub fn allocated(&self) -> usize {
        self.allocator.allocated()
    }

    /// The number of sequences that have blocks, and of blocks that they have.
    pub fn in_use(&self) -> (usize, usize) {
        let held = self.sequences.values().filter(|it| !it.blocks.is_empty());
        let (sequences, blocks) = (held.clone().count(), held.map(|it| it.blocks.len()).sum());
        (sequences, blocks)
    }

    /// The blocks, with their statistics.
    pub fn blocks(&self) -> &ElasticBlocks {
        &self.blocks
    }
}

/// How long others may take to hear that they owe, and the engine's worker to finish a page that it
/// makes ahead.
const HEARD: Duration = Duration::from_millis(5);

impl Blocks for Kv {
    fn sequence_tokens_max(&self) -> usize {
        self.blocks.num_blocks() * BLOCK_TOKENS
    }

    fn cached_prefix(&mut self, id: Id) -> usize {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return 0;
        };
        let computed = sequence.tokens.len().saturating_sub(1);
        let unused = self.prefix.unused();
        let taken = self.prefix.take(&sequence.tokens[..computed]);
        let newly_used = unused - self.prefix.unused();
        if self.counted.as_mut().is_some_and(|it| !it.take(newly_used)) {
            for block in taken.iter().rev() {
                self.prefix.release(*block);
            }
            return 0;
        }
        // They exist.
        _ = self.named.name(taken.iter().copied());
        sequence.known = taken.len();
        sequence.blocks = taken;
        sequence.known * BLOCK_TOKENS
    }

    fn grow(&mut self, id: Id, tokens: usize) -> Growth {
        let has = self.table(id).len();
        let missing = tokens.div_ceil(BLOCK_TOKENS).saturating_sub(has);
        if missing == 0 {
            return Growth::Done;
        }
        if missing >= self.refused {
            return self.lack();
        }
        if !self.take(missing) {
            self.is_short = true;
            return Growth::Short;
        }
        let spare = self.spare.pop_if(|_| missing == 1);
        match spare.map_or_else(|| self.allocate(missing), |block| Ok(vec![block])) {
            Ok(blocks) => {
                // They exist.
                _ = self.named.name(blocks.iter().copied());
                if let Some(sequence) = self.sequences.get_mut(&id) {
                    sequence.blocks.extend(blocks);
                }
                Growth::Done
            }
            Err(error) => {
                self.settle();
                let is_memory = error.is_out_of_memory() || error.is_retryable();
                if is_memory {
                    self.refused = missing;
                    tracing::debug!(
                        blocks = missing,
                        free_backed = self.allocator.free_backed(),
                        free_bytes = self.free_bytes(),
                        retiring_bytes = self.blocks.engine().stats().parts.retiring_bytes,
                        owed_bytes = self.others.iter().map(Account::owed_bytes).sum::<usize>(),
                        prefixes = self.prefix.unused(),
                        %error,
                        "short of memory"
                    );
                    return self.lack();
                }
                match is_out_of_blocks(&error) {
                    true => self.is_short = true,
                    false => _ = self.failure.get_or_insert(error),
                }
                Growth::Short
            }
        }
    }

    fn release(&mut self, id: Id) {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        let blocks = std::mem::take(&mut sequence.blocks);
        let known = std::mem::take(&mut sequence.known);
        self.named.forget(blocks.iter().copied());
        self.refused = usize::MAX;
        let (shared, own) = blocks.split_at(known.min(blocks.len()));
        let freed = self.allocator.free(own.iter().copied());
        // From the last on, so that a prefix is older than what is behind it.
        let gone = shared.iter().rev().copied();
        let gone: Vec<_> = gone.filter(|block| !self.prefix.release(*block)).collect();
        let has_freed = !own.is_empty() || !gone.is_empty();
        let freed = freed.and_then(|()| self.allocator.free(gone));
        let freed = freed.and_then(|()| match self.policy {
            Policy::PageAtATime if has_freed => {
                let empty = self.allocator.reclaim_candidates(usize::MAX, |_| None);
                match empty.is_empty() {
                    true => Ok(()),
                    false => self.allocator.commit(&empty),
                }
            }
            _ => Ok(()),
        });
        self.settle();
        if let Err(error) = freed
            && self.failure.is_none()
        {
            self.failure = Some(error);
        }
    }
}

fn is_out_of_blocks(error: &VmmError) -> bool {
    use candle_cuda_vmm::{BlockError, cuda_vmm};
    let block = match error {
        VmmError::Vmm(cuda_vmm::VmmError::Block(block)) => block,
        _ => return false,
    };
    matches!(block, BlockError::OutOfBlocks { .. })
}
