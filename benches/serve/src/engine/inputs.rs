//! What a decode step reads on the device.

use super::choice::Choice;
use super::kv::Kv;
use crate::scheduler::Id;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::attention::KvBatch;
use candle_cuda_vmm::sampling::SampleParameters;
use candle_cuda_vmm::{ElasticBlocks, Result};

/// Tensors that keep their addresses, for the largest batch. Each step changes what is in them.
/// Cloning is cheap, and clones are the same tensors.
#[derive(Clone)]
pub struct Inputs {
    /// The new token, its position, and the length with it, of each row: U32 `[3, batch]`.
    numbers: Tensor,
    /// The temperature and the probability of the tokens that are chosen from: F32 `[2, batch]`.
    chances: Tensor,
    /// U32 `[batch, 2]`.
    seeds: Tensor,
    /// The blocks of each row: U32 `[batch, blocks_max]`.
    tables: Tensor,
    layers: Vec<[Tensor; 2]>,
    blocks: ElasticBlocks,
}

impl Inputs {
    /// Makes inputs of rows without a sequence.
    pub fn new(kv: &Kv, device: &Device, batch_max: usize, blocks_max: usize) -> Result<Self> {
        let (layers, blocks) = kv.layers();
        Ok(Self {
            numbers: Tensor::zeros((3, batch_max), DType::U32, device)?,
            chances: Tensor::zeros((2, batch_max), DType::F32, device)?,
            seeds: Tensor::zeros((batch_max, 2), DType::U32, device)?,
            tables: Tensor::zeros((batch_max, blocks_max), DType::U32, device)?,
            layers,
            blocks,
        })
    }

    fn row(&self, row: usize, batch: usize) -> Result<Tensor> {
        Ok(self.numbers.get(row)?.narrow(0, 0, batch)?)
    }

    /// The new tokens of the first `batch` rows, and their positions.
    pub fn tokens(&self, batch: usize) -> Result<[Tensor; 2]> {
        Ok([self.row(0, batch)?, self.row(1, batch)?])
    }

    /// How the next token of each of the first `batch` rows is chosen.
    pub fn parameters(&self, batch: usize) -> Result<SampleParameters> {
        let chance = |row: usize| self.chances.get(row)?.narrow(0, 0, batch);
        let seeds = self.seeds.narrow(0, 0, batch)?;
        let positions = self.row(1, batch)?;
        Ok(SampleParameters::new(
            &chance(0)?,
            &chance(1)?,
            &seeds,
            &positions,
        )?)
    }

    /// K and V of each layer for the first `batch` rows.
    pub fn kv(&self, batch: usize) -> Result<Vec<KvBatch>> {
        let (tables, lengths) = (self.tables.narrow(0, 0, batch)?, self.row(2, batch)?);
        let layers = self.layers.iter().map(|[k, v]| {
            let kv = KvBatch::blocks(k, v, &tables)?.lengths(&lengths)?;
            Ok(kv.checked_by(&self.blocks))
        });
        layers.collect()
    }
}

/// The inputs, and what the device has in them.
pub struct Rows {
    inputs: Inputs,
    tables: Vec<u32>,
    blocks_max: usize,
    batch_max: usize,
}

impl Rows {
    /// Makes inputs for at most this many sequences of this many blocks.
    pub fn new(kv: &Kv, device: &Device, batch_max: usize, blocks_max: usize) -> Result<Self> {
        Ok(Self {
            inputs: Inputs::new(kv, device, batch_max, blocks_max)?,
            tables: vec![0; batch_max * blocks_max],
            blocks_max,
            batch_max,
        })
    }

    /// The inputs.
    pub fn inputs(&self) -> &Inputs {
        &self.inputs
    }

    /// Writes the inputs of these sequences, in rows of this order. The rows behind them get a
    /// length of 0.
    pub fn set(&mut self, kv: &Kv, sequences: &[(Id, Choice)]) -> Result<()> {
        let mut chances = vec![1f32; 2 * self.batch_max];
        let mut seeds = vec![0u32; 2 * self.batch_max];
        // Rows without a sequence take the likeliest token, which is the least work.
        chances[..self.batch_max].fill(0.);
        let mut numbers = vec![0u32; 3 * self.batch_max];
        let mut changed: Option<(usize, usize)> = None;
        let width = self.blocks_max;
        let tables = self.tables.chunks_exact_mut(width);
        for (row, (table, (id, choice))) in tables.zip(sequences).enumerate() {
            let entries = kv.table(*id).iter().map(|block| *block as u32);
            if !entries
                .clone()
                .eq(table.iter().copied().take(entries.len()))
            {
                for (entry, new) in table.iter_mut().zip(entries) {
                    *entry = new;
                }
                changed = Some((changed.map_or(row, |(first, _)| first), row));
            }
            chances[row] = choice.temperature;
            chances[self.batch_max + row] = choice.top_p;
            seeds[2 * row..][..2].copy_from_slice(&choice.seed_halves());
            let tokens = kv.tokens(*id);
            numbers[row] = tokens.last().copied().unwrap_or_default();
            numbers[self.batch_max + row] = tokens.len().saturating_sub(1) as u32;
            numbers[2 * self.batch_max + row] = tokens.len() as u32;
        }
        let device = self.inputs.tables.device();
        if let Some((first, last)) = changed {
            let new = &self.tables[first * width..(last + 1) * width];
            let new = Tensor::from_slice(new, (last + 1 - first, width), device)?;
            self.inputs.tables.slice_set(&new, 0, first)?;
        }
        let chances = Tensor::from_vec(chances, (2, self.batch_max), device)?;
        self.inputs.chances.slice_set(&chances, 0, 0)?;
        let seeds = Tensor::from_vec(seeds, (self.batch_max, 2), device)?;
        self.inputs.seeds.slice_set(&seeds, 0, 0)?;
        let numbers = Tensor::from_vec(numbers, (3, self.batch_max), device)?;
        Ok(self.inputs.numbers.slice_set(&numbers, 0, 0)?)
    }
}
