//! Random operations on tensors, caches, sequences and blocks of models that share one limit,
//! against a plain model of pages: what is within a guarantee is always had, and the rest exactly
//! if it leaves room for all guarantees. Nothing here launches a kernel.

use crate::common::layouts::Layout;
use crate::common::{UnderTest, open, page, settle_to};
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::cuda_vmm::VmmError as Core;
use candle_cuda_vmm::kv_cache::{KvCache, KvCacheFactory, Sequence, SequenceCache};
use candle_cuda_vmm::{
    ElasticBlocks, ElasticTensor, Quota, Result, SharedMemoryPool, TensorPool, TensorPoolOptions,
    VmmError,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

const LIMIT_PAGES: usize = 16;
/// Rows, tokens and blocks in a page.
const PER_PAGE: usize = 4;
/// Pages of the addresses of each tensor.
const CAPACITY_PAGES: usize = 12;
const BLOCKS: usize = 16;

/// The memory of rows in ranges of one length, in pages of each.
#[derive(Clone, Copy)]
struct Rows {
    len: usize,
    pages: usize,
    per_page: usize,
    ranges: usize,
}

impl Rows {
    fn new(per_page: usize, ranges: usize) -> Self {
        let (len, pages) = (0, 0);
        Self {
            len,
            pages,
            per_page,
            ranges,
        }
    }

    fn all_pages(&self) -> usize {
        self.pages * self.ranges
    }

    /// With memory for `more` rows.
    fn reserved(self, more: usize) -> Self {
        let pages = (self.len + more).div_ceil(self.per_page);
        Self {
            pages: self.pages.max(pages),
            ..self
        }
    }

    fn grown(self, more: usize) -> Self {
        Self {
            len: self.len + more,
            ..self.reserved(more)
        }
    }

    /// One page behind the rows stays.
    fn truncated(self, len: usize) -> Self {
        let pages = match len {
            0 => 0,
            len => self.pages.min(len.div_ceil(self.per_page) + 1),
        };
        Self { len, pages, ..self }
    }
}

/// What a model has: a tensor, a sequence of two layers, and blocks of two tensors.
#[derive(Clone)]
struct Plain {
    tensor: Rows,
    sequence: Rows,
    blocks: BTreeSet<usize>,
    guarantee: usize,
}

impl Plain {
    fn new(layout: Layout, guarantee: usize) -> Self {
        Self {
            tensor: Rows::new(PER_PAGE, 1),
            // Keys and values of two layers.
            sequence: match layout {
                Layout::Apart => Rows::new(PER_PAGE, 4),
                Layout::OneRange => Rows::new(PER_PAGE / 4, 1),
            },
            blocks: BTreeSet::new(),
            guarantee,
        }
    }

    fn held(&self) -> usize {
        let block_pages: BTreeSet<_> = self.blocks.iter().map(|block| block / PER_PAGE).collect();
        self.tensor.all_pages() + self.sequence.all_pages() + 2 * block_pages.len()
    }
}

struct Model {
    pool: TensorPool,
    tensor: ElasticTensor,
    sequence: Sequence,
    layers: Vec<SequenceCache>,
    blocks: ElasticBlocks,
}

impl Model {
    fn new(layout: Layout, pool: TensorPool) -> Self {
        let token = (1, 2, page() / 32);
        let sequence = layout.sequence(&pool, 2, [token; 2], DType::F32);
        let sequence = sequence.unwrap();
        let layers = (0..2).map(|layer| sequence.layer(layer, 1, 16).unwrap());
        let entries = ["k", "v"].map(|name| (name, page() / PER_PAGE, DType::U8));
        Self {
            tensor: pool.tensor(page() / PER_PAGE, DType::U8).unwrap(),
            layers: layers.collect(),
            sequence,
            blocks: pool.blocks(BLOCKS, entries).unwrap(),
            pool,
        }
    }
}

struct Played<'a> {
    test: &'a UnderTest,
    shared: SharedMemoryPool,
    models: Vec<Model>,
    plain: Vec<Plain>,
}

