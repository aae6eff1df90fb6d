//! A backing with bytes that are remembered.

use crate::common::Simulated;
use cuda_vmm::pool::blocks::{BlockBacking, ElementSize, LayerSpec, ReclaimPlan, TensorSpec};
use cuda_vmm::sim::{Books, SimConfig};
use cuda_vmm::{Engine, EngineOptions, Stream};
use std::collections::BTreeMap;

/// Small, so that every byte can be read often.
pub const PAGE: usize = 4096;

/// Shapes that paged caches have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shapes {
    /// `[size, heads, dim]` for two layers' keys and values, blocks that straddle pages.
    Rows,
    /// `[heads, dim/x, size, x]` for keys and `[heads, dim, size]` for values.
    Vectors,
    /// `[size, 512]` with `[size, 64]`: blocks of two sizes, of which neither divides a page.
    Mla,
    /// Blocks of more than a page beside small ones.
    Large,
}

impl Shapes {
    pub const ALL: [Self; 4] = [Self::Rows, Self::Vectors, Self::Mla, Self::Large];

    pub fn spec(self) -> LayerSpec {
        let f16 = ElementSize::new(2).expect("not zero");
        let tensor = |name: &str, shape: &[usize]| TensorSpec::new(name, shape, f16);
        let tensors = match self {
            Self::Rows => vec![
                tensor("0.k", &[5, 2, 32]),
                tensor("0.v", &[5, 2, 32]),
                tensor("1.k", &[5, 2, 32]),
                tensor("1.v", &[5, 2, 32]),
            ],
            Self::Vectors => vec![tensor("k", &[2, 2, 4, 8]), tensor("v", &[2, 16, 4])],
            Self::Mla => vec![tensor("latent", &[3, 512]), tensor("rope", &[3, 64])],
            Self::Large => vec![tensor("wide", &[16, 3, 100]), tensor("narrow", &[16, 7])],
        };
        let tensors: Result<Vec<_>, _> = tensors.into_iter().collect();
        LayerSpec::new(tensors.expect("small")).expect("tensors of different names")
    }
}

pub struct Fixture {
    pub backing: BlockBacking,
    pub engine: Engine,
    pub stream: Stream,
    /// What each block of each tensor holds.
    pub contents: BTreeMap<(usize, usize), Vec<u8>>,
    written: usize,
    pub simulated: Simulated,
}

impl Fixture {
    pub fn new(shapes: Shapes, blocks: usize, options: EngineOptions) -> Self {
        let simulated = Simulated::new(SimConfig::new().granularity_bytes(PAGE));
        let engine = Engine::new(&simulated.device, options).expect("an engine");
        let backing = BlockBacking::new(&engine, shapes.spec(), blocks, PAGE).expect("a backing");
        Self {
            backing,
            engine,
            stream: Stream::new(&simulated.device).expect("a stream"),
            contents: BTreeMap::new(),
            written: 0,
            simulated,
        }
    }

    /// Backs blocks and writes something of its own to each that was not.
    pub fn back(&mut self, blocks: impl IntoIterator<Item = usize>) {
        let blocks: Vec<_> = blocks.into_iter().collect();
        self.backing.back(blocks.iter().copied()).expect("room");
        for block in blocks {
            if !self.contents.contains_key(&(0, block)) {
                self.fill(block);
            }
        }
    }

    /// Writes something new to a backed block, in every tensor.
    pub fn fill(&mut self, block: usize) {
        for (index, tensor) in self.backing.tensors().iter().enumerate() {
            self.written += 1;
            let byte = |at: usize| (self.written * 131 + at * 7 + at / 251) as u8;
            let bytes: Vec<_> = (0..tensor.block_bytes()).map(byte).collect();
            let address = tensor.base_address() + (block * tensor.block_bytes()) as u64;
            // SAFETY: the block is backed.
            unsafe { self.stream.write(address, &bytes) }.expect("written");
            self.contents.insert((index, block), bytes);
        }
    }

