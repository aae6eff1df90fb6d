//! What one account has: a tensor, a cache, a sequence of two layers, a block table and a range.

use crate::tokens::Tokens;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::cuda_vmm::{GraphPin, PoolOptions, VirtualMemoryPool};
use candle_cuda_vmm::kv_cache::KvCacheFactory;
use candle_cuda_vmm::{
    Account, BlockId, ElasticBlockAllocator, ElasticKvCache, ElasticTensor, Result, Sequence,
    SequenceCache, TensorPool, TensorPoolOptions, VmmError,
};
use std::sync::Arc;

/// The shape of a row of the tensor: 32 KiB.
pub const ROW: [usize; 2] = [64, 128];
/// Heads and elements of a token in each cache: 4 KiB.
pub const HEADS: usize = 8;
pub const HEAD_DIM: usize = 128;
/// Blocks of 128 KiB in each of two tensors.
pub const BLOCKS: usize = 64;
const BLOCK: [usize; 2] = [256, 128];
/// Addresses of the range, in pages.
pub const RANGE_PAGES: usize = 12;

/// A tensor that was handed out, and what is in it.
pub struct View {
    pub tensor: Tensor,
    pub tokens: Tokens,
    pub dim: usize,
    pub factor: f32,
}

impl View {
    pub fn check(&self, what: &str) -> Result<()> {
        Ok(self
            .tokens
            .check(&self.tensor, self.dim, self.factor, what)?)
    }
}

fn check_cache(cache: &ElasticKvCache, tokens: &Tokens, what: &str) -> Result<()> {
    for (tensor, factor) in [(cache.k()?, 1.0), (cache.v()?, -1.0)] {
        if let Some(tensor) = tensor {
            tokens.check(&tensor, 2, factor, what)?;
        }
    }
    Ok(())
}

/// Keys and their negatives as values.
pub type Pair = (Tensor, Tensor);

/// The keys and values of some tokens, `[1, heads, tokens, elements]`.
pub fn pair(tokens: &Tokens, device: &Device) -> Result<Pair> {
    let tensor = |factor| tokens.tensor(2, &[1, HEADS, tokens.len(), HEAD_DIM], factor, device);
    Ok((tensor(1.0)?, tensor(-1.0)?))
}

/// What was returned as keys and values, as views to be checked.
pub fn views((k, v): Pair, tokens: &Tokens) -> [View; 2] {
    [(k, 1.0), (v, -1.0)].map(|(tensor, factor)| View {
        tensor,
        tokens: tokens.clone(),
        dim: 2,
        factor,
    })
}

pub struct Life {
    pub account: Account,
    pub tensor: ElasticTensor,
    pub rows: Tokens,
    pub cache: ElasticKvCache,
    pub cached: Tokens,
    pub sequence: Sequence,
    pub layers: [SequenceCache; 2],
    pub tokens: Tokens,
    pub blocks: ElasticBlockAllocator,
    /// The blocks that are handed out, and what each of them is if it could be written.
    pub table: Vec<(BlockId, Option<f32>)>,
    pub range: VirtualMemoryPool,
    /// Offsets and bytes that are live in the range.
    pub spans: Vec<(usize, usize)>,
    pub leases: Vec<Arc<()>>,
    pub pin: Option<GraphPin>,
    pub views: Vec<View>,
    /// What forks were made of.
    pub origins: Origins,
}

/// Tensors, caches and sequences that go on beside their forks.
#[derive(Default)]
pub struct Origins {
    pub tensor: Option<(ElasticTensor, Tokens)>,
    pub cache: Option<(ElasticKvCache, Tokens)>,
    pub sequence: Option<([SequenceCache; 2], Tokens)>,
}

/// The caches of a sequence's two layers.
pub fn layers(sequence: &Sequence) -> Result<[SequenceCache; 2]> {
    Ok([sequence.layer(0, 2, 512)?, sequence.layer(1, 2, 512)?])
}

impl Life {
    /// The layers of its sequence have a range each, or all one.
    pub fn new(device: &Device, account: Account, one_range: bool) -> Result<Self> {
        let page = account.engine().device().granularity_bytes();
        let options = TensorPoolOptions::new()
            .reservation_bytes(64 * page)
            .ahead_bytes_max(page);
        let pool = TensorPool::on_account(device, &account, options)?;
        let token = (1, HEADS, HEAD_DIM);
        let sequence = match one_range {
            true => (pool.sequence()).rows_in_one_range(2, token, token, DType::F32)?,
            false => pool.sequence().rows(token, token, DType::F32)?,
        };
        let entries = ["k", "v"].map(|name| (name, &BLOCK, DType::F32));
        let options = PoolOptions::new().ahead_bytes_max(2 * page);
        Ok(Self {
            tensor: pool.tensor(&ROW[..], DType::F32)?,
            rows: Tokens::default(),
            cache: pool.kv_cache(2, 512),
            cached: Tokens::default(),
            layers: layers(&sequence)?,
            sequence,
            tokens: Tokens::default(),
            blocks: pool.blocks(BLOCKS, entries)?.allocator(),
            table: Vec::new(),
            range: VirtualMemoryPool::on_account(&account, RANGE_PAGES * page, page, options)?,
            spans: Vec::new(),
            leases: Vec::new(),
            pin: None,
            views: Vec::new(),
            origins: Origins::default(),
            account,
        })
    }

    /// Checks everything that is there.
    pub fn check(&self) -> Result<()> {
        let origins = &self.origins;
        (self.rows).check(&self.tensor.view()?, 0, 1.0, "the tensor")?;
        if let Some((tensor, rows)) = &origins.tensor {
            rows.check(&tensor.view()?, 0, 1.0, "a forked tensor")?;
        }
        check_cache(&self.cache, &self.cached, "the cache")?;
        if let Some((cache, tokens)) = &origins.cache {
            check_cache(cache, tokens, "a forked cache")?;
        }
        for layer in &self.layers {
            check_cache(&*layer.lock()?, &self.tokens, "the sequence")?;
        }
        if let Some((layers, tokens)) = &origins.sequence {
            for layer in layers {
                check_cache(&*layer.lock()?, tokens, "a forked sequence")?;
            }
        }
        self.check_blocks()?;
        self.views.iter().try_for_each(|view| view.check("a view"))
    }

    fn check_blocks(&self) -> Result<()> {
        let prefix = self.blocks.blocks().prefix("k")?;
        let (shown, known) = (prefix.dims()[0], self.table.iter().copied());
        for (block, value) in known.filter(|(block, _)| *block < shown) {
            let Some(value) = value else { continue };
            let one = prefix.narrow(0, block, 1)?.flatten_all()?;
            let seen = [one.max(0)?, one.min(0)?].map(|it| it.to_scalar::<f32>());
            for seen in seen {
                let seen = seen?;
                if seen != value {
                    let what = format!("block {block} is {seen} instead of {value}");
                    return Err(VmmError::other(what));
                }
            }
        }
        Ok(())
    }

    /// Writes a number to a block, if it is among the first that have no gap; returns it then.
    pub fn write_block(&self, block: BlockId, value: f32) -> Result<Option<f32>> {
        let prefix = self.blocks.blocks().prefix("k")?;
        if block >= prefix.dims()[0] {
            return Ok(None);
        }
        let full = Tensor::full(value, (1, BLOCK[0], BLOCK[1]), prefix.device())?;
        prefix.slice_set(&full, 0, block)?;
        Ok(Some(value))
    }
}