impl Played<'_> {
    fn available(&self, model: usize) -> usize {
        let others = self.plain.iter().enumerate();
        let others = others.filter(|(index, _)| *index != model);
        let spoken_for: usize = others
            .map(|(_, plain)| plain.held().max(plain.guarantee))
            .sum();
        LIMIT_PAGES.saturating_sub(spoken_for + self.plain[model].held())
    }

    fn settle(&self) {
        self.test.device.synchronize().unwrap();
        let engine = self.shared.core().engine();
        while engine.stats().parts.retiring_bytes > 0 {
            engine.step();
        }
    }

    /// Checks an outcome against what was available, and notes it.
    fn judge(&mut self, model: usize, after: Plain, outcome: Result<()>, what: &str) {
        let need = after.held() - self.plain[model].held();
        let available = self.available(model);
        match outcome {
            Ok(()) => {
                assert!(need <= available, "{what}: {need} of {available} pages");
                self.plain[model] = after;
            }
            Err(VmmError::Vmm(Core::OutOfPhysicalMemory { .. })) => {
                assert!(need > available, "{what}: {need} of {available} pages");
            }
            Err(error) => panic!("{what}: {error}"),
        }
    }

    fn play(&mut self, random: &mut StdRng) {
        let at = random.random_range(0..self.models.len());
        let count = random.random_range(1..9);
        let mut after = self.plain[at].clone();
        let model = &mut self.models[at];
        let most = CAPACITY_PAGES * PER_PAGE;
        let (what, outcome) = match random.random_range(0..9) {
            0 | 1 => {
                let count = count.min(most - after.tensor.len);
                after.tensor = after.tensor.grown(count);
                ("grow", model.tensor.grow(count))
            }
            2 => {
                after.tensor = after.tensor.truncated(after.tensor.len / 2);
                ("truncate", model.tensor.truncate(after.tensor.len))
            }
            3 => {
                let count = count.min(most - after.sequence.len);
                after.sequence = after.sequence.reserved(count);
                ("reserve", model.sequence.reserve(count))
            }
            // A step of a model: its memory first, and then no layer is refused.
            4 | 5 => {
                let count = count.min(most - after.sequence.len);
                after.sequence = after.sequence.grown(count);
                let reserved = model.sequence.reserve(count);
                if reserved.is_ok() && count > 0 {
                    let shape = (1, count, 2, page() / 32);
                    let tokens = Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
                    let tokens = tokens.to_device(&self.test.device).unwrap();
                    for layer in &mut model.layers {
                        drop(layer.append(&tokens, &tokens).expect("it was reserved"));
                    }
                }
                ("step", reserved)
            }
            6 => {
                after.sequence = after.sequence.truncated(0);
                model.sequence.reset();
                ("reset", Ok(()))
            }
            7 => {
                let blocks: BTreeSet<_> = (0..count / 2 + 1)
                    .map(|_| random.random_range(0..BLOCKS))
                    .collect();
                after.blocks.extend(&blocks);
                ("back", model.blocks.back(blocks))
            }
            _ => {
                let gone: Vec<_> = after.blocks.iter().copied().take(count).collect();
                after.blocks.retain(|block| !gone.contains(block));
                ("unback", model.blocks.unback(gone))
            }
        };
        if after.held() < self.plain[at].held() {
            outcome.unwrap_or_else(|error| panic!("{what}: {error}"));
            self.plain[at] = after;
        } else {
            self.judge(at, after, outcome, what);
        }
    }

    /// The engine's own thread may be in the midst of giving something back. So what is to be
    /// available is so soon.
    fn check(&self) {
        let until = Instant::now() + Duration::from_secs(60);
        let is_as_expected = |(index, model): (usize, &Model)| {
            let available = model.pool.account().available_bytes();
            available == self.available(index) * page()
        };
        loop {
            self.settle();
            if self.models.iter().enumerate().all(is_as_expected) || Instant::now() > until {
                break;
            }
        }
        let snapshot = self.shared.core().snapshot();
        for (index, (plain, model)) in self.plain.iter().zip(&self.models).enumerate() {
            let account = &snapshot.accounts[index];
            let live_bytes = account.stats.parts.live_page_bytes + account.stats.parts.leased_bytes;
            assert_eq!(live_bytes, plain.held() * page(), "{account:?}");
            let available = model.pool.account().available_bytes();
            assert_eq!(available, self.available(index) * page(), "model {index}");
            assert_eq!(model.sequence.len(), plain.sequence.len);
            assert_eq!(model.sequence.bytes(), plain.sequence.all_pages() * page());
            assert_eq!(model.tensor.len(), plain.tensor.len);
        }
    }
}

#[test]
fn guarantees_hold_for_tensors_caches_and_blocks() {
    let test = open();
    let mut random = StdRng::seed_from_u64(15);
    for layout in [Layout::Apart, Layout::OneRange].repeat(4) {
        let limit_bytes = LIMIT_PAGES * page();
        let mut shared = SharedMemoryPool::new(limit_bytes, test.device.clone()).unwrap();
        let (mut models, mut plain) = (Vec::new(), Vec::new());
        for name in ["a", "b", "c"] {
            let guarantee = random.random_range(0..6);
            let quota = Quota::new().guarantee_bytes(guarantee * page());
            shared.register_model_with(name, page(), quota).unwrap();
            let options = TensorPoolOptions::new()
                .page_bytes(page())
                .reservation_bytes(CAPACITY_PAGES * page());
            let pool = shared.tensor_pool(name, options).unwrap();
            models.push(Model::new(layout, pool));
            plain.push(Plain::new(layout, guarantee));
        }
        let mut played = Played {
            test: &test,
            shared,
            models,
            plain,
        };
        for _ in 0..60 {
            played.play(&mut random);
            played.check();
        }
        played.models.clear();
        settle_to(&test.device, played.shared.core().engine(), 0);
    }
}
