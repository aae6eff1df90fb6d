//! One query over many keys.

use crate::machine::{DTYPE, HEAD_DIM, KV_HEADS, Machine};
use crate::model::stock;
use anyhow::{Result, ensure};
use candle_core::{DType, Tensor};
use candle_cuda_vmm::attention::gqa;
use cuda_vmm_benches::{Outcome, Sides};

const QUERY_HEADS: usize = 32;
const KEYS: [[usize; 4]; 2] = [[1024, 8192, 32_768, 131_072], [16, 32, 64, 128]];
/// Queries, one after another, of a sample.
const QUERIES: usize = 10;
/// Read bandwidth of an H100's memory, in bytes a second. A copy gets 3.03e12 of it.
const BANDWIDTH: f64 = 3.07e12;
/// How far results may be apart. They are means of elements around 1, in F16.
const TOLERANCE: f32 = 0.02;

/// The time in µs that reading K and V once takes at least.
fn floor_us(keys: usize) -> f64 {
    (2 * keys * KV_HEADS * HEAD_DIM * DTYPE.size_in_bytes()) as f64 / BANDWIDTH * 1e6
}

/// Against K and V repeated for each group of heads, as Candle's models do it.
pub fn measure(machine: &Machine, outcome: &mut Outcome) -> Result<()> {
    let scale = 1.0 / (HEAD_DIM as f32).sqrt();
    let random = |heads: usize, tokens: usize| {
        let made = Tensor::randn(0f32, 1.0, (1, tokens, heads, HEAD_DIM), &machine.candle)?;
        made.to_dtype(DTYPE)?.transpose(1, 2)
    };
    let lengths = ["1,024", "8,192", "32,768", "131,072"];
    for (length, keys) in lengths.into_iter().zip(machine.sized(KEYS)) {
        let [ours, peer] = ["gqa", "repeat_kv"].map(|name| format!("{name}, {length} keys"));
        let q = random(QUERY_HEADS, 1)?.contiguous()?;
        // As a cache that grows has them, and as the peer wants them, which need not copy.
        let (k, v) = (random(KV_HEADS, keys)?, random(KV_HEADS, keys)?);
        let (head_k, head_v) = (k.contiguous()?, v.contiguous()?);
        let by_gqa = || gqa(&q, &k, &v, scale, true);
        let by_stock = || stock(&q, &head_k, &head_v, scale, None);
        let apart = (by_gqa()?.to_dtype(DType::F32)? - by_stock()?.to_dtype(DType::F32)?)?;
        let apart = apart.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
        let is_near = apart <= TOLERANCE;
        ensure!(is_near, "over {keys} keys the results are {apart} apart");
        let mut sides = Sides::default();
        sides.add(&ours, || machine.mean_time(QUERIES, by_gqa));
        sides.add(&peer, || machine.mean_time(QUERIES, by_stock));
        outcome.measure(sides, &machine.settings, machine.settings.rounds)?;
        let (ours_us, peer_us) = (outcome.us(&ours, 500)?, outcome.us(&peer, 500)?);
        let floor = format!("reading K and V once takes {:.1} µs", floor_us(keys));
        let note =
            format!("{keys} keys; {ours_us:.1} µs and {peer_us:.1} µs; {floor} at 3.07 TB/s");
        outcome.note(&ours, note);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use cuda_vmm_benches::figure::Figure;

    #[test]
    fn the_floor_is_what_keys_and_values_take_to_read() {
        // 128 MiB.
        assert!((floor_us(32_768) - 43.719).abs() < 0.001);
        assert_eq!(floor_us(65_536), 2.0 * floor_us(32_768));
    }

    #[test]
    fn only_at_32k_is_more_demanded_than_not_to_be_slower() {
        let figures = include_str!("../../../../figures/bench-candle.csv");
        let figures = Figure::list(figures).unwrap();
        let of_attention = figures.iter().filter(|figure| figure.work == "attention");
        for (figure, keys) in of_attention.zip(KEYS[0]) {
            let least = if keys == 32_768 { 4.0 } else { 1.0 };
            let pass = |ours| figure.blank().judge(ours, Some(1.0)).pass;
            assert_eq!(pass(least), Some(true));
            assert_eq!(pass(least - 0.01), Some(false));
        }
    }
}
