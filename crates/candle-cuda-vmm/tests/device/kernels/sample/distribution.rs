//! Tokens beside the distribution in double precision.

use super::{DTYPES, draw, random, row, within};
use crate::common::open;
use crate::kernels::batch::{has_attention, numbers};
use candle_core::Tensor;
use rand::SeedableRng;
use rand::rngs::StdRng;
use std::collections::BTreeSet;

/// The probabilities of tokens in the set of the most likely ones, in double precision.
fn probabilities(logits: &[f32], temperature: f32, p: f64) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights = logits
        .iter()
        .map(|logit| ((f64::from(*logit) - f64::from(largest)) / f64::from(temperature)).exp());
    let weights: Vec<_> = weights.collect();
    let whole: f64 = weights.iter().sum();
    let mut sorted = weights.clone();
    sorted.sort_by(|left, right| right.total_cmp(left));
    let mut so_far = 0.;
    let last = sorted.iter().find(|weight| {
        so_far += **weight;
        so_far >= p * whole
    });
    let least = last.copied().unwrap_or_default();
    let kept = |weight: &f64| if *weight >= least { *weight } else { 0. };
    let kept: Vec<_> = weights.iter().map(kept).collect();
    let whole: f64 = kept.iter().sum();
    kept.iter().map(|weight| weight / whole).collect()
}

#[test]
fn the_frequencies_of_tokens_are_their_probabilities() {
    const SEEDS: usize = 20_000;
    let test = open();
    if !has_attention(&test) {
        return;
    }
    let mut seeded = StdRng::seed_from_u64(2);
    for (dtype, size) in DTYPES.into_iter().zip([32, 64, 45]) {
        for (temperature, top_p) in [(1., 1.), (0.6, 1.), (1.7, 0.9), (1., 0.5), (3., 0.99)] {
            let logits = random(&mut seeded, size, 1.5);
            // One row for all.
            let logits = within(&[logits], 0, dtype, &test.device);
            let rounded = numbers(&logits);
            let logits = logits.broadcast_as((SEEDS, size)).unwrap();
            let rows: Vec<_> = (0..SEEDS)
                .map(|seed| row(temperature, top_p, seed as u64 * 0x1_0000_0001))
                .collect();
            let mut counts = vec![0u32; size];
            for token in draw(&logits, &rows) {
                counts[token as usize] += 1;
            }
            let expected = probabilities(&rounded, temperature, f64::from(top_p));
            let (mut chi_square, mut kept) = (0., 0.);
            for (count, probability) in counts.iter().zip(&expected) {
                if *probability == 0. {
                    assert_eq!(*count, 0);
                    continue;
                }
                let wanted = probability * SEEDS as f64;
                chi_square += (f64::from(*count) - wanted).powi(2) / wanted;
                kept += 1.;
            }
            // Five standard deviations above the mean.
            let most = kept - 1. + 5. * (2f64 * kept).sqrt();
            let what = format!("{dtype:?}, {temperature}, {top_p}, {kept} tokens");
            assert!(chi_square < most, "{chi_square} of {most}: {what}");
        }
    }
}

#[test]
fn no_token_is_outside_the_most_likely_ones() {
    let test = open();
    if !has_attention(&test) {
        return;
    }
    let mut seeded = StdRng::seed_from_u64(3);
    for dtype in DTYPES {
        for (size, spread) in [(100, 2.), (4096, 0.5), (4096, 3.), (32_003, 1.)] {
            let logits = random(&mut seeded, size, spread);
            let logits = within(&[logits], 0, dtype, &test.device);
            let rounded = numbers(&logits);
            let logits = logits.broadcast_as((64, size)).unwrap();
            for (temperature, top_p) in [(1., 0.9), (0.5, 0.3), (2., 0.99), (1., 1e-6), (1., 0.)] {
                let rows: Vec<_> = (0..64).map(|seed| row(temperature, top_p, seed)).collect();
                // Weights are rounded, so a token at the edge may be in or out.
                let p = f64::from(top_p) * (1. + 1e-5);
                let expected = probabilities(&rounded, temperature, p);
                for token in draw(&logits, &rows) {
                    let what = format!("{token}: {dtype:?} [{size}], {temperature}, {top_p}");
                    assert!(expected[token as usize] > 0., "{what}");
                    let largest = rounded.iter().copied().fold(f32::MIN, f32::max);
                    let is_largest = rounded[token as usize] == largest;
                    assert!(top_p > 1e-5 || is_largest, "{what}");
                }
            }
        }
    }
}

#[test]
fn tokens_of_equal_logits_are_all_in_the_set_or_all_out() {
    let test = open();
    if !has_attention(&test) {
        return;
    }
    // Half of the mass are the first three, and the next four are equal.
    let logits = [1f32, 1., 1., 0., 0., 0., -0., -5.];
    let logits = Tensor::new(&[logits], &test.device).unwrap();
    let logits = logits.broadcast_as((400, 8)).unwrap();
    for (top_p, set) in [(0.5, 0..3), (0.7, 0..7), (0.9, 0..7), (1., 0..8)] {
        let rows: Vec<_> = (0..400).map(|seed| row(2., top_p, seed)).collect();
        let tokens: BTreeSet<_> = draw(&logits, &rows).into_iter().collect();
        assert!(tokens.into_iter().eq(set), "{top_p}");
    }
}

#[test]
fn extreme_numbers_have_the_limits_that_are_documented() {
    const NO: f32 = f32::NAN;
    const LESS: f32 = f32::NEG_INFINITY;
    const MORE: f32 = f32::INFINITY;
    let test = open();
    if !has_attention(&test) {
        return;
    }
    let tokens = |logits: [f32; 8], temperature, top_p| -> BTreeSet<u32> {
        let logits = Tensor::new(&[logits], &test.device).unwrap();
        let logits = logits.broadcast_as((200, 8)).unwrap();
        let rows: Vec<_> = (0..200).map(|seed| row(temperature, top_p, seed)).collect();
        draw(&logits, &rows).into_iter().collect()
    };
    for temperature in [0., 1., MORE] {
        for top_p in [0.5, 1., NO] {
            let tokens = |logits| tokens(logits, temperature, top_p);
            assert_eq!(tokens([LESS; 8]), [0].into());
            assert_eq!(tokens([NO; 8]), [0].into());
            assert_eq!(tokens([NO, LESS, NO, 3., NO, NO, LESS, NO]), [3].into());
            assert_eq!(tokens([1., 5., NO, MORE, 1., MORE, LESS, 0.]), [3].into());
        }
    }
    let apart = [-3e38, 0., 1., 3e38, 2., 2.9e38, -1., 1e30];
    assert_eq!(tokens(apart, 1., 1.), [3].into());
    let near = [1., 1.5, 1.25, 1.125, 0., -1., -2., 1.4999];
    for temperature in [1e-30, 1e-45, 1e-6] {
        assert_eq!(tokens(near, temperature, 1.), [1].into(), "{temperature}");
    }
    let all: BTreeSet<_> = (0..8).collect();
    for temperature in [1e6, 1e30, f32::MAX, MORE] {
        for top_p in [1., 2., NO] {
            assert_eq!(tokens(near, temperature, top_p), all, "{temperature}");
        }
        let some = [1., NO, LESS, 2., NO, NO, NO, NO];
        assert_eq!(
            tokens(some, temperature, 1.),
            [0, 3].into(),
            "{temperature}"
        );
    }
    for top_p in [0., -1., LESS] {
        assert_eq!(tokens(near, 1., top_p), [1].into(), "{top_p}");
    }
}
