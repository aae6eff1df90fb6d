//! What a decode step reads on the device.

use super::choice::Choice;
use super::kv::Kv;
use super::upload::upload;
use crate::scheduler::Id;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::attention::KvBatch;
use candle_cuda_vmm::sampling::SampleParameters;
use candle_cuda_vmm::{ElasticBlocks, Result};
use std::ops::Range;

/// Where the numbers of the rows are: one tensor, so that a step uploads all of them at once.
#[derive(Clone, Copy)]
struct Places {
    batch_max: usize,
    blocks_max: usize,
}

impl Places {
    /// The tokens, the positions, or the lengths with the new token: a number for each row.
    fn column(self, column: usize) -> Range<usize> {
        column * self.batch_max..(column + 1) * self.batch_max
    }

    /// Two numbers for each row.
    fn seeds(self) -> Range<usize> {
        3 * self.batch_max..5 * self.batch_max
    }

    /// The blocks of each row, behind all else.
    fn tables(self, rows: Range<usize>) -> Range<usize> {
        let first = self.seeds().end;
        first + rows.start * self.blocks_max..first + rows.end * self.blocks_max
    }

    fn len(self) -> usize {
        self.tables(0..self.batch_max).end
    }
}

/// Tensors that keep their addresses, for the largest batch. Each step changes what is in them.
/// Cloning is cheap, and clones are the same tensors.
#[derive(Clone)]
pub struct Inputs {
    places: Places,
    /// U32.
    numbers: Tensor,
    /// The temperature and the probability of the tokens that are chosen from: F32 `[2, batch]`.
    chances: Tensor,
    layers: Vec<[Tensor; 2]>,
    blocks: ElasticBlocks,
}

impl Inputs {
    /// Makes inputs of rows without a sequence.
    fn new(kv: &Kv, device: &Device, places: Places) -> Result<Self> {
        let (layers, blocks) = kv.layers();
        Ok(Self {
            places,
            numbers: Tensor::zeros(places.len(), DType::U32, device)?,
            chances: Tensor::zeros((2, places.batch_max), DType::F32, device)?,
            layers,
            blocks,
        })
    }

    fn column(&self, column: usize, batch: usize) -> Result<Tensor> {
        let first = self.places.column(column).start;
        Ok(self.numbers.narrow(0, first, batch)?)
    }

    fn rows(&self, first: usize, (batch, width): (usize, usize)) -> Result<Tensor> {
        let numbers = self.numbers.narrow(0, first, batch * width)?;
        Ok(numbers.reshape((batch, width))?)
    }

    /// The new tokens of the first `batch` rows, and their positions.
    pub fn tokens(&self, batch: usize) -> Result<[Tensor; 2]> {
        Ok([self.column(0, batch)?, self.column(1, batch)?])
    }

    /// How the next token of each of the first `batch` rows is chosen.
    pub fn parameters(&self, batch: usize) -> Result<SampleParameters> {
        let chance = |row: usize| self.chances.get(row)?.narrow(0, 0, batch);
        let seeds = self.rows(self.places.seeds().start, (batch, 2))?;
        let positions = self.column(1, batch)?;
        Ok(SampleParameters::new(
            &chance(0)?,
            &chance(1)?,
            &seeds,
            &positions,
        )?)
    }

    /// K and V of each layer for the first `batch` rows.
    pub fn kv(&self, batch: usize) -> Result<Vec<KvBatch>> {
        let first = self.places.tables(0..0).start;
        let tables = self.rows(first, (batch, self.places.blocks_max))?;
        let lengths = self.column(2, batch)?;
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
    numbers: Vec<u32>,
    chances: Vec<f32>,
}

impl Rows {
    /// Makes inputs for at most this many sequences of this many blocks.
    pub fn new(kv: &Kv, device: &Device, batch_max: usize, blocks_max: usize) -> Result<Self> {
        let places = Places {
            batch_max,
            blocks_max,
        };
        Ok(Self {
            inputs: Inputs::new(kv, device, places)?,
            numbers: vec![0; places.len()],
            chances: vec![0.; 2 * batch_max],
        })
    }

    /// The inputs.
    pub fn inputs(&self) -> &Inputs {
        &self.inputs
    }

    /// Writes the inputs of these sequences, in rows of this order. The rows behind them get a
    /// length of 0. What the device has already is not written again.
    pub fn set(&mut self, kv: &Kv, sequences: &[(Id, Choice)]) -> Result<()> {
        let places = self.inputs.places;
        let chances = self.choose(sequences);
        let mut changed: Option<(usize, usize)> = None;
        for (row, (id, _)) in sequences.iter().enumerate() {
            let table = kv.table(*id).iter().map(|block| *block as u32);
            let known = &mut self.numbers[places.tables(row..row + 1)];
            if !table.clone().eq(known.iter().copied().take(table.len())) {
                for (known, block) in known.iter_mut().zip(table) {
                    *known = block;
                }
                changed = Some((changed.map_or(row, |(first, _)| first), row));
            }
        }
        self.numbers[..places.seeds().end].fill(0);
        for (row, (id, choice)) in sequences.iter().enumerate() {
            let tokens = kv.tokens(*id);
            let last = tokens.last().copied().unwrap_or_default();
            let columns = [
                last,
                tokens.len().saturating_sub(1) as u32,
                tokens.len() as u32,
            ];
            for (column, number) in columns.into_iter().enumerate() {
                self.numbers[places.column(column).start + row] = number;
            }
            let seed = &mut self.numbers[places.seeds()][2 * row..][..2];
            seed.copy_from_slice(&choice.seed_halves());
        }
        if chances != self.chances {
            let inputs = &self.inputs.chances;
            let new = Tensor::from_slice(&chances, inputs.dims(), inputs.device())?;
            inputs.slice_set(&new, 0, 0)?;
            self.chances = chances;
        }
        let tables = changed.map(|(first, last)| places.tables(first..last + 1));
        for numbers in [Some(0..places.seeds().end), tables].into_iter().flatten() {
            upload(&self.inputs.numbers, numbers.start, &self.numbers[numbers])?;
        }
        Ok(())
    }

    /// The temperatures of all rows, then their probabilities. Rows without a sequence take the
    /// likeliest token, which is the least work.
    fn choose(&self, sequences: &[(Id, Choice)]) -> Vec<f32> {
        let batch_max = self.inputs.places.batch_max;
        let mut chances = vec![0f32; 2 * batch_max];
        chances[batch_max..].fill(1.);
        for (row, (_, choice)) in sequences.iter().enumerate() {
            chances[row] = choice.temperature;
            chances[batch_max + row] = choice.top_p;
        }
        chances
    }
}
