//! The decoder of a batch on the CPU, in F32: the logits of stock attention at every step.

use crate::batch::BatchDecoder;
use crate::caches::Cached;
use crate::config::Config;
use crate::generation::{Generation, generate, prompt};
use crate::model::{Attention, Decoder};
use crate::paged::{BLOCK_SIZE, Paged, PagedCache, decode_graph};
use crate::token_bytes;
use crate::weights::{Source, Weights};
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::attention::{KvBatch, PromptSpan};
use candle_cuda_vmm::kv_cache::ConcatCaches;
use candle_cuda_vmm::{TensorPool, VmmError};
use std::rc::Rc;

const VOCABULARY: usize = 160;
/// Positions of the model, and rows of each sequence.
const CAPACITY: usize = 96;
const PROMPTS: [usize; 3] = [3, 16, 37];
const STEPS: usize = 40;
const WINDOW: usize = 20;
const SEED: u64 = 11;
/// The most that a logit may be off. The largest logits are about 4.
const OFF_MAX: f32 = 1e-5;

fn config(window: Option<usize>) -> Config {
    let mut config = Config::parse(
        r#"{ "vocab_size": 160, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
             "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 96 }"#,
    )
    .unwrap();
    config.sliding_window = window;
    config
}

fn weights() -> Weights {
    Weights::new(Source::Random(SEED), DType::F32, &Device::Cpu)
}

/// The tokens of sequence `at`: its prompt, and one for each step.
fn tokens(at: usize) -> Vec<u32> {
    prompt(VOCABULARY, PROMPTS[at] + STEPS, at as u64)
}

fn rows(logits: &Tensor) -> Vec<Vec<f32>> {
    logits.to_vec2().unwrap()
}

/// The logits of stock attention after each token, one token at a time.
fn stock(config: &Config, tokens: &[u32]) -> Vec<Vec<f32>> {
    let attention = Attention::Stock;
    let mut decoder = Decoder::new(config, weights(), &ConcatCaches, 16, attention).unwrap();
    let step = |token: &u32| decoder.forward(&[*token]).unwrap().to_vec1().unwrap();
    tokens.iter().map(step).collect()
}

fn assert_near(actual: &[f32], expected: &[f32], what: &str) {
    assert_eq!(actual.len(), expected.len());
    for (actual, expected) in actual.iter().zip(expected) {
        let off = (actual - expected).abs();
        // A NaN fails too.
        assert!(off <= OFF_MAX, "{what}: {actual}, not {expected}");
    }
}

#[derive(Clone, Copy, Debug)]
enum Layout {
    Rows,
    Sequences,
    /// In an order that is not ascending, with the blocks of other sequences between them.
    Blocks,
}

const LAYOUTS: [Layout; 3] = [Layout::Rows, Layout::Sequences, Layout::Blocks];

/// A decoder over K and V of the test's own. They are NaN wherever no token was written.
struct Batch {
    decoder: BatchDecoder,
    layers: Vec<KvBatch>,
    lengths: Vec<usize>,
    on_device: Tensor,
}

impl Batch {
    fn new(config: &Config, layout: Layout, batch: usize) -> Self {
        let on_device = Tensor::zeros(batch, DType::U32, &Device::Cpu).unwrap();
        let layer = |_| {
            let kv = layer(config, layout, batch);
            kv.lengths(&on_device).unwrap()
        };
        Self {
            decoder: BatchDecoder::new(config, weights(), batch, &Device::Cpu).unwrap(),
            layers: (0..config.num_hidden_layers).map(layer).collect(),
            lengths: vec![0; batch],
            on_device,
        }
    }

    fn extend(&mut self, counts: impl IntoIterator<Item = (usize, usize)>) {
        for (sequence, count) in counts {
            self.lengths[sequence] += count;
        }
        let lengths: Vec<_> = self.lengths.iter().map(|length| *length as u32).collect();
        let lengths = Tensor::new(lengths, &Device::Cpu).unwrap();
        self.on_device.slice_set(&lengths, 0, 0).unwrap();
    }

