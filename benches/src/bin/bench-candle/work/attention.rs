//! One query over many keys.

use super::{Outcome, Work};
use crate::demand::{Demand, Reach};
use crate::layers::{DTYPE, HEAD_DIM, KV_HEADS};
use crate::machine::Machine;
use crate::model::stock;
use crate::sides::Sides;
use anyhow::{Result, ensure};
use candle_core::{DType, Tensor};
use candle_cuda_vmm::attention::gqa;
use std::hint::black_box;
use std::time::{Duration, Instant};

const fn demand(name: &'static str, least: f64) -> Demand {
    Demand::time(name, "queries/s", Reach::AtLeastTimes(least))
}

const DEMANDS: [Demand; 4] = [
    demand("gqa, one query, 1,024 keys: Candle's repeat_kv", 1.0),
    demand("gqa, one query, 8,192 keys: Candle's repeat_kv", 1.0),
    demand("gqa, one query, 32,768 keys: Candle's repeat_kv", 4.0),
    demand("gqa, one query, 131,072 keys: Candle's repeat_kv", 1.0),
];

/// Against K and V repeated for each group of heads, as Candle's models do it.
pub const WORK: Work = Work {
    name: "attention",
    demands: &DEMANDS,
    measure,
};

/// Our side and the peer's, for each number of keys.
const SIDES: [(&str, &str); 4] = [
    ("gqa, 1,024 keys", "repeat_kv, 1,024 keys"),
    ("gqa, 8,192 keys", "repeat_kv, 8,192 keys"),
    ("gqa, 32,768 keys", "repeat_kv, 32,768 keys"),
    ("gqa, 131,072 keys", "repeat_kv, 131,072 keys"),
];

const QUERY_HEADS: usize = 32;
/// Queries, one after another, of a sample.
const QUERIES: usize = 10;
/// What an H100's memory can be read with, in bytes a second; a copy, which reads and writes, gets 3.03e12 of it.
const BANDWIDTH: f64 = 3.07e12;
/// How far results may be apart. They are means of elements around 1, in F16.
const TOLERANCE: f32 = 0.02;

/// The time in µs that reading K and V once takes at least.
fn floor_us(keys: usize) -> f64 {
    (2 * keys * KV_HEADS * HEAD_DIM * DTYPE.size_in_bytes()) as f64 / BANDWIDTH * 1e6
}

fn measure(machine: &Machine) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let scale = 1.0 / (HEAD_DIM as f32).sqrt();
    let random = |shape: (usize, usize, usize, usize)| {
        Tensor::randn(0f32, 1.0, shape, &machine.candle)?.to_dtype(DTYPE)
    };
    for ((demand, (ours, peer)), keys) in DEMANDS.iter().zip(SIDES).zip(machine.sizes.keys) {
        let q = random((1, QUERY_HEADS, 1, HEAD_DIM))?;
        // Token-major, as a cache that grows has them, and in the order that the peer wants, so that it need not copy
        // them for that.
        let k = random((1, keys, KV_HEADS, HEAD_DIM))?.transpose(1, 2)?;
        let v = random((1, keys, KV_HEADS, HEAD_DIM))?.transpose(1, 2)?;
        let (head_k, head_v) = (k.contiguous()?, v.contiguous()?);
        let by_gqa = || gqa(&q, &k, &v, scale, true);
        let by_stock = || stock(&q, &head_k, &head_v, scale);
        let apart = (by_gqa()?.to_dtype(DType::F32)? - by_stock()?.to_dtype(DType::F32)?)?;
        let apart = apart.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
        ensure!(
            apart <= TOLERANCE,
            "over {keys} keys the results are {apart} apart"
        );
        let mut sides = Sides::new();
        sides.add(ours, || timed(machine, by_gqa));
        sides.add(peer, || timed(machine, by_stock));
        let measured = sides.measure(&machine.settings, machine.settings.rounds)?;
        outcome.measured.extend(measured);
        let (ours, peer) = (
            outcome.measured.median_us(ours)?,
            outcome.measured.median_us(peer)?,
        );
        let note = format!(
            "{keys} keys; {ours:.1} µs and {peer:.1} µs; reading K and V once takes {:.1} µs at 3.07 TB/s",
            floor_us(keys)
        );
        outcome.add_noted(demand, 1e6 / ours, Some(1e6 / peer), note);
    }
    Ok(outcome)
}

/// The time of a query, of some that are waited for at their end.
fn timed(machine: &Machine, attend: impl Fn() -> candle_core::Result<Tensor>) -> Result<Duration> {
    machine.synchronize()?;
    let started = Instant::now();
    for _ in 0..QUERIES {
        black_box(attend()?);
    }
    machine.synchronize()?;
    Ok(started.elapsed() / QUERIES as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_is_what_keys_and_values_take_to_read() {
        // 128 MiB.
        assert!((floor_us(32_768) - 43.719).abs() < 0.001);
        assert_eq!(floor_us(65_536), 2.0 * floor_us(32_768));
    }

    #[test]
    fn only_at_32k_is_more_demanded_than_not_to_be_slower() {
        for (demand, keys) in DEMANDS.iter().zip(crate::sizes::Sizes::FULL.keys) {
            let least = if keys == 32_768 { 4.0 } else { 1.0 };
            assert_eq!(demand.judge(least, Some(1.0)).pass, Some(true));
            assert_eq!(demand.judge(least - 0.01, Some(1.0)).pass, Some(false));
        }
    }
}
