//! The layouts of K and V of a batch, with NaN wherever no query looks.

use super::random::Random;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::attention::KvBatch;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

/// Where K and V of a batch are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Rows of `[batch, kv_heads, capacity, dim]`.
    HeadMajor,
    /// Rows in a view of `[batch, capacity, kv_heads, dim]`.
    TokenMajor,
    /// A token-major cache for each sequence, with other capacities.
    Sequences,
    /// Blocks of this many tokens, in random order.
    Blocks(usize),
    /// As `Blocks`, but K and V are parts of one tensor: `[num_blocks, 2, size, kv_heads, dim]`, if
    /// their heads have one size.
    JoinedBlocks(usize),
}

impl Layout {
    pub const ALL: [Self; 8] = [
        Self::HeadMajor,
        Self::TokenMajor,
        Self::Sequences,
        Self::Blocks(16),
        Self::Blocks(32),
        Self::Blocks(48),
        Self::Blocks(256),
        Self::JoinedBlocks(16),
    ];
}

/// K and V of a batch in memory.
pub struct Stored {
    pub kv: KvBatch,
    /// All memory, to compare.
    pub memory: Vec<Tensor>,
    /// The block numbers of each sequence; empty without blocks.
    pub tables: Vec<Vec<usize>>,
}

/// The memory of K or V, as numbers.
struct Image {
    numbers: Vec<f32>,
    shape: Vec<usize>,
}

impl Image {
    fn new(shape: &[usize]) -> Self {
        Self {
            numbers: vec![f32::NAN; shape.iter().product()],
            shape: shape.to_vec(),
        }
    }

    /// Copies a row to the place of these indices of all dimensions but the last.
    fn set(&mut self, at: &[usize], row: &[f32]) {
        let steps = at.iter().zip(&self.shape);
        let first = steps.fold(0, |first, (at, size)| first * size + at) * row.len();
        self.numbers[first..first + row.len()].copy_from_slice(row);
    }

    fn tensor(self, dtype: DType, device: &Device) -> Tensor {
        let tensor = Tensor::from_vec(self.numbers, self.shape, &Device::Cpu).unwrap();
        tensor.to_dtype(dtype).unwrap().to_device(device).unwrap()
    }
}

impl Stored {
    pub fn new(random: &Random, seed: u64, device: &Device) -> Self {
        let case = &random.case;
        let mut rng = StdRng::seed_from_u64(seed);
        let lengths: Vec<_> = case.lengths.iter().map(|length| *length as u32).collect();
        let lengths = Tensor::new(lengths, device).unwrap();
        let stored = match case.layout {
            Layout::HeadMajor | Layout::TokenMajor => Self::rows(random, device),
            Layout::Sequences => Self::sequences(random, device),
            Layout::Blocks(size) | Layout::JoinedBlocks(size) => {
                Self::blocks(random, size, &mut rng, device)
            }
        };
        let mut kv = stored.kv.lengths(&lengths).unwrap();
        if case.stored == DType::F8E4M3 {
            kv = kv.scales(case.scales[0], case.scales[1]).unwrap();
        }
        Self { kv, ..stored }
    }

    fn rows(random: &Random, device: &Device) -> Self {
        let case = &random.case;
        let is_head_major = case.layout == Layout::HeadMajor;
        let (batch, heads) = (case.lengths.len(), case.kv_heads);
        let capacity = case.lengths.iter().max().unwrap() + 7;
        let tensor = |numbers: &[Vec<f32>], dim| {
            let mut image = Image::new(&match is_head_major {
                true => [batch, heads, capacity, dim],
                false => [batch, capacity, heads, dim],
            });
            random.each_row(numbers, dim, |sequence, token, head, row| {
                let at = match is_head_major {
                    true => [sequence, head, token],
                    false => [sequence, token, head],
                };
                image.set(&at, row);
            });
            image.tensor(case.stored, device)
        };
        let memory = vec![
            tensor(&random.k, case.dim),
            tensor(&random.v, case.value_dim),
        ];
        let view = |tensor: &Tensor| match is_head_major {
            true => tensor.clone(),
            false => tensor.transpose(1, 2).unwrap(),
        };
        Self {
            kv: KvBatch::rows(&view(&memory[0]), &view(&memory[1])).unwrap(),
            memory,
            tables: Vec::new(),
        }
    }

