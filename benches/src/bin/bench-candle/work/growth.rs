//! Caches of all layers that grow token by token: the time of a step, their memory, and views.

use crate::machine::{DTYPE, HEAD_DIM, KV_HEADS, Machine};
use anyhow::Result;
use candle_core::Tensor;
use candle_cuda_vmm::attention::gqa;
use candle_cuda_vmm::kv_cache::{KvCache, KvCacheFactory, PreallocatedCaches};
use candle_cuda_vmm::{Quota, SharedMemoryPool, TensorPool};
use cuda_vmm_benches::{Outcome, Sides, time, watch};
use std::hint::black_box;
use std::time::Duration;

pub const LAYERS: [usize; 2] = [32, 2];
/// The most tokens that are appended at once.
const PART: usize = 1024;

pub struct Layers<F: KvCacheFactory>(Vec<F::Cache>);

impl<F: KvCacheFactory> Layers<F> {
    /// Caches that expect this many tokens.
    pub fn new(machine: &Machine, factory: &F, tokens: usize) -> Result<Self> {
        let caches = (0..machine.sized(LAYERS)).map(|layer| factory.layer(layer, 2, tokens));
        Ok(Self(caches.collect::<candle_cuda_vmm::Result<_>>()?))
    }

    /// Appends the same tokens in each layer, as keys and as values, and drops the views.
    pub fn append(&mut self, tokens: &Tensor) -> candle_core::Result<()> {
        for cache in &mut self.0 {
            black_box(cache.append(tokens, tokens)?);
        }
        Ok(())
    }

    /// Returns K and V of each layer.
    pub fn views(&mut self, machine: &Machine) -> Result<Vec<(Tensor, Tensor)>> {
        let none = tokens(machine, 1)?.narrow(2, 0, 0)?;
        let views = (self.0.iter_mut()).map(|cache| cache.append(&none, &none));
        Ok(views.collect::<candle_cuda_vmm::Result<_>>()?)
    }

    /// Appends `count` tokens, in the largest parts that divide them.
    pub fn fill(mut self, machine: &Machine, count: usize) -> Result<Self> {
        let part = (1..=PART).rev().find(|part| count.is_multiple_of(*part));
        let tokens = tokens(machine, part.unwrap_or(1))?;
        (0..count / tokens.dim(2)?).try_for_each(|_| self.append(&tokens))?;
        Ok(self)
    }
}

pub fn tokens(machine: &Machine, count: usize) -> candle_core::Result<Tensor> {
    Tensor::zeros((1, KV_HEADS, count, HEAD_DIM), DTYPE, &machine.candle)
}

fn token_bytes(layers: usize) -> usize {
    2 * layers * KV_HEADS * HEAD_DIM * DTYPE.size_in_bytes()
}

/// Appends a token to all layers, of caches of two kinds in turns, and does something after it. A
/// sample is the mean time of a stretch of steps, or a part of that.
fn in_turns<T>(
    machine: &Machine,
    outcome: &mut Outcome,
    [ours, peer]: [&str; 2],
    (factory, peers): (&impl KvCacheFactory, &impl KvCacheFactory),
    (stretch, rounds, warm): (usize, usize, usize),
    parts: usize,
    after: impl Fn() -> candle_core::Result<T>,
) -> Result<()> {
    let token = tokens(machine, 1)?;
    let most = warm + stretch * (rounds + 1);
    let mut layers = Layers::new(machine, factory, most)?;
    let mut peers = Layers::new(machine, peers, most)?;
    let mut step_ours = || layers.append(&token).and_then(|()| after());
    let mut step_peer = || peers.append(&token).and_then(|()| after());
    for _ in 0..warm {
        step_ours()?;
        step_peer()?;
    }
    let time = |step: &mut dyn FnMut() -> candle_core::Result<T>| {
        Ok(machine.mean_time(stretch, step)? / parts as u32)
    };
    let mut sides = Sides::default();
    sides.add(ours, || time(&mut step_ours));
    sides.add(peer, || time(&mut step_peer));
    // All tokens are appended, however long that takes; the first stretch warms up.
    outcome.measure(sides, &machine.settings.patient(u32::MAX), rounds)
}

