//! Two decoders under one limit of memory: requests arrive, memory is asked for before each step,
//! and the model that owes memory preempts a sequence.
//!
//! `cargo run --example two_models` runs on the CPU device, with the simulated driver. With
//! `--features cuda` it runs on GPU 0.

use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::attention::gqa;
use candle_cuda_vmm::kv_cache::{KvCache, KvCacheFactory, Sequence, SequenceCache};
use candle_cuda_vmm::{Quota, Result, SharedMemoryPool, TensorPool, TensorPoolOptions};
use std::collections::VecDeque;

const VOCABULARY: usize = 256;
const HIDDEN: usize = 256;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 32;
const KV: usize = KV_HEADS * HEAD_DIM;
const LAYERS: usize = 2;
/// A page for keys and one for values in each layer: what a sequence takes at first.
const SEQUENCE_BYTES: usize = 2 * LAYERS * (2 << 20);

/// A decoder without normalisation and feed-forward layers, with random weights.
struct Decoder {
    embedding: Tensor,
    /// Queries, keys and values in one matrix, and the output.
    layers: Vec<[Tensor; 2]>,
}

impl Decoder {
    fn new(device: &Device) -> Result<Self> {
        let matrix = |rows, columns| Tensor::randn(0f32, 0.06, (rows, columns), device);
        let layer = |_| Ok([matrix(HIDDEN, HIDDEN + 2 * KV)?, matrix(HIDDEN, HIDDEN)?]);
        Ok(Self {
            embedding: matrix(VOCABULARY, HIDDEN)?,
            layers: (0..LAYERS).map(layer).collect::<Result<_>>()?,
        })
    }

    /// Appends tokens to the caches, and returns the likeliest next one.
    fn forward(&self, tokens: &[u32], caches: &mut [SequenceCache]) -> Result<u32> {
        let count = tokens.len();
        let ids = Tensor::new(tokens, self.embedding.device())?;
        let mut x = self.embedding.index_select(&ids, 0)?;
        for ([qkv, out], cache) in self.layers.iter().zip(caches) {
            let qkv = x.matmul(qkv)?;
            let heads = |start, width| {
                let part = qkv.narrow(1, start, width)?.contiguous()?;
                let shape = (1, count, width / HEAD_DIM, HEAD_DIM);
                part.reshape(shape)?.transpose(1, 2)
            };
            let (k, v) = cache.append(&heads(HIDDEN, KV)?, &heads(HIDDEN + KV, KV)?)?;
            let scale = 1.0 / (HEAD_DIM as f32).sqrt();
            let attended = gqa(&heads(0, HIDDEN)?, &k, &v, scale, true)?;
            let attended = attended.transpose(1, 2)?.reshape((count, HIDDEN))?;
            x = (x + attended.matmul(out)?)?;
        }
        let last = x.narrow(0, count - 1, 1)?;
        let logits = last.matmul(&self.embedding.t()?)?.squeeze(0)?;
        Ok(logits.argmax(0)?.to_scalar()?)
    }
}

struct Request {
    tokens: Vec<u32>,
    wanted: usize,
    was_preempted: bool,
}

/// A request with caches, which hold the first of its tokens.
struct Running {
    request: Request,
    sequence: Sequence,
    caches: Vec<SequenceCache>,
}

struct Model {
    name: &'static str,
    pool: TensorPool,
    decoder: Decoder,
    waiting: VecDeque<Request>,
    running: Vec<Running>,
    /// Requests and tokens that are done, and how often a sequence was preempted.
    counts: [usize; 3],
}

