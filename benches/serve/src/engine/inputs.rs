//! What a decode step reads on the device.

use super::choice::Choice;
use super::kv::Kv;
use super::order::Order;
use super::upload::upload;
use crate::scheduler::Id;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::attention::KvBatch;
use candle_cuda_vmm::sampling::SampleParameters;
use candle_cuda_vmm::{ElasticBlocks, Result};
use std::ops::Range;

/// Where the numbers of the rows are: one tensor, so that a step uploads all of them at once.
#[derive(Clone, Copy)]
enum Column {
    Token,
    Position,
    /// With the new token.
    Length,
    /// Two numbers for each row.
    Seeds,
    /// Which entry of its table a step writes first, so that a sequence that gets a block needs no
    /// upload of its own: that of its last block.
    Entry = 5,
    /// What it writes there.
    Block,
    /// The number of columns.
    End,
}

impl Column {
    fn rows(self, batch_max: usize) -> Range<usize> {
        let (first, width) = (
            self as usize,
            if matches!(self, Self::Seeds) { 2 } else { 1 },
        );
        first * batch_max..(first + width) * batch_max
    }
}

/// Tensors that keep their addresses, for the largest batch. Each step changes what is in them.
/// Cloning is cheap, and clones are the same tensors.
#[derive(Clone)]
pub struct Inputs {
    batch_max: usize,
    /// U32, in columns.
    numbers: Tensor,
    /// The blocks of each row: U32, all rows one after the other.
    tables: Tensor,
    blocks_max: usize,
    /// The temperature and the probability of the tokens that are chosen from: F32 `[2, batch]`.
    chances: Tensor,
    layers: Vec<[Tensor; 2]>,
    blocks: ElasticBlocks,
}

impl Inputs {
    /// Makes inputs of rows without a sequence.
    fn new(kv: &Kv, device: &Device, batch_max: usize, blocks_max: usize) -> Result<Self> {
        let (layers, blocks) = kv.layers();
        let zeros = |count: usize| Tensor::zeros(count, DType::U32, device);
        Ok(Self {
            batch_max,
            numbers: zeros(Column::End as usize * batch_max)?,
            tables: zeros(batch_max * blocks_max)?,
            blocks_max,
            chances: Tensor::zeros((2, batch_max), DType::F32, device)?,
            layers,
            blocks,
        })
    }

    fn column(&self, column: Column, batch: usize) -> Result<Tensor> {
        let first = column.rows(self.batch_max).start;
        Ok(self.numbers.narrow(0, first, batch)?)
    }

    fn tables(&self, batch: usize) -> Result<Tensor> {
        let tables = self.tables.narrow(0, 0, batch * self.blocks_max)?;
        Ok(tables.reshape((batch, self.blocks_max))?)
    }

    /// Writes the entries of the tables that the first `batch` rows have for their last blocks. A
    /// step does so before all else.
    pub fn write_entries(&self, batch: usize) -> Result<()> {
        let column = |column| self.column(column, batch)?.reshape((batch, 1));
        let (entries, blocks) = (column(Column::Entry)?, column(Column::Block)?);
        Ok(self.tables(batch)?.scatter_set(&entries, &blocks, 1)?)
    }

    /// The new tokens of the first `batch` rows, and their positions.
    pub fn tokens(&self, batch: usize) -> Result<[Tensor; 2]> {
        let column = |column| self.column(column, batch);
        Ok([column(Column::Token)?, column(Column::Position)?])
    }

    /// How the next token of each of the first `batch` rows is chosen.
    pub fn parameters(&self, batch: usize) -> Result<SampleParameters> {
        let chance = |row: usize| self.chances.get(row)?.narrow(0, 0, batch);
        let first = Column::Seeds.rows(self.batch_max).start;
        let seeds = self.numbers.narrow(0, first, 2 * batch)?;
        let seeds = seeds.reshape((batch, 2))?;
        let positions = self.column(Column::Position, batch)?;
        Ok(SampleParameters::new(
            &chance(0)?,
            &chance(1)?,
            &seeds,
            &positions,
        )?)
    }