/// Tokens appended one by one, and all of them looked at, against Candle's preallocated cache.
pub fn append(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let (stretch, lengths) = (machine.sized([64, 8]), ["shorter", "longer"]);
    let counts = machine.sized([[4096, 16_384], [32, 64]]);
    for (length, count) in lengths.into_iter().zip(counts) {
        let [ours, peer] = ["ours", "KvCache"].map(|whose| format!("{whose}, {length}"));
        let (sizes, layers) = ((stretch, count / stretch - 1, 0), machine.sized(LAYERS));
        let names = [&*ours, &*peer];
        let kinds = (&machine.pool(false)?, &PreallocatedCaches);
        in_turns(machine, outcome, names, kinds, sizes, layers, || Ok(()))?;
        let [ours_us, peer_us] = [outcome.us(&ours, 990)?, outcome.us(&peer, 990)?];
        let tails = format!("p99 {ours_us:.2} µs and {peer_us:.2} µs");
        let note = format!("{count} tokens; the mean of {stretch} steps is a sample; {tails}");
        outcome.note(&ours, note);
    }
    Ok(())
}

/// The same over an account of a shared pool, against a pool of its own.
pub fn account(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let (stretch, count) = (machine.sized([64, 8]), machine.sized([4096, 32]));
    let (sizes, layers) = ((stretch, count / stretch - 1, 0), machine.sized(LAYERS));
    let limit_bytes = machine.device.total_bytes();
    let mut shared = SharedMemoryPool::new(limit_bytes, machine.candle.clone())?;
    // Others are registered too, and hold nothing.
    for model in ["model", "other", "third"] {
        shared.register_model_with(model, 1 << 30, Quota::new().guarantee_bytes(1 << 30))?;
    }
    let model = shared.tensor_pool("model", machine.pool_options(false))?;
    let (names, kinds) = (["account", "pool"], (&model, &machine.pool(false)?));
    in_turns(machine, outcome, names, kinds, sizes, layers, || Ok(()))
}

/// What Candle's cache is told to be ready for.
const PREALLOCATED_TOKENS: usize = 131_072;

/// The most that may be held for this many live bytes.
fn allowed_bytes(live_bytes: usize, page_bytes: usize) -> f64 {
    let times = if live_bytes < 1 << 30 { 1.0 } else { 1.125 };
    live_bytes as f64 * times + 64.0 * page_bytes as f64
}

/// The memory behind the caches of all layers, against what is allowed.
pub fn memory(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let token_bytes = token_bytes(machine.sized(LAYERS));
    let page_bytes = machine.device.granularity_bytes();
    let lengths = ["1,000", "10,000", "100,000"];
    let counts = machine.sized([[1000, 10_000, 100_000], [20, 40, 80]]);
    for (length, count) in lengths.into_iter().zip(counts) {
        let pool = machine.pool(false)?;
        let _layers = Layers::new(machine, &pool, count)?.fill(machine, count)?;
        let [held_bytes, ahead] = held(machine, &pool)?;
        let live_bytes = count * token_bytes;
        let others_bytes = PREALLOCATED_TOKENS * token_bytes;
        let side = format!("held, {length} tokens");
        outcome.count(&side, held_bytes as f64);
        let allowed_bytes = allowed_bytes(live_bytes, page_bytes);
        outcome.count(&format!("allowed, {length} tokens"), allowed_bytes);
        let others = format!("KvCache({PREALLOCATED_TOKENS}) takes {others_bytes} bytes");
        let note = format!("{count} tokens, {live_bytes} bytes live, {ahead} ahead; {others}");
        outcome.note(&side, note);
    }
    Ok(())
}

/// The bytes that a pool holds, without those ahead, and these.
fn held(machine: &Machine, pool: &TensorPool) -> Result<[usize; 2]> {
    machine.candle.synchronize()?;
    watch(pool.engine(), "memory on its way", |stats| {
        stats.parts.filling_bytes + stats.parts.retiring_bytes == 0
    })?;
    let ahead = pool.engine().stats().parts.ahead_bytes;
    Ok([pool.committed_bytes() - ahead, ahead])
}

/// One query in each layer in turn, so that a layer has left the GPU's own cache before its next.
pub fn attend<F: KvCacheFactory>(
    machine: &Machine,
    mut layers: Layers<F>,
) -> Result<impl FnMut() -> Result<Duration> + use<'_, F>> {
    let q = Tensor::ones((1, 4 * KV_HEADS, 1, HEAD_DIM), DTYPE, &machine.candle)?;
    let views = layers.views(machine)?;
    Ok(move || {
        let query = |(k, v): &_| gqa(&q, k, v, 0.1, true).map(drop);
        Ok(machine.mean_time(1, || views.iter().try_for_each(query))? / views.len() as u32)
    })
}

