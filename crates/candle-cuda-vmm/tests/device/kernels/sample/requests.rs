//! What a token depends on: logits, what the request is drawn with, and nothing else.

use super::{DTYPES, Row, draw, parameters, random, row, within};
use crate::common::open;
use crate::kernels::batch::has_attention;
use crate::kernels::graph::{device, end};
use candle_core::{DType, Device, Result, Tensor};
use candle_cuda_vmm::cuda_vmm::DriverKind;
use candle_cuda_vmm::graph::{DecodeGraph, DecodeGraphOptions};
use candle_cuda_vmm::sampling::{SampleParameters, sample};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeSet;

#[test]
fn a_request_gets_its_tokens_in_any_batch() {
    let test = open();
    if !has_attention(&test) {
        return;
    }
    let mut seeded = StdRng::seed_from_u64(4);
    for dtype in DTYPES {
        let logits: Vec<_> = (0..9).map(|_| random(&mut seeded, 5000, 1.)).collect();
        let rows: Vec<_> = (0..9)
            .map(|at| Row {
                position: at * 11,
                ..row(1.5, [0.95, 1.][at as usize % 2], seeded.random())
            })
            .collect();
        let together = draw(&within(&logits, 0, dtype, &test.device), &rows);
        // Rows at other addresses are read one by one.
        let elsewhere = draw(&within(&logits, 3, dtype, &test.device), &rows);
        assert_eq!(together, elsewhere, "{dtype:?}");
        for (at, token) in together.into_iter().enumerate() {
            let alone = within(&logits[at..=at], 16, dtype, &test.device);
            assert_eq!(draw(&alone, &rows[at..=at]), [token], "{dtype:?} {at}");
        }
    }
}

#[test]
fn other_positions_and_seeds_get_other_tokens() {
    let test = open();
    if !has_attention(&test) {
        return;
    }
    let logits = Tensor::zeros((1, 4096), DType::F32, &test.device).unwrap();
    let logits = logits.broadcast_as((300, 4096)).unwrap();
    let at = |position, seed| Row {
        position,
        ..row(1., 1., seed)
    };
    // Each bit of the seed matters, and each position.
    let rows = (0..64).map(|bit| at(0, 1 << bit));
    let rows: Vec<_> = rows
        .chain((0..236).map(|position| at(position, 9)))
        .collect();
    let tokens: BTreeSet<_> = draw(&logits, &rows).into_iter().collect();
    // 300 of 4,096 tokens: about 11 meet another one.
    assert!(tokens.len() > 270, "{} tokens", tokens.len());
}

/// Sizes of vocabularies, distributions with much and with little in the tail, and more equal
/// logits than a kernel keeps.
#[test]
fn a_gpu_draws_the_tokens_of_the_cpu() {
    let test = open();
    if test.kind == DriverKind::Simulated || !has_attention(&test) {
        return;
    }
    let mut seeded = StdRng::seed_from_u64(5);
    for dtype in DTYPES {
        for size in [1, 9, 256, 4096, 50_257, 128_256, 262_144] {
            let spreads = [0., 0.5, 1.5, 5.];
            let logits = spreads.map(|spread| random(&mut seeded, size, spread));
            for (temperature, top_p) in [(1., 1.), (1., 0.9), (0.5, 0.99), (2., 0.5), (0., 1.)] {
                let rows = [0; 4].map(|_| row(temperature, top_p, seeded.random()));
                let on = |device| draw(&within(&logits, 0, dtype, device), &rows);
                let what = format!("{dtype:?} [{size}], {temperature}, {top_p}");
                assert_eq!(on(&test.device), on(&Device::Cpu), "{what}");
            }
        }
    }
}

#[test]
fn a_replay_reads_what_was_written_since_the_capture() {
    const BATCH: usize = 4;
    let mut test = open();
    if !has_attention(&test) {
        return;
    }
    let device = device(&mut test);
    let mut seeded = StdRng::seed_from_u64(6);
    let logits: Vec<_> = (0..BATCH).map(|_| random(&mut seeded, 1000, 1.)).collect();
    let logits = within(&logits, 0, DType::F32, &device);
    let position = Tensor::zeros(BATCH, DType::U32, &device).unwrap();
    let temperature = Tensor::zeros(BATCH, DType::F32, &device).unwrap();
    let seed = Tensor::ones((BATCH, 2), DType::U32, &device).unwrap();
    let top_p = Tensor::new(&[0.9f32; BATCH], &device).unwrap();
    let inputs = SampleParameters::new(&temperature, &top_p, &seed, &position).unwrap();
    let step = |bucket| -> Result<Tensor> {
        sample(&logits.narrow(0, 0, bucket)?, &inputs.first(bucket)?)
    };
    let mut graph = DecodeGraph::new(&device, DecodeGraphOptions::up_to(BATCH), step).unwrap();
    graph.capture_all(&mut (), |_| {}).unwrap();
    let mut seen = BTreeSet::new();
    for (turn, batch) in [4, 1, 3, 4, 2, 4].into_iter().enumerate() {
        let rows = [0; BATCH].map(|at| Row {
            position: turn as u32 + at,
            ..row(turn as f32, 0.9, 0x1_0000_0001)
        });
        let now = parameters(&rows, &device);
        let write = |to: &Tensor, numbers: Vec<f32>| {
            let from = Tensor::new(&numbers[..], &device).unwrap();
            to.slice_set(&from, 0, 0).unwrap();
        };
        write(&temperature, rows.map(|row| row.temperature).to_vec());
        let positions = Tensor::new(&rows.map(|row| row.position), &device).unwrap();
        position.slice_set(&positions, 0, 0).unwrap();
        let replayed = graph.replay(batch, &mut ()).unwrap();
        let replayed: Vec<u32> = replayed.to_vec1().unwrap();
        let eager = sample(&logits, &now).unwrap().to_vec1::<u32>().unwrap();
        assert_eq!(replayed, eager[..batch], "turn {turn}");
        seen.extend(replayed);
    }
    assert!(seen.len() > 8, "{seen:?}");
    drop(graph);
    drop((logits, inputs, position, temperature, seed, top_p));
    end(device);
}
