//! A paged cache of a batch, and a generator over it.

use crate::batch::BatchDecoder;
use crate::config::Config;
use crate::generation::Generator;
use crate::weights::Weights;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::attention::{KvBatch, PromptSpan};
use candle_cuda_vmm::graph::{DecodeGraph, DecodeGraphOptions, StepBlocks};
use candle_cuda_vmm::{
    BlockId, ElasticBlockAllocator, ElasticBlocks, ElasticBlocksOptions, Result, TensorPool,
    VmmError,
};
use std::rc::Rc;

/// The tokens of a block.
pub const BLOCK_SIZE: usize = 16;

/// What a step reads on the device. The tensors keep their addresses, and each step changes what is
/// in them. Cloning is cheap.
#[derive(Clone)]
pub struct StepInputs {
    /// K and V of each layer, in blocks. Dropped before the blocks.
    layers: Vec<[Tensor; 2]>,
    /// The blocks of each sequence, U32 `[batch, blocks_max]`.
    tables: Tensor,
    /// The new token, its position, and the length with it, of each sequence: U32 `[3, batch]`.
    numbers: Tensor,
    blocks: ElasticBlocks,
}

impl StepInputs {
    fn row(&self, row: usize, batch: usize) -> Result<Tensor> {
        Ok(self.numbers.get(row)?.narrow(0, 0, batch)?)
    }

    /// Returns the new token of each of the first `batch` sequences, U32 `[batch]`.
    pub fn tokens(&self, batch: usize) -> Result<Tensor> {
        self.row(0, batch)
    }

    /// Returns their positions, U32 `[batch]`.
    pub fn positions(&self, batch: usize) -> Result<Tensor> {
        self.row(1, batch)
    }

    /// Returns K and V of each layer for them.
    pub fn kv(&self, batch: usize) -> Result<Vec<KvBatch>> {
        let (tables, lengths) = (self.tables.narrow(0, 0, batch)?, self.row(2, batch)?);
        let layers = self.layers.iter().map(|[k, v]| {
            let kv = KvBatch::blocks(k, v, &tables)?.lengths(&lengths)?;
            Ok(kv.checked_by(&self.blocks))
        });
        layers.collect()
    }
}

/// K and V of all layers in blocks, and the tables of a batch. A block has the same number in all
/// layers. Sequences are numbered from 0 without gaps.
pub struct PagedCache {
    inputs: StepInputs,
    sequences: Vec<Sequence>,
    /// What the device has in its tables.
    tables: Vec<u32>,
    /// The most sequences.
    batch_max: usize,
    /// The most blocks of a sequence.
    blocks_max: usize,
    window: Option<usize>,
    allocator: ElasticBlockAllocator,
    named: StepBlocks,
}

#[derive(Default)]
struct Sequence {
    blocks: Vec<BlockId>,
    /// The number of blocks that are free again, from the first on. They keep their entries.
    freed: usize,
    length: usize,
    token: u32,
    /// Whether the device has the table.
    is_uploaded: bool,
}

impl PagedCache {
    /// Reserves addresses for `batch_max` sequences of at most `tokens_max` tokens each. On the CPU
    /// that is memory.
    pub fn new(
        pool: &TensorPool,
        config: &Config,
        dtype: DType,
        batch_max: usize,
        tokens_max: usize,
    ) -> Result<Self> {
        let blocks_max = tokens_max.div_ceil(BLOCK_SIZE);
        let shape = (BLOCK_SIZE, config.kv_heads(), config.head_dim());
        let entries = (0..config.num_hidden_layers)
            .flat_map(|layer| ["k", "v"].map(|name| (format!("{layer}.{name}"), shape, dtype)));
        let count = batch_max * blocks_max;
        // A step needs at most one block for each sequence. The worker makes their memory ahead.
        let options = ElasticBlocksOptions::new().ahead_blocks_max(4 * batch_max);
        let blocks = pool.blocks_with_options(count, entries, options)?;
        // SAFETY: tables name allocated blocks only, which are backed until they are freed, when
        // no later query reads them. No operation reads a whole tensor.
        #[allow(unsafe_code)]
        let tensors = unsafe { blocks.reserved_tensors()? };
        let layers = tensors.chunks_exact(2);
        let layers = layers.map(|layer| [layer[0].clone(), layer[1].clone()]);
        let (allocator, named) = (blocks.allocator(), StepBlocks::new(&blocks));
        let (tables, device) = ((batch_max, blocks_max), pool.device());
        Ok(Self {
            inputs: StepInputs {
                layers: layers.collect(),
                tables: Tensor::zeros(tables, DType::U32, device)?,
                numbers: Tensor::zeros((3, batch_max), DType::U32, device)?,
                blocks,
            },
            sequences: Vec::new(),
            tables: vec![0; batch_max * blocks_max],
            batch_max,
            blocks_max,
            window: config.sliding_window,
            allocator,
            named,
        })
    }

