//! What a step reads on the device for its chunks of prompts.

use super::choice::Choice;
use super::kv::{BLOCK_TOKENS, Kv};
use crate::scheduler::{Chunk, Id};
use candle_core::{Device, Tensor};
use candle_cuda_vmm::Result;
use candle_cuda_vmm::attention::{KvBatch, PromptSpan};
use candle_cuda_vmm::sampling::SampleParameters;

/// The inputs of chunks of prompts, each a sequence of the batch.
pub struct PromptInputs {
    /// The tokens of all chunks, one after the other.
    pub tokens: Tensor,
    /// Where each chunk's tokens are.
    pub spans: Vec<PromptSpan>,
    /// K and V of each layer.
    pub kv: Vec<KvBatch>,
    /// How the token after each chunk is chosen.
    pub parameters: SampleParameters,
}

impl PromptInputs {
    /// Uploads the inputs of these chunks: the numbers in one copy, and the chances in another.
    pub fn new(
        kv: &Kv,
        chunks: &[Chunk],
        choice: impl Fn(Id) -> Choice,
        device: &Device,
    ) -> Result<Self> {
        let count = chunks.len();
        let end = |chunk: &Chunk| chunk.first + chunk.count;
        let blocks = |chunk: &Chunk| end(chunk).div_ceil(BLOCK_TOKENS);
        let width = chunks.iter().map(blocks).max().unwrap_or(1);
        let (mut numbers, mut spans, mut chances) = (Vec::new(), Vec::new(), vec![0f32; 2 * count]);
        for (at, chunk) in chunks.iter().enumerate() {
            numbers.extend_from_slice(&kv.tokens(chunk.id)[chunk.first..end(chunk)]);
            spans.push(PromptSpan::new(at, chunk.count, end(chunk)));
            let choice = choice(chunk.id);
            (chances[at], chances[count + at]) = (choice.temperature, choice.top_p);
        }
        let tokens = numbers.len();
        for chunk in chunks {
            let table = &kv.table(chunk.id)[..blocks(chunk)];
            let rest = std::iter::repeat_n(0, width - table.len());
            numbers.extend(table.iter().map(|block| *block as u32).chain(rest));
        }
        let seeds = chunks.iter().map(|chunk| choice(chunk.id).seed_halves());
        numbers.extend(seeds.flatten());
        numbers.extend(chunks.iter().map(|chunk| end(chunk) as u32));
        numbers.extend(chunks.iter().map(|chunk| end(chunk) as u32 - 1));

        let numbers = Tensor::new(numbers, device)?;
        let mut first = 0;
        let mut next = |count: usize| {
            let part = numbers.narrow(0, first, count);
            first += count;
            part
        };
        let tokens = next(tokens)?;
        let tables = next(count * width)?.reshape((count, width))?;
        let seeds = next(2 * count)?.reshape((count, 2))?;
        let (lengths, positions) = (next(count)?, next(count)?);
        let chances = Tensor::from_vec(chances, (2, count), device)?;
        let chance = |row| chances.get(row);
        Ok(Self {
            tokens,
            spans,
            kv: kv.batch(&tables, &lengths)?,
            parameters: SampleParameters::new(&chance(0)?, &chance(1)?, &seeds, &positions)?,
        })
    }
}