/// All layers of a sequence in one range, against ranges of their own.
pub fn one_range(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let (layers, row) = (machine.sized(LAYERS), (1, KV_HEADS, HEAD_DIM));
    let sequence = |layout: &str| -> Result<_> {
        let sequence = machine.pool(false)?.sequence();
        Ok(match layout {
            "apart" => sequence.rows(row, row, DTYPE)?,
            _ => sequence.rows_in_one_range(layers, row, row, DTYPE)?,
        })
    };
    let names = ["one range", "apart"];
    let kinds = (&sequence(names[0])?, &sequence(names[1])?);
    let sizes = (machine.sized([64, 8]), machine.sized([63, 3]), 0);
    in_turns(machine, outcome, names, kinds, sizes, layers, || Ok(()))?;
    for (length, count) in [("1", 1), ("1,000", machine.sized([1000, 20]))] {
        let sequence = sequence("one range")?;
        let _layers = Layers::new(machine, &sequence, count)?.fill(machine, count)?;
        let [held_bytes, _] = held(machine, sequence.pool())?;
        outcome.count(&format!("one range holds, {length}"), held_bytes as f64);
        let pages = 2 * machine.device.granularity_bytes();
        let allowed_bytes = pages as f64 + 1.125 * (count * token_bytes(layers)) as f64;
        outcome.count(&format!("it may hold, {length}"), allowed_bytes);
    }
    for (length, count) in [("8,000", [8000, 16]), ("32,000", [32_000, 32])] {
        let mut sides = Sides::default();
        for layout in names {
            let count = machine.sized(count);
            let layers = Layers::new(machine, &sequence(layout)?, count)?;
            let attend = attend(machine, layers.fill(machine, count)?)?;
            sides.add(&format!("gqa, {layout}, {length}"), attend);
        }
        outcome.measure(sides, &machine.settings, machine.settings.rounds)?;
    }
    Ok(())
}

/// The worst step of a long decode, against memory that was there before.
pub fn step(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    const OURS: &str = "ours";
    const PEER: &str = "KvCache, preallocated";
    let (steps, size) = (machine.sized([16_384, 32]), machine.sized([1024, 16]));
    let matrix = Tensor::ones((size, size), DTYPE, &machine.candle)?;
    let multiply = || matrix.matmul(&matrix);
    // Some steps come before the first that counts, besides the round that warms up.
    let (sizes, kinds) = ((1, steps, 16), (&machine.pool(false)?, &PreallocatedCaches));
    in_turns(machine, outcome, [OURS, PEER], kinds, sizes, 1, multiply)?;
    let [ours_us, peer_us] = [outcome.us(OURS, 500)?, outcome.us(PEER, 500)?];
    let note = format!("{steps} steps; medians {ours_us:.1} µs and {peer_us:.1} µs");
    outcome.note(OURS, note);
    Ok(())
}

/// A view of a tensor that grows: making it, and dropping it.
pub fn view(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    /// One view takes hardly longer than reading the clock, so a sample is the mean of all.
    const VIEWS: usize = 64;
    const OURS: &str = "ours, mean of 64 views";
    let pool = machine.pool(false)?;
    let mut tensor = pool.tensor((KV_HEADS, HEAD_DIM), DTYPE)?;
    tensor.grow(1000)?;
    machine.candle.synchronize()?;
    let mut sides = Sides::default();
    sides.add(OURS, || {
        let view = |_| tensor.view().map(|view| drop(black_box(view)));
        Ok(time(|| (0..VIEWS).try_for_each(view))?.1 / VIEWS as u32)
    });
    outcome.measure(sides, &machine.settings, machine.settings.rounds * 25)?;
    let tail_us = outcome.us(OURS, 990)?;
    outcome.note(OURS, format!("p99 {tail_us:.2} µs"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_takes_128_kib_and_an_eighth_more_is_allowed_from_a_gibibyte_on() {
        const GIB: usize = 1 << 30;
        assert_eq!(token_bytes(32), 128 << 10);
        assert_eq!(allowed_bytes(GIB - 8, 2), (GIB - 8 + 128) as f64);
        assert_eq!(allowed_bytes(GIB, 2), (GIB + GIB / 8 + 128) as f64);
    }
}