    /// Begins a sequence without tokens, which gets the next number.
    pub fn begin(&mut self) {
        self.sequences.push(Sequence::default());
    }

    /// Ends a sequence and frees its blocks. The last sequence gets its number.
    #[allow(dead_code, reason = "this program has one sequence")]
    pub fn end(&mut self, sequence: usize) -> Result<()> {
        let ended = self.sequences.swap_remove(sequence);
        let blocks = &ended.blocks[ended.freed..];
        self.named.forget(blocks.iter().copied());
        self.allocator.free(blocks.iter().copied())?;
        if let Some(moved) = self.sequences.get_mut(sequence) {
            moved.is_uploaded = false;
        }
        Ok(())
    }

    /// Counts new tokens of each sequence, and allocates the blocks that they need. Then writes
    /// what the step reads to the device.
    ///
    /// If a sequence becomes too long, or memory runs out, nothing is allocated.
    pub fn extend(&mut self, new: &[&[u32]]) -> Result<()> {
        let mut missing = Vec::new();
        for (at, (sequence, new)) in self.sequences.iter().zip(new).enumerate() {
            let (length, capacity) = (sequence.length + new.len(), self.blocks_max * BLOCK_SIZE);
            if length > capacity {
                return Err(VmmError::LengthBeyondCapacity {
                    sequence: at,
                    length,
                    capacity,
                });
            }
            missing.push(length.div_ceil(BLOCK_SIZE) - sequence.blocks.len());
        }
        let allocated = self.allocator.allocate(missing.iter().sum())?;
        self.named.name(allocated.iter().copied())?;
        let mut allocated = allocated.into_iter();
        for ((sequence, new), missing) in self.sequences.iter_mut().zip(new).zip(missing) {
            sequence.blocks.extend(allocated.by_ref().take(missing));
            sequence.is_uploaded &= missing == 0;
            sequence.length += new.len();
            sequence.token = new.last().copied().unwrap_or(sequence.token);
        }
        self.upload()
    }

    /// Frees blocks that no later query sees.
    pub fn release(&mut self) -> Result<()> {
        let Some(window) = self.window else {
            return Ok(());
        };
        for sequence in &mut self.sequences {
            // The next query sees its own key and one less than the window.
            let unseen = (sequence.length + 1).saturating_sub(window) / BLOCK_SIZE;
            let blocks = &sequence.blocks[sequence.freed..unseen];
            self.named.forget(blocks.iter().copied());
            self.allocator.free(blocks.iter().copied())?;
            sequence.freed = unseen;
        }
        Ok(())
    }

    /// Writes what the step reads to the device: the numbers, and the rows of tables that have
    /// changed, from the first to the last of them.
    fn upload(&mut self) -> Result<()> {
        let width = self.blocks_max;
        let mut changed: Option<(usize, usize)> = None;
        let rows = self.tables.chunks_exact_mut(width);
        for (row, (table, sequence)) in rows.zip(&mut self.sequences).enumerate() {
            if !std::mem::replace(&mut sequence.is_uploaded, true) {
                for (entry, block) in table.iter_mut().zip(&sequence.blocks) {
                    *entry = *block as u32;
                }
                changed = Some((changed.map_or(row, |(first, _)| first), row));
            }
        }
        let device = self.inputs.tables.device();
        if let Some((first, last)) = changed {
            let rows = &self.tables[first * width..(last + 1) * width];
            let rows = Tensor::from_slice(rows, (last + 1 - first, width), device)?;
            self.inputs.tables.slice_set(&rows, 0, first)?;
        }
        // Rows without a sequence have a length of 0.
        let mut new = vec![0u32; 3 * self.batch_max];
        for (at, sequence) in self.sequences.iter().enumerate() {
            new[at] = sequence.token;
            new[self.batch_max + at] = sequence.length.saturating_sub(1) as u32;
            new[2 * self.batch_max + at] = sequence.length as u32;
        }
        let new = Tensor::from_vec(new, (3, self.batch_max), device)?;
        Ok(self.inputs.numbers.slice_set(&new, 0, 0)?)
    }