    pub fn unback(&mut self, blocks: impl IntoIterator<Item = usize>) {
        let blocks: Vec<_> = blocks.into_iter().collect();
        self.backing.unback(blocks.iter().copied()).expect("backed");
        self.contents
            .retain(|(_, block), _| !blocks.contains(block));
    }

    pub fn commit(&mut self, plan: &ReclaimPlan) {
        self.backing.commit(plan, &self.stream).expect("true");
        self.committed(plan);
    }

    /// What is remembered follows a plan that was carried out.
    pub fn committed(&mut self, plan: &ReclaimPlan) {
        for index in 0..self.backing.tensors().len() {
            for block in plan.evicted() {
                self.contents.remove(&(index, *block));
            }
            for (from, to) in plan.moves() {
                let bytes = self
                    .contents
                    .remove(&(index, *from))
                    .expect("it was backed");
                self.contents.insert((index, *to), bytes);
            }
        }
    }

    /// Waits until what can go back by itself has.
    pub fn settle(&self) {
        self.simulated.device.synchronize().expect("done");
        self.engine.step();
        self.engine.step();
        let stats = self.engine.stats();
        assert_eq!(
            stats.parts.retiring_bytes + stats.parts.quarantined_bytes,
            0,
            "{stats}"
        );
    }

    /// Reads every byte that should be there, and holds the books against each other.
    #[track_caller]
    pub fn check(&self) {
        for ((index, block), expected) in &self.contents {
            let tensor = &self.backing.tensors()[*index];
            let address = tensor.base_address() + (block * tensor.block_bytes()) as u64;
            let mut bytes = vec![0; expected.len()];
            // SAFETY: the block is backed.
            unsafe { self.stream.read(address, &mut bytes) }.expect("mapped");
            assert!(
                bytes == *expected,
                "block {block} of {} holds other bytes",
                tensor.name()
            );
        }
        let backed: Vec<_> = (0..self.backing.blocks())
            .filter(|block| self.backing.is_backed(*block))
            .collect();
        let remembered = self.contents.keys().filter(|(index, _)| *index == 0);
        assert!(remembered.map(|(_, block)| block).eq(&backed));
        let prefix = backed
            .iter()
            .enumerate()
            .take_while(|(at, block)| at == *block);
        assert_eq!(self.backing.backed_prefix(), prefix.count());
        let stats = self.backing.stats();
        assert_eq!(stats.backed_blocks, backed.len());
        assert_eq!(stats.page_bytes, self.page_bytes(&backed));
        let engine = self.engine.stats();
        assert_eq!(
            engine.parts.total_bytes(),
            engine.committed_bytes,
            "{engine}"
        );
        assert_eq!(
            (engine.parts.live_page_bytes, engine.parts.slack_bytes),
            (stats.page_bytes, 0),
            "{engine}"
        );
        assert_eq!(stats.committed_bytes, engine.committed_bytes, "{engine}");
        let held = engine.committed_bytes + self.simulated.device.quarantined_bytes();
        assert_eq!(held, self.simulated.books().physical_bytes, "{engine}");
    }

    /// The pages that hold these blocks, in bytes.
    pub fn page_bytes(&self, blocks: &[usize]) -> usize {
        let mut pages = std::collections::BTreeSet::new();
        for block in blocks {
            for (index, of_tensor) in self.backing.tensors().iter().enumerate() {
                let bytes = of_tensor.block_bytes();
                let last = ((block + 1) * bytes - 1) / PAGE;
                pages.extend((block * bytes / PAGE..=last).map(|page| (index, page)));
            }
        }
        pages.len() * PAGE
    }

    /// Ends everything, and fails unless the driver has all of it back.
    #[track_caller]
    pub fn end(self) {
        let Simulated {
            driver,
            simulator,
            device,
        } = self.simulated;
        drop((self.backing, self.engine, self.stream, device, driver));
        assert_eq!(simulator.books(0), Books::default());
    }
}