    /// Appends chunks, each to a sequence of its own, and returns the logits after each.
    fn prompt(&mut self, chunks: &[(usize, &[u32])]) -> Vec<Vec<f32>> {
        self.extend(
            chunks
                .iter()
                .map(|(sequence, chunk)| (*sequence, chunk.len())),
        );
        let span = |(sequence, chunk): &(usize, &[u32])| {
            PromptSpan::new(*sequence, chunk.len(), self.lengths[*sequence])
        };
        let spans: Vec<_> = chunks.iter().map(span).collect();
        let tokens: Vec<_> = chunks
            .iter()
            .flat_map(|(_, chunk)| *chunk)
            .copied()
            .collect();
        let tokens = Tensor::new(tokens, &Device::Cpu).unwrap();
        rows(&self.decoder.prompt(&tokens, &spans, &self.layers).unwrap())
    }

    /// Appends a token to each sequence, and returns the logits after each.
    fn decode(&mut self, tokens: &[u32]) -> Vec<Vec<f32>> {
        self.extend((0..tokens.len()).map(|sequence| (sequence, 1)));
        let tokens = Tensor::new(tokens, &Device::Cpu).unwrap();
        let positions: Vec<_> = self
            .lengths
            .iter()
            .map(|length| *length as u32 - 1)
            .collect();
        let positions = Tensor::new(positions, &Device::Cpu).unwrap();
        let logits = self.decoder.decode(&tokens, &positions, &self.layers);
        rows(&logits.unwrap())
    }
}

fn layer(config: &Config, layout: Layout, batch: usize) -> KvBatch {
    let (heads, dim) = (config.kv_heads(), config.head_dim());
    let garbage = |shape: [usize; 4]| Tensor::full(f32::NAN, &shape, &Device::Cpu).unwrap();
    let token_major = |batch| {
        let tensor = garbage([batch, CAPACITY, heads, dim]);
        tensor.transpose(1, 2).unwrap()
    };
    match layout {
        Layout::Rows => KvBatch::rows(&token_major(batch), &token_major(batch)),
        Layout::Sequences => {
            let pairs: Vec<_> = (0..batch)
                .map(|_| (token_major(1), token_major(1)))
                .collect();
            KvBatch::sequences(&pairs)
        }
        Layout::Blocks => {
            let each = CAPACITY / BLOCK_SIZE;
            let blocks = || garbage([batch * each, BLOCK_SIZE, heads, dim]);
            let block = |sequence, at| (batch * each - 1 - (at * batch + sequence)) as u32;
            let table = |sequence| (0..each).map(move |at| block(sequence, at));
            let tables: Vec<_> = (0..batch).flat_map(table).collect();
            let tables = Tensor::from_vec(tables, (batch, each), &Device::Cpu).unwrap();
            KvBatch::blocks(&blocks(), &blocks(), &tables)
        }
    }
    .unwrap()
}

#[test]
fn a_prompt_whole_or_in_chunks_and_decode_steps_have_stock_logits() {
    let (tokens, count) = (tokens(2), PROMPTS[2]);
    for window in [None, Some(WINDOW)] {
        let config = config(window);
        let expected = stock(&config, &tokens);
        let chunks: [&[usize]; 4] = [&[37], &[16, 21], &[1, 22, 14], &[1; 37]];
        for (layout, chunks) in LAYOUTS
            .iter()
            .flat_map(|it| chunks.map(|sizes| (*it, sizes)))
        {
            let mut batch = Batch::new(&config, layout, 1);
            let what = format!("{layout:?}, window {window:?}, chunks {chunks:?}");
            let mut first = 0;
            for size in chunks {
                let logits = batch.prompt(&[(0, &tokens[first..first + size])]);
                first += size;
                assert_near(&logits[0], &expected[first - 1], &what);
            }
            assert_eq!(first, count);
            for at in count..tokens.len() {
                let logits = batch.decode(&[tokens[at]]);
                assert_near(&logits[0], &expected[at], &format!("{what}, token {at}"));
            }
        }
    }
}