    /// Returns what steps read on the device.
    pub fn inputs(&self) -> &StepInputs {
        &self.inputs
    }

    /// Returns the blocks that the tables name, for captured steps.
    pub fn named(&mut self) -> &mut StepBlocks {
        &mut self.named
    }

    /// Returns the number of tokens that each sequence has had.
    pub fn lengths(&self) -> impl Iterator<Item = usize> {
        self.sequences.iter().map(|sequence| sequence.length)
    }

    /// Returns the number of tokens in blocks.
    pub fn tokens(&self) -> usize {
        let tokens = |sequence: &Sequence| sequence.length - sequence.freed * BLOCK_SIZE;
        self.sequences.iter().map(tokens).sum()
    }

    /// Returns the memory in bytes that the blocks hold, including unused memory.
    pub fn held_bytes(&self) -> usize {
        self.allocator.blocks().stats().committed_bytes
    }
}

/// Makes the graph of decode steps over a paged cache, for batches in buckets up to `batch_max`.
/// Nothing is captured yet.
pub fn decode_graph(
    decoder: &Rc<BatchDecoder>,
    inputs: &StepInputs,
    batch_max: usize,
) -> Result<DecodeGraph<'static>> {
    let (decoder, inputs) = (decoder.clone(), inputs.clone());
    let device = inputs.tables.device().clone();
    let options = DecodeGraphOptions::up_to(batch_max);
    DecodeGraph::new(&device, options, move |bucket| {
        let (tokens, positions) = (inputs.tokens(bucket)?, inputs.positions(bucket)?);
        decoder.decode(&tokens, &positions, &inputs.kv(bucket)?)
    })
}

/// The decoder of a batch with one sequence, over a paged cache.
pub struct Paged {
    decoder: Rc<BatchDecoder>,
    /// The graph of decode steps; `None` if each step is launched kernel by kernel.
    graph: Option<DecodeGraph<'static>>,
    cache: PagedCache,
}

impl Paged {
    /// Makes the model, and a cache for at most `tokens_max` tokens. Decode steps are captured if
    /// `is_captured`.
    pub fn new(
        pool: &TensorPool,
        config: &Config,
        weights: Weights,
        dtype: DType,
        tokens_max: usize,
        is_captured: bool,
    ) -> Result<Self> {
        let decoder = Rc::new(BatchDecoder::new(config, weights, 1, pool.device())?);
        let mut cache = PagedCache::new(pool, config, dtype, 1, tokens_max)?;
        cache.begin();
        let graph = is_captured.then(|| decode_graph(&decoder, cache.inputs(), 1));
        Ok(Self {
            decoder,
            graph: graph.transpose()?,
            cache,
        })
    }

    fn device(&self) -> &Device {
        self.cache.inputs.tables.device()
    }
}

impl Generator for Paged {
    fn forward(&mut self, tokens: &[u32]) -> candle_core::Result<Tensor> {
        self.cache.extend(&[tokens])?;
        let logits = match (tokens.len(), &mut self.graph) {
            (1, Some(graph)) => graph.replay(1, self.cache.named())?,
            (1, None) => {
                let inputs = self.cache.inputs();
                let (tokens, positions) = (inputs.tokens(1)?, inputs.positions(1)?);
                self.decoder.decode(&tokens, &positions, &inputs.kv(1)?)?
            }
            (count, _) => {
                let length = self.cache.lengths().sum();
                let span = PromptSpan::new(0, count, length);
                let ids = Tensor::new(tokens, self.device())?;
                let kv = self.cache.inputs().kv(1)?;
                self.decoder.prompt(&ids, &[span], &kv)?
            }
        };
        self.cache.release()?;
        logits.squeeze(0)
    }

    fn tokens(&self) -> usize {
        self.cache.tokens()
    }

    fn held_bytes(&self) -> usize {
        self.cache.held_bytes()
    }
}