    /// K and V of each layer for the first `batch` rows.
    pub fn kv(&self, batch: usize) -> Result<Vec<KvBatch>> {
        let (tables, lengths) = (self.tables(batch)?, self.column(Column::Length, batch)?);
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
    tables: Vec<u32>,
    chances: Vec<f32>,
    order: Order,
}

impl Rows {
    /// Makes inputs for at most this many sequences of this many blocks.
    pub fn new(kv: &Kv, device: &Device, batch_max: usize, blocks_max: usize) -> Result<Self> {
        let inputs = Inputs::new(kv, device, batch_max, blocks_max)?;
        Ok(Self {
            numbers: vec![0; Column::End as usize * batch_max],
            tables: vec![0; batch_max * blocks_max],
            chances: vec![0.; 2 * batch_max],
            inputs,
            order: Order::default(),
        })
    }

    /// The inputs.
    pub fn inputs(&self) -> &Inputs {
        &self.inputs
    }

    /// Writes the inputs of these sequences, and returns the sequence of each row. The rows behind
    /// them get a length of 0. What the device has already is not written again.
    pub fn set(
        &mut self,
        kv: &Kv,
        sequences: &[Id],
        choice: impl Fn(Id) -> Choice,
    ) -> Result<&[Id]> {
        self.order.place(sequences);
        let changed = self.fill(kv, &choice);
        self.choose(choice)?;
        upload(&self.inputs.numbers, 0, &self.numbers)?;
        let width = self.inputs.blocks_max;
        for run in changed.chunk_by(|row, next| row + 1 == *next) {
            let (Some(first), Some(last)) = (run.first(), run.last()) else {
                continue;
            };
            // What is behind the last table is read by no step.
            let end = last * width + kv.table(self.order.rows()[*last]).len();
            let entries = first * width..end;
            upload(&self.inputs.tables, entries.start, &self.tables[entries])?;
        }
        Ok(self.order.rows())
    }

    /// Fills in the numbers of all rows. Returns the rows whose tables differ from those that the
    /// device has in more than their last entry.
    fn fill(&mut self, kv: &Kv, choice: impl Fn(Id) -> Choice) -> Vec<usize> {
        let (batch_max, width) = (self.inputs.batch_max, self.inputs.blocks_max);
        let mut changed = Vec::new();
        self.numbers.fill(0);
        for row in 0..batch_max {
            let known = &mut self.tables[row * width..][..width];
            let Some(id) = self.order.rows().get(row).copied() else {
                // Its first entry stays as it is.
                self.numbers[Column::Block.rows(batch_max)][row] = known[0];
                continue;
            };
            let (tokens, table) = (kv.tokens(id), kv.table(id));
            let entry = table.len().saturating_sub(1);
            let is_known = |at: usize| known[at] == table[at] as u32;
            if !(0..entry).all(is_known) {
                changed.push(row);
            }
            for (known, block) in known.iter_mut().zip(table) {
                *known = *block as u32;
            }
            let block = known[entry];
            for (column, number) in [
                (Column::Token, tokens.last().copied().unwrap_or_default()),
                (Column::Position, tokens.len().saturating_sub(1) as u32),
                (Column::Length, tokens.len() as u32),
                (Column::Entry, entry as u32),
                (Column::Block, block),
            ] {
                self.numbers[column.rows(batch_max)][row] = number;
            }
            let seeds = &mut self.numbers[Column::Seeds.rows(batch_max)][2 * row..][..2];
            seeds.copy_from_slice(&choice(id).seed_halves());
        }
        changed
    }

    /// Writes the temperatures of all rows, then their probabilities, if they have changed. Rows
    /// without a sequence take the likeliest token, which is the least work.
    fn choose(&mut self, choice: impl Fn(Id) -> Choice) -> Result<()> {
        let batch_max = self.inputs.batch_max;
        let mut chances = vec![0f32; 2 * batch_max];
        chances[batch_max..].fill(1.);
        for (row, id) in self.order.rows().iter().enumerate() {
            let choice = choice(*id);
            (chances[row], chances[batch_max + row]) = (choice.temperature, choice.top_p);
        }
        if chances != self.chances {
            let inputs = &self.inputs.chances;
            let new = Tensor::from_slice(&chances, inputs.dims(), inputs.device())?;
            inputs.slice_set(&new, 0, 0)?;
            self.chances = chances;
        }
        Ok(())
    }
}