#[test]
fn a_batch_has_the_logits_of_each_sequence_alone() {
    let tokens = [0, 1, 2].map(tokens);
    for window in [None, Some(WINDOW)] {
        let config = config(window);
        let expected = [0, 1, 2].map(|at| stock(&config, &tokens[at]));
        for layout in LAYOUTS {
            let mut batch = Batch::new(&config, layout, 3);
            let mut alone = [(); 3].map(|()| Batch::new(&config, layout, 1));
            // The longest prompt first, and the rest of it with the others.
            let ends = [0, 0, 20];
            batch.prompt(&[(2, &tokens[2][..20])]);
            let chunk = |at: usize| (at, &tokens[at][ends[at]..PROMPTS[at]]);
            let order = [2, 0, 1];
            let logits = batch.prompt(&order.map(chunk));
            for (at, logits) in order.into_iter().zip(logits) {
                let what = format!("{layout:?}, window {window:?}, sequence {at}");
                assert_near(&logits, &expected[at][PROMPTS[at] - 1], &what);
                let same = alone[at].prompt(&[(0, &tokens[at][..PROMPTS[at]])]);
                assert_near(&logits, &same[0], &what);
            }
            for step in 0..STEPS {
                let last = [0, 1, 2].map(|at| tokens[at][PROMPTS[at] + step]);
                for (at, logits) in batch.decode(&last).into_iter().enumerate() {
                    let what = format!("{layout:?}, window {window:?}, {at}, step {step}");
                    assert_near(&logits, &expected[at][PROMPTS[at] + step], &what);
                    assert_near(&logits, &alone[at].decode(&[last[at]])[0], &what);
                }
            }
        }
    }
}

#[test]
fn a_paged_cache_has_stock_logits_and_reuses_blocks_behind_a_window() {
    let tokens = [0, 1, 2].map(tokens);
    for window in [None, Some(WINDOW)] {
        let config = config(window);
        let expected = [0, 1, 2].map(|at| stock(&config, &tokens[at]));
        let pool = TensorPool::new(&Device::Cpu).unwrap();
        // One row has no sequence.
        let decoder = Rc::new(BatchDecoder::new(&config, weights(), 4, &Device::Cpu).unwrap());
        let mut cache = PagedCache::new(&pool, &config, DType::F32, 4, CAPACITY).unwrap();
        let mut graph = decode_graph(&decoder, cache.inputs(), 4).unwrap();
        (0..3).for_each(|_| cache.begin());
        cache
            .extend(&[0, 1, 2].map(|at| &tokens[at][..PROMPTS[at]]))
            .unwrap();
        let spans = [0, 1, 2].map(|at| PromptSpan::new(at, PROMPTS[at], PROMPTS[at]));
        let new: Vec<_> = (0..3)
            .flat_map(|at| &tokens[at][..PROMPTS[at]])
            .copied()
            .collect();
        let new = Tensor::new(new, &Device::Cpu).unwrap();
        let kv = cache.inputs().kv(3).unwrap();
        let logits = rows(&decoder.prompt(&new, &spans, &kv).unwrap());
        for at in 0..3 {
            assert_near(&logits[at], &expected[at][PROMPTS[at] - 1], "the prompt");
        }
        for step in 0..STEPS {
            cache.release().unwrap();
            let last = [0, 1, 2].map(|at| &tokens[at][PROMPTS[at] + step..][..1]);
            cache.extend(&last).unwrap();
            let logits = graph.replay(3, cache.named()).unwrap();
            for (at, logits) in rows(&logits).into_iter().enumerate() {
                let what = format!("window {window:?}, sequence {at}, step {step}");
                assert_near(&logits, &expected[at][PROMPTS[at] + step], &what);
            }
        }
        cache.release().unwrap();
        let tokens: usize = PROMPTS.iter().map(|prompt| prompt + STEPS).sum();
        match window {
            None => assert_eq!(cache.tokens(), tokens),
            // At most the window and a block before it that is seen in part.
            Some(window) => assert!(cache.tokens() < 3 * (window + BLOCK_SIZE)),
        }
    }
}

#[test]
fn a_sequence_that_becomes_too_long_changes_nothing() {
    let pool = TensorPool::new(&Device::Cpu).unwrap();
    let mut cache = PagedCache::new(&pool, &config(None), DType::F32, 2, 40).unwrap();
    (0..2).for_each(|_| cache.begin());
    let some = [0; 47];
    cache.extend(&[&some[..40], &some[..1]]).unwrap();
    match cache.extend(&[&some[..9], &some[..30]]).unwrap_err() {
        VmmError::LengthBeyondCapacity {
            sequence,
            length,
            capacity,
        } => assert_eq!((sequence, length, capacity), (0, 49, 48)),
        other => panic!("{other}"),
    }
    assert_eq!(cache.lengths().collect::<Vec<_>>(), [40, 1]);
    cache.extend(&[&some[..8], &some[..47]]).unwrap();
    assert_eq!(cache.tokens(), 96);
}