impl Model {
    fn step(&mut self) -> Result<()> {
        // Asked for by others: the youngest sequence goes, and starts again later.
        while self.pool.account().owed_bytes() > 0 && self.running.len() > 1 {
            self.waiting
                .extend(self.running.pop().map(|running| Request {
                    was_preempted: true,
                    ..running.request
                }));
            self.counts[2] += 1;
        }
        self.admit()?;
        for mut this in std::mem::take(&mut self.running) {
            let missing = this.request.tokens.len() - this.sequence.len();
            // Before the step, so that no layer is refused memory in the middle of it.
            match this.sequence.reserve(missing) {
                Ok(()) => {
                    let new = &this.request.tokens[this.sequence.len()..];
                    let next = self.decoder.forward(new, &mut this.caches)?;
                    this.request.tokens.push(next);
                }
                // All layers are as before. The sequence waits, and other models owe memory.
                Err(error) if error.is_retryable() => {}
                Err(error) => return Err(error),
            }
            match this.request.tokens.len() {
                tokens if tokens < this.request.wanted => self.running.push(this),
                tokens => {
                    self.counts[0] += 1;
                    self.counts[1] += tokens;
                }
            }
        }
        Ok(())
    }

    /// Starts the request that has waited longest. A new one asks for its memory at once, so that
    /// others owe it. One that was preempted waits until there is memory for it.
    fn admit(&mut self) -> Result<()> {
        let available_bytes = self.pool.account().available_bytes();
        let may_start =
            |request: &Request| !request.was_preempted || available_bytes >= SEQUENCE_BYTES;
        if !self.waiting.front().is_some_and(may_start) {
            return Ok(());
        }
        let Some(request) = self.waiting.pop_front() else {
            return Ok(());
        };
        let token = (1, KV_HEADS, HEAD_DIM);
        let sequence = self.pool.sequence().rows(token, token, DType::F32)?;
        let caches = (0..LAYERS).map(|layer| sequence.layer(layer, 2, 4096));
        self.running.push(Running {
            request,
            caches: caches.collect::<Result<_>>()?,
            sequence,
        });
        Ok(())
    }
}

fn main() -> Result<()> {
    #[cfg(feature = "cuda")]
    let device = Device::new_cuda(0)?;
    #[cfg(not(feature = "cuda"))]
    let device = Device::Cpu;
    // Memory for five sequences, of which one is kept for `chat`.
    let mut shared = SharedMemoryPool::new(5 * SEQUENCE_BYTES, device.clone())?;
    let sure = Quota::new().guarantee_bytes(SEQUENCE_BYTES).priority(1);
    let mut models = Vec::new();
    for (name, quota) in [("chat", sure), ("code", Quota::new())] {
        shared.register_model_with(name, SEQUENCE_BYTES, quota)?;
        models.push(Model {
            name,
            pool: shared.tensor_pool(name, TensorPoolOptions::new())?,
            decoder: Decoder::new(&device)?,
            waiting: VecDeque::new(),
            running: Vec::new(),
            counts: [0; 3],
        });
    }
    let request = |tokens: u32, wanted| Request {
        tokens: (0..tokens).collect(),
        wanted,
        was_preempted: false,
    };
    // `code` has all its requests at the beginning; those of `chat` come while it works on them.
    models[1].waiting.extend((0..6).map(|_| request(40, 100)));
    let mut coming = 3;
    for step in 1.. {
        if step % 10 == 0 && coming > 0 {
            models[0].waiting.push_back(request(20, 80));
            coming -= 1;
        }
        models.iter_mut().try_for_each(Model::step)?;
        let is_done = |model: &Model| model.waiting.is_empty() && model.running.is_empty();
        if coming == 0 && models.iter().all(is_done) {
            break;
        }
    }
    for model in models {
        let ([requests, tokens, preempted], name) = (model.counts, model.name);
        println!("{name}: {requests} requests, {tokens} tokens, {preempted} preemptions");
    }
    device.synchronize()?;
    shared.core().trim()?;
    let left_bytes = shared.detailed_stats().committed_bytes;
    println!("{left_bytes} bytes are left");
    assert_eq!(left_bytes, 0, "all sequences have ended");
    Ok(())
}