    fn sequences(random: &Random, device: &Device) -> Self {
        let case = &random.case;
        let tensors = |numbers: &[Vec<f32>], dim| {
            let lengths = case.lengths.iter().enumerate();
            let mut images: Vec<_> = lengths
                .map(|(sequence, length)| {
                    Image::new(&[1, length + 3 * sequence, case.kv_heads, dim])
                })
                .collect();
            random.each_row(numbers, dim, |sequence, token, head, row| {
                images[sequence].set(&[0, token, head], row);
            });
            let images = images.into_iter();
            images
                .map(|image| image.tensor(case.stored, device))
                .collect::<Vec<_>>()
        };
        let (k, v) = (
            tensors(&random.k, case.dim),
            tensors(&random.v, case.value_dim),
        );
        let view = |tensor: &Tensor| tensor.transpose(1, 2).unwrap();
        let pairs: Vec<_> = k.iter().zip(&v).map(|(k, v)| (view(k), view(v))).collect();
        Self {
            kv: KvBatch::sequences(&pairs).unwrap(),
            memory: [k, v].concat(),
            tables: Vec::new(),
        }
    }

    fn blocks(random: &Random, size: usize, rng: &mut StdRng, device: &Device) -> Self {
        let case = &random.case;
        let is_joined = case.layout != Layout::Blocks(size) && case.dim == case.value_dim;
        let counts: Vec<_> = case
            .lengths
            .iter()
            .map(|length| length.div_ceil(size))
            .collect();
        let num_blocks = counts.iter().sum::<usize>() + 3;
        let mut free: Vec<usize> = (0..num_blocks).collect();
        free.shuffle(rng);
        let tables: Vec<_> = counts
            .iter()
            .map(|count| free.split_off(free.len() - count))
            .collect();
        let mut parts = [(&random.k, case.dim), (&random.v, case.value_dim)]
            .map(|(_, dim)| Image::new(&[num_blocks, size, case.kv_heads, dim]));
        let mut joined = Image::new(&[num_blocks, 2, size, case.kv_heads, case.dim]);
        for (side, (numbers, dim)) in [(&random.k, case.dim), (&random.v, case.value_dim)]
            .into_iter()
            .enumerate()
        {
            random.each_row(numbers, dim, |sequence, token, head, row| {
                let (block, token) = (tables[sequence][token / size], token % size);
                match is_joined {
                    true => joined.set(&[block, side, token, head], row),
                    false => parts[side].set(&[block, token, head], row),
                }
            });
        }
        let memory: Vec<_> = match is_joined {
            true => vec![joined.tensor(case.stored, device)],
            false => parts
                .into_iter()
                .map(|part| part.tensor(case.stored, device))
                .collect(),
        };
        let part = |side: usize| match is_joined {
            true => memory[0].narrow(1, side, 1).unwrap().squeeze(1).unwrap(),
            false => memory[side].clone(),
        };
        let table = random.table(&tables, size, rng);
        let blocks_max = table[0].len();
        let table = Tensor::from_vec(table.concat(), (table.len(), blocks_max), device).unwrap();
        Self {
            kv: KvBatch::blocks(&part(0), &part(1), &table).unwrap(),
            memory,
            tables,
        }
    }
}

impl Random {
    /// Calls a function with sequence, token, head and numbers of each row that a query sees.
    fn each_row(
        &self,
        numbers: &[Vec<f32>],
        dim: usize,
        mut store: impl FnMut(usize, usize, usize, &[f32]),
    ) {
        let heads = self.case.kv_heads;
        for (sequence, numbers) in numbers.iter().enumerate() {
            for token in self.case.seen(sequence) {
                for head in 0..heads {
                    let first = (token * heads + head) * dim;
                    store(sequence, token, head, &numbers[first..first + dim]);
                }
            }
        }
    }

    /// Makes the block table, with garbage for blocks that no query sees.
    fn table(&self, tables: &[Vec<usize>], size: usize, rng: &mut StdRng) -> Vec<Vec<u32>> {
        let blocks_max = tables.iter().map(Vec::len).max().unwrap() + 2;
        let sequences = tables.iter().enumerate();
        sequences
            .map(|(sequence, table)| {
                let seen = self.case.seen(sequence);
                let seen = seen.start / size..seen.end.div_ceil(size);
                let entry = |at| match seen.contains(&at) {
                    true => table[at] as u32,
                    false => [u32::MAX, 1 << 30, 77_777][rng.random_range(0..3)],
                };
                (0..blocks_max).map(entry).collect()
            })
            .collect()
    }
}
