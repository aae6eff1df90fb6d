//! A paged cache of a batch, and a generator over it.

use crate::batch::BatchDecoder;
use crate::config::Config;
use crate::generation::Generator;
use crate::weights::Weights;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::attention::{KvBatch, PromptSpan};
use candle_cuda_vmm::{BlockId, ElasticBlockAllocator, Result, TensorPool, VmmError};

/// The tokens of a block.
pub const BLOCK_SIZE: usize = 16;

/// K and V of all layers in blocks, and the tables of a batch. A block has the same number in all
/// layers.
///
/// Tables, lengths and positions are device tensors that keep their addresses. Each step changes
/// what is in them.
pub struct PagedCache {
    /// One for each layer. Their tensors are dropped before the blocks.
    layers: Vec<KvBatch>,
    tables: Tensor,
    lengths: Tensor,
    positions: Tensor,
    sequences: Vec<Sequence>,
    /// The most blocks of a sequence.
    blocks_max: usize,
    window: Option<usize>,
    allocator: ElasticBlockAllocator,
}

#[derive(Clone, Default)]
struct Sequence {
    blocks: Vec<BlockId>,
    /// The number of blocks that are free again, from the first on. They keep their entries.
    freed: usize,
    length: usize,
}

impl PagedCache {
    /// Reserves addresses for `batch` sequences of at most `tokens_max` tokens each. On the CPU
    /// that is memory.
    pub fn new(
        pool: &TensorPool,
        config: &Config,
        dtype: DType,
        batch: usize,
        tokens_max: usize,
    ) -> Result<Self> {
        let blocks_max = tokens_max.div_ceil(BLOCK_SIZE);
        let shape = (BLOCK_SIZE, config.kv_heads(), config.head_dim());
        let entries = (0..config.num_hidden_layers)
            .flat_map(|layer| ["k", "v"].map(|name| (format!("{layer}.{name}"), shape, dtype)));
        let blocks = pool.blocks(batch * blocks_max, entries)?;
        // SAFETY: tables name allocated blocks only, which are backed until they are freed, when
        // no later query reads them. No operation reads a whole tensor.
        #[allow(unsafe_code)]
        let tensors = unsafe { blocks.reserved_tensors()? };
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::U32, pool.device());
        let (tables, lengths) = (zeros(&[batch, blocks_max])?, zeros(&[batch])?);
        let layers = tensors.chunks_exact(2).map(|layer| {
            let kv = KvBatch::blocks(&layer[0], &layer[1], &tables)?.lengths(&lengths)?;
            Ok(kv.checked_by(&blocks))
        });
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
            positions: zeros(&[batch])?,
            tables,
            lengths,
            sequences: vec![Sequence::default(); batch],
            blocks_max,
            window: config.sliding_window,
            allocator: blocks.allocator(),
        })
    }

    /// Counts `counts[i]` new tokens of sequence `i`, and allocates the blocks that they need. Then
    /// writes tables, lengths and positions to the device.
    ///
    /// If a sequence becomes too long, or memory runs out, nothing is allocated.
    pub fn extend(&mut self, counts: &[usize]) -> Result<()> {
        let mut missing = Vec::new();
        for (at, (sequence, count)) in self.sequences.iter().zip(counts).enumerate() {
            let (length, capacity) = (sequence.length + count, self.blocks_max * BLOCK_SIZE);
            if length > capacity {
                return Err(VmmError::LengthBeyondCapacity {
                    sequence: at,
                    length,
                    capacity,
                });
            }
            missing.push(length.div_ceil(BLOCK_SIZE) - sequence.blocks.len());
        }
        let mut new = self.allocator.allocate(missing.iter().sum())?.into_iter();
        for ((sequence, count), missing) in self.sequences.iter_mut().zip(counts).zip(missing) {
            sequence.blocks.extend(new.by_ref().take(missing));
            sequence.length += count;
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
            self.allocator.free(blocks.iter().copied())?;
            sequence.freed = unseen;
        }
        Ok(())
    }

    fn upload(&self) -> Result<()> {
        let device = self.tables.device();
        let mut tables = vec![0u32; self.sequences.len() * self.blocks_max];
        for (table, sequence) in tables
            .chunks_exact_mut(self.blocks_max)
            .zip(&self.sequences)
        {
            for (entry, block) in table.iter_mut().zip(&sequence.blocks) {
                *entry = *block as u32;
            }
        }
        let tables = Tensor::from_vec(tables, self.tables.shape(), device)?;
        self.tables.slice_set(&tables, 0, 0)?;
        let lengths: Vec<_> = self.sequences.iter().map(|it| it.length as u32).collect();
        let positions: Vec<_> = lengths.iter().map(|it| it.saturating_sub(1)).collect();
        self.lengths
            .slice_set(&Tensor::new(lengths, device)?, 0, 0)?;
        self.positions
            .slice_set(&Tensor::new(positions, device)?, 0, 0)?;
        Ok(())
    }

    /// Returns K and V of each layer.
    pub fn layers(&self) -> &[KvBatch] {
        &self.layers
    }

    /// Returns the position of each sequence's last token, U32 `[batch]`.
    pub fn positions(&self) -> &Tensor {
        &self.positions
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

/// The decoder of a batch with one sequence, over a paged cache.
pub struct Paged {
    decoder: BatchDecoder,
    cache: PagedCache,
}

impl Paged {
    /// Makes the model, and a cache for at most `tokens_max` tokens.
    pub fn new(
        pool: &TensorPool,
        config: &Config,
        weights: Weights,
        dtype: DType,
        tokens_max: usize,
    ) -> Result<Self> {
        Ok(Self {
            decoder: BatchDecoder::new(config, weights, 1, pool.device())?,
            cache: PagedCache::new(pool, config, dtype, 1, tokens_max)?,
        })
    }

    fn device(&self) -> &Device {
        self.cache.tables.device()
    }
}

impl Generator for Paged {
    fn forward(&mut self, tokens: &[u32]) -> candle_core::Result<Tensor> {
        self.cache.extend(&[tokens.len()])?;
        let ids = Tensor::new(tokens, self.device())?;
        let layers = self.cache.layers();
        let logits = match tokens.len() {
            1 => self.decoder.decode(&ids, self.cache.positions(), layers)?,
            count => {
                let length = self.cache.lengths().sum();
                let span = PromptSpan::new(0, count, length);
                self.decoder.prompt(&ids, &[span], layers)?
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