/// Each sequence gets its own tokens, whichever row it is in, and no bucket is captured twice.
#[test]
fn sequences_come_and_go_between_replays() {
    let config = config(None);
    let tokens: Vec<_> = (0..6).map(|at| prompt(VOCABULARY, 60, at)).collect();
    let expected: Vec<_> = tokens.iter().map(|all| stock(&config, all)).collect();
    let pool = TensorPool::new(&Device::Cpu).unwrap();
    let decoder = Rc::new(BatchDecoder::new(&config, weights(), 4, &Device::Cpu).unwrap());
    let mut cache = PagedCache::new(&pool, &config, DType::F32, 4, CAPACITY).unwrap();
    let mut graph = decode_graph(&decoder, cache.inputs(), 4).unwrap();
    let mut buckets = Vec::new();
    graph
        .capture_all(cache.named(), |progress| {
            buckets.push((progress.bucket, progress.done, progress.total))
        })
        .unwrap();
    assert_eq!(buckets, [(4, 1, 3), (2, 2, 3), (1, 3, 3)]);
    // The sequence in each row, and the tokens that it has had.
    let mut running: Vec<(usize, usize)> = Vec::new();
    let mut waiting = 0..tokens.len();
    for step in 0..120 {
        // One comes every ten steps if there is room, and one goes every seventeen.
        if step % 17 == 16 && !running.is_empty() {
            let row = step % running.len();
            cache.end(row).unwrap();
            running.swap_remove(row);
        }
        if step % 10 == 0
            && running.len() < 4
            && let Some(next) = waiting.next()
        {
            cache.begin();
            running.push((next, 0));
        }
        while let Some(row) = running.iter().position(|(_, had)| *had == 60) {
            cache.end(row).unwrap();
            running.swap_remove(row);
        }
        if running.is_empty() {
            break;
        }
        let new: Vec<_> = running
            .iter()
            .map(|(at, had)| &tokens[*at][*had..][..1])
            .collect();
        cache.extend(&new).unwrap();
        let logits = graph.replay(running.len(), cache.named()).unwrap();
        for ((at, had), logits) in running.iter_mut().zip(rows(&logits)) {
            let what = format!("step {step}, sequence {at}, token {had}");
            assert_near(&logits, &expected[*at][*had], &what);
            *had += 1;
        }
    }
    assert!(waiting.is_empty(), "all have come");
    assert_eq!(graph.counts().captures, 3);
}

#[test]
fn a_paged_cache_gives_the_same_tokens_as_others() {
    for (seed, window) in [(0, None), (1, None), (2, Some(WINDOW)), (3, Some(WINDOW))] {
        let config = config(window);
        let bytes = token_bytes(&config, DType::F32);
        let prompt = prompt(VOCABULARY, PROMPTS[2], seed);
        let weights = || Weights::new(Source::Random(seed), DType::F32, &Device::Cpu);
        let stock = Attention::Stock;
        let mut cached = Cached {
            decoder: Decoder::new(&config, weights(), &ConcatCaches, 16, stock).unwrap(),
            factory: &ConcatCaches,
        };
        let expected = generate(&mut cached, bytes, &prompt, STEPS, 4).unwrap();
        let pool = TensorPool::new(&Device::Cpu).unwrap();
        let make = |is_captured| {
            let (weights, dtype) = (weights(), DType::F32);
            Paged::new(&pool, &config, weights, dtype, CAPACITY, is_captured).unwrap()
        };
        let captured = generate(&mut make(true), bytes, &prompt, STEPS, 4).unwrap();
        assert_eq!(captured.tokens, expected.tokens);
        let Generation {
            tokens, samples, ..
        } = generate(&mut make(false), bytes, &prompt, STEPS, 4).unwrap();
        assert_eq!(tokens, expected.tokens);
        for (sample, other) in samples.iter().zip(&expected.samples) {
            let more = sample.cached_tokens - other.cached_tokens;
            assert!(more < BLOCK_SIZE && (window.is_some() || more == 0));
            assert!(sample.held_bytes >= sample.live_bytes);
        }
    }
}
